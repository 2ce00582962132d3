"""The training loop: ``train_and_evaluate``, which is ``prepare`` and ``train``.

``train_together`` is the same for several runs that differ in hyperparameters alone: one program
takes a step of all.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tqdm
from absl import logging

from experiments import mesh as mesh_lib
from experiments import optimizers, outcome, preemption, tasks, telemetry
from experiments import program as program_lib
from experiments import segments as segments_lib
from experiments import workdir as workdir_lib


def _check(config: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for fields of a task that this loop cannot take."""
    least = {'steps' if 'steps' in config else 'epochs': 1}
    least |= dict(max_consecutive_errors=0, seed=0)
    least |= {name: 1 for name in ('accumulation', 'max_to_keep') if name in config}
    if 'log_every' not in config or config['log_every'] is not None:
        least['log_every'] = 1
    for what in ('checkpoint', 'evaluate'):
        given = [f'{what}_every_{unit}' for unit in ('epochs', 'steps')]
        given = [name for name in given if config.get(name) is not None]
        if len(given) > 1 or (what == 'checkpoint' and not given):
            raise ValueError(
                f'task must have one of {what}_every_epochs and {what}_every_steps, got {given}.'
            )
        least |= dict.fromkeys(given, 1)
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
    options: telemetry.Options


def prepare(
    task_config: Mapping[str, Any],
    optimizer_config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    data_dir: str | None = None,
    options: telemetry.Options | None = None,
) -> Experiment:
    """Checks all inputs and opens the workdir; the arguments are ``train_and_evaluate``'s.

    Raises:
      ValueError: for a wrong configuration, or a workdir that holds another one.
      FileNotFoundError: for missing data.
    """
    options = options or telemetry.Options()
    options.check()
    task = _task(task_config, optimizer_config, data_dir, workdir)
    optimizer_config = optimizers.without_search_space(optimizer_config)
    run = workdir_lib.Workdir(workdir, task_config, optimizer_config, task.artifacts)
    return Experiment(task, task_config, optimizer_config, run, options)


def check(
    task_config: Mapping[str, Any],
    optimizer_config: Mapping[str, Any],
    data_dir: str | None = None,
    workdir: str | pathlib.Path | None = None,
) -> tasks.Task:
    """The task, if a run could start; raises what ``prepare`` raises, and writes nothing.

    Whether it could in a folder is looked up if one is given.
    """
    task = _task(task_config, optimizer_config, data_dir, workdir)
    if workdir is not None:
        config = optimizers.without_search_space(optimizer_config)
        workdir_lib.check(workdir, task_config, config)
    return task


