"""Clear errors for wrong arguments: what was given and what is allowed.

Only Python and NumPy numbers can be checked at construction. A traced value or a
``jax.Array`` (as ``optax.inject_hyperparams`` passes) is let through: looking at it would
stop the trace or wait for the device.
"""

import numbers
from collections.abc import Collection
from typing import Any, TypeAlias

import jax
import numpy as np

# A hyperparameter: a number, or a traced one.
Scalar: TypeAlias = float | jax.Array


def is_static_zero(value: Any) -> bool:
    """Whether ``value`` is a zero known while tracing, so that its term can be left out."""
    return isinstance(value, (numbers.Number, np.number)) and value == 0


def in_range(
    name: str, value: Any, low: float, high: float = float('inf'), *, closed: bool = False
) -> None:
    """Raises ``ValueError`` unless ``low <= value < high``, or ``<= high`` where closed."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return
    allowed = f'[{low:g}, {high:g}' + (']' if closed else ')')
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.number)):
        raise ValueError(f'{name} must be a number in {allowed}, got {value!r}.')
    if not (low <= float(value) < high or (closed and float(value) == high)):
        raise ValueError(f'{name} must be in {allowed}, got {value!r}.')


def learning_rate(value: Any) -> None:
    """Raises ``ValueError`` unless this is a schedule or a number that is not negative."""
    if not callable(value):
        in_range('learning_rate', value, 0)


def positive(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``0 < value < inf``."""
    if is_static_zero(value):
        raise ValueError(f'{name} must be > 0, got {value!r}.')
    in_range(name, value, 0)


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``allowed``."""
    if isinstance(value, (jax.Array, np.ndarray)) or value not in allowed:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, allowed))}, got {value!r}.')


def static_int(name: str, value: Any, low: int) -> None:
    """Raises ``ValueError`` unless ``value`` is a plain integer ``>= low``.

    An integer that decides the shape of the state cannot be traced: the message names the
    ``static_args`` that ``optax.inject_hyperparams`` needs.
    """
    if isinstance(value, jax.Array):
        raise ValueError(
            f'{name} must be a Python int, got {value!r}: it decides what the state holds and '
            f"cannot be traced. With optax.inject_hyperparams, pass static_args=('{name}',)."
        )
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < low:
        raise ValueError(f'{name} must be an integer >= {low}, got {value!r}.')


def flag(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f'{name} must be True or False, got {value!r}.')


def float_dtype(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is None or a real floating dtype."""
    if value is None:
        return
    if isinstance(value, (jax.Array, np.ndarray)):
        raise ValueError(
            f'{name} must be None or a floating dtype, got {value!r}. optax.inject_hyperparams '
            f"takes a dtype for a schedule and calls it: pass static_args=('{name}',)."
        )
    try:
        is_float = jax.numpy.issubdtype(jax.numpy.dtype(value), jax.numpy.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError(f'{name} must be None or a floating dtype, got {value!r}.')


def real_scalar(name: str, value: Any) -> jax.Array:
    """The value as an array of shape (); raises ``ValueError`` unless it is one real number."""
    try:
        array = jax.numpy.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{name} must be a scalar, got {value!r}.') from error
    if array.shape or jax.numpy.iscomplexobj(array):
        raise ValueError(
            f'{name} must be a real scalar, got {array.dtype} of shape {array.shape}.'
        )
    return array
