r"""Mini-blocks: groups of a few entries of a leaf, each with a full matrix of its own.

The entries of a leaf are lined up in chains and each chain is cut into groups of tau entries, the
last one filled up with zeros. Arrays here are ``(..., tau)`` and, for matrices, row by row in one
axis, ``(..., tau * tau)``: the groups of a leaf are one batch. A batch axis of its own is kept for
each axis of the leaf that no group spans, so that a leaf that is sharded along it needs no gather.

Matrices are flat because a TPU pads the last axis to 128, and stay so in all that is elementwise:
on a CPU a loop that reads them flat and writes them square, or the reverse, divides each index.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precond_optax import placement
from precond_optax.kernels import matrix_root

_FEWEST = 1024  # groups of a leaf whose roots are taken in several steps
_DEVICES = 64  # that may share out an axis of groups, or as many as divide it


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a leaf is cut: static facts from its shape, made by ``partition``.

    Attributes:
      shape: the leaf's shape.
      order: its axes, separate chains first, then the chain's from the slowest to the fastest.
      span: the axes along which groups lie, fastest first: as few as hold whole groups.
      batch: the shape of the batch of groups.
      axes: for each batch axis the leaf's axis that it follows: of the axes spanned, the slowest.
      size: tau.
      padded: whether the last group of a chain is filled up.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    span: tuple[int, ...]
    batch: tuple[int, ...]
    axes: tuple[int, ...]
    size: int
    padded: bool

    def split(self, x: jax.Array) -> jax.Array:
        """The groups of a leaf: ``shape -> (*batch, size)``."""
        lead = self.batch[:-1]
        # Made once: else the transpose is fused into what reads each entry tau times.
        ordered = jax.lax.optimization_barrier(x.transpose(self.order))
        lines = ordered.reshape(*lead, math.prod(x.shape) // math.prod(lead))
        if self.padded:
            more = self.batch[-1] * self.size - lines.shape[-1]
            lines = jnp.pad(lines, [(0, 0)] * len(lead) + [(0, more)])
        return lines.reshape(*self.batch, self.size)

    def join(self, groups: jax.Array) -> jax.Array:
        """The inverse of ``split``."""
        ordered = tuple(self.shape[axis] for axis in self.order)
        lead = self.batch[:-1]
        lines = groups.reshape(*lead, self.batch[-1] * self.size)
        if self.padded:
            lines = lines[..., : math.prod(ordered) // math.prod(lead)]
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return lines.reshape(ordered).transpose(back)

    def where(self) -> str:
        """Along which axes groups lie, and which shards hold whole ones, in words.

        Where a shard does not, or is one of a fast axis of several, the leaf is gathered.
        """
        *fast, slow = self.span
        text = f'along {"axes" if fast else "axis"} {", ".join(map(str, self.span))}'
        if self.padded:
            return f'{text} (whole in no shard)'
        least = self.size // math.gcd(self.size, math.prod(self.shape[axis] for axis in fast))
        return f'{text} (whole in shards of a multiple of {least} along axis {slow})'

    @property
    def matrices(self) -> placement.Follower:
        """The shape of the groups' matrices, and the leaf's axes that it follows."""
        return placement.Follower((*self.batch, self.size * self.size), (*self.axes, None))


def partition(shape: Sequence[int], chain: Sequence[int], block_size: int) -> Blocks:
    """Cuts a leaf into groups.

    Args:
      shape: the leaf's, without axes of size 0.
      chain: the axes of a chain, the fastest first, at least one; each index along the others has
        a chain of its own.
      block_size: entries of a group; no more than a chain has.

    Returns:
      A `Blocks`.

    Example:
      >>> blocks = partition((64, 10), chain=(0, 1), block_size=32)  # along the inputs
      >>> blocks.batch, blocks.axes, blocks.span
      ((10, 2), (1, 0), (0,))
      >>> blocks = partition((3, 3, 16, 8), chain=(0, 1, 2, 3), block_size=9)  # a group a filter
      >>> blocks.batch, blocks.axes, blocks.span
      ((8, 16, 1), (3, 2, 1), (0, 1))
      >>> blocks = partition((48, 10), chain=(0, 1), block_size=32)  # 32 does not divide 48
      >>> blocks.batch, blocks.axes, blocks.span
      ((15,), (1,), (0, 1))
    """
    chain = tuple(chain)
    others = tuple(axis for axis in range(len(shape)) if axis not in chain)
    size = min(block_size, math.prod(shape[axis] for axis in chain))
    lengths = [math.prod(shape[a] for a in chain[: n + 1]) for n in range(len(chain))]
    whole = [n for n, length in enumerate(lengths) if length % size == 0]
    last = whole[0] if whole else len(chain) - 1
    lead = (*others, *chain[:last:-1])
    return Blocks(
        shape=tuple(shape),
        order=(*others, *chain[::-1]),
        span=chain[: last + 1],
        batch=(*(shape[axis] for axis in lead), -(-lengths[last] // size)),
        axes=(*lead, chain[last]),
        size=size,
        padded=not whole,
    )


def slices(batch: Sequence[int], every: int) -> tuple[int, int]:
    """How the roots of a batch of groups are spread over steps: along which axis, in how many.

    A slice is every n-th group along the axis, so that each device has its part of each slice:
    where powers of two of them share it out, up to as many as 64.

    Args:
      batch: the groups' axes.
      every: steps, the most slices.

    Returns:
      The axis and n.

    Example:
      >>> slices((2048, 16), every=50), slices((24_500,), every=50), slices((10, 2), every=50)
      ((0, 32), (0, 49), (0, 1))
    """
    if math.prod(batch) < _FEWEST:
        return 0, 1

    def most(size: int) -> int:
        kept = math.gcd(size, _DEVICES)
        fits = (n for n in range(1, every + 1) if size % n == 0 and (size // n) % kept == 0)
        return max(fits)

    counts = [most(size) for size in batch]
    # Not the last axis if others do: a TPU holds it in rows of eight.
    axis = max(range(len(batch)), key=lambda i: (i < len(batch) - 1 and counts[i] > 1, counts[i]))
    return axis, counts[axis]


def in_turns(
    take: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    held: jax.Array,
    roots: jax.Array,
    *,
    count: jax.Array,
    turn: jax.Array,
    every: int,
) -> tuple[jax.Array, jax.Array]:
    """Roots of the groups whose turn it is: a slice of them, but of all in the first step.

    Args:
      take: of some groups' statistics and their last roots, the new ones and how many failed.
      held: statistics (..., tau * tau).
      roots: the last roots, likewise.
      count: the number of this step, from 1.
      turn: of the leaf, whose first slice has its turn in step 1 + turn + every and so on.
      every: steps from one root of a group to its next.

    Returns:
      The roots, and how many failed.
    """
    axis, parts = slices(held.shape[:-1], every)
    none = jnp.zeros([], jnp.float32)
    if parts == 1:  # out of a loop, XLA would take roots that are the same in all its steps
        now = (count == 1) | ((count - 1 - turn) % every == 0)
        return lax.cond(now, take, lambda _, last: (last, none), held, roots)
    due = np.full(every, -1, np.int32)
    due[[n * every // parts for n in range(parts)]] = np.arange(parts)
    own = jnp.asarray(due)[(count - 1 - turn) % every]
    first = count == 1
    start, stop = jnp.where(first, 0, jnp.maximum(own, 0)), jnp.where(first, parts, own + 1)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:axis], -1, parts, *x.shape[axis + 1 :])

    def body(n: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        whole, failed = state
        of_turn = (lax.dynamic_index_in_dim(x, n, axis + 1, False) for x in (statistics, whole))
        new, more = take(*of_turn)
        return lax.dynamic_update_index_in_dim(whole, new, n, axis + 1), failed + more

    # A loop of no step, of one or of all: with it nothing but a slice needs workspace, ever.
    statistics = split(held)
    whole, failed = lax.fori_loop(start, stop, body, (split(roots), none))
    return whole.reshape(roots.shape), failed


def square(flat: jax.Array) -> jax.Array:
    """Matrices as matrices: (..., tau * tau) -> (..., tau, tau)."""
    size = math.isqrt(flat.shape[-1])
    return flat.reshape(*flat.shape[:-1], size, size)


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    r"""The matrices :math:`a b^T`, flat: (..., tau), (..., tau) -> (..., tau * tau).

    Example:
      >>> import jax.numpy as jnp
      >>> outer(jnp.array([1, 2]), jnp.array([10, 20])).tolist()
      [10, 20, 20, 40]
    """
    size = a.shape[-1]
    return jnp.repeat(a, size, axis=-1) * jnp.tile(b, (1,) * (b.ndim - 1) + (size,))


def accumulate(grad: jax.Array, moment: jax.Array, *, decay: float | jax.Array) -> jax.Array:
    r"""The mean of second moments, one step on: :math:`G \leftarrow d G + (1 - d) g g^T`.

    Args:
      grad: g (..., tau).
      moment: G (..., tau * tau).
      decay: d, in [0, 1).

    Returns:
      G; as it was in groups whose gradient's square is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> accumulate(jnp.array([2.0, 0.0]), jnp.array([1.0, 0.0, 0.0, 1.0]), decay=0.5).tolist()
      [2.5, 0.0, 0.0, 0.5]
    """
    finite = jnp.isfinite(jnp.sum(grad * grad, axis=-1, keepdims=True))
    return jnp.where(finite, decay * moment + (1 - decay) * outer(grad, grad), moment)


def add_to_inverse(grad: jax.Array, factor: jax.Array) -> jax.Array:
    r"""A factor of the inverse second moment, one step on, as Sherman and Morrison have it.

    With :math:`H = S S^T = G^{-1}`, :math:`f = S^T g` and :math:`q = \sqrt{1 + f^T f}`

    .. math::
      S \leftarrow S \left(I - \frac{f f^T}{q (q + 1)}\right), \qquad
      S S^T = H - \frac{H g g^T H}{1 + g^T H g} = (G + g g^T)^{-1}

    The product is symmetric and positive semidefinite whatever the rounding. H itself, updated by
    the formula on the right, loses that: in float32 after some thousand steps, where its
    condition is 1e7 or more (`experiments/mini_blocks.py`).

    Args:
      grad: g (..., tau).
      factor: S (..., tau * tau).

    Returns:
      S; as it was in groups whose gradient is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> identity = jnp.array([1.0, 0.0, 0.0, 1.0])
      >>> add_to_inverse(jnp.array([0.0, 15**0.5]), identity).round(4).tolist()
      [1.0, 0.0, 0.0, 0.25]

    References:
      Potter's square-root form of the update: Bierman, Factorization Methods for Discrete
      Sequential Estimation (1977), section V.2. Lee, MBAG, equation (4), is the formula for H.
    """
    f = apply(factor, grad, transpose=True)
    largest = jnp.max(jnp.abs(f), axis=-1, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)  # whose squares could overflow
    norm = largest * jnp.linalg.norm(f / largest, axis=-1, keepdims=True)
    unit = f / jnp.where(norm > 0, norm, 1)
    q = jnp.hypot(1, norm)
    share = (norm / q) * (norm / (q + 1))
    taken = share * apply(factor, unit)
    return jnp.where(jnp.isfinite(norm), factor - outer(taken, unit), factor)


def step_by_inverse(grad: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`add_to_inverse`, and the new inverse times the gradient: MBAG-N.

    Args:
      grad: g (..., tau).
      factor: S (..., tau * tau).

    Returns:
      S and S S^T g.
    """
    factor = add_to_inverse(grad, factor)
    return factor, apply(factor, apply(factor, grad, transpose=True))


def apply(
    matrices: jax.Array, x: jax.Array, *, transpose: bool = False, times: int = 1
) -> jax.Array:
    """Each group times its matrix, or its transpose: (..., tau * tau), (..., tau) -> (..., tau).

    ``times`` over.

    Example:
      >>> import jax.numpy as jnp
      >>> apply(jnp.array([1.0, 2.0, 0.0, 1.0]), jnp.array([1.0, 1.0])).tolist()
      [3.0, 1.0]
    """
    subscripts = '...ij,...i->...j' if transpose else '...ij,...j->...i'
    for _ in range(times):
        x = matrix_root.product(subscripts, square(matrices), x)
    return x
