"""The tasks by name. A task knows no optimizer."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

_MODULES = {'autoencoder': 'experiments.tasks.autoencoder'}


@dataclasses.dataclass(frozen=True)
class Task:
    """What the training loop needs of a task.

    Attributes:
      train_data: a tree of arrays, examples along the first axis; it stays on the device.
      batch_size: examples in a step.
      epochs: passes over the data, each in its own order, the remainder dropped.
      init: from a key, the parameters.
      loss: from the parameters and a batch, the loss to be minimised, a scalar.
      schedule: from the peak learning rate, the learning rate by step; with ``anneal=False`` it
        stays at its peak after the warm-up.
      evaluate: from the parameters, the reported metrics; jitted by the task.
    """

    train_data: Any
    batch_size: int
    epochs: int
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    schedule: Callable[..., optax.Schedule]
    evaluate: Callable[[Any], dict[str, jax.Array]]

    @property
    def num_train(self) -> int:
        """The number of training examples."""
        return int(jax.tree.leaves(self.train_data)[0].shape[0])

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in a pass over the data."""
        return self.num_train // self.batch_size

    @property
    def num_steps(self) -> int:
        """Steps in the whole run."""
        return self.epochs * self.steps_per_epoch


def make(config: Mapping[str, Any], data_dir: str | None) -> Task:
    """The task that a config describes.

    Raises:
      ValueError: if the name is unknown.
      FileNotFoundError: if the data are not where they are looked for.
    """
    name = config.get('name')
    if name not in _MODULES:
        raise ValueError(f'task.name must be one of {sorted(_MODULES)}, got {name!r}.')
    return importlib.import_module(_MODULES[name]).make_task(config, data_dir)
