"""Flags of one run: on which devices and processes, and what is measured of it.

Every process runs the same command; see ``experiments/LAUNCH.md`` for the lines of each launcher.
"""

import contextlib
import logging as python_logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import app, flags

from experiments import mesh as mesh_lib
from experiments import telemetry

_DISTRIBUTED = flags.DEFINE_bool(
    'distributed',
    False,
    'One process of several. On TPU pods, under Slurm, Open MPI and Kubernetes JAX finds the '
    'others; elsewhere give the next three flags too.',
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator_address', None, 'With --distributed: HOST:PORT of process 0.'
)
_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'With --distributed: of all hosts.', lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    'process_id', None, 'With --distributed: which of them this is, from 0.', lower_bound=0
)
_MESH = flags.DEFINE_list(
    'mesh',
    None,
    f'Sizes of {", ".join(mesh_lib.AXES)}, such as 2,-1,1, in place of task.mesh; -1: the rest.',
)
_PEAK = flags.DEFINE_float('peak_flops', None, 'FLOP/s of one device, for the MFU.')
_OPTIMIZER = flags.DEFINE_bool(
    'measure_optimizer', False, "Time the optimizer alone first, and log its share of a step's."
)
_TENSORBOARD = flags.DEFINE_bool('tensorboard', False, 'Also write WORKDIR/tensorboard.')
_PROFILE = flags.DEFINE_list(
    'profile_steps', None, 'START,COUNT: a trace of these steps goes to WORKDIR/profile.'
)


def refuse() -> None:
    """Raises ``app.UsageError`` if one of these flags is given to a driver of several runs."""
    defined = flags.FLAGS.flags_by_module_dict()[__name__]
    if given := sorted(f'--{flag.name}' for flag in defined if flag.present):
        raise app.UsageError(f'only experiments.main, a single run, takes {", ".join(given)}')


def _integers(name: str, given: list[str], count: int) -> tuple[int, ...]:
    """Raises ``ValueError`` if a list is not of so many integers."""
    with contextlib.suppress(ValueError):
        if len(given) == count:
            return tuple(int(text) for text in given)
    raise ValueError(f'--{name} must be {count} integers, got {",".join(given)!r}.')


def options() -> telemetry.Options:
    """What is measured.

    Raises:
      ValueError: for wrong flags.
    """
    first = _PROFILE.value and _integers('profile_steps', _PROFILE.value, 2)
    return telemetry.Options(
        peak_flops=_PEAK.value,
        measure_optimizer=_OPTIMIZER.value,
        tensorboard=_TENSORBOARD.value,
        profile=(first[0], first[1]) if first else None,
    )


def with_mesh(config: Any) -> Mapping[str, Any]:
    """A task's config with the mesh of the flag, if it is given.

    Raises:
      ValueError: for a wrong flag.
    """
    if _MESH.value is None:
        return config
    sizes = _integers('mesh', _MESH.value, len(mesh_lib.AXES))
    with config.unlocked():
        config.mesh = dict(zip(mesh_lib.AXES, sizes, strict=True))
    return config


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Within it the processes of a run know each other, if the flags say that there are several.

    Raises:
      ValueError: for flags that do not go together, or if JAX does not find the others.
    """
    by_hand = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if not _DISTRIBUTED.value:
        if any(value is not None for value in by_hand):
            raise ValueError(
                '--coordinator_address, --num_processes and --process_id go with --distributed.'
            )
        yield
        return
    python_logging.getLogger('jax._src.distributed').setLevel(python_logging.WARNING)
    jax.distributed.initialize(*by_hand)
    yield
    jax.distributed.shutdown()  # waits for the others
