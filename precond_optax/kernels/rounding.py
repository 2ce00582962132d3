"""Stochastic rounding: to the dtype's neighbours, each with the odds that keep the mean."""

from typing import Any

import jax
import jax.numpy as jnp


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
    # A bfloat16 is the upper half of a float32: noise below it carries with the right odds.
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=_sharding(x))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise.astype(jnp.uint32)
    up = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
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
