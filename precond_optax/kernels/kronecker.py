r"""Blocks of a leaf, and a matrix for each axis of each block: their Kronecker product's factors.

A leaf of k axes (merged ones count as one) is cut along each into blocks of at most so many
entries, the last one filled up with zeros. Arrays here are ``(*batch, n_1 .. n_k, s_1 .. s_k)``:
the leaf's batch axes, the number of blocks along each axis and the size of a block. The matrices
of axis i are ``(*batch, n_1 .. n_k, s_i, s_i)``; for two axes

.. math:: L = \sum G G^T, \qquad R = \sum G^T G, \qquad u = P_L G P_R

with roots P. Zeros that fill a block up add nothing to the statistics and get nothing.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from precond_optax.kernels.matrix_root import product
from precond_optax.placement import Follower


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a leaf is cut: static facts from its shape, made by ``partition``.

    Attributes:
      shape: the leaf's shape.
      lead: how many of its axes are batch axes.
      dims: the lengths of the others, merged ones as one.
      axes: for each of those the leaf's axis that its blocks follow: of merged ones the slowest.
      sizes: the entries of a block along each.
    """

    shape: tuple[int, ...]
    lead: int
    dims: tuple[int, ...]
    axes: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of blocks along each axis."""
        return tuple(-(-dim // size) for dim, size in zip(self.dims, self.sizes, strict=True))

    @property
    def batch(self) -> tuple[int, ...]:
        """The shape of the batch of blocks."""
        return (*self.shape[: self.lead], *self.counts)

    @property
    def _pairs(self) -> tuple[int, ...]:
        """The order of (n_1, s_1, n_2, s_2 ..) in (n_1 .. n_k, s_1 .. s_k)."""
        k, lead = len(self.dims), self.lead
        inner = (*range(lead, lead + 2 * k, 2), *range(lead + 1, lead + 2 * k, 2))
        return (*range(lead), *inner)

    def alike(self) -> list[tuple[int, ...]]:
        """The axes, in groups along which blocks have the same size."""
        sizes = dict.fromkeys(self.sizes)
        return [tuple(a for a, size in enumerate(self.sizes) if size == s) for s in sizes]

    def split(self, x: jax.Array) -> jax.Array:
        """The blocks of a leaf: ``shape -> (*batch, *sizes)``; (5, 4) in twos: (3, 2, 2, 2)."""
        batch = self.shape[: self.lead]
        x = x.reshape(*batch, *self.dims)
        whole = [n * s for n, s in zip(self.counts, self.sizes, strict=True)]
        more = [(0, w - dim) for w, dim in zip(whole, self.dims, strict=True)]
        if any(after for _, after in more):
            x = jnp.pad(x, [(0, 0)] * self.lead + more)
        pairs = [n for pair in zip(self.counts, self.sizes, strict=True) for n in pair]
        return x.reshape(*batch, *pairs).transpose(self._pairs)

    def join(self, blocks: jax.Array) -> jax.Array:
        """The inverse of ``split``."""
        back = sorted(range(len(self._pairs)), key=self._pairs.__getitem__)
        whole = [n * s for n, s in zip(self.counts, self.sizes, strict=True)]
        x = blocks.transpose(back).reshape(*self.shape[: self.lead], *whole)
        return x[(..., *map(slice, self.dims))].reshape(self.shape)

    def each(self, *own: int) -> Follower:
        """An array with axes of its own for each block, and the leaf's axes that it follows."""
        axes = (*range(self.lead), *self.axes, *(None for _ in own))
        return Follower((*self.batch, *own), axes)


