"""Stochastic rounding: to the dtype's neighbours, each with the odds that keep the mean."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_SHIFTS = (16, 15, 15)
_FACTORS = (0x21F0AAAD, 0xD35A2D97)  # of a mixer of 32 bits with little bias, found by C. Wellons


def stochastic_round(key: jax.Array, x: jax.Array) -> jax.Array:
    """``x`` in bfloat16, rounded up or down at random so that its mean is ``x``.

    A running mean that is stored in bfloat16 (8 bits of precision) loses each increment below
    1/256 of itself when it is rounded to nearest, and stands still. Rounded so, it moves on in
    the mean.

    Args:
      key: a PRNG key.
      x: float32 array of any shape.

    Returns:
      A bfloat16 array: exactly ``x`` where that is representable; else its neighbour above with
      the probability (x - below) / (above - below), and the one below otherwise.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.full(10000, 1 + 1 / 512)  # a quarter of the way from 1 to 1 + 1/128
      >>> rounded = stochastic_round(jax.random.key(0), x)
      >>> sorted({*rounded.tolist()}), f'{(rounded > 1).mean():.2f}'
      ([1.0, 1.0078125], '0.25')

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015: section 3.
    """
    return round_by(bits(seeds(key), positions(x.shape, sharding=_sharding(x))), x)


def seeds(key: jax.Array) -> jax.Array:
    """Two numbers of 32 bits from a key: what `bits` takes.

    Example:
      >>> import jax
      >>> seeds(jax.random.key(0)).shape
      (2,)
    """
    return jax.random.bits(key, (2,), jnp.uint32)


def positions(
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
    start: jax.typing.ArrayLike = 0,
    sharding: Any = None,
) -> jax.Array:
    """The numbers of an array's entries, row by row, modulo 2^32.

    Args:
      shape: of the array, or of a part of it.
      strides: how far apart neighbours along each axis are; None: in an array of that shape.
      start: the number of the first entry.
      sharding: the result's, in explicit meshes.

    Returns:
      A uint32 array of that shape.

    Example:
      >>> positions((2, 3)).tolist()
      [[0, 1, 2], [3, 4, 5]]
      >>> positions((2, 2), strides=(3, 1), start=1).tolist()  # the last columns of these
      [[1, 2], [4, 5]]
    """
    if strides is None:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    found = jnp.full(shape, start, jnp.uint32, out_sharding=sharding)
    for axis, stride in enumerate(strides):
        steps = lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
        found = found + steps * jnp.uint32(stride % 2**32)
    return found


def bits(seeds: Sequence[jax.Array] | jax.Array, index: jax.Array) -> jax.Array:
    """A random number below 2^16 for each index, of the seeds and the index alone.

    A few operations on each entry, which fuse with what they are for, in any kernel.

    Args:
      seeds: two of 32 bits.
      index: uint32 array.

    Returns:
      A uint32 array of its shape.
    """
    x = index ^ seeds[0]
    x = (x ^ (x >> _SHIFTS[0])) * jnp.uint32(_FACTORS[0])
    x = (x ^ (x >> _SHIFTS[1])) + seeds[1]
    x = (x ^ (x >> _SHIFTS[2])) * jnp.uint32(_FACTORS[1])
    return x >> 16


def round_by(noise: jax.Array, x: jax.Array) -> jax.Array:
    """A float32 array in bfloat16: up where noise, below 2^16, is above what is to be cut off."""
    # A bfloat16 is the upper half of a float32: noise below it carries with the right odds.
    raised = lax.bitcast_convert_type(x, jnp.uint32) + noise
    up = lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32)
    # The carry of a NaN whose lower bits are set could make it a zero.
    return jnp.where(jnp.isnan(x), x, up).astype(jnp.bfloat16)


def stored_rounding(stored: Any, dtype: Any) -> float:
    """The relative rounding of what is stored in a lower dtype than the arithmetic's, or 0.

    Args:
      stored: the dtype of storage; None: the arithmetic's.
      dtype: the arithmetic's.

    Returns:
      The rounding unit of ``stored``, or 0 where it has as many bits as ``dtype``.

    Example:
      >>> stored_rounding('bfloat16', 'float32'), stored_rounding(None, 'float32')
      (0.0078125, 0.0)
    """
    kept = jnp.finfo(stored or dtype)
    return float(kept.eps) if kept.bits < jnp.finfo(dtype).bits else 0.0


def _sharding(x: jax.Array) -> Any:
    """The sharding in the type of ``x``, which explicit meshes want matched; None elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.typeof(x).sharding if mesh.are_all_axes_explicit else None
