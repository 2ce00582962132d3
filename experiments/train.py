"""The training loop: ``train_and_evaluate``, which is ``prepare`` and ``train``."""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tqdm

from experiments import optimizers, tasks
from experiments import workdir as workdir_lib

# What an optimizer's state may tell of the run as a whole; logged where it does.
TOLD = ('trust_region', 'predicted_reduction', 'loss_average')


class Carry(NamedTuple):
    """What a run needs to go on, and all that a checkpoint holds besides the clock."""

    params: Any
    opt_state: Any
    step: jax.Array  # shape=(), dtype=int32: steps taken


def make_segment(task: tasks.Task, tx: optax.GradientTransformation, seed: int) -> Any:
    """A function of (carry, data, length) that takes ``length`` steps in one compiled scan.

    The order of the examples depends on the seed and the epoch only, never on where the run was
    cut into segments: so a resumed run sees the same batches.
    """
    tx = optax.with_extra_args_support(tx)  # those that take no loss are not given it
    per_epoch, size = task.steps_per_epoch, task.batch_size
    order_key = jax.random.fold_in(jax.random.key(seed), 1)

    def order_of(epoch: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(order_key, epoch), task.num_train)

    def step(data: Any, scanned: tuple[Carry, jax.Array], _: None) -> Any:
        (params, opt_state, count), order = scanned
        index = count % per_epoch
        order = jax.lax.cond(index == 0, lambda: order_of(count // per_epoch), lambda: order)
        rows = jax.lax.dynamic_slice_in_dim(order, index * size, size)
        batch = jax.tree.map(lambda x: x[rows], data)
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (Carry(params, opt_state, count + 1), order), loss

    @functools.partial(jax.jit, static_argnames='length', donate_argnames='carry')
    def segment(carry: Carry, data: Any, length: int) -> tuple[Carry, jax.Array]:
        order = order_of(carry.step // per_epoch)
        (carry, _), losses = jax.lax.scan(
            functools.partial(step, data), (carry, order), length=length
        )
        return carry, losses

    return segment


def _check(config: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for fields of a task that this loop cannot take."""
    least = dict(
        epochs=1, log_every=1, checkpoint_every_epochs=1, max_consecutive_errors=0, seed=0
    )
    for name, low in least.items():
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f'task.{name} must be an integer >= {low}, got {value!r}.')


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is set up: its inputs are checked, nothing is computed yet."""

    task: tasks.Task
    config: Mapping[str, Any]  # the task's
    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    run: workdir_lib.Workdir

    def initial(self) -> Carry:
        """Parameters and state before the first step."""
        key = jax.random.fold_in(jax.random.key(self.config['seed']), 0)
        params = self.task.init(key)
        return Carry(params, self.tx.init(params), jnp.zeros([], jnp.int32))


def prepare(
    task_config: Mapping[str, Any],
    optimizer_config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    data_dir: str | None = None,
) -> Experiment:
    """Checks all inputs and opens the workdir; the arguments are ``train_and_evaluate``'s.

    Raises:
      ValueError: for a wrong configuration, or a workdir that holds another one.
      FileNotFoundError: for missing data.
    """
    _check(task_config)
    task = tasks.make(task_config, data_dir)
    inner = optimizers.make(optimizer_config, task.schedule, task.num_steps)
    tx = optax.apply_if_finite(inner, task_config['max_consecutive_errors'])
    schedule = task.schedule(optimizer_config['learning_rate'])
    jax.eval_shape(lambda key: tx.init(task.init(key)), jax.random.key(0))
    run = workdir_lib.Workdir(workdir, task_config, optimizer_config)
    return Experiment(task, task_config, tx, schedule, run)


def train(
    experiment: Experiment, *, progress: bool = True, stop_after: int | None = None
) -> dict[str, Any]:
    """Runs what ``prepare`` made, from its last checkpoint on, and closes its workdir."""
    task, run, config = experiment.task, experiment.run, experiment.config
    learning_rate = jax.jit(experiment.learning_rate)
    log_every, total = config['log_every'], task.num_steps
    save_every = math.ceil(config['checkpoint_every_epochs'] * task.steps_per_epoch / log_every)
    with run:
        if (finished := run.summary()) is not None:
            return finished
        carry, seconds = run.restore(jax.eval_shape(experiment.initial))
        if carry is None:
            carry = jax.jit(experiment.initial)()
        step = int(carry.step)
        run.truncate_metrics(step)
        lengths = [min(log_every, total - at) for at in range(step, total, log_every)]
        segment = make_segment(task, experiment.tx, config['seed'])
        clock = time.perf_counter()
        compiled = {
            length: segment.lower(carry, task.train_data, length=length).compile()
            for length in set(lengths)
        }
        compile_seconds = time.perf_counter() - clock

        with tqdm.tqdm(total=total, initial=step, unit='step', disable=not progress) as bar:
            for length in lengths:
                clock = time.perf_counter()
                carry, losses = compiled[length](carry, task.train_data)
                losses = jax.device_get(losses)  # the one synchronisation of the segment
                seconds += time.perf_counter() - clock
                step += length
                row = {
                    'step': step,
                    'epoch': step / task.steps_per_epoch,
                    'seconds': seconds,
                    'loss': float(losses.mean()),
                    'last_loss': float(losses[-1]),
                    'learning_rate': float(learning_rate(step - 1)),
                    'notfinite': int(carry.opt_state.total_notfinite),
                    **told(carry.opt_state),
                }
                run.log(row)
                bar.update(length)
                bar.set_postfix(loss=f'{row["loss"]:.3f}', notfinite=row['notfinite'])
                if step % (save_every * log_every) == 0 or step == total:
                    run.save(step, carry, seconds)
                if stop_after is not None and stop_after <= step < total:
                    return {'step': step}
        metrics = {k: float(v) for k, v in task.evaluate(carry.params).items()}
        return run.finish(
            {
                **metrics,
                'steps': total,
                'seconds': seconds,
                'compile_seconds': compile_seconds,
                'steps_per_second': total / seconds,
                'num_params': sum(x.size for x in jax.tree.leaves(carry.params)),
                'state_bytes': _optimizer_bytes(carry.opt_state),
                'notfinite': int(carry.opt_state.total_notfinite),
            }
        )


def train_and_evaluate(
    task_config: Mapping[str, Any],
    optimizer_config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    data_dir: str | None = None,
    *,
    progress: bool = True,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Trains a task with an optimizer, from where ``workdir`` left off.

    Args:
      task_config: see ``configs/tasks``.
      optimizer_config: see ``configs/optimizers``.
      workdir: where ``config.json``, ``metrics.jsonl``, ``summary.json`` and the checkpoints go.
        A second call with the same configuration resumes from the last checkpoint, bit for bit.
      data_dir: where the data set lies; not part of the configuration.
      progress: whether to draw a bar.
      stop_after: stop, without a summary, once this many steps are logged. For tests.

    Returns:
      The summary, as in ``summary.json``.

    Raises:
      ValueError: for a wrong configuration, or a workdir that holds another one.
      FileNotFoundError: for missing data.
    """
    experiment = prepare(task_config, optimizer_config, workdir, data_dir)
    return train(experiment, progress=progress, stop_after=stop_after)


def told(state: optax.OptState) -> dict[str, float]:
    """The numbers of `TOLD` that are in a state, by their fields' names.

    Found wherever they are, so the loop needs to know neither the methods nor how an alias or a
    wrapper nests their states.
    """
    found = {name: optax.tree.get(state, name) for name in TOLD}
    return {name: float(number) for name, number in found.items() if number is not None}


def _optimizer_bytes(state: optax.ApplyIfFiniteState) -> int:
    """Bytes of the optimizer's state, without the wrapper's counters."""
    return sum(x.nbytes for x in jax.tree.leaves(state.inner_state))
