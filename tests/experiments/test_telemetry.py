"""Speeds, the MFU, the optimizer's share, traces and TensorBoard."""

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import main, segments, tasks, telemetry, train
from experiments.program import Carry
from tests.experiments import stand_in
from tests.experiments.small import config_of, lines


def test_mfu_is_the_model_s_flops_over_what_the_devices_could_do(monkeypatch):
    assert telemetry.mfu(2000.0, 6e9, 4, 1e13) == pytest.approx(2000 * 6e9 / (4 * 1e13))
    task = tasks.Task(
        batch_size=1, epochs=1, init=None, loss=None, schedule=None, evaluate=None,
        tokens_per_step=100, flops_per_token=5.0,
    )  # fmt: skip
    options = telemetry.Options(peak_flops=1000.0)
    row = telemetry.rates(task, 2, options, [0.1, 0.1, 0.3])
    assert row['tokens_per_second'] == pytest.approx(300 / 0.5)
    assert row['mfu'] == pytest.approx(600 * 5 / 2000)
    assert row['step_seconds_p50'] == pytest.approx(0.1)
    assert 0.29 < row['step_seconds_p99'] <= 0.3
    assert telemetry.rates(task, 2, telemetry.Options(), [0.1])['mfu'] is None  # a CPU's peak
    device = type('Device', (), {'device_kind': 'NVIDIA H200'})()
    monkeypatch.setattr(jax, 'devices', lambda: [device])
    assert telemetry.peak_flops(None) == 989.4e12
    assert telemetry.peak_flops(1.0) == 1.0


def test_times_are_those_of_the_ends_of_steps(monkeypatch):
    """Dispatched at once, ready after 1, 3 and 4 seconds."""
    clock, ready = [0.0], {'a': 1.0, 'b': 3.0, 'c': 4.0, 'd': 4.5}
    waited = []

    def block(name):
        waited.append(name)
        clock[0] = max(clock[0], ready[name])

    monkeypatch.setattr(jax, 'block_until_ready', block)
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
    watch = telemetry.Watch()
    watch.start()
    for name in ready:
        watch.dispatched(name, 1)
    assert waited == ['a', 'b'], 'the device has two steps before it'
    watch.finish()
    assert watch.times == [1.0, 2.0, 1.0, 0.5]
    watch.start()
    clock[0] = 0.0
    watch.start()
    watch.dispatched('c', 4)  # a scan of four steps
    watch.finish()
    assert watch.times == [1.0] * 4


def test_the_last_steps_of_a_segment_are_timed_one_by_one(monkeypatch):
    """Also where they are read at once: each is ready a second after the one before."""
    clock = [0.0]

    def block(ready):
        clock[0] = max(clock[0], ready)

    def get(told):
        block(told[-1]['loss'])
        return told

    monkeypatch.setattr(jax, 'block_until_ready', block)
    monkeypatch.setattr(jax, 'device_get', get)
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
    stream = tasks.Stream(6, 6, (), lambda step: iter([{'x': np.zeros(2)}] * 6))
    taking = segments._Streamed(stream, None, None)
    taking._compiled[(2,),] = lambda carry, batch: (carry + 1, {'loss': carry + 1.0})
    watch = telemetry.Watch()
    watch.start()
    _, told = taking(0, 0, 6, watch)
    watch.finish()
    assert told['loss'].tolist() == [1, 2, 3, 4, 5, 6]
    assert watch.times == [1.0] * 6


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (telemetry.Options(peak_flops=-1.0), 'peak_flops must be a number > 0, got -1.0'),
        (telemetry.Options(profile=(-1, 2)), 'a profile is START >= 0 and COUNT >= 1'),
        (telemetry.Options(profile=(1, 0)), 'a profile is START >= 0 and COUNT >= 1'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        options.check()


def test_tensorboard_needs_its_package(monkeypatch):
    monkeypatch.setattr(telemetry.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='needs the package tensorboardX'):
        telemetry.Options(tensorboard=True).check()
    telemetry.Options().check()


def test_measuring_the_optimizer_leaves_the_run_alone():
    params = {'x': jnp.arange(4.0), 'y': jnp.ones((2, 3), jnp.bfloat16)}
    tx = optax.apply_if_finite(optax.adam(1e-3), 3)
    carry = Carry(params, tx.init(params), jnp.zeros([], jnp.int32))
    before = jax.device_get(carry)
    assert telemetry.optimizer_seconds(tx, carry) > 0
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail('changed'), before, carry)


@pytest.mark.parametrize(('name', 'updates'), [('adam', 10), ('block_adam', 12), ('mbag', 50)])
def test_the_optimizer_is_measured_over_whole_periods(name, updates):
    """MBAG's config has roots in every 50th step; the first update is to compile it."""
    config = config_of('optimizers', name)
    if name == 'block_adam':
        config.root_every = 4
    counts = []

    def update(grads, state, params):
        jax.debug.callback(lambda count: counts.append(int(count)), state)
        return grads, state + 1

    tx = optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)
    params = {'x': jnp.ones(3)}
    measured = telemetry.Telemetry(None, 1, telemetry.Options(), pathlib.Path())
    carry = Carry(params, tx.init(params), jnp.zeros([], jnp.int32))
    measured.measure(tx, carry, telemetry.period(config))
    jax.effects_barrier()
    assert sorted(counts) == list(range(1 + updates))


