"""From an optimizer config to an Optax transformation."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import optax
import optax.contrib

import precond_optax

FACTORIES: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    'adafactor': optax.adafactor,
    'adagrad': optax.adagrad,
    'adam': optax.adam,
    'adamw': optax.adamw,
    'block_adam': precond_optax.block_adam,
    'mbag': precond_optax.mbag,
    'muon': optax.contrib.muon,
    'rmsprop': optax.rmsprop,
    'sgd': optax.sgd,
    'shampoo': precond_optax.shampoo,
    'shared_basis': precond_optax.shared_basis,
    'sketchy': precond_optax.sketchy,
    'soaa': precond_optax.soaa,
    'sonew': precond_optax.sonew,
}


def make(
    config: Mapping[str, Any], schedule: Callable[[float], optax.Schedule], num_steps: int
) -> optax.GradientTransformation:
    """The optimizer that a config describes.

    Args:
      config: ``name``, ``learning_rate`` (the peak), and the factory's other keywords. A
        ``total_steps`` that is there and None is the run's.
      schedule: the task's schedule of the learning rate, from its peak.
      num_steps: the steps of the whole run.

    Returns:
      The transformation.

    Raises:
      ValueError: if the name or a keyword is unknown, or the learning rate is no number >= 0.
    """
    arguments = dict(config)
    name = arguments.pop('name', None)
    if name not in FACTORIES:
        raise ValueError(f'optimizer.name must be one of {sorted(FACTORIES)}, got {name!r}.')
    peak = arguments.pop('learning_rate', None)
    is_number = isinstance(peak, float | int) and not isinstance(peak, bool)
    if not is_number or not 0 <= peak < math.inf:
        raise ValueError(f'optimizer.learning_rate must be a number >= 0, got {peak!r}.')
    if arguments.get('total_steps', num_steps) is None:
        arguments['total_steps'] = num_steps
    try:
        return FACTORIES[name](learning_rate=schedule(peak), **arguments)
    except TypeError as error:
        raise ValueError(f'optimizer {name!r} does not take these keywords: {error}.') from error
