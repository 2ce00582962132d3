r"""The chain: the entries of an array lined up one after another, without a reshape.

``axes`` names the array's axes from the fastest running to the slowest. Axes that it leaves
out are batch axes: each of their indices has a chain of its own. For ``x`` of shape (2, 3),

    axes (0, 1), order 'F':  x00 x10 x01 x11 x02 x12
    axes (1, 0), order 'C':  x00 x01 x02 x10 x11 x12

and ``successor(x, (0, 1))`` is, in place of each entry, the next one along the first line:

    x00 x01 x02       x10 x11 x12
    x10 x11 x12   ->  x01 x02 0

Flattening a sharded array makes XLA gather it. A shift by ``lax.pad`` with a negative edge on
one side and a positive one on the other moves the border only, and is the one form of a shift
that explicitly sharded axes take as well.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def _pad(x: jax.Array, axis: int, by: int) -> jax.Array:
    """``x`` moved along an axis, zeros behind it."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (by, -by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _shift(x: jax.Array, axes: Sequence[int], steps: int) -> jax.Array:
    """What stands ``steps`` entries on (or back, if negative); zero past the chain's ends."""
    if steps == 0:
        return x
    if not axes:
        return jnp.zeros_like(x)
    fastest, *slower = axes
    size = x.shape[fastest]
    if not slower:
        return jnp.zeros_like(x) if abs(steps) >= size else _pad(x, fastest, -steps)
    # Past the border the chain goes on at the other border, one line on along the slower axes:
    # those rows alone are moved over here, the rest is zero, as the other term is in their place.
    # The sum puts them together where a select would need a mask sharded like x, and the array
    # keeps its full shape where a few rows could not be sharded.
    lines, rest = divmod(steps, size)
    if rest == 0:
        return _shift(x, slower, lines)
    inner = _shift(_pad(x, fastest, -rest), slower, lines)
    return inner + _shift(_pad(x, fastest, size - rest), slower, lines + 1)


def successor(x: jax.Array, axes: Sequence[int], steps: int = 1) -> jax.Array:
    """The entry ``steps`` on along the chain in place of each entry, zero past its end.

    Args:
      x: array of any shape and numeric dtype.
      axes: the chain's axes, fastest first; the others are batch axes.
      steps: how far, >= 0.

    Returns:
      An array of the shape and dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> successor(jnp.array([[1, 3, 5], [2, 4, 6]]), axes=(0, 1)).tolist()
      [[2, 4, 6], [3, 5, 0]]
    """
    return _shift(x, axes, steps)


def predecessor(x: jax.Array, axes: Sequence[int], steps: int = 1) -> jax.Array:
    """The entry ``steps`` before along the chain in place of each entry, zero before its start.

    Args:
      x: array of any shape and numeric dtype.
      axes: the chain's axes, fastest first; the others are batch axes.
      steps: how far, >= 0.

    Returns:
      An array of the shape and dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> predecessor(jnp.array([[1, 3, 5], [2, 4, 6]]), axes=(0, 1)).tolist()
      [[0, 2, 4], [1, 3, 5]]
    """
    return _shift(x, axes, -steps)


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
