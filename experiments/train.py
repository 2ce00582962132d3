"""The training loop: ``train_and_evaluate``, which is ``prepare`` and ``train``.

``train_together`` is the same for several runs that differ in hyperparameters alone: one program
takes a step of all.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
import tqdm

from experiments import optimizers, tasks
from experiments import program as program_lib
from experiments import workdir as workdir_lib

# What an optimizer's state may tell of the run as a whole; logged where it does.
TOLD = ('trust_region', 'predicted_reduction', 'loss_average')


def _check(config: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for fields of a task that this loop cannot take."""
    unit = 'steps' if 'steps' in config else 'epochs'
    least = {unit: 1, f'checkpoint_every_{unit}': 1}
    least |= dict(log_every=1, max_consecutive_errors=0, seed=0)
    for name, low in least.items():
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f'task.{name} must be an integer >= {low}, got {value!r}.')


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is set up: its inputs are checked, nothing is computed yet."""

    task: tasks.Task
    config: Mapping[str, Any]  # the task's
    optimizer_config: Mapping[str, Any]
    run: workdir_lib.Workdir


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
    task = check(task_config, optimizer_config, data_dir)
    optimizer_config = optimizers.without_search_space(optimizer_config)
    run = workdir_lib.Workdir(workdir, task_config, optimizer_config)
    return Experiment(task, task_config, optimizer_config, run)


def check(
    task_config: Mapping[str, Any],
    optimizer_config: Mapping[str, Any],
    data_dir: str | None = None,
) -> tasks.Task:
    """The task, if a run could start; raises what ``prepare`` raises, and writes nothing."""
    _check(task_config)
    task = tasks.make(task_config, data_dir)
    if task.stream is not None and jax.process_count() > 1:
        raise ValueError(
            f'{jax.process_count()} processes: each would read its part of a batch, but this loop '
            'does not put the parts together; run one process.'
        )
    jax.eval_shape(program_lib.single(task, task_config, optimizer_config).initial)
    return task


def metrics(task: tasks.Task) -> list[str]:
    """The names of what a task reports at the end."""
    reported = jax.eval_shape(lambda key: task.evaluate(task.init(key)), jax.random.key(0))
    return sorted(reported)


def train(
    experiment: Experiment, *, progress: bool = True, stop_after: int | None = None
) -> dict[str, Any]:
    """Runs what ``prepare`` made, from its last checkpoint on, and closes its workdir."""
    return train_together([experiment], progress=progress, stop_after=stop_after)[0]


def train_together(
    experiments: Sequence[Experiment], *, progress: bool = True, stop_after: int | None = None
) -> list[dict[str, Any]]:
    """Runs several in one program, from their last checkpoints on, and closes their workdirs.

    Args:
      experiments: one or more, of one task, that differ in floats of the optimizer's config.
      progress: as in ``train_and_evaluate``.
      stop_after: likewise.

    Returns:
      Their summaries, each as if it had been run alone, up to rounding. ``seconds`` are a run's
      share of the time of all.

    Raises:
      ValueError: if they are not at the same step.
    """
    task, config, count = experiments[0].task, experiments[0].config, len(experiments)
    runs = [experiment.run for experiment in experiments]
    log_every, total = config['log_every'], task.num_steps
    save_every = _interval(task, config, 'checkpoint_every')
    validate_every = _interval(task, config, 'evaluate_every') if task.validate else 0
    with contextlib.ExitStack() as opened:
        for run in runs:
            opened.enter_context(run)
        finished = [summary for run in runs if (summary := run.summary()) is not None]
        if len(finished) == count:
            return finished
        program, carry, step, clocks = _resume(experiments)
        lengths = [min(log_every, total - at) for at in range(step, total, log_every)]
        segments = program_lib.make_segments(task, program.step, config['seed'])
        clock = time.perf_counter()
        program_bytes = segments.compile(carry, lengths)
        compile_seconds = time.perf_counter() - clock
        rates = [jax.jit(task.schedule(e.optimizer_config['learning_rate'])) for e in experiments]

        with tqdm.tqdm(total=total, initial=step, unit='step', disable=not progress) as bar:
            for length in lengths:
                clock = time.perf_counter()
                carry, losses = segments(carry, step, length)
                losses = jax.device_get(losses)  # the one synchronisation of the segment
                spent = (time.perf_counter() - clock) / count
                clocks = [seconds + spent for seconds in clocks]
                step += length
                numbers = told(carry.opt_state, count)
                if task.validate and (step % validate_every == 0 or step == total):
                    for own, part in zip(numbers, program.split(carry), strict=True):
                        own.update(_numbers(task.validate, part))
                for i, run in enumerate(runs):
                    own = losses.reshape(length, count)[:, i]
                    row = {
                        'step': step,
                        'epoch': step / task.steps_per_epoch,
                        'seconds': clocks[i],
                        'loss': float(own.mean()),
                        'last_loss': float(own[-1]),
                        'learning_rate': float(rates[i](step - 1)),
                    }
                    run.log(row | numbers[i])
                bar.update(length)
                skipped = sum(own['notfinite'] for own in numbers)
                bar.set_postfix(loss=f'{losses.mean():.3f}', notfinite=skipped)
                if step % save_every == 0 or step == total:
                    for run, part, seconds in zip(runs, program.split(carry), clocks, strict=True):
                        run.save(step, part, seconds)
                if stop_after is not None and stop_after <= step < total:
                    return [{'step': step}] * count
        compilation = {
            'compile_seconds': compile_seconds,
            'program_bytes': program_bytes,
        }
        ends = zip(runs, program.split(carry), clocks, strict=True)
        return [
            run.finish(_summary(task, part, seconds) | _best(task, run, part) | compilation)
            for run, part, seconds in ends
        ]


def _interval(task: tasks.Task, config: Mapping[str, Any], name: str) -> int:
    """The steps that the config has, as such or as epochs: whole segments."""
    log_every = config['log_every']
    steps = config.get(f'{name}_steps') or config[f'{name}_epochs'] * task.steps_per_epoch
    return math.ceil(steps / log_every) * log_every


def checkpoint_at(experiment: Experiment, part: float) -> int:
    """The first step with a checkpoint at or after a part of the run."""
    every = _interval(experiment.task, experiment.config, 'checkpoint_every')
    return math.ceil(part * experiment.task.num_steps / every) * every


def kinship(experiment: Experiment) -> str:
    """The same for runs that ``train_together`` takes: all but floats, and where they are."""
    config = experiment.optimizer_config
    others = {name: value for name, value in config.items() if not isinstance(value, float)}
    return repr((sorted(others.items()), sorted(config), experiment.run.latest_step()))


def room(experiment: Experiment) -> int:
    """For how many runs like this the device has memory; 1 on CPUs, where more gain nothing."""
    device = jax.devices()[0]
    stats = device.memory_stats()
    if device.platform == 'cpu' or not stats:
        return 1
    task, config = experiment.task, experiment.config
    program = program_lib.single(task, config, experiment.optimizer_config)
    segments = program_lib.make_segments(task, program.step, config['seed'])
    data = sum(x.nbytes for x in jax.tree.leaves(task.train_data))
    each = segments.compile(jax.eval_shape(program.initial), [1]) - data
    return max(1, int((0.8 * stats['bytes_limit'] - data) // max(each, 1)))


def _resume(
    experiments: Sequence[Experiment],
) -> tuple[program_lib.Program, program_lib.Carry, int, list[float]]:
    """The program, and where its runs are: the carry, the steps taken and the runs' seconds."""
    task, config = experiments[0].task, experiments[0].config
    alone = program_lib.single(task, config, experiments[0].optimizer_config)
    program = alone
    if len(experiments) > 1:
        configs = [experiment.optimizer_config for experiment in experiments]
        program = program_lib.together(task, config, configs)
    shapes = jax.eval_shape(alone.initial)
    restored = [experiment.run.restore(shapes) for experiment in experiments]
    carries = [carry for carry, _ in restored if carry is not None]
    steps = {int(carry.step) for carry in carries}
    if carries and (len(steps) > 1 or len(carries) < len(restored)):
        raise ValueError(f'runs go on together from one step; they are at {sorted(steps)}.')
    carry = program.stack(carries) if carries else jax.jit(program.initial)()
    step = int(carry.step)
    for experiment in experiments:
        experiment.run.truncate_metrics(step)
    return program, carry, step, [seconds for _, seconds in restored]


