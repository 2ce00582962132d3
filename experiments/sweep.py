"""Searches an optimizer's hyperparameters with Optuna, one run for each trial.

python -m experiments.sweep --task=configs/tasks/autoencoder.py --task.epochs=10 \\
    --optimizer=configs/optimizers/sonew.py --search=configs/searches/paper_random.py \\
    --workdir=DIR --data_dir=DATA

Each trial is a workdir of its own, DIR/000, DIR/001, ...; a sweep that was interrupted is
started again by the same command, and its finished trials are not repeated.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from experiments import main as main_lib
from experiments import train

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


def sampler(search: Mapping[str, Any]) -> tuple[Any, int]:
    """Optuna's sampler for a search config and the number of its trials."""
    import optuna

    space = search['space']
    if search['sampler'] == 'grid':
        grid = {name: list(axis['grid']) for name, axis in space.items()}
        made = optuna.samplers.GridSampler(grid, seed=search['seed'])
        return made, len(made._all_grids) if False else _grid_size(grid)
    if search['sampler'] == 'random':
        return optuna.samplers.RandomSampler(seed=search['seed']), search['trials']
    raise ValueError(f"search.sampler must be 'grid' or 'random', got {search['sampler']!r}.")