def test_a_run_with_all_of_it(tmp_path, monkeypatch):
    pytest.importorskip('tensorboardX')
    monkeypatch.setitem(tasks._MODULES, 'stand_in', 'tests.experiments.stand_in')
    options = telemetry.Options(
        peak_flops=1e9, measure_optimizer=True, tensorboard=True, profile=(2, 3)
    )
    traced, periods, real = [], [], telemetry.optimizer_seconds

    def seconds(tx, carry, period):
        periods.append(period)
        return real(tx, carry, period)

    monkeypatch.setattr(telemetry, 'optimizer_seconds', seconds)
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: traced.append(folder))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: traced.append('end'))
    config = stand_in.get_config()
    config.update(epochs=2, log_every=4)
    train.train_and_evaluate(
        config, config_of('optimizers', 'mbag'), tmp_path, progress=False, options=options
    )
    assert periods == [50], "mbag's config has roots in every 50th step"
    assert traced == [str(tmp_path / 'profile'), 'end']
    rows = lines(tmp_path)
    assert [row['step'] for row in rows] == [4, 8]
    for row in rows:
        assert row['mfu'] == pytest.approx(row['tokens_per_second'] * 1e3 / 1e9)
        mean = 16 * stand_in.LENGTH / row['tokens_per_second']
        assert row['optimizer_share'] * mean == pytest.approx(row['optimizer_seconds'])
        assert row['grad_norm'] > 0
        assert row['notfinite'] == 0
    events = list((tmp_path / 'tensorboard').iterdir())
    assert events
    assert events[0].stat().st_size > 500


def test_tensorboard_takes_back_what_is_run_again(tmp_path, monkeypatch):
    """A file of a run that goes on from step 4 says that what another has from 5 on is void."""
    pytest.importorskip('tensorboardX')
    from tensorboardX.proto import event_pb2

    monkeypatch.setitem(tasks._MODULES, 'stand_in', 'tests.experiments.stand_in')
    config = stand_in.get_config()
    config.update(epochs=2, checkpoint_every_steps=4)
    arguments = (config, config_of('optimizers', 'sgd'), tmp_path)
    options = telemetry.Options(tensorboard=True)
    for stop in (6, None):
        train.train_and_evaluate(*arguments, progress=False, options=options, stop_after=stop)
    purged = []
    for file in sorted((tmp_path / 'tensorboard').iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], 'little')
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            if event.HasField('session_log'):
                purged.append(event.step)
            data = data[16 + size :]
    assert purged == [5]


def test_a_trace_has_its_steps_and_ends_with_the_run(monkeypatch):
    calls, steps = [], []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append(('on', steps[:])))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append(('off', steps[:])))
    watch = telemetry.Watch((2, 2), 'folder')
    for step in range(6):
        watch.before(step, 1)
        steps.append(step)
    assert calls == [('on', [0, 1]), ('off', [0, 1, 2, 3])]
    watch.close()
    assert len(calls) == 2
    calls.clear()
    watch = telemetry.Watch((5, 2), 'folder')
    watch.before(0, 4)
    assert not calls
    watch.before(4, 4)  # a scan of steps 4 to 7
    watch.close()
    assert [call[0] for call in calls] == ['on', 'off']


def test_gradient_norm_is_before_the_optimizer(monkeypatch, tmp_path):
    """And not logged where no one asked for it."""
    monkeypatch.setitem(tasks._MODULES, 'stand_in', 'tests.experiments.stand_in')
    config = stand_in.get_config()
    config.epochs = 1
    task = tasks.make(config, None)
    train.train_and_evaluate(config, config_of('optimizers', 'sgd'), tmp_path / 'a')
    params = task.init(jax.random.fold_in(jax.random.key(0), 0))
    norm = jax.jit(lambda p, batch: optax.global_norm(jax.grad(task.loss)(p, batch)))
    assert lines(tmp_path / 'a')[0]['grad_norm'] == pytest.approx(
        float(norm(params, next(task.stream.batches(0)))), rel=1e-5
    )
    with config.unlocked():
        config.log_grad_norm = False
    train.train_and_evaluate(config, config_of('optimizers', 'sgd'), tmp_path / 'b')
    assert 'grad_norm' not in lines(tmp_path / 'b')[0]


def test_flags_of_a_single_run_are_refused_elsewhere(monkeypatch):
    flag = main.flags.FLAGS['distributed']
    monkeypatch.setattr(flag, 'present', 1)
    main.refuse_arguments(['driver'], single=True)
    with pytest.raises(main.app.UsageError, match=r'only experiments.main, .*--distributed'):
        main.refuse_arguments(['driver'])
