"""Products of arrays in the arithmetic of a model, with CPUs' matrix units where they have them.

XLA multiplies bfloat16 arrays on CPUs as float32 ones, unless the product is to be float32: then
it takes what the processor has for them (AMX). So there a product is asked for in float32 and
rounded, to the precision of TPUs and GPUs, which sum in float32 too. Such a product has no forward
mode (``jax.jvp``).
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from precond_optax import placement


def einsum(equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """``jnp.einsum`` of two arrays of one dtype, each of whose letters is in two of the three.

    Args:
      equation: as 'btd,dh->bth'.
      x: the first array.
      y: the second.
      dtype: of the product, if not theirs.

    Returns:
      Their product.

    Example:
      >>> einsum('bi,io->bo', jnp.ones((2, 3)), jnp.ones((3, 4))).shape
      (2, 4)
    """
    if x.dtype == y.dtype == jnp.bfloat16 and placement.platform() == 'cpu':
        return _product(equation, jnp.dtype(dtype or x.dtype), x, y)
    return jnp.einsum(equation, x, y, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    first, second, out = _letters(equation)
    if len(first) == len(second) == 2 and first[0] == second[0] and len(x) % 2 == 0:
        # jaxlib 0.10 takes no matrix units where this is the only letter that is summed over.
        x, y = (array.reshape(2, -1, array.shape[1]) for array in (x, y))
        equation = f'...{first},...{second}->{out}'
        other = next(letter for letter in 'xyz' if letter not in equation)
        equation = equation.replace('...', other)
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32).astype(dtype)


def _forward(equation: str, dtype: Any, x: jax.Array, y: jax.Array) -> Any:
    return _product(equation, dtype, x, y), (x, y)


def _backward(equation: str, dtype: Any, arrays: tuple[jax.Array, jax.Array], bar: Any) -> Any:
    del dtype
    first, second, out = _letters(equation)
    x, y = arrays
    bar = bar.astype(x.dtype)  # as the matrix units of accelerators would
    return (
        _product(f'{out},{second}->{first}', x.dtype, bar, y),
        _product(f'{first},{out}->{second}', y.dtype, x, bar),
    )


def _letters(equation: str) -> list[str]:
    return re.split(',|->', equation)


_product.defvjp(_forward, _backward)
