"""A run's folder: its configuration, its log, its checkpoints, its summary."""

import hashlib
import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

# How a run is carried out and not what it is: a resumed run may have others. Its numbers are the
# same to rounding (but see ``Task.loss`` about ``accumulation``).
CARRIED_OUT = ('mesh', 'accumulation', 'max_to_keep')
# Fields that configs were given later, and what a run did that was begun without them.
ADDED: dict[str, Any] = {
    'task.compute_dtype': 'float32',
    'task.word_dropout': 0.0,
    'task.log_grad_norm': True,
    'optimizer.impl': 'auto',
    'optimizer.nesterov': False,
    'optimizer.fallback': 'sgd',
    'optimizer.schedules': {},
    'optimizer.layout': [],
    'optimizer.mean_eps': None,
    'optimizer.delayed_graft': False,
}
PACKAGES = ('jax', 'jaxlib', 'optax', 'flax', 'numpy', 'orbax-checkpoint', 'precond_optax')


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON gives it back: tuples become lists, configs in it dictionaries."""

    def inner(value: Any) -> dict[str, Any]:
        return value.to_dict() if hasattr(value, 'to_dict') else dict(value)

    return json.loads(json.dumps(config, default=inner))


def differences(
    held: Mapping[str, Any], task_config: Mapping[str, Any], optimizer_config: Mapping[str, Any]
) -> list[str]:
    """In what a configuration that is held is not that of a run with these, field by field."""
    found = []
    for group, config in (('task', plain(task_config)), ('optimizer', plain(optimizer_config))):
        for key in sorted({*held[group], *config}, key=lambda key: (key != 'name', key)):
            there, given = held[group].get(key, ADDED.get(f'{group}.{key}')), config.get(key)
            if there != given and key not in CARRIED_OUT:
                found.append(f'{group}.{key}: {there!r} there, {given!r} given')
    return found


def check(
    path: str | pathlib.Path, task_config: Mapping[str, Any], optimizer_config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What a folder's ``config.json`` holds, None if there is nothing yet; writes nothing.

    Raises:
      ValueError: if a run of this configuration cannot be there.
    """
    folder = pathlib.Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'--workdir={str(path)!r} is a file, a folder is needed.')
    file = folder / 'config.json'
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f'workdir {folder} is not empty and holds no config.json.')
        return None
    try:
        held = json.loads(file.read_text())
        held['task'].items(), held['optimizer'].items(), held['environment'].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{file} is not the configuration of a run: {error!r}.') from error
    if found := differences(held, task_config, optimizer_config):
        raise ValueError(
            f'workdir {folder} holds a run of another configuration ('
            + '; '.join(found)
            + '). Choose another --workdir, or remove this one.'
        )
    return held


def environment() -> dict[str, Any]:
    """Versions, device and code of a run, so that its numbers can be traced."""
    import importlib.metadata

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    try:
        here = pathlib.Path(__file__).parent
        commit = subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=12'],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        'python': platform.python_version(),
        'versions': versions,
        'device': jax.devices()[0].device_kind,
        'num_devices': jax.device_count(),
        'num_processes': jax.process_count(),
        'num_cpus': os.cpu_count(),
        'commit': commit,
        **({'xla_flags': flags} if (flags := os.environ.get('XLA_FLAGS')) else {}),
    }


