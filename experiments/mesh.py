"""The mesh of a run, and the one table that says which of its axes an array's axes lie along.

A mesh has three axes. ``data`` holds whole copies of the model, ``fsdp`` divides the batch and
each parameter, ``tensor`` divides the work of a layer. Models name the axes of their arrays by
what they are; `RULES` alone says where those go.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')

# From what an axis of an array is to the mesh axes that divide it; None: it is whole.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    'batch': ('data', 'fsdp'),
    'length': None,
    'layers': None,
    'embed': 'fsdp',  # of parameters
    'features': None,  # the same axis of activations
    'heads': 'tensor',
    'head_dim': None,
    'mlp': 'tensor',
    'vocab': 'tensor',
}


def make(config: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, its axes in the order of `AXES`.

    Args:
      config: the size of each axis; one of them may be -1, for what is left of the devices.
      devices: all of them, of all processes. None: ``jax.devices()``.

    Returns:
      A mesh whose axes are Auto.

    Raises:
      ValueError: if the sizes are not integers, or their product is not the number of devices.

    Example:
      >>> make({'data': 1, 'fsdp': -1, 'tensor': 1}).shape['data']
      1
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: config.get(name) for name in AXES}
    text = f'task.mesh must give integers >= 1, or -1 once, for {AXES}, got {dict(config)}'
    if set(config) != set(AXES) or not all(
        isinstance(n, int) and not isinstance(n, bool) and (n >= 1 or n == -1)
        for n in sizes.values()
    ):
        raise ValueError(f'{text}.')
    if (free := [name for name, size in sizes.items() if size == -1]) and len(free) == 1:
        others = math.prod(size for name, size in sizes.items() if name != free[0])  # type: ignore[misc]
        sizes[free[0]] = len(devices) // others
    if len(free) > 1 or math.prod(sizes.values()) != len(devices):  # type: ignore[arg-type]
        raise ValueError(f'{text}; their product must be {len(devices)}, the number of devices.')
    shape = tuple(sizes[name] for name in AXES)
    kinds = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, kinds, devices=devices)  # type: ignore[arg-type]
    except NotImplementedError:  # no product of the torus' own axes: then of parts of them
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)  # type: ignore[arg-type]
        return Mesh(array, AXES, axis_types=kinds)


def of(config: Mapping[str, Any]) -> Mesh | None:
    """The mesh of a task's config, None if it runs on one device.

    Without ``mesh`` in the config one process has one device; several divide the batch among all
    their devices, and each device holds all parameters.

    Raises:
      ValueError: see `make`.
    """
    given = config.get('mesh')
    if given is None:
        if jax.process_count() == 1:
            return None
        given = {'data': -1, 'fsdp': 1, 'tensor': 1}
    return make(dict(given))


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array whose axes are these, by `RULES`; None: whole along that axis.

    Raises:
      ValueError: for a name that has no rule.

    Example:
      >>> tuple(spec(('layers', 'embed', 'mlp')))
      (None, 'fsdp', 'tensor')
    """
    if unknown := sorted({name for name in names if name is not None} - set(RULES)):
        raise ValueError(f'no rule for the axes {unknown}; there are {sorted(RULES)}.')
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def _fitting(mesh: Mesh | AbstractMesh, names: Sequence[str | None], shape: Any) -> PartitionSpec:
    """`spec`, but whole along an axis that its mesh axes do not divide."""
    if len(names) != len(shape):
        raise ValueError(f'{tuple(names)} names {len(names)} axes of an array of shape {shape}.')

    def entry(size: int, given: Any) -> Any:
        axes = given if isinstance(given, tuple) else () if given is None else (given,)
        return None if size % math.prod(mesh.shape[axis] for axis in axes) else given

    return PartitionSpec(*map(entry, shape, spec(names)))


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Asks the compiler for the partition of `spec`, in the mesh of ``jax.set_mesh``.

    Where there is no mesh, the array as it is: a model need not know whether it is divided. An
    axis that its mesh axes do not divide is whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(mesh, names, x.shape))


def whole(mesh: Mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """Rows of the first axis on their devices."""
    return NamedSharding(mesh, spec(('batch',)))


def rows(mesh: Mesh) -> int:
    """In how many parts a batch is cut."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def shardings(mesh: Mesh, params: Any, logical_axes: Any = None) -> Any:
    """Where parameters lie.

    Args:
      mesh: of the run.
      params: arrays or their shapes.
      logical_axes: a tree like theirs, of tuples with one name of `RULES` or None for each axis;
        None in place of a tuple, or of the tree: whole.

    Returns:
      A tree of shardings. An axis that its mesh axes do not divide is whole, see `left_whole`.

    Raises:
      ValueError: for names that do not fit, with the parameter's path.
    """
    places = [
        NamedSharding(mesh, PartitionSpec() if names is None else _at(mesh, path, names, shape))
        for path, shape, names in _named(params, logical_axes)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), places)


def left_whole(mesh: Mesh, params: Any, logical_axes: Any) -> list[str]:
    """The axes that a rule would divide and that are whole all the same, for people to read."""
    found = []
    for path, shape, names in _named(params, logical_axes):
        if names is None:
            continue
        for size, name, entry in zip(shape, names, _at(mesh, path, names, shape), strict=True):
            if name is not None and RULES[name] is not None and entry is None:
                found.append(f'{path}: {name!r}, {size} entries, on {RULES[name]!r}')
    return found


def _at(mesh: Mesh, path: str, names: Sequence[str | None], shape: Any) -> PartitionSpec:
    try:
        return _fitting(mesh, names, shape)
    except ValueError as error:
        raise ValueError(f'logical_axes of {path}: {error}') from error


def _named(params: Any, logical_axes: Any) -> Iterator[tuple[str, Any, Any]]:
    """Path, shape and names of each parameter."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names: list[Any] = [None] * len(leaves)
    if logical_axes is not None:
        names = structure.flatten_up_to(logical_axes)  # type: ignore[attr-defined]
    for (path, leaf), own in zip(leaves, names, strict=True):
        yield jax.tree_util.keystr(path, simple=True, separator='/'), leaf.shape, own


def part(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of each batch this process reads, and how many parts there are.

    As many as processes, unless one row of the mesh's batch is cut over several of them by the
    ``tensor`` axis: these read the same part.

    Raises:
      ValueError: if the processes' devices have parts of each other's rows.
    """
    if mesh is None:
        return 0, 1
    held: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = batch(mesh).devices_indices_map((rows(mesh),))
    for device, (own,) in places.items():
        held.setdefault(device.process_index, set()).add(own.start or 0)
    parts = sorted({tuple(sorted(own)) for own in held.values()})
    if len({len(own) for own in parts}) > 1 or sum(map(len, parts)) != rows(mesh):
        raise ValueError(
            f'task.mesh {dict(mesh.shape)} cuts the batch across the processes, which have its '
            f'rows {parts}; make data * fsdp a multiple or a divisor of {jax.process_count()}.'
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def reader(config: Mapping[str, Any]) -> tuple[int, int]:
    """`part` in the mesh of a task's config: for its stream."""
    return part(of(config))