def partition(
    shape: Sequence[int], lead: int, groups: Sequence[Sequence[int]], block_size: int
) -> Blocks:
    """Cuts a leaf into blocks.

    Args:
      shape: the leaf's, without axes of size 0.
      lead: the number of leading batch axes.
      groups: the other axes, in ascending order; those of a group are seen as one.
      block_size: entries of a block along each axis; no more than the axis has.

    Returns:
      A `Blocks`.

    Example:
      >>> blocks = partition((64, 8, 32), lead=0, groups=((0,), (1, 2)), block_size=100)
      >>> blocks.dims, blocks.sizes, blocks.batch, blocks.axes
      ((64, 256), (64, 100), (1, 3), (0, 1))
    """
    dims = tuple(math.prod(shape[axis] for axis in group) for group in groups)
    return Blocks(
        shape=tuple(shape),
        lead=lead,
        dims=dims,
        axes=tuple(group[0] for group in groups),
        sizes=tuple(min(block_size, dim) for dim in dims),
    )


def unfold(blocks: jax.Array, axis: int, ndim: int) -> jax.Array:
    """One of the last ``ndim`` axes in the rows: (..., s_1 .. s_k) -> (..., s_i, the rest).

    Example:
      >>> import jax.numpy as jnp
      >>> unfold(jnp.zeros((7, 2, 3, 4)), axis=1, ndim=3).shape
      (7, 3, 8)
    """
    lead = blocks.ndim - ndim
    moved = jnp.moveaxis(blocks, lead + axis, lead)
    return moved.reshape(*moved.shape[: lead + 1], -1)


def fold(rows: jax.Array, like: jax.Array, axis: int, ndim: int) -> jax.Array:
    """The inverse of ``unfold``, given an array of the result's shape."""
    lead = like.ndim - ndim
    moved = list(like.shape)
    moved.insert(lead, moved.pop(lead + axis))
    return jnp.moveaxis(rows.reshape(moved), lead, lead + axis)


def finite(blocks: jax.Array, ndim: int) -> jax.Array:
    """Which blocks have a finite squared norm, and so finite statistics: (..., 1, 1)."""
    squares = jnp.sum(blocks * blocks, axis=tuple(range(-ndim, 0)))
    return jnp.isfinite(squares)[..., None, None]


def accumulate(
    blocks: jax.Array,
    statistics: Sequence[jax.Array],
    *,
    b2: jax.Array | float,
    weight: jax.Array | float,
) -> list[jax.Array]:
    r"""The statistics of each axis, one step on: :math:`L \leftarrow b_2 L + w\, G G^T`.

    Args:
      blocks: G (..., s_1 .. s_k).
      statistics: for each axis (..., s_i, s_i).
      b2: decay, in [0, 1].
      weight: w of the new gradient.

    Returns:
      The statistics; as they were in blocks whose gradient's square is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> old = [jnp.eye(1), jnp.eye(2)]
      >>> left, right = accumulate(jnp.array([[1.0, 2.0]]), old, b2=0.5, weight=1.0)
      >>> left.tolist(), right.tolist()
      ([[5.5]], [[1.5, 2.0], [2.0, 4.5]])
    """
    ndim, taken = len(statistics), finite(blocks, len(statistics))
    new = []
    for axis, old in enumerate(statistics):
        rows = unfold(blocks, axis, ndim)
        gram = product('...ij,...lj->...il', rows, rows)
        new.append(jnp.where(taken, b2 * old + weight * gram, old))
    return new


def apply(blocks: jax.Array, roots: Sequence[jax.Array]) -> jax.Array:
    """Each block times the matrix of each of its axes; P_L G P_R for two.

    Args:
      blocks: G (..., s_1 .. s_k).
      roots: for each axis (..., s_i, s_i), symmetric.

    Returns:
      (..., s_1 .. s_k).

    Example:
      >>> import jax.numpy as jnp
      >>> roots = [jnp.full((1, 1), 2.0), jnp.diag(jnp.array([1.0, 3.0]))]
      >>> apply(jnp.ones((1, 2)), roots).tolist()
      [[2.0, 6.0]]
    """
    for axis, root in enumerate(roots):
        rows = product('...ij,...jl->...il', root, unfold(blocks, axis, len(roots)))
        blocks = fold(rows, blocks, axis, len(roots))
    return blocks