def _summary(task: tasks.Task, carry: program_lib.Carry, seconds: float) -> dict[str, Any]:
    """What is said of a run that is through."""
    described = task.describe(_evaluated(carry)) if task.describe else {}
    return {
        **_numbers(task.evaluate, carry),
        **described,
        'steps': task.num_steps,
        'seconds': seconds,
        'steps_per_second': task.num_steps / seconds,
        'num_params': sum(x.size for x in jax.tree.leaves(carry.params)),
        # Without the counters of the wrapper.
        'state_bytes': sum(x.nbytes for x in jax.tree.leaves(carry.opt_state.inner_state)),
        'notfinite': int(carry.opt_state.total_notfinite),
    }


def _evaluated(carry: program_lib.Carry) -> Any:
    return optimizers.evaluated(carry.opt_state, carry.params)


def _numbers(evaluate: Any, carry: program_lib.Carry) -> dict[str, float]:
    """What a function of a task says of a run's parameters."""
    return {name: float(value) for name, value in evaluate(_evaluated(carry)).items()}


def _best(task: tasks.Task, run: workdir_lib.Workdir, carry: program_lib.Carry) -> dict[str, Any]:
    """The best that was logged of what a task tracks, its step, and what was logged with it.

    From the log, which a resumed run has cut to its checkpoint: so a checkpoint holds none of it.
    """
    rows = [row for row in workdir_lib.read_metrics(run.path) if row.get(task.tracked) is not None]
    if task.validate is None or not rows:
        return {}
    best = max(rows, key=lambda row: row[task.tracked])  # the first of equal ones
    split = task.tracked.split('_')[0]
    names = jax.eval_shape(task.validate, carry.params)
    return {
        f'best_{task.tracked}': best[task.tracked],
        f'best_{split}_step': best['step'],
        f'at_best_{split}': {name: best[name] for name in names},
    }


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
      stop_after: stop, without a summary, once this many steps are logged; what came after the
        last checkpoint is run again by the next call.

    Returns:
      The summary, as in ``summary.json``.

    Raises:
      ValueError: for a wrong configuration, or a workdir that holds another one.
      FileNotFoundError: for missing data.
    """
    experiment = prepare(task_config, optimizer_config, workdir, data_dir)
    return train(experiment, progress=progress, stop_after=stop_after)


def told(state: optax.ApplyIfFiniteState, count: int) -> list[dict[str, float]]:
    """The numbers of `TOLD` that are in a state, by their fields' names, for each of its runs.

    Found wherever they are, so the loop needs to know neither the methods nor how an alias or a
    wrapper nests their states.
    """
    found = {name: optax.tree.get(state, name) for name in TOLD}
    found = {name: number for name, number in found.items() if number is not None}
    rows = {name: number.reshape(count) for name, number in jax.device_get(found).items()}
    skipped = jax.device_get(state.total_notfinite).reshape(count)
    return [
        {'notfinite': int(skipped[i]), **{name: float(row[i]) for name, row in rows.items()}}
        for i in range(count)
    ]
