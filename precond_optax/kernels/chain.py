r"""The chain: the entries of an array lined up one after another, without a reshape.

``axes`` names the array's axes from the fastest running to the slowest. Axes that it leaves
out are batch axes: each of their indices has a chain of its own. For ``x`` of shape (2, 3),

    axes (0, 1), order 'F':  x00 x10 x01 x11 x02 x12
    axes (1, 0), order 'C':  x00 x01 x02 x10 x11 x12

and ``successor(x, (0, 1))`` is, in place of each entry, the next one along the first line:

    x00 x01 x02       x10 x11 x12
    x10 x11 x12   ->  x01 x02 0

Flattening a sharded array makes XLA gather it. A roll along an axis moves the border only, in a
ring of shards; so does the shift of the border row along the slower axes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precond_optax import placement


class Tile(NamedTuple):
    """In place of ``axes``, those of a tile that has some more rows or columns at its ends.

    Attributes:
      roll: of a tile and a number of rows, the tile rolled on by them; as ``jnp.roll`` on axis 0.
    """

    roll: Callable[[jax.Array, int], jax.Array]


class Shards(NamedTuple):
    """In place of ``axes``, where an array is one device's part: in a manual region of a mesh.

    Attributes:
      axes: the chain's, fastest first.
      names: for each of the array's axes, those of the mesh that share it out.
    """

    axes: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]

    @property
    def cuts(self) -> tuple[str, ...]:
        """The axes of the mesh that cut chains."""
        return tuple(name for axis in self.axes for name in self.names[axis])


ChainAxes: TypeAlias = Sequence[int] | Tile | Shards


def _neighbour(x: jax.Array, axes: Sequence[int], step: int) -> jax.Array:
    """What stands ``step`` (1 or -1) entries on along the chain; zero past its ends."""
    if not axes:
        return jnp.zeros_like(x)
    fastest, *slower = axes
    size = x.shape[fastest]
    if not slower:
        config = [(0, 0, 0)] * x.ndim
        config[fastest] = (-step, step, 0)
        return lax.pad(x, jnp.zeros((), x.dtype), config)
    if size == 1:
        return _neighbour(x, slower, step)
    # Past the border the chain goes on at the other border, where the roll takes it, but one step
    # on along the slower axes. One roll moves one face of a shard; a shift by padding and another
    # one for the border row would move two.
    rolled = jnp.roll(x, -step, fastest)
    border = lax.broadcasted_iota(jnp.int32, x.shape, fastest) == (size - 1 if step == 1 else 0)
    return jnp.where(border, _neighbour(rolled, slower, step), rolled)


def beyond(edge: jax.Array, shards: Shards, step: int) -> jax.Array:
    """The rows that follow on a device's part of an array (``step`` 1), or precede it (-1).

    They are sent by the device that has them: once around the ring of devices along the fastest
    axis, and from its end on to the next row along the slower axes.

    Args:
      edge: of each device's part, the first rows along the fastest axis (``step`` 1), or the last.
      shards: how the array is shared out.
      step: 1 or -1.

    Returns:
      Rows like ``edge``; zero past the chain's ends.
    """
    fastest, *slower = shards.axes
    (further,) = _neighbours(edge, shards._replace(axes=tuple(slower)), step, 1)
    names = shards.names[fastest]
    if not names:
        return further
    ordered = tuple(n for n in jax.sharding.get_abstract_mesh().axis_names if n in names)
    # `ppermute` numbers the devices in the mesh's order, whatever order the names have.
    numbers = np.arange(lax.axis_size(names)).reshape([lax.axis_size(name) for name in ordered])
    ring = np.transpose(numbers, [ordered.index(name) for name in names]).ravel()
    at_end = lax.axis_index(names) == (0 if step == 1 else len(ring) - 1)
    pairs = list(zip(ring.tolist(), np.roll(ring, step).tolist(), strict=True))
    return lax.ppermute(jnp.where(at_end, further, edge), ordered, pairs)


def ends(
    arrays: Sequence[jax.Array],
    count: int,
    axes: Sequence[int],
    names: Sequence[tuple[str, ...]] = (),
) -> tuple[jax.Array, jax.Array]:
    """What stands before the first entries along the fastest axis, and after the last ones.

    The last entries of the line before and the first of the one after. Other devices may have
    these: ``count`` are sent, of all arrays at once.

    Args:
      arrays: all of one shape.
      count: how many along the fastest axis, no more than there are.
      axes: the chain's, fastest first; the others are batch axes.
      names: in a manual region, for each of the arrays' axes those of the mesh that share it out.

    Returns:
      Two arrays (arrays, ...), ``count`` long along the fastest axis, float32; zero past the
      chains' ends.
    """
    fastest, size = axes[0], arrays[0].shape[axes[0]]
    shards = Shards(tuple(axis + 1 for axis in axes), ((), *(names or [()] * arrays[0].ndim)))

    def stacked(start: int) -> jax.Array:
        """In float32 once they are cut, so that no array is converted for it."""
        cut = [lax.slice_in_dim(x, start, start + count, axis=fastest) for x in arrays]
        return jnp.stack([x.astype(jnp.float32) for x in cut])

    return beyond(stacked(size - count), shards, -1), beyond(stacked(0), shards, 1)


def _joined(x: jax.Array, shards: Shards, step: int, count: int) -> tuple[jax.Array, ...]:
    """The neighbours one step on to ``count``, as the rows there are and those that follow them.

    They are slices of one array, which are read in place: a shift of its own would be a copy. Of
    those before (``step`` -1) no more than one is taken anywhere.
    """
    if not shards.axes:
        return (jnp.zeros_like(x),) * count
    fastest, size = shards.axes[0], x.shape[shards.axes[0]]
    if count > size:
        near = _joined(x, shards, step, size)
        return near + _joined(near[-1], shards, step, count - size)
    rows = functools.partial(lax.slice_in_dim, axis=fastest)
    if step == 1:
        own, edge = rows(x, 1, size), rows(x, 0, count)
    else:
        own, edge = rows(x, 0, size - 1), rows(x, size - 1, size)
    further = beyond(edge, shards, step)
    longer = jnp.concatenate([own, further][::step], fastest) if size > 1 else further
    return tuple(rows(longer, start, start + size) for start in range(count))


def _rolled(x: jax.Array, axes: Sequence[int], step: int, count: int) -> tuple[jax.Array, ...]:
    """The neighbours one step on to ``count``, each from the one before."""
    found = [x]
    for _ in range(count):
        found.append(_neighbour(found[-1], axes, step))
    return tuple(found[1:])


def _neighbours(
    x: jax.Array, axes: Sequence[int] | Shards, step: int, count: int
) -> tuple[jax.Array, ...]:
    """Those one step on to ``count``, however axes are given and wherever the array is."""
    if isinstance(axes, Shards):
        if axes.cuts:
            return _joined(x, axes, step, count)
        return _rolled(x, axes.axes, step, count)
    by_rolls = functools.partial(_rolled, axes=axes, step=step, count=count)

    def shifted(x: jax.Array) -> tuple[jax.Array, ...]:
        if jax.device_count() > 1 or not isinstance(x, jax.core.Tracer):
            return by_rolls(x)
        # There are no other parts. A CPU copies what is rolled, and branches for each entry to
        # choose between it and the border. What is traced here may be for many other devices.
        alone = Shards(tuple(axes), ((),) * x.ndim)
        by_parts = functools.partial(_joined, shards=alone, step=step, count=count)
        return lax.platform_dependent(x, cpu=by_parts, default=by_rolls)

    # Along explicit axes rolls and masks have no rule.
    return placement.in_auto_axes(shifted, x, [placement.like(x)] * count, x)


def successor(x: jax.Array, axes: ChainAxes) -> jax.Array:
    """The next entry along the chain in place of each entry, zero in place of the last.

    Args:
      x: array of any shape and numeric dtype.
      axes: the chain's axes, fastest first; the others are batch axes.

    Returns:
      An array of the shape and dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> successor(jnp.array([[1, 3, 5], [2, 4, 6]]), axes=(0, 1)).tolist()
      [[2, 4, 6], [3, 5, 0]]
    """
    (one,) = successors(x, 1, axes)
    return one


def successors(x: jax.Array, count: int, axes: ChainAxes) -> Iterator[jax.Array]:
    """The next entry along the chain in place of each entry, the one after it, and so on.

    Args:
      x: array of any shape and numeric dtype.
      count: how many steps on; none are no arrays.
      axes: the chain's axes, fastest first; the others are batch axes.

    Yields:
      ``count`` arrays of the shape and dtype of ``x``, zero past the chain's end; in a kernel no
      sooner than they are taken, as a tile's registers are few.

    Example:
      >>> import jax.numpy as jnp
      >>> [x.tolist() for x in successors(jnp.array([1, 2, 3, 4]), 3, axes=(0,))]
      [[2, 3, 4, 0], [3, 4, 0, 0], [4, 0, 0, 0]]
    """
    if isinstance(axes, Tile):
        for _ in range(count):
            x = axes.roll(x, -1)
            yield x
    elif count:
        yield from _neighbours(x, axes, 1, count)


def predecessor(x: jax.Array, axes: ChainAxes) -> jax.Array:
    """The entry before along the chain in place of each entry, zero in place of the first.

    Args:
      x: array of any shape and numeric dtype.
      axes: the chain's axes, fastest first; the others are batch axes.

    Returns:
      An array of the shape and dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> predecessor(jnp.array([[1, 3, 5], [2, 4, 6]]), axes=(0, 1)).tolist()
      [[0, 2, 4], [1, 3, 5]]
    """
    if isinstance(axes, Tile):
        return axes.roll(x, 1)
    (one,) = _neighbours(x, axes, -1, 1)
    return one


def sum_of_predecessors(arrays: Sequence[jax.Array], axes: ChainAxes) -> jax.Array:
    """The first array's entry one before, and the second's two before, and so on, added up.

    By Horner's rule: as many single steps as there are arrays, each over one border.

    Args:
      arrays: one or more, of one shape and dtype.
      axes: the chain's axes, fastest first; the others are batch axes.

    Returns:
      An array of that shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> ones, tens = jnp.array([1, 2, 3, 4]), jnp.array([10, 20, 30, 40])
      >>> sum_of_predecessors([ones, tens], axes=(0,)).tolist()
      [0, 1, 12, 23]
    """
    *nearer, total = arrays
    for x in reversed(nearer):
        total = x + predecessor(total, axes)
    return predecessor(total, axes)


def to_line(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The chains written out, of shape (batch axes..., n). For small arrays: it reshapes.

    Args:
      x: array of any shape and dtype.
      axes: the chain's axes, fastest first; the others are batch axes.

    Returns:
      An array of shape (batch axes..., n). Worked shape: (5, 2, 3) with axes (1, 2) has batch
      axis 0 and gives (5, 6).

    Example:
      >>> import jax.numpy as jnp
      >>> to_line(jnp.array([[1, 3, 5], [2, 4, 6]]), axes=(0, 1)).tolist()
      [1, 2, 3, 4, 5, 6]
    """
    batch = [axis for axis in range(x.ndim) if axis not in axes]
    x = jnp.transpose(x, (*batch, *reversed(axes)))
    return x.reshape(*x.shape[: len(batch)], -1)
