r"""Sketchy: Shampoo with low-rank sketches of its second moments: state, transformation, alias."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precond_optax import checks, grafting, kronecker, leafwise, placement
from precond_optax import layout as layout_lib
from precond_optax.checks import Scalar
from precond_optax.kernels import kronecker as kernel
from precond_optax.kernels import matrix_root, sketch
from precond_optax.layout import LeafLayout

_SKETCH = ('vectors', 'values', 'escaped')


class ScaleBySketchyState(NamedTuple):
    """State of ``scale_by_sketchy``.

    ``blocks`` stands for a leaf's batch axes and the number of its blocks along each other axis;
    s for the size of a block along one, k for the rank. The tuples have a tree for each axis of a
    leaf, up to five; leaves with fewer axes, or not preconditioned, hold ``optax.MaskedNode()`` in
    the rest. The sketches are of the parameter's dtype, but float32 at least.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: steps taken
    mu: optax.Updates  # like the parameters, of mu_dtype: mean of the grafted directions
    vectors: tuple[optax.Updates, ...]  # (*blocks, s, k): U, columns orthonormal or zero
    values: tuple[optax.Updates, ...]  # (*blocks, k): Lambda, ascending
    escaped: tuple[optax.Updates, ...]  # (*blocks,): rho
    graft: optax.OptState  # the grafting rule's own state, if it has any
    failed_roots: jax.Array  # shape=(leaves,), dtype=float32: how often a sketch stayed as it was


