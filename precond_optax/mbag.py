r"""MBAG, the mini-block adaptive gradient method: state, transformation, alias."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precond_optax import checks, grafting, leafwise, placement
from precond_optax import layout as layout_lib
from precond_optax.checks import Scalar
from precond_optax.kernels import calls, matrix_root, mini_block, mini_block_tiles
from precond_optax.kernels.rounding import stored_rounding
from precond_optax.layout import LeafLayout


class ScaleByMbagState(NamedTuple):
    """State of ``scale_by_mbag``.

    ``groups`` stands for the axes of a leaf's mini-blocks of tau entries; batch axes come first.
    Leaves with blocks of one entry hold their statistics in the parameter's own shape, no root.
    Of ``factor`` and ``second_moment`` one is in use, the other ``optax.MaskedNode()``.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: steps taken
    mu: optax.Updates  # like the parameters, of mu_dtype: decaying sum of the directions
    factor: optax.Updates  # (*groups, tau * tau), of stats_dtype: S, S S^T = (damping I + sum)^-1
    second_moment: optax.Updates  # likewise: G, with a decay
    root: optax.Updates  # likewise: the last root; MaskedNode() where none is used
    graft: optax.OptState  # the grafting rule's own state, if it has any
    failed_roots: jax.Array  # shape=(leaves,), dtype=float32: how often a block kept its last root


