"""A run's folder: its configuration, its log, its checkpoints, its summary."""

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
PACKAGES = ('jax', 'jaxlib', 'optax', 'flax', 'numpy', 'orbax-checkpoint', 'precond_optax')


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON gives it back: tuples become lists, configs in it dictionaries."""

    def inner(value: Any) -> dict[str, Any]:
        return value.to_dict() if hasattr(value, 'to_dict') else dict(value)

    return json.loads(json.dumps(config, default=inner))


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
      ValueError: if the folder holds another configuration, or other artifacts.
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
            if self.path.exists() and not self.path.is_dir():
                raise ValueError(f'--workdir={str(path)!r} is a file, a folder is needed.')
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim({'task': plain(task_config), 'optimizer': plain(optimizer_config)})
            self._keep(artifacts or {})

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

    def _claim(self, config: dict[str, Any]) -> None:
        """Writes the configuration, or checks that the folder holds this very one."""
        file = self.path / 'config.json'
        carried_out = {k: config['task'][k] for k in CARRIED_OUT if k in config['task']}
        here = {**environment(), **({'carried_out': carried_out} if carried_out else {})}
        if not file.exists():
            if any(self.path.iterdir()):
                raise ValueError(f'workdir {self.path} is not empty and holds no config.json.')
            write_json(file, {**config, 'environment': here})
            return
        try:
            held = json.loads(file.read_text())
            known = [held['environment'], *held.get('resumed_in', [])]
            held['task'].items(), held['optimizer'].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{file} is not the configuration of a run: {error!r}.') from error
        differences = [
            f'{group}.{key}: {held[group].get(key)!r} there, {config[group].get(key)!r} given'
            for group in ('task', 'optimizer')
            for key in sorted({*held[group], *config[group]})
            if held[group].get(key) != config[group].get(key) and key not in CARRIED_OUT
        ]
        if differences:
            raise ValueError(
                f'workdir {self.path} holds a run of another configuration ('
                + '; '.join(differences)
                + '). Choose another --workdir, or remove this one.'
            )
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
                raise ValueError(f'{file} is not what the data give now; the run cannot go on.')

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


def _first_process(action: Callable[[], None]) -> None:
    """Does something in the first process; all raise ``ValueError`` if it does."""
    told = None
    if jax.process_index() == 0:
        try:
            action()
        except ValueError as error:
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
