"""Searches an optimizer's hyperparameters with Optuna, one run for each trial.

python -m experiments.sweep --task=configs/tasks/autoencoder.py --task.epochs=10 \\
    --optimizer=configs/optimizers/sonew.py --search=configs/searches/paper_random.py \\
    --workdir=DIR --data_dir=DATA

Each trial is a workdir of its own, DIR/000, DIR/001, ...; a sweep that was interrupted is
started again by the same command, and its finished trials are not repeated.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from experiments import main as main_lib
from experiments import train
from experiments import workdir as workdir_lib

_SEARCH = config_flags.DEFINE_config_file('search', None, 'Config file of the search.')


def suggest(trial: Any, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A trial's hyperparameters.

    Each name of ``space`` has either ``grid``, the values, or ``low`` and ``high``, of which the
    logarithm is uniform; with ``one_minus`` they bound one minus the hyperparameter.
    """
    values = {}
    for name, axis in space.items():
        if 'grid' in axis:
            values[name] = trial.suggest_categorical(name, list(axis['grid']))
        else:
            label = f'1-{name}' if axis.get('one_minus') else name
            drawn = trial.suggest_float(label, axis['low'], axis['high'], log=True)
            values[name] = 1 - drawn if axis.get('one_minus') else drawn
    return values


def make_sampler(search: Mapping[str, Any]) -> tuple[Any, int]:
    """Optuna's sampler for a search config, and the number of trials."""
    import optuna

    space = search['space']
    if search['sampler'] == 'grid':
        grid = {name: list(axis['grid']) for name, axis in space.items()}
        size = math.prod(len(values) for values in grid.values())
        return optuna.samplers.GridSampler(grid, seed=search['seed']), size
    if search['sampler'] == 'random':
        return optuna.samplers.RandomSampler(seed=search['seed']), search['trials']
    raise ValueError(f"search.sampler must be 'grid' or 'random', got {search['sampler']!r}.")


def sweep(
    task_config: config_dict.ConfigDict,
    optimizer_config: config_dict.ConfigDict,
    search: Mapping[str, Any],
    workdir: str | pathlib.Path,
    data_dir: str | None = None,
) -> list[dict[str, Any]]:
    """Runs the trials of a search.

    Args:
      task_config: see ``configs/tasks``.
      optimizer_config: see ``configs/optimizers``; its values are those that are not searched.
      search: see ``configs/searches``.
      workdir: where the trials' workdirs and ``sweep.json`` go.
      data_dir: where the data set lies.

    Returns:
      The trials, best first: ``{'trial', 'hyperparameters', 'metric'}``.

    Raises:
      ValueError: for a search that is none, or a hyperparameter that the optimizer's config does
        not have.
    """
    import optuna

    for name, axis in search['space'].items():
        wanted = ('grid',) if search['sampler'] == 'grid' else ('low', 'high')
        if not all(key in axis for key in wanted):
            raise ValueError(
                f'search.space.{name} needs {" and ".join(wanted)} for sampler '
                f'{search["sampler"]!r}, got {dict(axis)}.'
            )
    if unknown := sorted(set(search['space']) - set(optimizer_config)):
        raise ValueError(
            f'search.space has {unknown}, which the optimizer config has not; it has '
            f'{sorted(optimizer_config)}.'
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    root = pathlib.Path(workdir)
    trials: list[dict[str, Any]] = []
    sampler, count = make_sampler(search)
    root.mkdir(parents=True, exist_ok=True)

    def objective(trial: Any) -> float:
        values = suggest(trial, search['space'])
        config = optimizer_config.copy_and_resolve_references()
        config.update(values)
        folder = f'{trial.number:03d}'
        summary = train.train_and_evaluate(task_config, config, root / folder, data_dir)
        if search['metric'] not in summary:
            raise ValueError(
                f'search.metric must be one of {sorted(summary)}, got {search["metric"]!r}.'
            )
        # A run that left the numbers behind is the worst, and no error.
        metric = summary[search['metric']]
        metric = math.inf if metric is None or not math.isfinite(metric) else metric
        trials.append({'trial': folder, 'hyperparameters': values, 'metric': metric})
        return metric

    optuna.create_study(sampler=sampler).optimize(objective, n_trials=count)
    trials.sort(key=lambda trial: trial['metric'])
    content = {'search': dict(workdir_lib.plain(search)), 'trials': trials}
    workdir_lib.write_json(root / 'sweep.json', content)
    return trials


def main(argv: list[str]) -> None:
    """Runs the search of the flags and prints its trials, best first."""
    main_lib.refuse_arguments(argv)
    flag = flags.FLAGS
    with main_lib.clear_errors():
        trials = sweep(flag.task, flag.optimizer, _SEARCH.value, flag.workdir, flag.data_dir)
    for trial in trials:
        print(f'{trial["metric"]:10.4f}  {trial["trial"]}  {trial["hyperparameters"]}')


if __name__ == '__main__':
    main_lib.run(main, 'task', 'optimizer', 'search', 'workdir')
