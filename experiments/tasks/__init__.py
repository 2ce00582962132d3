"""The tasks by name. A task knows no optimizer."""

import dataclasses
import importlib
import inspect
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

import precond_optax

_MODULES = {
    'autoencoder': 'experiments.tasks.autoencoder',
    'language_model': 'experiments.tasks.language_model',
    'pos_tagging': 'experiments.tasks.pos_tagging',
}


@dataclasses.dataclass(frozen=True)
class Stream:
    """Training batches that come from the host one by one.

    A batch is a tree of NumPy arrays: those with axes have examples along the first, the others,
    such as the step, are the same for all. Of several processes each has its part of the
    examples, see ``experiments.mesh.reader``, and ``shapes`` are of such a part.

    Attributes:
      num_train: the number of training examples.
      steps_per_epoch: batches in a pass over them; of a run that is given in steps, all of its.
      shapes: a tree of ``ShapeDtypeStruct`` for each shape that a batch can have.
      batches: from a step, the batches from there on; a batch depends on its step alone, so a
        resumed run sees the same ones.
    """

    num_train: int
    steps_per_epoch: int
    shapes: Sequence[Any]
    batches: Callable[[int], Iterator[Any]]


def batches_of(source: Any, ahead: bool = False) -> Callable[[int], Iterator[Any]]:
    """`Stream.batches` of something with a length and, by its step, each batch; through Grain.

    Args:
      source: of the batches.
      ahead: whether threads read ahead. Of data in memory they would only be in the way.
    """
    import grain

    dataset = grain.MapDataset.source(source)
    options = grain.ReadOptions(
        num_threads=4 if ahead else 0, prefetch_buffer_size=16 if ahead else 0
    )

    def from_step(step: int) -> Iterator[Any]:
        return iter(dataset.slice(slice(step, None)).to_iter_dataset(options))

    return from_step


@dataclasses.dataclass(frozen=True)
class Task:
    """What the training loop needs of a task.

    Its examples come from ``train_data`` or from ``stream``.

    On several processes parameters are arrays of all of them, of which each holds some parts.
    ``evaluate``, ``validate`` and ``describe`` are then called in all, and must compute the same
    there in the same order: from NumPy arrays that are the same in each process, by jitted
    functions. What comes out of these as a scalar can be read as it is; what has axes must be made
    whole first, ``mesh.constrain(x, (None,) * x.ndim)`` inside of the function.

    Attributes:
      batch_size: examples in a step.
      epochs: passes over the data, each in its own order.
      init: from a key, the parameters.
      loss: from the parameters and a batch, the loss to be minimised, a scalar. With
        ``accumulation`` in the config it is called for each microbatch, and their mean is taken:
        so a mean over a varying number of tokens weighs those of a short microbatch more. A
        batch that is a dict then has ``microbatch`` too, its number, to draw random numbers by.
      schedule: from the peak learning rate, the learning rate by step; with ``anneal=False`` it
        stays at its peak after the warm-up.
      evaluate: from the parameters, the metrics that are reported at the end; jitted by the task.
      train_data: a tree of arrays, examples along the first axis; it stays on the device. The
        remainder of an epoch is dropped.
      stream: batches from the host.
      validate: from the parameters, metrics that are logged every ``evaluate_every_epochs`` of
        the config; jitted by the task. None: there are none.
      tracked: one of them, of which the summary has the largest value, and all that was logged
        with it.
      describe: from the parameters at the end, what else the summary has; of JSON's kinds.
      layout: how the leaves are seen, for the optimizers that take a layout.
      logical_axes: a tree like the parameters', whose leaves are tuples of names of
        ``experiments.mesh.RULES``, one per axis. None: in a mesh each device has them all.
      tokens_per_step: of all processes together; 0: the task does not count tokens.
      flops_per_token: of the model in a step of training, forward and backward.
      artifacts: files that belong to the run, by their names, and are written beside its
        checkpoints.
    """

    batch_size: int
    epochs: int
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    schedule: Callable[..., optax.Schedule]
    evaluate: Callable[[Any], dict[str, jax.Array]]
    train_data: Any = None
    stream: Stream | None = None
    validate: Callable[[Any], dict[str, jax.Array]] | None = None
    tracked: str = ''
    describe: Callable[[Any], dict[str, Any]] | None = None
    layout: Mapping[str, precond_optax.LeafRule] | None = None
    logical_axes: Any = None
    tokens_per_step: int = 0
    flops_per_token: float = 0.0
    artifacts: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def num_train(self) -> int:
        """The number of training examples."""
        if self.stream is not None:
            return self.stream.num_train
        return int(jax.tree.leaves(self.train_data)[0].shape[0])

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the data."""
        if self.stream is not None:
            return self.stream.steps_per_epoch
        return self.num_train // self.batch_size

    @property
    def num_steps(self) -> int:
        """Steps in the whole run."""
        return self.epochs * self.steps_per_epoch


def make(
    config: Mapping[str, Any], data_dir: str | None, workdir: str | pathlib.Path | None = None
) -> Task:
    """The task that a config describes.

    A ``make_task`` that has artifacts may take ``workdir`` too, the folder of a run that goes on:
    for what it would else make again.

    Raises:
      ValueError: if the name is unknown.
      FileNotFoundError: if the data are not where they are looked for.
    """
    name = config.get('name')
    if name not in _MODULES:
        raise ValueError(f'task.name must be one of {sorted(_MODULES)}, got {name!r}.')
    make_task = importlib.import_module(_MODULES[name]).make_task
    if 'workdir' in inspect.signature(make_task).parameters:
        return make_task(config, data_dir, workdir)
    return make_task(config, data_dir)
