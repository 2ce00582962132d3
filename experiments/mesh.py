"""The mesh of a run, and the one table that says which of its axes an array's axes lie along.

A mesh has three axes. ``data`` holds whole copies of the model, ``fsdp`` divides the batch and
each parameter, ``tensor`` divides the work of a layer. Models name the axes of their arrays by
what they are; `RULES` alone says where those go.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

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
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)  # type: ignore[arg-type]


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


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Asks the compiler for the partition of `spec`, in the mesh of ``jax.set_mesh``.

    Where there is no mesh, the array as it is: a model need not know whether it is divided.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))
