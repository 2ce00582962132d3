"""Two processes with four CPU devices each train as one device does, and survive being killed."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import tasks, train
from experiments import workdir as workdir_lib
from tests.experiments import stand_in
from tests.experiments.small import ROOT, config_of, lines
from tests.test_processes import free_port


class Two:
    """Both processes of one run; within it, and none is left after it."""

    def __init__(self, folder, *arguments, module='tests.experiments.stand_in', **more):
        self._logs = [folder.with_name(f'{folder.name}_{i}.log') for i in range(2)]
        address = f'--coordinator_address=127.0.0.1:{free_port()}'
        common = ['--optimizer=configs/optimizers/adamw.py', f'--workdir={folder}', address]
        environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '4', **more}
        self.processes = []
        for i, log in enumerate(self._logs):
            numbers = ['--distributed', '--num_processes=2', f'--process_id={i}']
            command = [sys.executable, '-m', module, *common, *numbers, *arguments]
            with log.open('w') as output:
                self.processes.append(
                    subprocess.Popen(
                        command, stdout=output, stderr=output, cwd=ROOT, env=environment
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def told(self):
        return '\n'.join(log.read_text()[-4000:] for log in self._logs)

    def wait_for_row(self, folder, step, seconds=240):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (folder / 'metrics.jsonl').exists() and len(lines_so_far(folder)) >= step:
                return
            assert all(p.poll() is None for p in self.processes), self.told()
            time.sleep(0.05)
        pytest.fail(f'step {step} was not reached:\n{self.told()}')

    def codes(self, seconds=240):
        try:
            return [process.wait(seconds) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f'still running:\n{self.told()}')


def lines_so_far(folder):
    text = (folder / 'metrics.jsonl').read_text()
    return [json.loads(line) for line in text.splitlines() if line.endswith('}')]


def one_device(folder, **changes):
    config = stand_in.get_config()
    config.update(changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks._MODULES, 'stand_in', 'tests.experiments.stand_in')
        return train.train_and_evaluate(
            config, config_of('optimizers', 'adamw'), folder, progress=False
        )


STAND_IN = '--task=tests/experiments/stand_in.py'


@pytest.mark.slow
def test_killed_stopped_and_resumed_by_one_process(tmp_path):
    """SIGKILL to one, SIGTERM to one, one device for the rest: the curve of one device."""
    changes = dict(epochs=5, log_every=2, checkpoint_every_steps=4)  # 20 steps, 10 rows
    expected = one_device(tmp_path / 'one', **changes)
    folder = tmp_path / 'two'
    changes['slow'] = 0.2
    given = [f'--task.{name}={value}' for name, value in changes.items()]
    arguments = (STAND_IN, '--mesh=2,2,2', *given)
    with Two(folder, *arguments) as run:
        run.wait_for_row(folder, 3)
        run.processes[1].send_signal(signal.SIGKILL)
        run.processes[1].wait()
    reached = len(lines_so_far(folder))
    assert 3 <= reached < 10, 'killed in the middle'
    with Two(folder, *arguments) as run:
        run.wait_for_row(folder, reached + 1)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.codes() == [143, 143], run.told()
    stopped = lines(folder)[-1]['step']
    assert 2 * reached < stopped < 20
    assert [file.name for file in (folder / 'checkpoints').glob('[0-9]*')] == [str(stopped)]
    assert not (folder / 'summary.json').exists()
    config = json.loads((folder / 'config.json').read_text())
    assert config['environment']['num_processes'] == 2
    # Now before its first row, at which no step has been asked for that is not long past.
    with Two(folder, *arguments, STAND_IN_SIGTERM='1') as run:
        assert run.codes() == [143, 143], run.told()
    assert stopped <= lines(folder)[-1]['step'] < 20
    done = one_device(folder, **changes)
    assert done['train_loss'] == pytest.approx(expected['train_loss'], rel=1e-4)
    assert_same_curve(folder, tmp_path / 'one')


def assert_same_curve(folder, other):
    rows, expected = lines(folder), lines(other)
    assert [row['step'] for row in rows] == [row['step'] for row in expected]
    for name in ('loss', 'learning_rate', 'train_loss', 'dev_accuracy'):
        got, wanted = ([row.get(name, 0) for row in log] for log in (rows, expected))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['8,1,1', '1,8,1', '1,2,4', '1,1,8'])
def test_two_processes_equal_one_device(mesh, tmp_path):
    """To the end; with 1,1,8 both processes read the whole batch."""
    expected = one_device(tmp_path / 'one')
    with Two(tmp_path / 'two', STAND_IN, f'--mesh={mesh}') as run:
        assert run.codes() == [0, 0], run.told()
    assert_same_curve(tmp_path / 'two', tmp_path / 'one')
    summary = json.loads((tmp_path / 'two' / 'summary.json').read_text())
    assert summary['train_loss'] == pytest.approx(expected['train_loss'], rel=1e-4)
    assert summary['state_bytes'] == expected['state_bytes']


@pytest.mark.slow
def test_tagging_on_two_processes(tmp_path):
    """Its stream, its evaluation and its table of confusions, by plain data parallelism."""
    changes = dict(source='synthetic', batch_size=64, epochs=2, warmup_epochs=1, log_every=1)
    changes |= dict(layers=1, width=8, heads=2, qkv=8, mlp=16, buckets='(8,)', min_count=1)
    changes |= dict(dropout=0.0)
    given = [f'--task.{name}={value}' for name, value in changes.items()]
    flags = ('--task=configs/tasks/pos_tagging_small.py', *given)
    with Two(tmp_path / 'two', *flags, module='experiments.main') as run:
        assert run.codes() == [0, 0], run.told()
    alone = ['--optimizer=configs/optimizers/adamw.py', f'--workdir={tmp_path / "one"}']
    command = [sys.executable, '-m', 'experiments.main', *alone, *flags]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_same_curve(tmp_path / 'two', tmp_path / 'one')
    one, two = (json.loads((tmp_path / f / 'summary.json').read_text()) for f in ('one', 'two'))
    assert two['dev_confusions'] == one['dev_confusions']
    assert two['at_best_dev'] == pytest.approx(one['at_best_dev'], rel=1e-4)


@pytest.mark.parametrize('error', [ValueError('no'), OSError('disk full')])
def test_others_are_told_whatever_the_first_process_raises(error, monkeypatch):
    told = []

    def action():
        raise error

    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(
        workdir_lib.multihost_utils, 'broadcast_one_to_all', lambda x: told.append(bool(x))
    )
    with pytest.raises(type(error), match=str(error)):
        workdir_lib._first_process(action)
    assert told == [True]


def test_processes_must_have_read_the_same(monkeypatch):
    same = {'text.json': b'its rows', 'tokenizer.model': b'its pieces'}
    told = []
    workdir_lib._same_in_all_processes(same)

    def gathered(own):
        told.append(own)
        return np.stack([told[0], own])

    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(workdir_lib.multihost_utils, 'process_allgather', gathered)
    workdir_lib._same_in_all_processes(same)
    workdir_lib._same_in_all_processes(dict(reversed(same.items())))
    with pytest.raises(
        ValueError, match=r"has other \['text.json', .*'\] than processes \[0\]: all"
    ):
        workdir_lib._same_in_all_processes(same | {'text.json': b'other rows'})


def test_processes_are_given_with_distributed():
    command = [sys.executable, '-m', 'tests.experiments.stand_in', STAND_IN, '--workdir=none']
    command += ['--optimizer=configs/optimizers/adamw.py', '--num_processes=2']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'error: --coordinator_address, --num_processes and --proc' in done.stderr