class Workdir:
    """Opens a folder for one configuration and keeps everything that a run leaves there.

    Of several processes, which must see one folder, the first writes what is not a checkpoint.

    Args:
      path: the folder; made if it is not there.
      task_config: the task's configuration; ``max_to_keep`` checkpoints are kept, 1 if absent.
      optimizer_config: the optimizer's.
      artifacts: further files of the run.

    Raises:
      ValueError: if the folder holds another configuration, or other artifacts, or another process
        has other ones.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        task_config: Mapping[str, Any],
        optimizer_config: Mapping[str, Any],
        artifacts: Mapping[str, bytes] | None = None,
    ) -> None:
        self.path = pathlib.Path(path).absolute()
        self._first = jax.process_index() == 0

        def claim() -> None:
            held = check(path, task_config, optimizer_config)
            self._claim(held, {'task': plain(task_config), 'optimizer': plain(optimizer_config)})
            self._keep(artifacts or {})

        _same_in_all_processes(artifacts or {})
        _first_process(claim)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=task_config.get('max_to_keep', 1),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # of saves that a kill cut off
        )
        self._manager = ocp.CheckpointManager(self.path / 'checkpoints', options=options)

    def __enter__(self) -> 'Workdir':
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()  # waits for a checkpoint that is being written

    def _claim(self, held: dict[str, Any] | None, config: dict[str, Any]) -> None:
        """Writes the configuration, or where the run that is held goes on."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / 'config.json'
        carried_out = {k: config['task'][k] for k in CARRIED_OUT if k in config['task']}
        here = {**environment(), **({'carried_out': carried_out} if carried_out else {})}
        if held is None:
            write_json(file, {**config, 'environment': here})
            return
        known = [held['environment'], *held.get('resumed_in', [])]
        if here not in known and not (self.path / 'summary.json').exists():
            write_json(file, {**held, 'resumed_in': [*known[1:], here]})

    def _keep(self, artifacts: Mapping[str, bytes]) -> None:
        """Writes the artifacts, or checks that they are those that are there."""
        for name, content in artifacts.items():
            file = self.path / name
            if not file.exists():
                partial = file.with_suffix(file.suffix + '.partial')
                partial.write_bytes(content)
                os.replace(partial, file)
            elif file.read_bytes() != content:
                raise ValueError(
                    f'{file} is not what the data give now: the run began with others, and cannot '
                    'go on with these.'
                )

    def log(self, row: dict[str, Any]) -> None:
        """Appends a line to ``metrics.jsonl``; on the disk when this returns."""
        if not self._first:
            return
        with open(self.path / 'metrics.jsonl', 'a', encoding='utf-8') as file:
            file.write(json.dumps(_finite(row)) + '\n')
            file.flush()
            os.fsync(file.fileno())

    def truncate_metrics(self, step: int) -> None:
        """Drops log lines after ``step``: what was logged after the checkpoint is run again."""
        if not self._first:
            return
        kept = [json.dumps(row) + '\n' for row in read_metrics(self.path) if row['step'] <= step]
        write_text(self.path / 'metrics.jsonl', ''.join(kept))

    def save(self, step: int, carry: Any, seconds: float) -> None:
        """Saves a checkpoint: read from the devices when this returns, written in the background.

        The last one on the disk is whole until this one is. Waits for the one before.
        """
        if self._manager.latest_step() == step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                carry=ocp.args.StandardSave(carry), clock=ocp.args.JsonSave({'seconds': seconds})
            ),
        )

    def latest_step(self) -> int:
        """The step of the last checkpoint, 0 if there is none."""
        return self._manager.latest_step() or 0

    def restore(self, like: Any) -> tuple[Any | None, float]:
        """The last checkpoint and its clock in seconds; ``(None, 0.0)`` if there is none.

        ``like`` says with ``ShapeDtypeStruct`` where each array shall lie, wherever it was.
        """
        step = self._manager.latest_step()
        if step is None:
            return None, 0.0
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                carry=ocp.args.StandardRestore(like), clock=ocp.args.JsonRestore()
            ),
        )
        return restored['carry'], restored['clock']['seconds']

    def summary(self) -> dict[str, Any] | None:
        """The summary of a run that is through, else None."""
        file = self.path / 'summary.json'
        return json.loads(file.read_text()) if file.exists() else None

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Writes ``summary.json``: the run is through, and its last checkpoint on the disk."""
        self._manager.wait_until_finished()
        if not self._first:
            return summary
        write_json(self.path / 'summary.json', summary)
        return summary


def _same_in_all_processes(artifacts: Mapping[str, bytes]) -> None:
    """Raises ``ValueError``, in all of them, if the files differ: each has read its own data."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(repr(sorted(artifacts.items())).encode()).digest()
    own = np.frombuffer(digest, np.uint32)
    if (others := multihost_utils.process_allgather(own) != own).any():
        raise ValueError(
            f'process {jax.process_index()} has other {sorted(artifacts)} than processes '
            f'{np.flatnonzero(others.any(axis=-1)).tolist()}: all must see the same data, and '
            'have the same versions of what reads them.'
        )


def _first_process(action: Callable[[], None]) -> None:
    """Does something in the first process; if it raises there, all do."""
    told = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as error:  # whatever it is: the others wait to be told
            told = error
    if jax.process_count() > 1:
        refused = multihost_utils.broadcast_one_to_all(np.array(told is not None))
        if refused and told is None:
            raise ValueError('the first process cannot use the workdir, see there.')
    if told is not None:
        raise told


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a workdir's log, without one that is being written or that a kill cut off."""
    file = path / 'metrics.jsonl'
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_json(file: pathlib.Path, content: Any) -> None:
    """Writes strict JSON, whole or not at all; numbers that are not finite become null."""
    write_text(file, json.dumps(_finite(content), indent=2) + '\n')


def save_tables(folder: str | None, name: str, content: dict[str, Any], text: str) -> None:
    """Prints ``text``; with a folder, also writes NAME.json, the raw numbers, and NAME.md."""
    print(text)
    if folder:
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / f'{name}.json', {'environment': environment(), **content})
        write_text(path / f'{name}.md', text + '\n')


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes text, whole or not at all: a kill leaves the old file or the new one."""
    partial = file.with_suffix(file.suffix + '.partial')
    partial.write_text(text)
    os.replace(partial, file)
