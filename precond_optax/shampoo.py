r"""Shampoo with blocking: state, transformation, alias."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precond_optax import checks, grafting, kronecker, leafwise, placement
from precond_optax import layout as layout_lib
from precond_optax.checks import Scalar
from precond_optax.kernels import kronecker as kernel
from precond_optax.kernels import matrix_root
from precond_optax.kernels.rounding import stored_rounding
from precond_optax.layout import LeafLayout


class ScaleByShampooState(NamedTuple):
    """State of ``scale_by_shampoo``.

    ``blocks`` stands for a leaf's batch axes and the number of its blocks along each other axis;
    s for the size of a block along one. The two tuples have a tree for each axis of a leaf, up to
    five; leaves with fewer axes, or not preconditioned, hold ``optax.MaskedNode()`` in the rest.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: steps taken
    mu: optax.Updates  # like the parameters, of mu_dtype: mean of the grafted directions
    statistics: tuple[optax.Updates, ...]  # (*blocks, s, s), of stats_dtype: G G^T, G^T G ..
    roots: tuple[optax.Updates, ...]  # likewise: the last inverse roots; zero before the first
    graft: optax.OptState  # the grafting rule's own state, if it has any
    failed_roots: jax.Array  # shape=(leaves,), dtype=float32: how often an axis kept its last root