def scale_by_sketchy(  # noqa: D417 (its arguments are those of `sketchy`)
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-6,
    *,
    nesterov: bool = False,
    rank: int = 256,
    block_size: int = 1024,
    update_every: int = 10,
    start_step: Scalar = 0,
    graft: grafting.Graft = 'rmsprop_normalized',
    max_dim: int = 4096,
    mu_dtype: Any | None = None,
    layout: layout_lib.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of Sketchy, to be subtracted; no learning rate and no weight decay.

    The math is in `sketchy`. The direction has the shapes and dtypes of the gradients, and the
    units of the grafting rule's: none for RMSProp's.

    Args:
      b1, b2, eps, nesterov, rank, block_size, update_every, start_step, graft, max_dim, mu_dtype,
        layout: as in `sketchy`, with the same defaults.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `ScaleBySketchyState`.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf cannot be taken.

    Example:
      >>> import jax.numpy as jnp, optax, precond_optax
      >>> tx = optax.chain(precond_optax.scale_by_sketchy(rank=2), optax.scale(-1e-3))
      >>> params = {'kernel': jnp.ones((3, 8)), 'bias': jnp.ones(8)}
      >>> left, right, *_ = tx.init(params)[0].vectors
      >>> left['kernel'].shape, right['kernel'].shape
      ((1, 1, 3, 2), (1, 1, 8, 2))

    References:
      See `sketchy`.
    """
    kronecker.check(
        b1, b2, eps, nesterov, block_size, update_every, start_step, max_dim, graft, mu_dtype
    )
    checks.static_int('rank', rank, 1)
    layout_lib.check(layout)
    cut = kronecker.Cut(block_size, max_dim)

    def rank_of(facts: LeafLayout) -> int:
        return rank if facts.rank is None else facts.rank

    def sketches(facts: LeafLayout) -> list[tuple[placement.Follower, ...]]:
        """For each axis of a leaf what is known of its three arrays."""
        blocks, k = cut.blocks(facts), rank_of(facts)
        if blocks is None:
            return []
        return [
            (blocks.each(size, min(k, size)), blocks.each(min(k, size)), blocks.each())
            for size in blocks.sizes
        ]

    def axes_of(facts: LeafLayout) -> dict[str, placement.Axes]:
        return {
            f'{field}/{axis}': follower.axes
            for axis, followers in enumerate(sketches(facts))
            for field, follower in zip(_SKETCH, followers, strict=True)
        }

    def by_field(arrays: list[Any]) -> leafwise.Fields:
        """From the arrays of all axes, three for each, the fields."""
        return {f: kronecker.for_each_axis(arrays[i::3]) for i, f in enumerate(_SKETCH)}

    def init_leaf(leaf: Any, facts: LeafLayout) -> leafwise.Fields:
        arrays = [
            placement.zeros(leaf, shape, facts.compute_dtype, axes)
            for followers in sketches(facts)
            for shape, axes in followers
        ]
        return by_field(arrays) | {'mu': jnp.zeros_like(leaf, dtype=mu_dtype or facts.dtype)}

    def precondition(
        grad: jax.Array, state: ScaleBySketchyState, facts: LeafLayout, blocks: kernel.Blocks
    ) -> tuple[jax.Array, leafwise.Fields]:
        """The direction of a leaf that is preconditioned, and what changes."""
        followers = [follower for three in sketches(facts) for follower in three]
        held = zip(*(getattr(state, field)[: len(blocks.dims)] for field in _SKETCH), strict=True)
        direction, failed, *arrays = placement.in_auto_axes(
            functools.partial(_step, _How(blocks, update_every)),
            grad,
            [placement.like(grad), placement.Follower((), ()), *followers],
            grad,
            jnp.asarray(b2, grad.dtype),
            jnp.asarray(eps, grad.dtype),
            state.count,
            jnp.asarray(facts.turn),
            *(array for three in held for array in three),
        )
        return direction, by_field(arrays) | {'failed_roots': state.failed_roots + failed}

    return leafwise.leafwise(
        ScaleBySketchyState,
        init_leaf,
        kronecker.make_update_leaf(precondition, cut, b1, nesterov, graft, start_step),
        layout=layout,
        stacked=dict.fromkeys(_SKETCH, kronecker.AXES),
        gathered={'failed_roots': True},
        one_by_one='failed_roots',
        graft=grafting.standalone(graft, b1, b2, layout),
        describe=lambda facts: cut.describe(facts, f', sketches of rank {rank_of(facts)}'),
        axes=axes_of,
        every=update_every,
        cost=cut.cost,
    )


class _How(NamedTuple):
    """What is static of a leaf's step. No path: leaves of one shape share a trace."""

    blocks: kernel.Blocks
    update_every: int


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
    """A leaf's direction, how many of its sketches failed, and the three arrays of each axis."""
    ndim = len(how.blocks.dims)
    blocks, weight = how.blocks.split(grad), grafting.weight(b2)

    def updated() -> tuple[jax.Array, ...]:
        failed, new = jnp.zeros([], grad.dtype), []
        for axis in range(ndim):
            columns = matrix_root.once(failed, kernel.unfold(blocks, axis, ndim))
            held = arrays[3 * axis : 3 * axis + 3]
            *three, bad = sketch.update(columns, *held, b2=b2, weight=weight)
            new += three
            failed += jnp.sum(bad, dtype=grad.dtype)
        return failed, *new

    if how.update_every == 1:
        failed, *new = updated()
    else:
        failed, *new = jax.lax.cond(
            leafwise.is_turn(count, how.update_every, turn),
            updated,
            lambda: (jnp.zeros([], grad.dtype), *arrays),
        )
    held = kronecker.correction(b2, leafwise.turns_taken(count, how.update_every, turn))
    for axis in range(ndim):
        vectors, values, escaped = new[3 * axis : 3 * axis + 3]
        rows = sketch.apply(
            kernel.unfold(blocks, axis, ndim),
            vectors,
            values / held,
            escaped / held,
            p=2 * ndim,
            eps=eps,
        )
        blocks = kernel.fold(rows, blocks, axis, ndim)
    return how.blocks.join(blocks), failed, *new


def sketchy(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-6,
    *,
    nesterov: bool = False,
    rank: int = 256,
    block_size: int = 1024,
    update_every: int = 10,
    start_step: Scalar = 0,
    graft: grafting.Graft = 'rmsprop_normalized',
    max_dim: int = 4096,
    mu_dtype: Any | None = None,
    layout: layout_lib.Layout = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sketchy: Shampoo with each second moment as leading eigenvectors and the mass they miss.

    For a matrix, cut into blocks G as in `shampoo`, and likewise for the other axis

    .. math::
      \beta_2 U \Lambda U^T + (1 - \beta_2)\, G G^T &= \sum_i \lambda_i v_i v_i^T \\
      U \leftarrow (v_1 .. v_k), \quad \Lambda &\leftarrow \Lambda_k - \lambda_{k+1} I, \quad
      \rho \leftarrow \beta_2 \rho + \lambda_{k+1} \\
      \tilde L &= U \Lambda U^T + \rho I

    (frequent directions), and then Shampoo's step with :math:`\tilde L` and :math:`\tilde R`,
    which are never formed. With ``rank`` at least ``block_size`` and ``update_every=1`` it is
    Shampoo's.

    As in the authors' code, a sketch takes the gradients of every ``update_every``-th step alone,
    so that ``b2`` counts those, and the eigenvalue taken off is the first that is left out: the
    paper's sketch of k + 1 directions, whose last is always zero. Which leaves are preconditioned,
    their axes, the size of the step and what the others get is as in `shampoo`.

    State beside the parameters: two arrays of each leaf's shape (momentum, RMSProp's), and for
    each block of m x n entries ``k (m + n + 2) + 2`` numbers. An eigendecomposition for each axis
    of each block every ``update_every`` steps is most of the time, of the block's size, as
    Shampoo's; where a block has few entries along the other axes, of their number plus k.

    Args:
      learning_rate: the step size, a number or a schedule.
      b1: decay of the mean of the grafted directions, in [0, 1).
      b2: decay of the sketches, from one update to the next, and of the grafting rule's second
        moment, in [0, 1]; 1: sums.
      eps: added to the second moments, in units of the largest eigenvalue of each, >= 0.
      nesterov: whether the mean looks one step ahead, as in ``optax.nadam``.
      rank: k, >= 1; no more than a block has entries along the axis.
      block_size: entries of a block along each axis, >= 1; the last block of an axis may have
        fewer. Devices along an axis that do not divide its blocks all hold what belongs to them.
        With ``optax.inject_hyperparams`` all floats may be traced; name the integers rank,
        block_size, update_every and max_dim in ``static_args``, and there also what you give of
        dtypes, layout functions or masks.
      update_every: steps between two updates of a leaf's sketches, >= 1. The first is in the first
        step; leaves take turns, so that no step does all.
      start_step: the first steps, whose update is the grafting rule's, >= 0.
      graft: where the size of the update comes from: 'rmsprop_normalized', 'adam', 'momentum',
        'sgd', any ``optax.GradientTransformation``, or None for the method's own; the plain
        gradient is then what leaves get that are not preconditioned, and all leaves in the first
        ``start_step`` steps.
      max_dim: the longest axis, merged ones as one, of a leaf that is preconditioned.
      mu_dtype: dtype in which the momentum is stored; None: the parameter's.
      layout: what the shapes do not tell. A mapping from regular expressions, searched for in
        a leaf's path ('encoder/0/kernel'), to `LeafRule`, first match wins; or a function
        ``(path, leaf) -> LeafRule | None``.
      weight_decay: decoupled, as in ``optax.adamw``, >= 0, or a schedule.
      mask: which leaves decay, as in ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Update dtypes follow the gradients'. In the
      state of `scale_by_sketchy`, ``failed_roots`` counts by leaf how often a block's sketch
      stayed as it was because its gradient's square or the new one was not finite.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf is not of a floating
        dtype or does not fit its rule, with its path.

    Example:
      >>> import jax, jax.numpy as jnp, optax, precond_optax
      >>> def f(x): return jnp.sum((x - 1.0) ** 2)
      >>> tx = precond_optax.sketchy(learning_rate=0.1)
      >>> params = jnp.zeros((3, 2))
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...   updates, state = update(jax.grad(f)(params), state)
      ...   params = optax.apply_updates(params, updates)
      >>> print(f'{f(params):.1f}')
      0.0

    References:
      Feinberg, Chen, Sun, Anil, Hazan, `Sketchy: Memory-efficient Adaptive Regularization with
      Frequent Directions <https://arxiv.org/abs/2302.03764>`_, NeurIPS 2023: Algorithm 1 (frequent
      directions), Algorithm 3 (S-Shampoo), section 5.2 (means in place of sums).
    """
    direction = scale_by_sketchy(
        b1,
        b2,
        eps,
        nesterov=nesterov,
        rank=rank,
        block_size=block_size,
        update_every=update_every,
        start_step=start_step,
        graft=graft,
        max_dim=max_dim,
        mu_dtype=mu_dtype,
        layout=layout,
    )
    return leafwise.chain_learning_rate(direction, learning_rate, weight_decay, mask)
