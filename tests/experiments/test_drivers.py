"""The drivers: every task with every optimizer, kill and resume, wrong input."""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import main as main_lib
from experiments import optimizers, report, telemetry, train
from experiments import tasks as tasks_lib
from experiments import workdir as workdir_lib
from tests.experiments.small import (
    OPTIMIZERS,
    ROOT,
    TASKS,
    config_of,
    for_few_steps,
    lines,
    small_task,
    without_clock,
)


def main(*arguments, module='main', **keywords):
    return subprocess.run(
        [sys.executable, '-m', f'experiments.{module}', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **keywords,
    )


def flags_for(workdir, *more):
    return (
        '--task=configs/tasks/digits.py',
        '--optimizer=configs/optimizers/sonew.py',
        f'--workdir={workdir}',
        '--task.source=synthetic',
        '--task.batch_size=64',
        '--task.hidden=(8,3,8)',
        *more,
    )


def pairs():
    """Tasks and optimizers. The small configs shrink to what the large ones do.

    Quick are SONew and, on the autoencoder, every second optimizer.
    """
    for task in TASKS:
        for i, optimizer in enumerate(OPTIMIZERS):
            if task in ('autoencoder', 'language_model', 'pos_tagging') or optimizer == 'sonew':
                slow = optimizer != 'sonew' and (task != 'autoencoder' or i % 2)
                yield pytest.param(task, optimizer, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(('task', 'optimizer'), list(pairs()))
def test_every_task_with_every_optimizer(task, optimizer, tmp_path):
    task_config = small_task(task, batch_size=128)
    config = for_few_steps(config_of('optimizers', optimizer))
    summary = train.train_and_evaluate(task_config, config, tmp_path, progress=False)
    assert summary['steps'] == 4
    assert np.isfinite(summary['train_loss'])
    assert summary['notfinite'] == 0
    assert [row['step'] for row in lines(tmp_path)] == [1, 2, 3, 4]


def test_every_optimizer_is_given_the_loss_of_its_batch(tmp_path):
    """SOAA's mean of the losses is that of those that are logged; what it tells is logged too."""
    task = small_task(epochs=3)
    train.train_and_evaluate(task, config_of('optimizers', 'soaa'), tmp_path / 'a', progress=False)
    rows = lines(tmp_path / 'a')
    average = 0.0
    for row in rows:
        average = 0.9 * average + 0.1 * row['loss']
        assert row['loss_average'] == pytest.approx(average, rel=1e-5)
        assert row['trust_region'] > 0
    assert rows[-1]['predicted_reduction'] > 0
    train.train_and_evaluate(task, config_of('optimizers', 'adam'), tmp_path / 'b', progress=False)
    assert not set(telemetry.TOLD) & set(lines(tmp_path / 'b')[0])


def test_training_lowers_the_loss(tmp_path):
    task = small_task(epochs=30)
    summary = train.train_and_evaluate(task, config_of('optimizers', 'sonew'), tmp_path)
    assert summary['train_loss'] < 0.97 * lines(tmp_path)[0]['loss']


def test_length_of_segments_does_not_change_the_run(tmp_path):
    """One step at a time, three at a time, or all: the same losses."""
    optimizer = config_of('optimizers', 'sonew')
    optimizer.eps = 1e-2
    ends = []
    for every in (1, 3, 100):
        task = small_task(log_every=every, epochs=4)
        folder = tmp_path / str(every)
        ends.append(train.train_and_evaluate(task, optimizer, folder, progress=False))
    for end in ends[1:]:
        np.testing.assert_allclose(end['train_loss'], ends[0]['train_loss'], rtol=1e-5)


def test_every_example_is_seen_once_in_an_epoch(monkeypatch, tmp_path):
    """With a loss that marks the rows it is given, by the gradient."""
    count, size = 12, 4

    def fake(config, data_dir, workdir):
        return tasks_lib.Task(
            train_data=jnp.arange(count),
            batch_size=size,
            epochs=2,
            init=lambda key: jnp.zeros(count),
            loss=lambda params, rows: jnp.sum(params[rows]) + 0 * jnp.sum(params),
            schedule=lambda peak: lambda step: -peak,
            evaluate=lambda params: {'train_loss': params.sum(), 'seen': params.min()},
        )

    monkeypatch.setattr(tasks_lib, 'make', fake)
    config = config_of('optimizers', 'sgd')
    config.update(momentum=0.0, learning_rate=1.0)
    summary = train.train_and_evaluate(small_task(log_every=2), config, tmp_path, progress=False)
    assert summary['train_loss'] == 2 * count
    assert summary['seen'] == 2


@pytest.mark.parametrize('stop_after', [1, 4, 5])
def test_resumed_run_is_the_same_bit_for_bit(tmp_path, stop_after):
    task, optimizer = (
        small_task(epochs=3, checkpoint_every_epochs=1),
        config_of('optimizers', 'sonew'),
    )
    whole = train.train_and_evaluate(task, optimizer, tmp_path / 'whole', progress=False)
    cut = tmp_path / 'cut'
    partial = train.train_and_evaluate(task, optimizer, cut, progress=False, stop_after=stop_after)
    assert partial == {'step': stop_after}
    resumed = train.train_and_evaluate(task, optimizer, cut, progress=False)
    assert without_clock([resumed]) == without_clock([whole])
    assert without_clock(lines(cut)) == without_clock(lines(tmp_path / 'whole'))


def test_killed_run_resumes_bit_for_bit(tmp_path):
    """SIGKILL in the middle, twice; then the same command ends as if nothing had been."""
    more = ('--task.epochs=2000', '--task.log_every=20', '--task.checkpoint_every_epochs=100')
    assert main(*flags_for(tmp_path / 'whole', *more)).returncode == 0
    cut = tmp_path / 'cut'
    for kill in range(2):
        process = subprocess.Popen(
            [sys.executable, '-m', 'experiments.main', *flags_for(cut, *more)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        log, wanted = cut / 'metrics.jsonl', 60 + 100 * kill
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) > wanted:
                break
            time.sleep(0.01)
        assert process.poll() is None, 'the run ended before it could be killed'
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (cut / 'summary.json').exists()
    done = main(*flags_for(cut, *more))
    assert done.returncode == 0, done.stderr
    assert without_clock(lines(cut)) == without_clock(lines(tmp_path / 'whole'))
    ends = [json.loads((tmp_path / f / 'summary.json').read_text()) for f in ('cut', 'whole')]
    assert without_clock(ends[:1]) == without_clock(ends[1:])


def test_finished_run_is_not_repeated(tmp_path):
    task, optimizer = small_task(), config_of('optimizers', 'adam')
    first = train.train_and_evaluate(task, optimizer, tmp_path, progress=False)
    stamp = (tmp_path / 'metrics.jsonl').stat().st_mtime_ns
    assert train.train_and_evaluate(task, optimizer, tmp_path, progress=False) == first
    assert (tmp_path / 'metrics.jsonl').stat().st_mtime_ns == stamp


def test_log_line_cut_off_by_a_kill_is_dropped(tmp_path):
    run = workdir_lib.Workdir(tmp_path, {'a': 1}, {'b': 2})
    run.log({'step': 1})
    run.log({'step': 2})
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 3, "lo')
    run.truncate_metrics(1)
    assert lines(tmp_path) == [{'step': 1}]


def test_non_finite_gradients_are_skipped_and_counted(monkeypatch, tmp_path):
    """A loss that is NaN on its first batches leaves the parameters alone."""
    real = tasks_lib.make

    def poisoned(config, data_dir, workdir):
        task = real(config, data_dir, workdir)
        data = task.train_data.astype(jnp.float32).at[0].set(jnp.nan)
        return dataclasses.replace(task, train_data=data)

    monkeypatch.setattr(tasks_lib, 'make', poisoned)
    task = small_task(epochs=3)
    summary = train.train_and_evaluate(task, config_of('optimizers', 'sonew'), tmp_path)
    assert summary['notfinite'] == 3  # the batch with the broken row, in each epoch
    assert np.isfinite(summary['test_loss'])


def test_two_tasks_or_optimizers_do_not_share_a_workdir(tmp_path):
    task, optimizer = small_task(), config_of('optimizers', 'adam')
    train.train_and_evaluate(task, optimizer, tmp_path, progress=False)
    optimizer.learning_rate = 0.5
    task.epochs = 3
    with pytest.raises(
        ValueError, match=r'task.epochs: 2 there, 3 given; .*learning_rate: 0.003 th'
    ):
        train.train_and_evaluate(task, optimizer, tmp_path, progress=False)


def test_fields_that_configs_were_given_later(tmp_path):
    """A run of before them goes on, and is that of their old meaning."""
    task, optimizer = small_task(), config_of('optimizers', 'sonew')
    train.train_and_evaluate(task, optimizer, tmp_path, progress=False, stop_after=4)
    file = tmp_path / 'config.json'
    held = json.loads(file.read_text())
    for field in workdir_lib.ADDED:
        group, name = field.split('.')
        held[group].pop(name, None)
    file.write_text(json.dumps(held))
    task.compute_dtype = 'bfloat16'
    with pytest.raises(ValueError, match=r"\(task.compute_dtype: 'float32' there, 'bfloat16' gi"):
        train.train_and_evaluate(task, optimizer, tmp_path, progress=False)
    task.compute_dtype = 'float32'
    assert train.train_and_evaluate(task, optimizer, tmp_path, progress=False)['steps'] == 8


def test_log_lines_by_epoch_and_what_is_rounded(tmp_path, monkeypatch):
    """None is an epoch, of four steps; what no log line ends is told, once for a config."""
    train._warn_once.cache_clear()  # other tests may have been told
    told = []
    monkeypatch.setattr(train.logging, 'warning', lambda text, *args: told.append(text % args))
    adam = config_of('optimizers', 'adam')
    train.train_and_evaluate(small_task(log_every=None), adam, tmp_path, progress=False)
    assert [row['step'] for row in lines(tmp_path)] == [4, 8]
    assert not told
    for _ in range(2):
        train.check(small_task(log_every=3, checkpoint_every_epochs=1), adam)
    assert len(told) == 1
    assert told[0].startswith('task.checkpoint_every is 4 steps, no multiple of the 3 between two')
    assert 'taken for 6' in told[0]


def test_a_check_looks_into_the_folder_and_writes_nothing(tmp_path):
    task, optimizer = small_task(), config_of('optimizers', 'adam')
    train.check(task, optimizer, None, tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
    train.prepare(task, optimizer, tmp_path / 'run')
    train.check(task, optimizer, None, tmp_path / 'run')
    with pytest.raises(ValueError, match=r'holds a run of another configuration \(task.epochs'):
        train.check(small_task(epochs=3), optimizer, None, tmp_path / 'run')


@pytest.mark.parametrize('name', ['autoencoder', 'language_model'])
def test_killed_before_the_summary(name, tmp_path):
    """No step is left, and what the program needs is known all the same."""
    task, optimizer = small_task(name), config_of('optimizers', 'sgd')
    whole = train.train_and_evaluate(task, optimizer, tmp_path, progress=False)
    (tmp_path / 'summary.json').unlink()
    again = train.train_and_evaluate(task, optimizer, tmp_path, progress=False)
    assert again['program_bytes'] > 0
    assert without_clock([again]) == without_clock([whole])


BAD_CONFIGS = [
    (
        dict(name='autoencodr'),
        {},
        r"task.name must be one of \['autoencoder', 'lang.*', 'pos_tagging'\], got 'autoencodr'",
    ),
    (dict(source='cifar'), {}, r"task.source must be one of .*, got 'cifar'"),
    (dict(batch_size=0), {}, r'task.batch_size must be in \[1, 256\]'),
    (dict(batch_size=257), {}, r'task.batch_size must be in \[1, 256\]'),
    (dict(param_dtype='int8'), {}, "task.param_dtype must be .* got 'int8'"),
    (dict(compute_dtype='int8'), {}, "task.compute_dtype must be .* got 'int8'"),
    (dict(epochs=0), {}, 'task.epochs must be an integer >= 1, got 0'),
    (dict(log_every=0), {}, 'task.log_every must be an integer >= 1'),
    (dict(seed=-1), {}, 'task.seed must be an integer >= 0, got -1'),
    (dict(max_consecutive_errors=-1), {}, 'task.max_consecutive_errors must be an integer >= 0'),
    (dict(hidden=()), {}, r'task.hidden must be integers >= 1, one at least, got \(\)'),
    (dict(hidden=(0, 3)), {}, 'task.hidden must be integers >= 1'),
    ({}, dict(learning_rate=-1.0), 'optimizer.learning_rate must be a number >= 0, got -1.0'),
    (dict(warmup_epochs=9), {}, 'task.warmup_epochs must be in'),
    ({}, dict(name='sonnew'), r"optimizer.name must be one of .*'sonew'.*, got 'sonnew'"),
    ({}, dict(b2=2.0), r'b2 must be in \[0, 1\), got 2.0'),
    ({}, dict(name='soaa'), "'soaa' does not take these keywords: .*'band'"),
]


@pytest.mark.parametrize(('task', 'optimizer', 'message'), BAD_CONFIGS)
def test_bad_config(task, optimizer, message, tmp_path):
    optimizer_config = config_of('optimizers', 'sonew')
    optimizer_config.update(optimizer)
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(small_task(**task), optimizer_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists(), 'a wrong configuration leaves nothing behind'


def test_unknown_keyword_of_an_optimizer(tmp_path):
    optimizer = config_of('optimizers', 'adam')
    with optimizer.unlocked():
        optimizer.momentum = 0.9
    with pytest.raises(ValueError, match=r"'adam' does not take these keywords: .*momentum"):
        train.train_and_evaluate(small_task(), optimizer, tmp_path)


def test_missing_data(tmp_path):
    for data_dir in (None, str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"source 'mnist'.* mnist/train-images"):
            train.train_and_evaluate(
                small_task(source='mnist'), config_of('optimizers', 'adam'), tmp_path, data_dir
            )


@pytest.mark.parametrize('content', ['{}', 'no json', '{"task": 1, "optimizer": 2}', '[]'])
def test_workdir_with_a_foreign_config(content, tmp_path):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(ValueError, match=r'config.json is not the configuration of a run'):
        train.train_and_evaluate(small_task(), config_of('optimizers', 'adam'), tmp_path)


def test_workdir_with_other_things(tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(ValueError, match=r'is not empty and holds no config\.json'):
        train.train_and_evaluate(small_task(), config_of('optimizers', 'adam'), tmp_path)


@pytest.mark.parametrize('optimizer', ['sonew', 'soaa'])
def test_config_has_all_arguments(optimizer):
    parameters = inspect.signature(optimizers.FACTORIES[optimizer]).parameters
    config = config_of('optimizers', optimizer)
    ours = {'name', 'search_space'} | ({'schedules', 'layout'} & set(config))
    assert set(config) == set(parameters) - {'layout', 'mask'} | ours
    for name, value in config.items():
        if name not in ours | {'learning_rate', 'total_steps'}:
            # The autoencoder's; and zero is what None stands for, which no search could change.
            own = {'eps': 1e-4, 'mean_eps': None, 'relative_eps': 0.0}
            default = parameters[name].default
            assert value == (own.get(name, default) if optimizer == 'sonew' else default), name


def test_workdir_that_is_a_file(tmp_path):
    file = tmp_path / 'file'
    file.write_text('')
    with pytest.raises(ValueError, match='is a file, a folder is needed'):
        train.train_and_evaluate(small_task(), config_of('optimizers', 'adam'), file)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--task.epoch=3',), 'Did you mean "epochs"'),
        (('--task.nothing=3',), "no such field: 'nothing'"),
        (('--task=configs/tasks/language_model.py:huge',), "'large', '1b'], got 'huge'"),
        (('--nothing=1',), "Unknown command line flag 'nothing'"),
        (('extra',), 'unknown arguments: extra'),
        (
            ('--task=configs/tasks/mnst.py',),
            'mnst.py: no such file. There are: configs/tasks/auto',
        ),
        (
            ('--optimizer=configs/optimizers/adm.py',),
            'adafactor.py, configs/optimizers/adagrad.py',
        ),
        (('--task.epochs=many',), 'many'),
        (('--task.epochs=0',), 'error: task.epochs must be an integer >= 1, got 0'),
        (('--optimizer.band=-7',), 'error: band must be an integer >= 0, got -7'),
    ],
)
def test_wrong_flags(arguments, message, tmp_path):
    done = main(*flags_for(tmp_path / 'run', *arguments))
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('flag', 'there'), [('search', 'searches/random.py'), ('table', 'tables/autoencoder.py')]
)
def test_other_config_files_that_are_not_there(flag, there):
    with pytest.raises(SystemExit, match=rf'--{flag}=no.py: no such file. There are: .*{there}'):
        main_lib._parse(['program', f'--{flag}=no.py'])


def test_what_fails_once_training_has_begun_is_no_wrong_input(tmp_path, monkeypatch):
    """Drivers show a ``ValueError`` of the checks without a traceback; this has one."""

    def fails(*_):
        raise ValueError('no room')

    monkeypatch.setattr(train._Loop, 'run', fails)
    with pytest.raises(RuntimeError, match=f'training failed in {tmp_path}: no room') as raised:
        train.train_and_evaluate(small_task(), config_of('optimizers', 'sgd'), tmp_path)
    assert isinstance(raised.value.__cause__, ValueError)


def test_required_flags():
    done = main('--task=configs/tasks/digits.py')
    assert done.returncode != 0
    assert 'optimizer' in done.stderr
    assert 'workdir' in done.stderr


def test_command_line_overrides_reach_the_run(tmp_path):
    done = main(*flags_for(tmp_path, '--task.epochs=6', '--optimizer.learning_rate=0.5'))
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['task']['epochs'] == 6
    assert config['optimizer']['learning_rate'] == 0.5
    assert config['environment']['versions']['jax']
    assert json.loads(done.stdout.splitlines()[-1])['steps'] == 24


@pytest.mark.parametrize('flags', ['', '--xla_cpu_experimental_ynn_fusion_type='])
def test_flags_of_the_compiler_are_kept_with_a_run(tmp_path, monkeypatch, flags):
    monkeypatch.setenv('XLA_FLAGS', flags)  # XLA itself has read its flags by now
    train.train_and_evaluate(small_task(epochs=1), config_of('optimizers', 'sgd'), tmp_path)
    environment = json.loads((tmp_path / 'config.json').read_text())['environment']
    assert environment.get('xla_flags', '') == flags
    text = report.environment_lines(report.load([tmp_path]))
    assert ('XLA_FLAGS' in text) == bool(flags)
    assert flags in text


def test_drivers_need_only_what_they_use(tmp_path):
    """Without TFDS, Optuna, matplotlib and the like, training still runs."""
    absent = ('tensorflow_datasets', 'array_record', 'conllu', 'grain', 'optuna', 'matplotlib')
    absent += ('sklearn',)
    (tmp_path / 'sitecustomize.py').write_text(
        'import sys\n' + ''.join(f'sys.modules[{name!r}] = None\n' for name in absent)
    )
    environment = {**os.environ, 'PYTHONPATH': f'{tmp_path}:{os.environ.get("PYTHONPATH", "")}'}
    done = main(*flags_for(tmp_path / 'run', '--task.epochs=5'), env=environment)
    assert done.returncode == 0, done.stderr


def test_report(tmp_path):
    for name, rate in (('adam', 1e-3), ('adam', 1e-2), ('sonew', 1e-2)):
        optimizer = config_of('optimizers', name)
        optimizer.learning_rate = rate
        train.train_and_evaluate(
            small_task(), optimizer, tmp_path / f'{name}{rate}', progress=False
        )
    train.train_and_evaluate(
        small_task(), config_of('optimizers', 'sgd'), tmp_path / 'sgd', stop_after=2
    )
    text = report.report([str(tmp_path)], str(tmp_path / 'out' / 'report'))
    for label in ('adam learning_rate=0.001', 'adam learning_rate=0.01', '| sonew ', 'at step 2'):
        assert label in text
    rows = text.splitlines()[2:5]
    losses = [float(row.split('|')[2]) for row in rows]
    assert losses == sorted(losses)
    assert (tmp_path / 'out/report.png').stat().st_size > 10_000
    assert len(json.loads((tmp_path / 'out/report.json').read_text())) == 4
    assert (tmp_path / 'out/report.md').read_text().strip() in text


def test_report_with_a_diverged_and_a_torn_run(tmp_path):
    for name, rate in (('sgd', 1e9), ('adam', 1e-2), ('adam', 1e-3)):
        optimizer = config_of('optimizers', name)
        optimizer.learning_rate = rate
        task = small_task(max_consecutive_errors=0)
        train.train_and_evaluate(task, optimizer, tmp_path / f'{name}{rate}', progress=False)
    torn = tmp_path / 'torn'
    train.train_and_evaluate(small_task(), config_of('optimizers', 'sgd'), torn, stop_after=2)
    with open(torn / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 3, "lo')
    text = report.report([str(tmp_path), str(torn)], str(tmp_path / 'report'))
    first = [row.split('|')[1].split()[0] for row in text.splitlines()[2:6]]
    assert first == ['adam', 'adam', 'sgd', 'sgd']
    assert text.count('at step 2') == 1
    json.loads((tmp_path / 'report.json').read_text(), parse_constant=pytest.fail)


def test_report_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no run'):
        report.find([str(tmp_path)])
