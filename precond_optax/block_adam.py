r"""Block Adam: Adam with a full matrix for each few inputs of an output: state, method, alias."""

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


class ScaleByBlockAdamState(NamedTuple):
    """State of ``scale_by_block_adam``.

    ``groups`` stands for the axes of a leaf's groups: its outputs, and the groups of each.
    Leaves with groups of one entry hold their second moment in the parameter's own shape.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: steps taken
    mu: optax.Updates  # like the parameters, of mu_dtype: mean of the gradients
    second_moment: optax.Updates  # (*groups, tau * tau), of stats_dtype: mean of g g^T
    root: optax.Updates  # likewise: the last root; MaskedNode() where each step has a new one
    graft: optax.OptState  # the grafting rule's own state, if it has any
    failed_roots: jax.Array  # shape=(leaves,), dtype=float32: how often a group had no new root


def scale_by_block_adam(  # noqa: D417 (its arguments are those of `block_adam`)
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    block_size: int = 32,
    root_every: int = 1,
    root: str = 'auto',
    graft: grafting.Graft = None,
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
    impl: str = 'auto',
) -> optax.GradientTransformationExtraArgs:
    """The direction of Block Adam, to be subtracted; no learning rate and no weight decay.

    The math is in `block_adam`. The direction has the shapes and dtypes of the gradients, and no
    units.

    Args:
      b1, b2, eps, block_size, root_every, root, graft, mu_dtype, stats_dtype,
        stochastic_rounding, layout, impl: as in `block_adam`, with the same defaults.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `ScaleByBlockAdamState`.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf cannot be taken.

    Example:
      >>> import jax.numpy as jnp, optax, precond_optax
      >>> tx = optax.chain(precond_optax.scale_by_block_adam(block_size=2), optax.scale(-1e-3))
      >>> params = {'kernel': jnp.ones((4, 5)), 'bias': jnp.ones(5)}
      >>> state = tx.init(params)
      >>> state[0].second_moment['kernel'].shape, state[0].second_moment['bias'].shape
      ((5, 2, 4), (5,))

    References:
      See `block_adam`.
    """
    checks.in_range('b1', b1, 0, 1)
    checks.in_range('b2', b2, 0, 1)
    checks.in_range('eps', eps, 0)
    checks.static_int('block_size', block_size, 1)
    checks.static_int('root_every', root_every, 1)
    checks.one_of('root', root, tuple(matrix_root.METHODS))
    checks.one_of('impl', impl, calls.IMPLS)
    checks.float_dtype('mu_dtype', mu_dtype)
    checks.float_dtype('stats_dtype', stats_dtype)
    checks.flag('stochastic_rounding', stochastic_rounding)
    grafting.check(graft)
    layout_lib.check(layout)

    def blocks_of(facts: LeafLayout) -> mini_block.Blocks | None:
        """How the leaf is cut; None where its groups have one entry."""
        asked = block_size if facts.block_size is None else facts.block_size
        inputs = math.prod(facts.shape[axis] for axis in facts.block_axes)
        if not facts.precondition or min(asked, inputs) == 1:
            return None
        return mini_block.partition(facts.shape, facts.block_axes, asked)

    def init_leaf(leaf: Any, facts: LeafLayout) -> leafwise.Fields:
        blocks, stored = blocks_of(facts), stats_dtype or facts.compute_dtype
        fields: leafwise.Fields = {
            'mu': jnp.zeros_like(leaf, dtype=mu_dtype or facts.dtype),
            'root': optax.MaskedNode(),
        }
        if blocks is None:
            return fields | {'second_moment': jnp.zeros_like(leaf, dtype=stored)}
        shape, axes = blocks.matrices
        for name in ('second_moment', 'root')[: 1 + (root_every > 1)]:
            fields[name] = placement.zeros(leaf, shape, stored, axes)
        return fields

    def update_leaf(
        grad: jax.Array, state: ScaleByBlockAdamState, facts: LeafLayout
    ) -> tuple[jax.Array, leafwise.Fields]:
        blocks = blocks_of(facts)
        mu = b1 * state.mu + (1 - b1) * grad
        mu_hat = mu / (1 - b1**state.count)
        changed: leafwise.Fields = {'mu': mu}
        if blocks is None:
            nu = b2 * state.second_moment + (1 - b2) * grad * grad
            shifted = nu / (1 - b2**state.count) + eps
            direction = mu_hat * matrix_root.inverse_square_root(shifted)
            changed['second_moment'] = nu
        else:
            rounding = stored_rounding(stats_dtype, grad.dtype)
            arrays = [state.second_moment, state.root][: 1 + (root_every > 1)]
            numbers = [placement.Follower((), ()), *(blocks.matrices for _ in arrays)]
            dtypes = [grad.dtype, stats_dtype or grad.dtype]
            passes = mini_block_tiles.passes('Block Adam', impl, grad, blocks.size, dtypes)
            direction, failed, *arrays = placement.in_auto_axes(
                functools.partial(_step, _How(blocks, root, root_every, rounding, passes)),
                grad,
                [placement.like(grad), *numbers],
                grad,
                mu_hat,
                jnp.asarray(b2, grad.dtype),
                jnp.asarray(eps, grad.dtype),
                state.count,
                jnp.asarray(facts.turn),
                *arrays,
            )
            changed |= dict(zip(('second_moment', 'root'), arrays, strict=False))
            changed['failed_roots'] = state.failed_roots + failed
        if graft is not None:
            own = grad if graft == 'sgd' else state.graft
            direction = grafting.rescale(direction, own, facts.axes)
        return direction, changed

    def describe(facts: LeafLayout) -> str:
        blocks = blocks_of(facts)
        if blocks is None:
            return 'Adam direction'
        return f'{math.prod(blocks.batch)} blocks of {blocks.size} {blocks.where()}'

    def cost(facts: LeafLayout) -> float:
        """Of the roots."""
        blocks = blocks_of(facts)
        return 0 if blocks is None else math.prod(blocks.batch) * blocks.size**3

    def axes_of(facts: LeafLayout) -> dict[str, placement.Axes]:
        blocks = blocks_of(facts)
        names = ('second_moment', 'root')
        return {} if blocks is None else dict.fromkeys(names, blocks.matrices.axes)

    return leafwise.leafwise(
        ScaleByBlockAdamState,
        init_leaf,
        update_leaf,
        layout=layout,
        stochastic=('second_moment',) if stochastic_rounding else (),
        gathered={'failed_roots': True},
        one_by_one='failed_roots',
        graft=grafting.standalone(graft, b1, b2, layout),
        describe=describe,
        axes=axes_of,
        every=root_every,
        cost=cost,
    )


class _How(NamedTuple):
    """What is static of a leaf's step. No path: leaves of one shape share a trace."""

    blocks: mini_block.Blocks
    root: str
    root_every: int
    rounding: float  # with which statistics are stored, where not in the arithmetic's dtype
    passes: mini_block_tiles.Passes | None  # kernels in place of XLA's products