def scale_by_shampoo(  # noqa: D417 (its arguments are those of `shampoo`)
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-6,
    *,
    nesterov: bool = False,
    block_size: int = 512,
    update_every: int = 10,
    start_step: Scalar = 0,
    root: str = 'auto',
    graft: grafting.Graft = 'rmsprop_normalized',
    max_dim: int = 4096,
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of Shampoo, to be subtracted; no learning rate and no weight decay.

    The math is in `shampoo`. The direction has the shapes and dtypes of the gradients, and the
    units of the grafting rule's: none for RMSProp's.

    Args:
      b1, b2, eps, nesterov, block_size, update_every, start_step, root, graft, max_dim, mu_dtype,
        stats_dtype, stochastic_rounding, layout: as in `shampoo`, with the same defaults.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `ScaleByShampooState`.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf cannot be taken.

    Example:
      >>> import jax.numpy as jnp, optax, precond_optax
      >>> tx = optax.chain(precond_optax.scale_by_shampoo(block_size=4), optax.scale(-1e-3))
      >>> params = {'kernel': jnp.ones((3, 8)), 'bias': jnp.ones(8)}
      >>> left, right, *_ = tx.init(params)[0].statistics
      >>> left['kernel'].shape, right['kernel'].shape
      ((1, 2, 3, 3), (1, 2, 4, 4))

    References:
      See `shampoo`.
    """
    kronecker.check(
        b1, b2, eps, nesterov, block_size, update_every, start_step, max_dim, graft, mu_dtype
    )
    checks.one_of('root', root, tuple(matrix_root.METHODS))
    checks.float_dtype('stats_dtype', stats_dtype)
    checks.flag('stochastic_rounding', stochastic_rounding)
    layout_lib.check(layout)
    cut = kronecker.Cut(block_size, max_dim)

    def matrices(facts: LeafLayout) -> list[placement.Follower]:
        """For each axis of a leaf the shape of its matrices and the leaf's axes they follow."""
        blocks = cut.blocks(facts)
        return [] if blocks is None else [blocks.each(size, size) for size in blocks.sizes]

    def axes_of(facts: LeafLayout) -> dict[str, placement.Axes]:
        return {
            f'{field}/{axis}': follower.axes
            for axis, follower in enumerate(matrices(facts))
            for field in ('statistics', 'roots')
        }

    def init_leaf(leaf: Any, facts: LeafLayout) -> leafwise.Fields:
        fields: leafwise.Fields = {'mu': jnp.zeros_like(leaf, dtype=mu_dtype or facts.dtype)}
        for field in ('statistics', 'roots'):
            fields[field] = kronecker.for_each_axis(
                [
                    placement.zeros(leaf, shape, stats_dtype or facts.compute_dtype, axes)
                    for shape, axes in matrices(facts)
                ]
            )
        return fields

    def precondition(
        grad: jax.Array, state: ScaleByShampooState, facts: LeafLayout, blocks: kernel.Blocks
    ) -> tuple[jax.Array, leafwise.Fields]:
        """The direction of a leaf that is preconditioned, and what changes."""
        held = matrices(facts)
        how = _How(blocks, root, update_every, stored_rounding(stats_dtype, grad.dtype))
        direction, failed, *arrays = placement.in_auto_axes(
            functools.partial(_step, how),
            grad,
            [placement.like(grad), placement.Follower((), ()), *held, *held],
            grad,
            jnp.asarray(b2, grad.dtype),
            jnp.asarray(eps, grad.dtype),
            state.count,
            jnp.asarray(facts.turn),
            *state.statistics[: len(held)],
            *state.roots[: len(held)],
        )
        return direction, {
            'statistics': kronecker.for_each_axis(arrays[: len(held)]),
            'roots': kronecker.for_each_axis(arrays[len(held) :]),
            'failed_roots': state.failed_roots + failed,
        }

    return leafwise.leafwise(
        ScaleByShampooState,
        init_leaf,
        kronecker.make_update_leaf(precondition, cut, b1, nesterov, graft, start_step),
        layout=layout,
        stacked={'statistics': kronecker.AXES, 'roots': kronecker.AXES},
        stochastic=('statistics',) if stochastic_rounding else (),
        gathered={'failed_roots': True},
        one_by_one='failed_roots',
        graft=grafting.standalone(graft, b1, b2, layout),
        describe=cut.describe,
        axes=axes_of,
        every=update_every,
        cost=cut.cost,
    )


class _How(NamedTuple):
    """What is static of a leaf's step. No path: leaves of one shape share a trace."""

    blocks: kernel.Blocks
    root: str
    update_every: int
    rounding: float  # with which statistics are stored, where not in the arithmetic's dtype


@functools.partial(jax.jit, static_argnums=0)
def _step(
    how: _How,
    grad: jax.Array,
    b2: jax.Array,
    eps: jax.Array,
    count: jax.Array,
    turn: jax.Array,
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    """A leaf's direction, how many of its roots failed, its statistics and its roots."""
    ndim = len(how.blocks.dims)
    blocks, kept = how.blocks.split(grad), arrays[ndim:]
    statistics = kernel.accumulate(blocks, arrays[:ndim], b2=b2, weight=grafting.weight(b2))

    def fresh() -> tuple[jax.Array, ...]:
        held, failed, roots = kronecker.correction(b2, count), jnp.zeros([], grad.dtype), [*kept]
        for axes in how.blocks.alike():
            # One batch, for the axes along which blocks have the same size.
            matrices = jnp.stack([statistics[axis] for axis in axes]) / held
            new, bad = matrix_root.inverse_pth_root(
                matrix_root.once(failed, matrices), 2 * ndim, eps, how.root, how.rounding
            )
            failed += jnp.sum(bad, dtype=grad.dtype)
            for i, axis in enumerate(axes):
                roots[axis] = jnp.where(bad[i, ..., None, None], kept[axis], new[i])
        return failed, *roots

    if how.update_every == 1:
        failed, *roots = fresh()
    else:
        failed, *roots = jax.lax.cond(
            leafwise.is_turn(count, how.update_every, turn),
            fresh,
            lambda: (jnp.zeros([], grad.dtype), *kept),
        )
    direction = how.blocks.join(kernel.apply(blocks, roots))
    return direction, failed, *statistics, *roots


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-6,
    *,
    nesterov: bool = False,
    block_size: int = 512,
    update_every: int = 10,
    start_step: Scalar = 0,
    root: str = 'auto',
    graft: grafting.Graft = 'rmsprop_normalized',
    max_dim: int = 4096,
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo: a second moment for each axis of a leaf, by blocks; their fourth roots.

    For a matrix, cut into blocks G of at most ``block_size`` rows and columns, each by itself

    .. math::
      L_t &= \beta_2 L_{t-1} + (1 - \beta_2)\, G G^T, \quad
      R_t = \beta_2 R_{t-1} + (1 - \beta_2)\, G^T G \\
      u &= (\hat L + \epsilon \lambda_{\max}(\hat L) I)^{-1/4}\, G\,
           (\hat R + \epsilon \lambda_{\max}(\hat R) I)^{-1/4} \\
      \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1)\, u \|w\| / \|u\| \\
      \theta_{t+1} &= \theta_t - \alpha_t (\hat\mu_t + \lambda \theta_t)

    with w the update of the grafting rule, leaf by leaf; hats are bias-corrected. ``b2=1`` makes
    sums of the means, as in the paper. The default rule has no bias correction: the first step
    is :math:`(1 - \beta_2)^{-1/2}` times as long as Adam's. A learning rate found for Adam carries
    over after some :math:`1 / (1 - \beta_2)` steps of warm-up, or with ``graft='adam'``. Without
    grafting u has its own size and no unit: for a gradient that stays the same it is the nearest
    orthogonal matrix, all singular values 1. A leaf of k axes has k second moments and the roots
    -1/(2k).

    ``LeafRule`` says which axes there are: ``merge_axes=((-2, -1),)`` for the query, key and value
    kernels (d, heads, head_dim) of attention, so that they are matrices; batch axes stack separate
    leaves. Leaves with one axis or none, with an axis longer than ``max_dim`` or with more than
    five axes get the grafting rule's update; then momentum.

    State beside the parameters: two arrays of each leaf's shape (momentum, RMSProp's), and for
    each block of m x n entries ``2 m^2 + 2 n^2`` numbers: four for each entry in square ones. An
    eigendecomposition of each block's matrices every ``update_every`` steps is most of the time.

    Args:
      learning_rate: the step size, a number or a schedule.
      b1: decay of the mean of the grafted directions, in [0, 1).
      b2: decay of the second moments and of the grafting rule's, in [0, 1]; 1: sums.
      eps: added to the second moments, in units of the largest eigenvalue of each, >= 0.
      nesterov: whether the mean looks one step ahead, as in ``optax.nadam``.
      block_size: entries of a block along each axis, >= 1; the last block of an axis may have
        fewer. Devices along an axis that do not divide its blocks all hold what belongs to them.
        With ``optax.inject_hyperparams`` all floats may be traced; name the integers
        block_size, update_every and max_dim in ``static_args``, and there also what you give of
        dtypes, layout functions or masks.
      update_every: steps between two roots of a leaf, >= 1. The first is taken in the first step;
        the second moments take every gradient. Leaves take turns, so that no step does all.
      start_step: the first steps, whose update is the grafting rule's, >= 0.
      root: 'eigh', the eigendecomposition; 'newton_schulz', matrix products alone (the coupled
        Newton iteration); or 'auto', which is the second on TPUs and the first elsewhere.
      graft: where the size of the update comes from: 'rmsprop_normalized', 'adam', 'momentum',
        'sgd', any ``optax.GradientTransformation``, or None for the method's own; the plain
        gradient is then what leaves get that are not preconditioned, and all leaves in the first
        ``start_step`` steps.
      max_dim: the longest axis, merged ones as one, of a leaf that is preconditioned.
      mu_dtype: dtype in which the momentum is stored; None: the parameter's.
      stats_dtype: dtype in which second moments and roots are stored; None: the parameter's, but
        float32 at least.
      stochastic_rounding: whether second moments stored in bfloat16 are rounded stochastically.
      layout: what the shapes do not tell. A mapping from regular expressions, searched for in
        a leaf's path ('encoder/0/kernel'), to `LeafRule`, first match wins; or a function
        ``(path, leaf) -> LeafRule | None``.
      weight_decay: decoupled, as in ``optax.adamw``, >= 0, or a schedule.
      mask: which leaves decay, as in ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Update dtypes follow the gradients'. In the
      state of `scale_by_shampoo`, ``failed_roots`` counts by leaf how often a block's axis kept
      its last root because the new one was not finite or had not converged.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf is not of a floating
        dtype or does not fit its rule, with its path.

    Example:
      >>> import jax, jax.numpy as jnp, optax, precond_optax
      >>> def f(x): return jnp.sum((x - 1.0) ** 2)
      >>> tx = precond_optax.shampoo(learning_rate=0.1)
      >>> params = jnp.zeros((3, 2))
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...   updates, state = update(jax.grad(f)(params), state)
      ...   params = optax.apply_updates(params, updates)
      >>> print(f'{f(params):.1f}')
      0.0

    References:
      Gupta, Koren, Singer, `Shampoo: Preconditioned Stochastic Tensor Optimization
      <https://arxiv.org/abs/1802.09568>`_, ICML 2018: Algorithms 1 (matrices) and 2 (more axes);
      Anil et al., `Scalable Second Order Optimization for Deep Learning
      <https://arxiv.org/abs/2002.09018>`_, 2020: blocks, grafting, eps, roots every few steps.
    """
    direction = scale_by_shampoo(
        b1,
        b2,
        eps,
        nesterov=nesterov,
        block_size=block_size,
        update_every=update_every,
        start_step=start_step,
        root=root,
        graft=graft,
        max_dim=max_dim,
        mu_dtype=mu_dtype,
        stats_dtype=stats_dtype,
        stochastic_rounding=stochastic_rounding,
        layout=layout,
    )
    return leafwise.chain_learning_rate(direction, learning_rate, weight_decay, mask)