def scale_by_mbag(  # noqa: D417 (its arguments are those of `mbag`)
    momentum: Scalar = 0.9,
    damping: Scalar = 0.01,
    *,
    block_size: int = 32,
    root_every: int = 50,
    newton_schulz_steps: int = 10,
    decay: Scalar | None = None,
    root: bool = True,
    order: str = 'F',
    graft: grafting.Graft = None,
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
    impl: str = 'auto',
) -> optax.GradientTransformationExtraArgs:
    """The direction of MBAG, to be subtracted; no learning rate and no weight decay.

    The math is in `mbag`. The direction has the shapes and dtypes of the gradients; it has no
    units with ``root=True``, those of an inverse gradient without, and the grafting rule's else.

    Args:
      momentum, damping, block_size, root_every, newton_schulz_steps, decay, root, order, graft,
        mu_dtype, stats_dtype, stochastic_rounding, layout, impl: as in `mbag`, with the same
        defaults.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `ScaleByMbagState`.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf cannot be taken.

    Example:
      >>> import jax.numpy as jnp, optax, precond_optax
      >>> tx = optax.chain(precond_optax.scale_by_mbag(block_size=2), optax.scale(-1e-3))
      >>> params = {'kernel': jnp.ones((4, 5)), 'bias': jnp.ones(5)}
      >>> state = tx.init(params)
      >>> state[0].factor['kernel'].shape, state[0].factor['bias'].shape
      ((5, 2, 4), (5,))

    References:
      See `mbag`.
    """
    checks.in_range('momentum', momentum, 0, 1)
    checks.positive('damping', damping)
    if decay is not None:
        checks.in_range('decay', decay, 0, 1)
    for name, value in (
        ('block_size', block_size),
        ('root_every', root_every),
        ('newton_schulz_steps', newton_schulz_steps),
    ):
        checks.static_int(name, value, 1)
    checks.flag('root', root)
    checks.flag('stochastic_rounding', stochastic_rounding)
    checks.one_of('order', order, ('F', 'C'))
    checks.one_of('impl', impl, calls.IMPLS)
    checks.float_dtype('mu_dtype', mu_dtype)
    checks.float_dtype('stats_dtype', stats_dtype)
    grafting.check(graft)
    layout_lib.check(layout)
    in_use = 'factor' if decay is None else 'second_moment'
    keeps_root = root or decay is not None  # the inverse of a mean is its inverse root twice

    def blocks_of(facts: LeafLayout) -> mini_block.Blocks | None:
        """How the leaf is cut; None where its blocks have one entry."""
        asked = block_size if facts.block_size is None else facts.block_size
        chain = facts.chain_axes(facts.order or order)
        filters = _filter_size(facts)
        if facts.block_size is None and 1 < filters <= 4 * block_size:
            asked, chain = filters, facts.chain_axes('F')
        if not facts.precondition or min(asked, facts.size) == 1:
            return None
        return mini_block.partition(facts.shape, chain, asked)

    def init_leaf(leaf: Any, facts: LeafLayout) -> leafwise.Fields:
        blocks, stored = blocks_of(facts), stats_dtype or facts.compute_dtype
        fields = dict.fromkeys(('factor', 'second_moment', 'root'), optax.MaskedNode())
        fields['mu'] = jnp.zeros_like(leaf, dtype=mu_dtype or facts.dtype)
        start = jnp.asarray(damping, facts.compute_dtype)
        start = 1 / jnp.sqrt(start) if decay is None else start
        if blocks is None:
            zeros = jnp.zeros_like(leaf, dtype=facts.compute_dtype)
            return fields | {in_use: (zeros + start).astype(stored)}
        shape, axes = blocks.matrices
        identity = jnp.eye(blocks.size, dtype=facts.compute_dtype).reshape(-1)
        zeros = placement.zeros(leaf, shape, facts.compute_dtype, axes)
        fields[in_use] = (zeros + start * identity).astype(stored)
        if keeps_root:
            fields['root'] = placement.zeros(leaf, shape, stored, axes)
        return fields

    def one_entry(grad: jax.Array, held: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The direction and the statistics of a leaf with blocks of one entry."""
        if decay is None:
            held = held / jnp.hypot(1, held * grad)
            inverse_root = held
        else:
            held = decay * held + (1 - decay) * grad * grad
            inverse_root = matrix_root.inverse_square_root(held)
        return inverse_root * grad * (1 if root else inverse_root), held

    def update_leaf(
        grad: jax.Array, state: ScaleByMbagState, facts: LeafLayout
    ) -> tuple[jax.Array, leafwise.Fields]:
        blocks, held = blocks_of(facts), getattr(state, in_use)
        if blocks is None:
            direction, held = one_entry(grad, held)
            changed: leafwise.Fields = {in_use: held}
        else:
            rounding = stored_rounding(stats_dtype, grad.dtype)
            arrays = [held, state.root] if keeps_root else [held]
            dtypes = [grad.dtype, stats_dtype or grad.dtype]
            passes = mini_block_tiles.passes('MBAG', impl, grad, blocks.size, dtypes)
            how = _How(blocks, root, root_every, newton_schulz_steps, rounding, passes)
            numbers = [placement.Follower((), ()), *(blocks.matrices for _ in arrays)]
            direction, failed, *arrays = placement.in_auto_axes(
                functools.partial(_step, how),
                grad,
                [placement.like(grad), *numbers],
                grad,
                None if decay is None else jnp.asarray(decay, grad.dtype),
                state.count,
                jnp.asarray(facts.turn),
                *arrays,
            )
            changed = dict(zip((in_use, 'root'), arrays, strict=False))
            changed['failed_roots'] = state.failed_roots + failed
        if graft is not None:
            own = grad if graft == 'sgd' else state.graft
            direction = grafting.rescale(direction, own, facts.axes)
        mu = momentum * state.mu + direction
        return mu, changed | {'mu': mu}

    def describe(facts: LeafLayout) -> str:
        blocks = blocks_of(facts)
        if blocks is None:
            if not root:
                return 'diagonal inverse'
            return 'AdaGrad direction' if decay is None else 'RMSProp direction'
        return f'{math.prod(blocks.batch)} mini-blocks of {blocks.size} {blocks.where()}'

    def cost(facts: LeafLayout) -> float:
        """Of the roots."""
        blocks = blocks_of(facts)
        return 0 if blocks is None else math.prod(blocks.batch) * blocks.size**3

    def axes_of(facts: LeafLayout) -> dict[str, placement.Axes]:
        blocks = blocks_of(facts)
        return {} if blocks is None else dict.fromkeys((in_use, 'root'), blocks.matrices.axes)

    return leafwise.leafwise(
        ScaleByMbagState,
        init_leaf,
        update_leaf,
        layout=layout,
        stochastic=(in_use,) if stochastic_rounding else (),
        gathered={'failed_roots': True},
        graft=grafting.standalone(graft, momentum, 1.0 if decay is None else decay, layout),
        describe=describe,
        axes=axes_of,
        every=root_every,
        cost=cost,
    )


def _filter_size(facts: LeafLayout) -> int:
    """Entries of one input-output pair of a convolution's kernel (..., in, out); 1 for others."""
    if len(facts.groups) < 4:
        return 1
    return math.prod(facts.shape[axis] for group in facts.groups[:-2] for axis in group)


class _How(NamedTuple):
    """What is static of a leaf's step. No path: leaves of one shape share a trace."""

    blocks: mini_block.Blocks
    root: bool
    root_every: int
    newton_schulz_steps: int
    rounding: float  # with which statistics are stored, where not in the arithmetic's dtype
    passes: mini_block_tiles.Passes | None  # kernels in place of XLA's products


@functools.partial(jax.jit, static_argnums=0)
def _step(
    how: _How,
    grad: jax.Array,
    decay: jax.Array | None,
    count: jax.Array,
    turn: jax.Array,
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    """A leaf's direction, how many of its roots failed, its statistics and its roots."""
    groups, passes = how.blocks.split(grad), how.passes or mini_block
    held, *kept = arrays
    if not kept:
        held, direction = passes.step_by_inverse(groups, held)
        return how.blocks.join(direction), jnp.zeros([], jnp.float32), held
    if decay is None:
        held = passes.add_to_inverse(groups, held)
    else:
        held = passes.accumulate(groups, held, decay=decay)

    def take(held: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        matrices = mini_block.square(held)
        if decay is None:
            roots, _ = matrix_root.polar_root(matrices, how.newton_schulz_steps)
        else:
            shifted = matrix_root.with_shift(matrices, jnp.array(0, held.dtype), how.rounding)
            _, roots, _ = matrix_root.newton_schulz(shifted, how.newton_schulz_steps)
        roots = roots.reshape(held.shape)
        failed = ~jnp.all(jnp.isfinite(roots), axis=-1, keepdims=True)
        return jnp.where(failed, last, roots), jnp.sum(failed, dtype=jnp.float32)

    if how.root_every == 1:
        roots, failed = take(held, kept[0])
    else:
        roots, failed = mini_block.in_turns(
            take, held, kept[0], count=count, turn=turn, every=how.root_every
        )
    direction = passes.apply(roots, groups, times=1 if how.root else 2)
    return how.blocks.join(direction), failed, held, roots


def mbag(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.9,
    damping: Scalar = 0.01,
    *,
    block_size: int = 32,
    root_every: int = 50,
    newton_schulz_steps: int = 10,
    decay: Scalar | None = None,
    root: bool = True,
    order: str = 'F',
    graft: grafting.Graft = None,
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
    impl: str = 'auto',
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MBAG: full-matrix AdaGrad on groups of a few entries each.

    The entries of a leaf are lined up in a chain that is cut into mini-blocks of
    :math:`\tau` entries, the last one filled up with zeros. Each has its own second moment:

    .. math::
      G_t &= G_{t-1} + g_t g_t^T, \quad G_0 = \lambda I \
      v_t &= \beta v_{t-1} + G_t^{-1/2} g_t \
      \theta_{t+1} &= \theta_t - \alpha_t (v_t + \lambda_w \theta_t)

    The inverse :math:`H = G^{-1}` is kept, as a factor S with :math:`H = S S^T`, which Sherman and
    Morrison's formula updates; its root, taken now and then, is by Newton-Schulz iteration. With
    ``decay`` d it is MBAG-EMA, :math:`G_t = d G_{t-1} + (1 - d) g_t g_t^T` without bias
    correction; with ``root=False`` MBAG-N, H in place of its root.

    :math:`v` is a sum, not a mean, as in ``optax.sgd``: with momentum 0.9 the step is ten times as
    long as that of a method with Adam's mean. Convolution kernels (height, width, in, out) of up
    to 4 ``block_size`` entries a filter have a group for each pair of input and output. Leaves
    with one axis or none have groups of one entry: AdaGrad's direction, RMSProp's with a decay.

    State beside the parameters: momentum, and for each entry of a leaf :math:`2 \tau` numbers,
    :math:`\tau` with ``root=False`` and no decay. ``precond_optax.plan`` lists it, and along which
    axes groups lie: where a shard holds whole groups, nothing is gathered.

    Args:
      learning_rate: the step size, a number or a schedule.
      momentum: decay of the sum of the directions, in [0, 1).
      damping: :math:`\lambda`, what G begins with, in units of squared gradients, > 0. A mean
        forgets it, as :math:`d^t`.
      block_size: :math:`\tau`, >= 1; no more than a leaf has entries. With
        ``optax.inject_hyperparams`` all floats may be traced; name the integers block_size,
        root_every and newton_schulz_steps in ``static_args``, and there also what you give of
        dtypes, layout functions or masks.
      root_every: steps between two roots of a group, >= 1. The first is taken in the first step.
        Leaves take turns, and so do the groups of leaves with a thousand or more, so that no step
        but the first does all; a smaller leaf's steps are 1, 1 + root_every, and so on, or some
        later. Groups of one entry have theirs in each step. The first root, of
        one gradient, has the size of damping in all other directions: where that is far below
        squared gradients, steps are long until the second. Of a mean so are those of a group
        whose gradients come back after t steps without: by :math:`d^{-t/2}`, until its next root.
        With 1 no step of a mean is longer than :math:`(1 - d)^{-1/2}` for each group.
      newton_schulz_steps: of the iteration, >= 1. n of them resolve eigenvalues down to about
        :math:`(4/9)^n` of the largest; along smaller ones the step is too short, never too long.
      decay: None: the sum; or that of the mean, in [0, 1).
      root: whether the direction takes the inverse root or the inverse.
      order: along which axis the chain runs first. 'F': the first, so along the inputs of one
        output neuron of a Flax kernel, and on to the next neuron. 'C': the last.
      graft: where the size of the update comes from: None, the method's own; 'adam', 'momentum',
        'sgd', 'rmsprop_normalized', any ``optax.GradientTransformation``. The momentum is that
        of the grafted directions.
      mu_dtype: dtype in which the momentum is stored; None: the parameter's.
      stats_dtype: dtype in which the matrices are stored; None: the parameter's, but float32 at
        least.
      stochastic_rounding: whether statistics stored in bfloat16 are rounded stochastically.
      layout: what the shapes do not tell. A mapping from regular expressions, searched for in
        a leaf's path ('encoder/0/kernel'), to `LeafRule`, first match wins; or a function
        ``(path, leaf) -> LeafRule | None``.
      impl: 'pallas': leaves that can go through kernels that read their matrices once do; 'xla':
        none does; 'auto': the first on TPUs. They take float32, groups of 16, 32, 64 or 128
        entries, and leaves that lie on one device; GPUs have none. The results are the same to
        rounding. With 'pallas' CPUs interpret the kernels. An update cannot be differentiated
        through them.
      weight_decay: :math:`\lambda_w`, decoupled, as in ``optax.adamw``, >= 0, or a schedule.
      mask: which leaves decay, as in ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Update dtypes follow the gradients'. In the
      state of `scale_by_mbag`, ``failed_roots`` counts by leaf how often a group kept its last
      root because the new one was not finite.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf is not of a floating
        dtype or does not fit its rule, with its path.

    Example:
      >>> import jax, jax.numpy as jnp, optax, precond_optax
      >>> def f(x): return jnp.sum((x - 1.0) ** 2)
      >>> tx = precond_optax.mbag(learning_rate=0.1)
      >>> params = jnp.zeros((3, 2))
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(100):
      ...   updates, state = update(jax.grad(f)(params), state)
      ...   params = optax.apply_updates(params, updates)
      >>> print(f'{f(params):.1f}')
      0.0

    References:
      Lee, "MBAG: A Scalable Mini-Block Adaptive Gradient Method for Deep Neural Networks":
      Algorithm 1, equation (4) (the inverse), equation (5) (its root), equation (6) (the groups),
      Algorithm 2 (MBAG-EMA).
    """
    direction = scale_by_mbag(
        momentum,
        damping,
        block_size=block_size,
        root_every=root_every,
        newton_schulz_steps=newton_schulz_steps,
        decay=decay,
        root=root,
        order=order,
        graft=graft,
        mu_dtype=mu_dtype,
        stats_dtype=stats_dtype,
        stochastic_rounding=stochastic_rounding,
        layout=layout,
        impl=impl,
    )
    return leafwise.chain_learning_rate(direction, learning_rate, weight_decay, mask)
