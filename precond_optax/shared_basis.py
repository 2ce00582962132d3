r"""The shared-basis block low-rank preconditioner: state, transformation, alias."""

import functools
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precond_optax import checks, grafting, leafwise, placement
from precond_optax import layout as layout_lib
from precond_optax.checks import Scalar
from precond_optax.kernels import matrix_root
from precond_optax.kernels import shared_basis as kernel
from precond_optax.kernels.rounding import stored_rounding
from precond_optax.layout import LeafLayout

_FALLBACKS = {'sgd': 'SGD direction', 'graft': 'grafting direction'}


class ScaleBySharedBasisState(NamedTuple):
    """State of ``scale_by_shared_basis``.

    ``block`` stands for the axes of a leaf's inputs, ``outputs`` for those of its outputs; batch
    axes come first. Leaves that are not preconditioned hold ``optax.MaskedNode()`` but for mu.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: steps taken
    mu: optax.Updates  # like the parameters, of mu_dtype: mean of the grafted directions
    basis: optax.Updates  # (rank, *block), float32 at least: B, orthonormal rows
    coefficients: optax.Updates  # (*outputs, rank * rank), of stats_dtype: R
    residual: optax.Updates  # (*outputs), float32 at least: rho
    root: optax.Updates  # (*outputs, rank * rank), of stats_dtype: (R + (rho + eps) I)^(-1/2)
    graft: optax.OptState  # the grafting rule's own state, if it has any
    failed_roots: jax.Array  # shape=(leaves,), dtype=float32: how often a block kept its last root


def scale_by_shared_basis(  # noqa: D417 (its arguments are those of `shared_basis`)
    b1: Scalar = 0.9,
    b2: Scalar = 0.9,
    eps: Scalar = 1e-8,
    *,
    nesterov: bool = False,
    rank: int = 32,
    power_iterations: int = 1,
    oversampling: int = 0,
    update_every: int = 1,
    start_step: Scalar = 0,
    root: str = 'auto',
    residual_norm: str = 'spectral',
    graft: grafting.Graft = 'rmsprop_normalized',
    max_block_dim: int = 4096,
    fallback: str = 'graft',
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The direction of the shared-basis preconditioner, to be subtracted; no learning rate.

    The math is in `shared_basis`. The direction has the shapes and dtypes of the gradients, and
    the units of the grafting rule's: none for RMSProp's.

    Args:
      b1, b2, eps, nesterov, rank, power_iterations, oversampling, update_every, start_step, root,
        residual_norm, graft, max_block_dim, fallback, mu_dtype, stats_dtype, stochastic_rounding,
        layout, seed: as in `shared_basis`, with the same defaults.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `ScaleBySharedBasisState`.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf cannot be taken.

    Example:
      >>> import jax.numpy as jnp, optax, precond_optax
      >>> tx = optax.chain(precond_optax.scale_by_shared_basis(rank=2), optax.scale(-1e-3))
      >>> params = {'kernel': jnp.ones((3, 5)), 'bias': jnp.ones(5)}
      >>> state = tx.init(params)
      >>> state[0].basis['kernel'].shape, state[0].coefficients['kernel'].shape
      ((2, 3), (5, 4))

    References:
      See `shared_basis`.
    """
    checks.in_range('b1', b1, 0, 1)
    checks.in_range('b2', b2, 0, 1, closed=True)
    checks.in_range('eps', eps, 0)
    checks.in_range('start_step', start_step, 0)
    for name, value, low in (
        ('rank', rank, 1),
        ('power_iterations', power_iterations, 1),
        ('oversampling', oversampling, 0),
        ('update_every', update_every, 1),
        ('max_block_dim', max_block_dim, 1),
        ('seed', seed, 0),
    ):
        checks.static_int(name, value, low)
    checks.flag('nesterov', nesterov)
    checks.flag('stochastic_rounding', stochastic_rounding)
    checks.one_of('root', root, tuple(matrix_root.METHODS))
    checks.one_of('residual_norm', residual_norm, kernel.RESIDUAL_NORMS)
    checks.one_of('fallback', fallback, _FALLBACKS)
    checks.float_dtype('mu_dtype', mu_dtype)
    checks.float_dtype('stats_dtype', stats_dtype)
    grafting.check(graft)
    layout_lib.check(layout)

    def skipped(facts: LeafLayout) -> str | None:
        """What a leaf gets that is not preconditioned, by the names of ``fallback``; else None."""
        if facts.precondition and _size(facts, facts.block_axes) <= max_block_dim:
            return None
        return 'graft' if len(facts.groups) < 2 else fallback

    def rank_of(facts: LeafLayout) -> int:
        """The leaf's rank: no more than its blocks have entries."""
        return min(rank if facts.rank is None else facts.rank, _size(facts, facts.block_axes))

    def key_of(facts: LeafLayout) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), zlib.crc32(facts.path.encode()))

    def shape_of(facts: LeafLayout, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(facts.shape[axis] for axis in axes)

    def axes_of(facts: LeafLayout) -> dict[str, placement.Axes]:
        if skipped(facts):
            return {}
        batch = tuple(range(facts.batch_axes))
        # Devices that share out a block would hold all of its coefficients, as large as the leaf.
        outputs = tuple((axis, *facts.block_axes) for axis in facts.output_axes)
        return {
            'basis': (*batch, None, *facts.block_axes),
            'coefficients': (*batch, *outputs, None),
            'residual': (*batch, *outputs),
            'root': (*batch, *outputs, None),
        }

    def init_leaf(leaf: Any, facts: LeafLayout) -> leafwise.Fields:
        fields: leafwise.Fields = {'mu': jnp.zeros_like(leaf, dtype=mu_dtype or facts.dtype)}
        if skipped(facts):
            return fields | dict.fromkeys(
                ('basis', 'coefficients', 'residual', 'root'), optax.MaskedNode()
            )
        wide, k, axes = facts.compute_dtype, rank_of(facts), axes_of(facts)
        batch, block = facts.shape[: facts.batch_axes], shape_of(facts, facts.block_axes)
        start = kernel.random_basis(key_of(facts), k, block, wide)
        start = jnp.broadcast_to(start, (*batch, k, *block))
        outputs = (*batch, *shape_of(facts, facts.output_axes))

        def zeros(name: str, dtype: Any, *more: int) -> jax.Array:
            return placement.zeros(leaf, (*outputs, *more), dtype, axes[name])

        return fields | {
            'basis': placement.place(start, leaf, axes['basis']),
            'coefficients': zeros('coefficients', stats_dtype or wide, k * k),
            'residual': zeros('residual', wide),
            'root': zeros('root', stats_dtype or wide, k * k),
        }

    def precondition(
        grad: jax.Array, state: ScaleBySharedBasisState, facts: LeafLayout
    ) -> tuple[jax.Array, leafwise.Fields]:
        """The direction of a leaf that is preconditioned, and what changes."""
        batch, k = facts.batch_axes, rank_of(facts)
        order = (*range(batch), *facts.block_axes, *facts.output_axes)
        more = min(oversampling, _size(facts, facts.block_axes) - k)

        axes = axes_of(facts)
        names = tuple(axes)
        held = [getattr(state, name) for name in names]
        shapes = [x.shape for x in held]
        rounding = stored_rounding(stats_dtype, grad.dtype)
        how = _How(
            batch, order, k, more, power_iterations, update_every, root, residual_norm, rounding
        )
        direction, *changed, failed = placement.in_auto_axes(
            functools.partial(_step, how),
            grad,
            [
                placement.like(grad),
                *map(placement.Follower, shapes, axes.values()),
                placement.Follower((), ()),
            ],
            grad,
            *held,
            jnp.asarray(b2, grad.dtype),
            jnp.asarray(eps, grad.dtype),
            state.count,
            jnp.asarray(facts.turn),
            key_of(facts) if more else None,
        )
        fields = dict(zip(names, changed, strict=True))
        return direction, fields | {'failed_roots': state.failed_roots + failed}

    def update_leaf(
        grad: jax.Array, state: ScaleBySharedBasisState, facts: LeafLayout
    ) -> tuple[jax.Array, leafwise.Fields]:
        own = state.graft
        changed: leafwise.Fields = {}
        if skipped(facts) == 'graft':
            direction = own
        else:
            direction = grad
            if skipped(facts) is None:
                direction, changed = precondition(grad, state, facts)
            if graft is not None:
                direction = grafting.rescale(direction, own, facts.axes)
            if not checks.is_static_zero(start_step):
                direction = jnp.where(state.count > start_step, direction, own)
        update, changed['mu'] = grafting.with_momentum(
            direction, state.mu, state.count, b1, nesterov
        )
        return update, changed

    def describe(facts: LeafLayout) -> str:
        size = _size(facts, facts.block_axes)
        if instead := skipped(facts):
            too_long = f', blocks of {size} > max_block_dim={max_block_dim}'
            return _FALLBACKS[instead] + (too_long if facts.precondition else '')
        outputs = math.prod(facts.shape[: facts.batch_axes]) * _size(facts, facts.output_axes)
        return f'shared basis, {outputs} blocks of {size}, rank {rank_of(facts)}'

    def cost(facts: LeafLayout) -> float:
        """Of a refresh, which the eigenproblems are most of."""
        if skipped(facts):
            return 0
        return (
            math.prod(facts.shape) / max(1, _size(facts, facts.block_axes)) * rank_of(facts) ** 3
        )

    return leafwise.leafwise(
        ScaleBySharedBasisState,
        init_leaf,
        update_leaf,
        layout=layout,
        stochastic=('coefficients',) if stochastic_rounding else (),
        gathered={'failed_roots': True},
        one_by_one='failed_roots',
        graft=grafting.standalone(graft, b1, b2, layout),
        describe=describe,
        axes=axes_of,
        every=update_every,
        cost=cost,
    )


class _How(NamedTuple):
    """What is static of a leaf's step. No path: leaves of one shape share a trace."""

    batch_axes: int
    order: tuple[int, ...]  # batch axes, block, outputs
    rank: int
    extra_rows: int
    power_iterations: int
    update_every: int
    root: str
    residual_norm: str
    rounding: float  # with which coefficients are stored, where not in the arithmetic's dtype


@functools.partial(jax.jit, static_argnums=0)
def _step(how: _How, grad: jax.Array, *arrays: Any) -> tuple[Any, ...]:
    """A leaf's direction, its new fields, and how many of its blocks failed.

    Compiled for itself where the caller does not: one program in place of a hundred.
    """
    step = functools.partial(_step_of_one, how)
    for _ in range(how.batch_axes):
        step = jax.vmap(step, in_axes=(*(0,) * 5, *(None,) * 5))
    direction, *changed, failed = step(grad.transpose(how.order), *arrays)
    back = tuple(sorted(range(grad.ndim), key=how.order.__getitem__))
    return direction.transpose(back), *changed, jnp.sum(failed, dtype=jnp.float32)


def _step_of_one(
    how: _How,
    grad: jax.Array,
    basis: jax.Array,
    coefficients: jax.Array,
    residual: jax.Array,
    root: jax.Array,
    b2: jax.Array,
    eps: jax.Array,
    count: jax.Array,
    turn: jax.Array,
    key: jax.Array | None,
) -> tuple[Any, ...]:
    """The step of one of the leaves that batch axes stack."""
    flat, square = coefficients.shape, (*coefficients.shape[:-1], how.rank, how.rank)
    stats = (basis, coefficients.reshape(square), residual, root.reshape(square))
    weight = grafting.weight(b2)

    def refreshed() -> tuple[Any, ...]:
        rows = None
        if key is not None:
            shape = (how.extra_rows, *basis.shape[1:])
            rows = jax.random.normal(jax.random.fold_in(key, count), shape, basis.dtype)
        return kernel.refresh(
            grad,
            *stats,
            b2=b2,
            weight=weight,
            eps=eps,
            power_iterations=how.power_iterations,
            extra_rows=rows,
            method=how.root,
            residual_norm=how.residual_norm,
            rounding=how.rounding,
        )

    def accumulated() -> tuple[Any, ...]:
        new = kernel.accumulate(grad, *stats[:3], b2=b2, weight=weight)
        return basis, *new, stats[3], jnp.zeros(residual.shape, bool)

    if how.update_every == 1:
        *new, failed = refreshed()
    else:
        now = leafwise.is_turn(count, how.update_every, turn)
        *new, failed = jax.lax.cond(now, refreshed, accumulated)
    direction = kernel.apply(grad, *new, eps=eps)
    new_basis, new_coefficients, new_residual, new_root = new
    return (
        direction,
        new_basis,
        new_coefficients.reshape(flat),
        new_residual,
        new_root.reshape(flat),
        failed,
    )


def _size(facts: LeafLayout, axes: tuple[int, ...]) -> int:
    return math.prod(facts.shape[axis] for axis in axes)


def shared_basis(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9,
    eps: Scalar = 1e-8,
    *,
    nesterov: bool = False,
    rank: int = 32,
    power_iterations: int = 1,
    oversampling: int = 0,
    update_every: int = 1,
    start_step: Scalar = 0,
    root: str = 'auto',
    residual_norm: str = 'spectral',
    graft: grafting.Graft = 'rmsprop_normalized',
    max_block_dim: int = 4096,
    fallback: str = 'graft',
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
    seed: int = 0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shared basis: each output's second moment, of low rank in a basis that all outputs share.

    A leaf is seen as m blocks, one for each output, of b entries, its inputs: gradients
    :math:`g_i`. Block-diagonal AdaGrad keeps a b x b second moment of each; this keeps k x k
    coefficients :math:`R_i` in one basis B of k orthonormal rows, and what that misses as a
    number :math:`\rho_i`. (The paper's B is this one's transpose.)

    .. math::
      M_i &= \beta_2 B_{t-1}^T R_{i,t-1} B_{t-1} + (1 - \beta_2)\, g_i g_i^T \\
      B_t^T &= \mathrm{QR}(A B_{t-1}^T), \quad A = \sum_i M_i M_i^T \\
      R_i &= \tilde R_i - \sigma_{\min}(\tilde R_i) I, \quad \tilde R_i = B_t M_i B_t^T \\
      \rho_i &= \beta_2 \rho_{i,t-1} + \|M_i - B_t^T R_i B_t\|_2 \\
      u_i &= (B_t^T R_i B_t + (\rho_i + \epsilon) I)^{-1/2} g_i \\
      \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1)\, u \|w\| / \|u\| \\
      \theta_{t+1} &= \theta_t - \alpha_t (\hat\mu_t + \lambda \theta_t)

    with w the update of the grafting rule, leaf by leaf, and a bias-corrected :math:`\hat\mu`. The
    default rule has none, so that the first step is :math:`(1 - \beta_2)^{-1/2}` times as long as
    Adam's: a learning rate found for Adam carries over after some :math:`1 / (1 - \beta_2)` steps
    of warm-up, or with ``graft='adam'``. ``b2=1`` makes sums of the means, as in the paper.
    With ``rank`` at least b, u is that of block-diagonal AdaGrad in full.

    The outputs are a leaf's last axis; ``LeafRule`` says otherwise: ``merge_axes=((-2, -1),)`` for
    the query, key and value kernels (d, heads, head_dim) of attention, so that a head's entries
    are outputs; ``output_axes`` for any other. Batch axes stack separate leaves. Leaves with one
    axis or none get the grafting rule's update; ``fallback`` says what embeddings
    (``precondition=False``) and leaves with blocks longer than ``max_block_dim`` get. All have
    momentum.

    State beside the parameters: two arrays of each leaf's shape (momentum, RMSProp's), and for a
    leaf of m blocks of b entries ``k b + 2 m k^2 + m`` numbers.

    Args:
      learning_rate: the step size, a number or a schedule.
      b1: decay of the mean of the grafted directions, in [0, 1).
      b2: decay of the second moments and of the grafting rule's, in [0, 1]. 1: sums, as the paper
        has them; the update then shrinks as 1 / sqrt(t), as AdaGrad's does.
      eps: added to the second moments, in units of squared gradients, >= 0.
      nesterov: whether the mean looks one step ahead, as in ``optax.nadam``.
      rank: k, >= 1; no more than a leaf's blocks have entries. Time grows with its cube, times
        the outputs. With ``optax.inject_hyperparams`` all floats may be traced; name the integers
        rank, power_iterations, oversampling, update_every, max_block_dim and seed in
        ``static_args``, and there also what you give of dtypes, layout functions or masks.
      power_iterations: how often a step turns the basis towards the leading eigenvectors of A.
      oversampling: random rows iterated beside the basis, of which the best k are kept.
      update_every: steps between two turns of a leaf's basis and two roots, >= 1. The statistics
        take every gradient in the basis at hand. Leaves take turns, so that no step does all.
      start_step: the first steps, whose update is the grafting rule's, >= 0.
      root: 'eigh', the eigendecomposition of the coefficients; 'newton_schulz', matrix products
        alone; or 'auto', which is the second on TPUs and the first elsewhere.
      residual_norm: 'spectral', the paper's, by power iteration from below; or 'frobenius', a
        bound from above.
      graft: where the size of the update comes from: 'rmsprop_normalized', 'adam', 'momentum',
        'sgd', any ``optax.GradientTransformation``, or None for the method's own.
      max_block_dim: the longest block that is preconditioned.
      fallback: what matrices that are not preconditioned get: 'graft', the grafting rule's update;
        or 'sgd', as in the paper, the gradient with that update's norm, which is that of all rows:
        of an embedding of many tokens the few that have a gradient in a step take it all.
      mu_dtype: dtype in which the momentum is stored; None: the parameter's.
      stats_dtype: dtype in which coefficients and roots are stored; None: the parameter's, but
        float32 at least. The basis and rho, which are small, are not affected.
      stochastic_rounding: whether coefficients stored in bfloat16 are rounded stochastically.
      layout: what the shapes do not tell. A mapping from regular expressions, searched for in
        a leaf's path ('encoder/0/kernel'), to `LeafRule`, first match wins; or a function
        ``(path, leaf) -> LeafRule | None``.
      seed: of the basis that a leaf begins with, beside its path.
      weight_decay: decoupled, as in ``optax.adamw``, >= 0, or a schedule.
      mask: which leaves decay, as in ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Update dtypes follow the gradients'. In the
      state of `scale_by_shared_basis`, ``failed_roots`` counts by leaf how often a block kept its
      last root because its gradient's square or its new root was not finite.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf is not of a floating
        dtype or does not fit its rule, with its path.

    Example:
      >>> import jax, jax.numpy as jnp, optax, precond_optax
      >>> def f(x): return jnp.sum((x - 1.0) ** 2)
      >>> tx = precond_optax.shared_basis(learning_rate=0.1)
      >>> params = jnp.zeros((3, 2))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...   updates, state = tx.update(jax.grad(f)(params), state)
      ...   params = optax.apply_updates(params, updates)
      >>> print(f'{f(params):.1f}')
      0.0

    References:
      Yen, Duvvuri, Dhillon, Hsieh, "Block Low-Rank Preconditioner with Shared Basis for Stochastic
      Optimization", NeurIPS 2023: Algorithm 1,
      equation (5) (the basis), equation (6) (the step), Theorems 1 and 2 (regret).
    """
    direction = scale_by_shared_basis(
        b1,
        b2,
        eps,
        nesterov=nesterov,
        rank=rank,
        power_iterations=power_iterations,
        oversampling=oversampling,
        update_every=update_every,
        start_step=start_step,
        root=root,
        residual_norm=residual_norm,
        graft=graft,
        max_block_dim=max_block_dim,
        fallback=fallback,
        mu_dtype=mu_dtype,
        stats_dtype=stats_dtype,
        stochastic_rounding=stochastic_rounding,
        layout=layout,
        seed=seed,
    )
    return leafwise.chain_learning_rate(direction, learning_rate, weight_decay, mask)
