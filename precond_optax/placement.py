"""Arrays that follow a parameter: each of their axes lies as one of the parameter's, or whole.

``axes`` names, for each axis of such an array, the parameter's axis that it belongs to; None for
one that belongs to none, such as the rows of a basis. Where the number of devices along the
parameter's axis does not divide the array's, such as a few blocks of many rows, it is whole, or
divided by the first of the mesh's axes that lie along the parameter's.

A tuple names further axes of the parameter after that one. Devices along these, which would all
hold the same, divide what the array's axis has left, as far as that goes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

Axes: TypeAlias = tuple[int | tuple[int, ...] | None, ...]


class Follower(NamedTuple):
    """What is known of an array that follows a parameter."""

    shape: tuple[int, ...]
    axes: Axes


def names_along(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    """The names of the mesh's axes that share out each axis of an array."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec]
    names = [tuple(name for name in entry if name is not None) for entry in entries]
    return names + [()] * (ndim - len(names))


def along(sharding: Sharding, ndim: int, follower: Follower) -> Sharding:
    """The sharding of an array that follows a parameter.

    Args:
      sharding: the parameter's.
      ndim: the parameter's number of axes.
      follower: the array's shape, and the parameter's axis that each of its axes belongs to.

    Returns:
      A sharding in the same mesh or on the same device.

    Example:
      >>> import jax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ('x',))
      >>> along(NamedSharding(mesh, P('x')), 2, Follower((4, 16), (None, 0))).spec
      P(None, 'x')
      >>> along(NamedSharding(mesh, P('x', None)), 2, Follower((16, 4), ((1, 0), None))).spec
      P('x', None)
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh, names = sharding.mesh.shape, names_along(sharding, ndim)
    belongs = [(axis,) if isinstance(axis, int) else axis or () for axis in follower.axes]

    def parts(given: Sequence[str]) -> int:
        return math.prod(mesh[name] for name in given)

    spec: list[tuple[str, ...]] = []
    for size, axes in zip(follower.shape, belongs, strict=True):
        own = names[axes[0]] if axes else ()
        while size % parts(own):  # by fewer devices rather than by none
            own = own[:-1]
        spec.append(own)
    taken = {name for own in spec for name in own}
    for position, axes in enumerate(belongs):
        for name in (name for axis in axes[1:] for name in names[axis]):
            more = (*spec[position], name)
            if name not in taken and follower.shape[position] % parts(more) == 0:
                spec[position] = more
                taken.add(name)
    parts_of = [own[0] if len(own) == 1 else own or None for own in spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*parts_of), memory_kind=sharding.memory_kind)


def platform() -> str:
    """What a trace is for: the platform of ``jax.set_mesh``'s mesh, which need not be here.

    Example:
      >>> platform() == jax.default_backend()
      True
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


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
    target = along(sharding, jnp.ndim(leaf), Follower(tuple(shape), axes))
    return jnp.zeros(shape, dtype, device=target)


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
    target = along(sharding, jnp.ndim(leaf), Follower(x.shape, axes))
    if isinstance(leaf, jax.core.Tracer):
        return jax.sharding.reshard(x, target)
    return jax.device_put(x, target)


def in_auto_axes(
    fun: Callable[..., Any], leaf: jax.Array, results: Sequence[Follower], *args: Any
) -> Any:
    """Calls a function whose sharding the compiler finds, in explicit meshes as in others.

    Args:
      fun: of ``args``, returns a tuple; it must not refer to other arrays.
      leaf: the parameter, or its gradient.
      results: for each of the function's results, its shape and the axes that it follows.
      *args: its arguments.

    Returns:
      The results, placed as ``results`` say where the mesh is explicit.
    """
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    if not explicit:
        return fun(*args)
    sharding = jax.typeof(leaf).sharding
    out = tuple(along(sharding, leaf.ndim, result) for result in results)
    return jax.sharding.auto_axes(fun, axes=explicit, out_sharding=out)(*args)


def has_known_parts(leaf: jax.Array) -> bool:
    """Whether an array's type tells which part of it each device has, or nothing is shared out.

    It does in meshes whose axes are all explicit. Without any mesh in sight, as in a plain jit, an
    array is taken to lie on one device. Of what is manual we know no more than the caller's part.
    """
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        sharding = leaf.sharding
        if len(sharding.device_set) > 1 and not isinstance(sharding, NamedSharding):
            return False
    mesh = jax.typeof(leaf).sharding.mesh
    if mesh.empty:  # that of its caller, which a jit would give it
        mesh = jax.sharding.get_abstract_mesh()
    kinds = set(mesh.axis_types)
    return kinds in (set(), {AxisType.Explicit}) or (kinds == {AxisType.Auto} and mesh.size == 1)


def on_each_part(
    fun: Callable[..., Any],
    leaf: jax.Array,
    results: Sequence[Follower],
    *args: tuple[jax.Array, Follower],
) -> Any:
    """Calls a function of what one device has, of a leaf that `has_known_parts`.

    Args:
      fun: of, for each axis of the leaf, the names of the mesh's axes that share it out, and of
        the device's parts of ``args``; returns a tuple of such parts.
      leaf: the parameter, or its gradient.
      results: for each of the function's results, its whole shape and the axes that it follows.
      *args: its arguments, with the same.

    Returns:
      The whole results.
    """
    sharding: Any = jax.typeof(leaf).sharding
    if not sharding.mesh.explicit_axes:
        return fun([()] * leaf.ndim, *(x for x, _ in args))

    def target(follower: Follower) -> Any:
        return along(sharding, leaf.ndim, follower)

    parts = jax.shard_map(
        functools.partial(fun, names_along(sharding, leaf.ndim)),
        mesh=sharding.mesh,
        in_specs=tuple(target(follower).spec for _, follower in args),
        out_specs=tuple(target(follower).spec for follower in results),
        check_vma=False,  # of a kernel it knows nothing
    )
    # A state that lies otherwise is moved; `shard_map` would refuse it.
    return parts(*(jax.sharding.reshard(x, target(follower)) for x, follower in args))


def like(leaf: Any) -> Follower:
    """That of an array of the parameter's own shape."""
    return Follower(jnp.shape(leaf), tuple(range(jnp.ndim(leaf))))
