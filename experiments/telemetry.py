"""What is measured of a run besides its loss: the times of its steps, and what they do.

``tokens_per_second`` counts the tokens of all processes over the time of a row's steps, without
validation and checkpoints. ``mfu``, the model FLOPs utilisation, is ::

    tokens_per_second * flops_per_token / (devices * peak FLOP/s of one)

with the task's ``flops_per_token``, of the model alone: what is computed again to save memory and
what the optimizer does are no part of it. Null where the peak is not known, see `PEAK_FLOPS`.

``step_seconds_p50`` and ``step_seconds_p99`` are percentiles of the times between the ends of
steps that follow each other, see `Watch`; they include waiting for a batch. Where a row's steps
are one compiled scan, nothing is seen of the single ones: both are the mean.

``optimizer_share`` is `optimizer_seconds` over the mean of a row's step times.
"""

import collections
import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# What an optimizer's state may tell of the run as a whole; logged where it does.
TOLD = ('trust_region', 'predicted_reduction', 'loss_average')

# FLOP/s of one device in dense bfloat16, from its maker's data sheet, by ``device_kind``.
PEAK_FLOPS: Mapping[str, float] = {
    'TPU v3': 123e12 / 2,  # a device is one of a chip's two cores
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989.4e12,
    'NVIDIA H200': 989.4e12,
}
# Fields of an optimizer's config: the steps from one root or refresh of a leaf to its next.
PERIODS = ('root_every', 'update_every')
AHEAD = 2  # steps that the device has before it while the host waits for one


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured beside the run; none of it is part of its configuration.

    Attributes:
      peak_flops: of one device, in place of `PEAK_FLOPS`.
      measure_optimizer: measure `optimizer_seconds` at the start, and log its share of the steps.
      tensorboard: write the log's numbers for TensorBoard too.
      profile: the first step of a profiler trace and for how many steps it is taken. All steps
        of a scan that has one of them are in it.
    """

    peak_flops: float | None = None
    measure_optimizer: bool = False
    tensorboard: bool = False
    profile: tuple[int, int] | None = None

    def check(self) -> None:
        """Raises ``ValueError`` for what cannot be done."""
        if self.tensorboard and importlib.util.find_spec('tensorboardX') is None:
            raise ValueError('TensorBoard needs the package tensorboardX, which is not installed.')
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f'peak_flops must be a number > 0, got {self.peak_flops}.')
        if self.profile is not None and not (self.profile[0] >= 0 and self.profile[1] >= 1):
            raise ValueError(f'a profile is START >= 0 and COUNT >= 1, got {self.profile}.')


class Watch:
    """The times of steps as the device ends them, without holding it up.

    A step is dispatched long before it runs. So the host waits for the end of the one that is
    `AHEAD` before the last dispatched one, and takes the time then: the device still has work,
    unless the host needs longer for a batch than the device for a step, and then that is the
    time of a step.

    Args:
      profile: as in `Options`.
      folder: where the trace goes.
    """

    def __init__(self, profile: tuple[int, int] | None = None, folder: Any = None) -> None:
        self._waiting = collections.deque[tuple[Any, int]]()
        self._last = 0.0
        self.times: list[float] = []  # seconds of each step since `start`
        self._profile, self._folder, self._tracing = profile, folder, False

    def start(self) -> None:
        """From here on steps follow each other."""
        self.times, self._last = [], time.perf_counter()

    def before(self, step: int, length: int) -> None:
        """Before some steps are dispatched: starts or ends the trace."""
        if self._profile is None:
            return
        first, count = self._profile
        within = step < first + count and first < step + length
        if within != self._tracing:
            self.finish()  # what was dispatched before is not in the trace, or wholly in it
            if within:
                jax.profiler.start_trace(str(self._folder))
                self._tracing = True
            else:
                self.close()

    def dispatched(self, result: Any, length: int) -> None:
        """After that: waits for the end of earlier ones."""
        self._waiting.append((result, length))
        while len(self._waiting) > AHEAD:
            self._wait()

    def finish(self) -> None:
        """Waits for all."""
        while self._waiting:
            self._wait()

    def _wait(self) -> None:
        result, length = self._waiting.popleft()
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.times += [(now - self._last) / length] * length
        self._last = now

    def close(self) -> None:
        """Ends the trace, if one is being taken."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing, self._profile = False, None


def peak_flops(given: float | None) -> float | None:
    """FLOP/s of one device of the run: as given, or from the table, or not known."""
    return given or PEAK_FLOPS.get(jax.devices()[0].device_kind)


