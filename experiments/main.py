"""Trains a task with an optimizer.

python -m experiments.main --task=configs/tasks/autoencoder.py \\
    --optimizer=configs/optimizers/sonew.py --workdir=/tmp/run --data_dir=DATA \\
    --task.epochs=10 --optimizer.learning_rate=3e-3
"""

import json

from absl import app, flags
from ml_collections import config_flags

from experiments import train

_TASK = config_flags.DEFINE_config_file('task', None, 'Config file of the task.')
_OPTIMIZER = config_flags.DEFINE_config_file('optimizer', None, 'Config file of the optimizer.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; resumed if it holds one.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of the data set, if it needs one.')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'unknown arguments: {argv[1:]}')
    try:
        summary = train.train_and_evaluate(
            _TASK.value, _OPTIMIZER.value, _WORKDIR.value, _DATA_DIR.value
        )
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f'error: {error}') from error
    print(json.dumps(summary))


def run() -> None:
    flags.mark_flags_as_required(['task', 'optimizer', 'workdir'])
    app.run(main)


if __name__ == '__main__':
    run()