@functools.partial(jax.jit, static_argnums=0)
def _step(
    how: _How,
    grad: jax.Array,
    mu_hat: jax.Array,
    b2: jax.Array,
    eps: jax.Array,
    count: jax.Array,
    turn: jax.Array,
    moment: jax.Array,
    *kept: jax.Array,
) -> tuple[jax.Array, ...]:
    """A leaf's direction, how many of its roots failed, its second moments and its roots."""
    passes = how.passes or mini_block
    moment = passes.accumulate(how.blocks.split(grad), moment, decay=b2)

    def take(moment: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        hat = mini_block.square(moment / (1 - b2**count))
        roots, failed = matrix_root.inverse_root(hat, eps, how.root, how.rounding)
        roots = jnp.where(failed[..., None], last, roots.reshape(moment.shape))
        return roots, jnp.sum(failed, dtype=jnp.float32)

    if kept:
        roots, failed = mini_block.in_turns(
            take, moment, kept[0], count=count, turn=turn, every=how.root_every
        )
    else:
        roots, failed = take(moment, jnp.zeros([], moment.dtype))
    direction = how.blocks.join(passes.apply(roots, how.blocks.split(mu_hat)))
    return direction, failed, moment, *(roots for _ in kept)


def block_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    block_size: int = 32,
    root_every: int = 1,
    root: str = 'auto',
    graft: grafting.Graft = None,
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
    impl: str = 'auto',
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Block Adam: Adam with a full second moment for each group of a few inputs of an output.

    .. math::
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      G_t &= \beta_2 G_{t-1} + (1 - \beta_2) g_t g_t^T \\
      \theta_{t+1} &= \theta_t - \alpha_t \left( (\hat G_t + \epsilon I)^{-1/2} \hat m_t
             + \lambda \theta_t \right)

    for each group of ``block_size`` inputs of one output, the last one of an output filled up with
    zeros; hats are bias-corrected. With ``block_size=1`` the direction is
    :math:`\hat m / \sqrt{\hat v + \epsilon}`: that of ``optax.adam(eps=0, eps_root=eps)``. Adam's
    own eps stands outside the root: the same size there is its square here.

    The outputs are a leaf's last axis, or what ``LeafRule`` names as ``output_axes``. Leaves with
    one axis or none get groups of one entry: Adam's direction with eps in the root.

    State beside the parameters: the momentum, and for each entry of a leaf ``block_size`` numbers;
    twice as many where roots are kept. An eigendecomposition of each group in each step makes it
    many times slower than Adam: ``root_every`` spreads them over the steps. The first root is then
    that of one gradient, and blows up what the next ones have in other directions: take
    ``graft='adam'`` with it.

    Args:
      learning_rate: the step size, a number or a schedule.
      b1: decay of the mean of the gradients, in [0, 1).
      b2: decay of the second moments, in [0, 1).
      eps: added to the second moments, in units of squared gradients, >= 0.
      block_size: entries of a group, >= 1; no more than an output has inputs. With
        ``optax.inject_hyperparams`` all floats may be traced; name the integers block_size and
        root_every in ``static_args``, and there also what you give of dtypes, layout functions
        or masks.
      root_every: steps between two roots of a group, >= 1. The first is taken in the first step;
        leaves take turns, so that no step does all.
      root: 'eigh', the eigendecomposition; 'newton_schulz', matrix products alone; or 'auto',
        which is the second on TPUs and the first elsewhere.
      graft: where the size of the update comes from: None, the method's own; 'adam', 'momentum',
        'sgd', 'rmsprop_normalized' or any ``optax.GradientTransformation``.
      mu_dtype: dtype in which the mean of the gradients is stored; None: the parameter's.
      stats_dtype: dtype in which the matrices are stored; None: the parameter's, but float32 at
        least.
      stochastic_rounding: whether second moments stored in bfloat16 are rounded stochastically.
      layout: what the shapes do not tell. A mapping from regular expressions, searched for in
        a leaf's path ('encoder/0/kernel'), to `LeafRule`, first match wins; or a function
        ``(path, leaf) -> LeafRule | None``.
      impl: 'pallas': leaves that can go through kernels that read their matrices once do; 'xla':
        none does; 'auto': the first on TPUs. They take float32, groups of 16, 32, 64 or 128
        entries, and leaves that lie on one device; GPUs have none. The results are the same to
        rounding. With 'pallas' CPUs interpret the kernels. An update cannot be differentiated
        through them.
      weight_decay: decoupled, as in ``optax.adamw``, >= 0, or a schedule.
      mask: which leaves decay, as in ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Update dtypes follow the gradients'. In the
      state of `scale_by_block_adam`, ``failed_roots`` counts by leaf how often a group kept its
      last root, or had none where none are kept, because the new one was not finite.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf is not of a floating
        dtype or does not fit its rule, with its path.

    Example:
      >>> import jax, jax.numpy as jnp, optax, precond_optax
      >>> def f(x): return jnp.sum((x - 1.0) ** 2)
      >>> tx = precond_optax.block_adam(learning_rate=0.1)
      >>> params = jnp.zeros((3, 2))
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...   updates, state = update(jax.grad(f)(params), state)
      ...   params = optax.apply_updates(params, updates)
      >>> print(f'{f(params):.1f}')
      0.0

    References:
      Yun, Lozano, Yang, `AdaBlock: SGD with Practical Block Diagonal Matrix Adaptation for Deep
      Learning <https://proceedings.mlr.press/v151/yun22a.html>`_, AISTATS 2022;
      a comparator in Lee's MBAG and in Yen et al., NeurIPS 2023.
    """
    direction = scale_by_block_adam(
        b1,
        b2,
        eps,
        block_size=block_size,
        root_every=root_every,
        root=root,
        graft=graft,
        mu_dtype=mu_dtype,
        stats_dtype=stats_dtype,
        stochastic_rounding=stochastic_rounding,
        layout=layout,
        impl=impl,
    )
    return leafwise.chain_learning_rate(direction, learning_rate, weight_decay, mask)