def mfu(
    tokens_per_second: float, flops_per_token: float, devices: int, peak: float | None
) -> float | None:
    """Model FLOPs utilisation, by the formula above.

    Example:
      >>> mfu(1000.0, 6e9, 8, 1.5e12)
      0.5
    """
    return None if not peak else tokens_per_second * flops_per_token / (devices * peak)


def rates(task: Any, devices: int, options: Options, times: list[float]) -> dict[str, Any]:
    """What a log line says of the speed of its steps.

    Args:
      task: whose ``tokens_per_step`` and ``flops_per_token`` count.
      devices: that take part.
      options: of the run.
      times: the seconds of each step.

    Returns:
      Numbers by name, see above.
    """
    row: dict[str, Any] = {f'step_seconds_p{p}': float(np.percentile(times, p)) for p in (50, 99)}
    if task.tokens_per_step:
        row['tokens_per_second'] = len(times) * task.tokens_per_step / sum(times)
        if task.flops_per_token:
            peak = peak_flops(options.peak_flops)
            row['mfu'] = mfu(row['tokens_per_second'], task.flops_per_token, devices, peak)
    return row


def period(optimizer_config: Mapping[str, Any]) -> int:
    """In how many steps an optimizer does all its work once, by its config.

    Example:
      >>> period({'name': 'mbag', 'root_every': 50}), period({'name': 'adam'})
      (50, 1)
    """
    return max(optimizer_config.get(name, 1) for name in PERIODS)


def optimizer_seconds(tx: optax.GradientTransformation, carry: Any, period: int = 1) -> float:
    """The seconds of an update alone, ``apply_updates`` included: the mean of ten or more.

    On copies of the parameters and the state, which must fit beside them, with gradients that are
    the parameters scaled down. They are whole periods, so methods with periodic work do it as
    often as in a run. Compiled alone, it reads the gradients from memory; in the whole step the
    compiler may overlap it with the backward pass, so its share is rather too large than too
    small.
    """
    repeats = -(-10 // period) * period
    tx = optax.with_extra_args_support(tx)
    places = jax.tree.map(lambda x: x.sharding, (carry.params, carry.opt_state))

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    copied = jax.jit(
        lambda x: (jax.tree.map(jnp.copy, x), jax.tree.map(lambda p: p * 1e-3, x[0])),
        out_shardings=(places, places[0]),
    )
    (params, state), grads = copied((carry.params, carry.opt_state))
    run = jax.jit(update, donate_argnums=(0, 1), out_shardings=places)
    params, state = jax.block_until_ready(run(params, state, grads))
    clock = time.perf_counter()
    for _ in range(repeats):
        params, state = run(params, state, grads)
    jax.block_until_ready(params)
    return (time.perf_counter() - clock) / repeats


class Telemetry:
    """All that is measured of some runs in one program beside their losses.

    Args:
      task: theirs.
      devices: that take part.
      options: of the runs.
      folder: where a trace and the files for TensorBoard go, of the first process alone.
      step: from which the runs go on.

    """

    def __init__(
        self, task: Any, devices: int, options: Options, folder: pathlib.Path, step: int = 0
    ) -> None:
        self._task, self._devices, self._options = task, devices, options
        first = jax.process_index() == 0
        self.watch = Watch(options.profile if first else None, folder / 'profile')
        self._board: Any = None
        if options.tensorboard and first:
            import tensorboardX

            # What was shown of steps after the checkpoint is taken back: they are run again.
            self._board = tensorboardX.SummaryWriter(
                str(folder / 'tensorboard'), purge_step=step + 1 if step else None
            )
        self._optimizer: float | None = None

    def measure(self, tx: optax.GradientTransformation, carry: Any, period: int = 1) -> None:
        """Measures the optimizer alone, see `optimizer_seconds`."""
        self._optimizer = optimizer_seconds(tx, carry, period)

    def rates(self) -> dict[str, Any]:
        """What a log line says of the speed of the steps since the watch was started."""
        times = self.watch.times
        row = rates(self._task, self._devices, self._options, times)
        if self._optimizer is not None:
            row['optimizer_seconds'] = self._optimizer
            # Mean by mean: the median would leave out steps with what is not done in each.
            row['optimizer_share'] = self._optimizer * len(times) / sum(times)
        return row

    def show(self, run: int, row: Mapping[str, Any]) -> None:
        """Gives a log line to TensorBoard; of several runs the first one's."""
        if self._board is None or run:
            return
        for name, value in row.items():
            if value is not None:
                self._board.add_scalar(name, value, row['step'])
        self._board.flush()

    def close(self) -> None:
        """Ends what was begun."""
        self.watch.close()
        if self._board is not None:
            self._board.close()


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
