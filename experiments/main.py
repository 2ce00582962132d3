"""Trains a task with an optimizer.

python -m experiments.main --task=configs/tasks/autoencoder.py \\
    --optimizer=configs/optimizers/sonew.py --workdir=DIR --data_dir=DATA \\
    --task.epochs=10 --optimizer.learning_rate=3e-3

On several hosts every process runs this, with --distributed; see experiments/LAUNCH.md. A SIGTERM
ends the run after the current segment, saved, with exit code 143; the same command resumes it.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import launch, train

config_flags.DEFINE_config_file('task', None, 'Config file of the task.')
config_flags.DEFINE_config_file('optimizer', None, 'Config file of the optimizer.')
flags.DEFINE_string('workdir', None, 'Folder of the run; resumed if it holds one.')
flags.DEFINE_string('data_dir', None, 'Folder of the data set, if it needs one.')


def refuse_arguments(argv: list[str], *, single: bool = False) -> None:
    """Raises ``app.UsageError`` if there are arguments that are no flags.

    Or, but in the driver of a single run, flags that only that one takes.
    """
    if len(argv) > 1:
        raise app.UsageError(f'unknown arguments: {" ".join(argv[1:])}')
    if not single:
        launch.refuse()


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Around the checks of the inputs: a wrong one ends the program without a traceback."""
    logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of every save
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f'error: {error}') from error


def _parse(argv: list[str]) -> list[str]:
    """Absl's parser, with clear errors for config files and fields that are not there."""
    kinds = dict(task='tasks', optimizer='optimizers', search='searches', table='tables')
    for flag, kind in kinds.items():
        for given in re.findall(rf'^--?{flag}=(.*)$', '\n'.join(argv), re.MULTILINE):
            if not pathlib.Path(given.split(':')[0]).is_file():
                folder = pathlib.Path('configs') / kind
                there = ', '.join(sorted(str(file) for file in folder.glob('[a-z]*.py')))
                raise SystemExit(f'error: --{flag}={given}: no such file. There are: {there}.')
    try:
        return flags.FLAGS(argv)
    except AttributeError as error:  # an unknown field of a config
        raise SystemExit(f'error: no such field: {str(error).strip(chr(34))}') from error
    except flags.Error as error:
        told = str(error)
        if 'Traceback' in told:  # a config file refuses its argument: the last line says why
            told = f'{told.split(":")[0]}: {told.strip().splitlines()[-1].strip()}'
        raise SystemExit(f'error: {told} (--help tells of the flags)') from error


def run(main: Callable[[list[str]], None], *required: str) -> None:
    """``app.run`` with the flags that must be given and with clear errors for wrong ones."""
    flags.mark_flags_as_required(required)
    app.run(main, flags_parser=_parse)


def main(argv: list[str]) -> None:
    """Runs the experiment of the flags and prints its summary."""
    refuse_arguments(argv, single=True)
    flag = flags.FLAGS
    with contextlib.ExitStack() as running:
        with clear_errors():
            running.enter_context(launch.processes())
            task, options = launch.with_mesh(flag.task), launch.options()
            experiment = train.prepare(task, flag.optimizer, flag.workdir, flag.data_dir, options)
        summary = train.train(experiment)
        if jax.process_index() == 0:
            print(json.dumps(summary))


if __name__ == '__main__':
    run(main, 'task', 'optimizer', 'workdir')