def _task(
    task_config: Mapping[str, Any],
    optimizer_config: Mapping[str, Any],
    data_dir: str | None,
    workdir: str | pathlib.Path | None,
) -> tasks.Task:
    """The task, of a run that goes on with what its folder keeps; raises what is wrong."""
    _check(task_config)
    mesh = mesh_lib.of(task_config)
    task = tasks.make(task_config, data_dir, workdir)
    if task.validate and _every(task, task_config, 'evaluate') is None:
        raise ValueError('task must have one of evaluate_every_epochs and evaluate_every_steps.')
    segments_lib.check(task, mesh, task_config.get('accumulation', 1))
    for what in ('checkpoint', 'evaluate'):
        asked, every = (f(task, task_config, what) for f in (_asked, _every))
        if asked != every:
            _warn_once(
                f'task.{what}_every is {asked} steps, no multiple of the '
                f'{_segment(task, task_config)} between two log lines, so it is taken for '
                f'{every}; see task.log_every.'
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
      RuntimeError: if something fails once training has begun, that no check has found.
    """
    runs = [experiment.run for experiment in experiments]
    with contextlib.ExitStack() as opened:
        for run in runs:
            opened.enter_context(run)
        finished = [summary for run in runs if (summary := run.summary()) is not None]
        if len(finished) == len(runs):
            return finished
        if (mesh := mesh_lib.of(experiments[0].config)) is not None:
            opened.enter_context(jax.set_mesh(mesh))
            _tell_of_whole_axes(experiments[0].task, mesh)
        stop = opened.enter_context(preemption.Preemption())
        loop = _Loop(experiments)
        opened.callback(loop.close)
        try:
            return loop.run(stop, progress and jax.process_index() == 0, stop_after)
        except (ValueError, FileNotFoundError) as error:
            # Drivers show these as wrong input, without a traceback.
            names = ', '.join(str(run.path) for run in runs)
            raise RuntimeError(f'training failed in {names}: {error}') from error


class _Loop:
    """Some runs in one program, from where they are; the arguments are ``train_together``'s."""

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self._experiments = experiments
        self._runs = [experiment.run for experiment in experiments]
        self._task, self._config = experiments[0].task, experiments[0].config
        options = experiments[0].options
        self._program, self._carry, self._step, self._clocks = _resume(experiments)
        step, total, every = self._step, self._task.num_steps, _segment(self._task, self._config)
        self._lengths = [min(every, total - at) for at in range(step, total, every)]
        self._segments = segments_lib.make(
            self._task, self._program.step, self._config['seed'], self._program.shardings
        )
        clock = time.perf_counter()
        # A run that a kill kept from saying that it is through has no steps left, but a program.
        lengths = self._lengths or [min(every, total)]
        program_bytes = self._segments.compile(self._carry, lengths)
        self._compilation = {
            'compile_seconds': time.perf_counter() - clock,
            'program_bytes': program_bytes,
        }
        self._rates = [
            jax.jit(self._task.schedule(e.optimizer_config['learning_rate'])) for e in experiments
        ]
        places: Any = self._program.shardings
        devices = 1 if places is None else len(places.step.device_set)
        self._telemetry = telemetry.Telemetry(
            self._task, devices, options, self._runs[0].path, self._step
        )
        if options.measure_optimizer and self._lengths:
            mesh = None if places is None else places.step.mesh
            chosen = experiments[0].optimizer_config
            tx = program_lib.make_tx(self._task, self._config, chosen, mesh)
            self._telemetry.measure(tx, self._carry, telemetry.period(chosen))

    def close(self) -> None:
        self._telemetry.close()

    def run(
        self, stop: preemption.Preemption, progress: bool, stop_after: int | None
    ) -> list[dict[str, Any]]:
        """Takes the steps that are left; the summaries."""
        task, total, first = self._task, self._task.num_steps, self._step
        save_every = _every(task, self._config, 'checkpoint')
        assert save_every is not None
        # While it was read and compiled; what is there is saved. Several processes agree on the
        # step after the last one that was asked for, which is never asked for again.
        if stop.reached(0, first) and first < total:
            raise SystemExit(preemption.EXIT_CODE)
        with tqdm.tqdm(total=total, initial=first, unit='step', disable=not progress) as bar:
            for length in self._lengths:
                bar.set_postfix(self._segment(length))
                bar.update(length)
                preempted = stop.reached(self._step - length, self._step)
                if self._step % save_every == 0 or self._step == total or preempted:
                    self._save()
                if preempted and self._step < total:
                    raise SystemExit(preemption.EXIT_CODE)
                if stop_after is not None and stop_after <= self._step < total:
                    return [{'step': self._step}] * len(self._runs)
        ends = zip(self._runs, self._program.split(self._carry), self._clocks, strict=True)
        return [
            run.finish(
                outcome.summary(task, part, seconds)
                | outcome.best(task, run, part)
                | self._compilation
            )
            for run, part, seconds in ends
        ]

    def _segment(self, length: int) -> dict[str, Any]:
        """Takes some steps, validates if it is time, and logs; what the bar shows."""
        task, count, watch = self._task, len(self._runs), self._telemetry.watch
        clock = time.perf_counter()
        watch.start()
        self._carry, told = self._segments(self._carry, self._step, length, watch)
        watch.finish()
        told = jax.device_get(told)  # the one synchronisation of the segment
        spent = (time.perf_counter() - clock) / count
        self._clocks = [seconds + spent for seconds in self._clocks]
        self._step += length
        numbers = telemetry.told(self._carry.opt_state, count)
        every = _every(task, self._config, 'evaluate') if task.validate else None
        if every and (self._step % every == 0 or self._step == task.num_steps):
            for own, part in zip(numbers, self._program.split(self._carry), strict=True):
                own.update(outcome.numbers(task.validate, part))
        speed = self._telemetry.rates()
        by_run = {name: x.reshape(length, count) for name, x in told.items()}
        for i, run in enumerate(self._runs):
            row = {
                'step': self._step,
                'epoch': self._step / task.steps_per_epoch,
                'seconds': self._clocks[i],
                'loss': float(by_run['loss'][:, i].mean()),
                'last_loss': float(by_run['loss'][-1, i]),
                'learning_rate': float(self._rates[i](self._step - 1)),
            }
            if 'grad_norm' in told:
                row['grad_norm'] = float(by_run['grad_norm'][:, i].mean())
            run.log(row | speed | numbers[i])
            self._telemetry.show(i, row | speed | numbers[i])
        skipped = sum(own['notfinite'] for own in numbers)
        return {'loss': f'{told["loss"].mean():.3f}', 'notfinite': skipped}

    def _save(self) -> None:
        parts = self._program.split(self._carry)
        for run, part, seconds in zip(self._runs, parts, self._clocks, strict=True):
            run.save(self._step, part, seconds)


def _segment(task: tasks.Task, config: Mapping[str, Any]) -> int:
    """The steps from one log line to the next: ``log_every``, an epoch where that is None."""
    return config['log_every'] or task.steps_per_epoch


def _asked(task: tasks.Task, config: Mapping[str, Any], what: str) -> int | None:
    """After how many steps, as the config has it in epochs or in steps."""
    if (epochs := config.get(f'{what}_every_epochs')) is not None:
        return epochs * task.steps_per_epoch
    return config.get(f'{what}_every_steps')


def _every(task: tasks.Task, config: Mapping[str, Any], what: str) -> int | None:
    """`_asked`, in whole segments."""
    segment, steps = _segment(task, config), _asked(task, config, what)
    return None if steps is None else math.ceil(steps / segment) * segment


@functools.cache  # a sweep prepares many runs of one config
def _warn_once(text: str) -> None:
    logging.warning('%s', text)


def checkpoint_at(task: tasks.Task, config: Mapping[str, Any], part: float) -> int:
    """The first step with a checkpoint at or after a part of the run; the last step has one."""
    every = _every(task, config, 'checkpoint')
    assert every is not None
    return min(task.num_steps, math.ceil(part * task.num_steps / every) * every)


def kinship(experiment: Experiment) -> str:
    """The same for runs that ``train_together`` takes: all but floats, and where they are."""
    config = experiment.optimizer_config
    others = {name: value for name, value in config.items() if not isinstance(value, float)}
    return repr((sorted(others.items()), sorted(config), experiment.run.latest_step()))


def room(experiment: Experiment) -> int:
    """For how many runs like this the device has memory; 1 on CPUs, where more gain nothing."""
    device = jax.devices()[0]
    stats = device.memory_stats()
    if device.platform == 'cpu' or not stats or mesh_lib.of(experiment.config) is not None:
        return 1
    task, config = experiment.task, experiment.config
    program = program_lib.single(task, config, experiment.optimizer_config)
    segments = segments_lib.make(task, program.step, config['seed'])
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
    like = _placed(jax.eval_shape(alone.initial), alone.shardings)
    restored = [experiment.run.restore(like) for experiment in experiments]
    carries = [carry for carry, _ in restored if carry is not None]
    steps = {int(carry.step) for carry in carries}
    if carries and (len(steps) > 1 or len(carries) < len(restored)):
        raise ValueError(f'runs go on together from one step; they are at {sorted(steps)}.')
    if carries:
        carry = program.stack(carries)
    else:
        carry = jax.jit(program.initial, out_shardings=program.shardings)()
    step = int(carry.step)
    for experiment in experiments:
        experiment.run.truncate_metrics(step)
    return program, carry, step, [seconds for _, seconds in restored]


def _tell_of_whole_axes(task: tasks.Task, mesh: jax.sharding.Mesh) -> None:
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    for text in mesh_lib.left_whole(mesh, params, task.logical_axes):
        if jax.process_index() == 0:
            logging.warning('whole on each device, not divided: %s', text)


def _placed(shapes: Any, shardings: program_lib.Carry | None) -> Any:
    """Shapes with the shardings of a carry; of None, on the first device."""
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, shapes)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )


def train_and_evaluate(
    task_config: Mapping[str, Any],
    optimizer_config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    data_dir: str | None = None,
    *,
    progress: bool = True,
    stop_after: int | None = None,
    options: telemetry.Options | None = None,
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
      options: what else is measured.

    Returns:
      The summary, as in ``summary.json``.

    Raises:
      SystemExit: with exit code 143, after a SIGTERM, when the run is saved.
      ValueError: for a wrong configuration, or a workdir that holds another one.
      FileNotFoundError: for missing data.
    """
    experiment = prepare(task_config, optimizer_config, workdir, data_dir, options)
    return train(experiment, progress=progress, stop_after=stop_after)
