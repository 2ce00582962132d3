"""Arrays that follow a parameter: each of their axes lies as one of the parameter's, or whole.

``axes`` names, for each axis of such an array, the parameter's axis that it belongs to; None for
one that belongs to none, such as the rows of a basis.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Axes: TypeAlias = tuple[int | None, ...]


def along(sharding: Sharding, axes: Axes, ndim: int) -> Sharding:
    """The sharding of an array that follows a parameter.

    Args:
      sharding: the parameter's.
      axes: the parameter's axis that each of the array's axes belongs to, or None.
      ndim: the parameter's number of axes.

    Returns:
      A sharding in the same mesh or on the same device.

    Example:
      >>> import jax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ('x',))
      >>> along(NamedSharding(mesh, P('x')), (None, 0), ndim=2).spec
      P(None, 'x')
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec))
    spec = PartitionSpec(*(None if axis is None else entries[axis] for axis in axes))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _sharding(leaf: Any) -> Sharding | None:
    """Where an array has to be, as far as it is known: while tracing, in explicit meshes alone."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        return sharding if sharding.mesh.explicit_axes else None
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


def zeros(leaf: Any, shape: Sequence[int], dtype: Any, axes: Axes) -> jax.Array:
    """Zeros that follow a parameter, made where they belong.

    Args:
      leaf: the parameter: an array, or anything with a shape.
      shape: of the result.
      dtype: of the result.
      axes: the parameter's axis that each of the result's axes belongs to, or None.

    Returns:
      An array of zeros.
    """
    sharding = _sharding(leaf)
    if sharding is None or isinstance(leaf, jax.core.Tracer):
        return place(jnp.zeros(shape, dtype), leaf, axes)
    return jnp.zeros(shape, dtype, device=along(sharding, axes, jnp.ndim(leaf)))


def place(x: jax.Array, leaf: Any, axes: Axes) -> jax.Array:
    """An array put where it belongs, given where a parameter is; as it is where that is unknown.

    Args:
      x: any array.
      leaf: the parameter: an array, or anything with a shape.
      axes: the parameter's axis that each axis of x belongs to, or None.

    Returns:
      The array.
    """
    sharding = _sharding(leaf)
    if sharding is None:
        return x
    target = along(sharding, axes, jnp.ndim(leaf))
    if isinstance(leaf, jax.core.Tracer):
        return jax.sharding.reshard(x, target)
    return jax.device_put(x, target)


def in_auto_axes(fun: Callable[..., Any], leaf: jax.Array, axes: Any, *args: Any) -> Any:
    """Calls a function whose sharding the compiler finds, in explicit meshes as in others.

    Args:
      fun: of ``args``; it must not refer to other arrays.
      leaf: the parameter, or its gradient.
      axes: for each of the function's results, the parameter's axes that its axes belong to.
      *args: its arguments.

    Returns:
      The results, placed as ``axes`` say where the mesh is explicit.
    """
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    if not explicit:
        return fun(*args)
    sharding = jax.typeof(leaf).sharding
    out = jax.tree.map(
        lambda one: along(sharding, one, leaf.ndim), axes, is_leaf=lambda x: _is_axes(x)
    )
    return jax.sharding.auto_axes(fun, axes=explicit, out_sharding=out)(*args)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(axis is None or isinstance(axis, int) for axis in x)
