"""Two processes, each with half of the devices, compute what one does, and share checkpoints."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests import cases, quick
from tests import process_worker as worker

ROOT = pathlib.Path(__file__).parents[1]


def run_together(commands, folder, timeout):
    """Runs commands at the same time; when one fails or time is up, none is left running."""
    logs = [folder / f'process_{i}.log' for i in range(len(commands))]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    running = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open('w') as output:
                running.append(
                    subprocess.Popen(
                        command, stdout=output, stderr=output, cwd=ROOT, env=environment
                    )
                )
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running) or time.monotonic() > end:
                break
            time.sleep(0.1)
        codes = [process.poll() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(codes) or None in codes:
        told = [
            f'process {i}: {"still running" if code is None else f"exit code {code}"}\n'
            f'{log.read_text()[-5000:]}'
            for i, (code, log) in enumerate(zip(codes, logs, strict=True))
        ]
        pytest.fail(f'within {timeout} s:\n' + '\n'.join(told), pytrace=False)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def assert_same(carry, expected):
    """By path, to rounding; the paths are the same ones."""
    assert carry.keys() == expected.keys()
    for path, x in carry.items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


def below(results, prefix):
    return {k.removeprefix(prefix): v for k, v in results.items() if k.startswith(prefix + '[')}


@pytest.mark.parametrize('method', quick.every(3, worker.METHODS))
def test_one_process_with_eight_devices_equals_one_device(method):
    one = worker.make_mesh(jax.devices()[:1])
    expected = train_from_start(method, one, 'rows', worker.BEFORE)
    for layout in worker.LAYOUTS:
        mesh = worker.make_mesh(jax.devices())
        carry = train_from_start(method, mesh, layout, worker.BEFORE)
        assert_same(worker.gather(carry), worker.gather(expected))


def train_from_start(method, mesh, layout, steps):
    return worker.train(method, mesh, layout, worker.begin(method, mesh, layout), range(steps))


FIRST = ('sonew',)
OTHERS = tuple(method for method in worker.METHODS if method not in FIRST)


@pytest.mark.parametrize('methods', [FIRST, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_two_processes_equal_one(methods, tmp_path):
    one = worker.make_mesh(jax.devices()[:1])
    eight = worker.make_mesh(jax.devices())
    expected, expected_later = {}, {}
    for method in methods:
        expected[method] = worker.gather(train_from_start(method, one, 'rows', worker.BEFORE))
        expected_later[method] = worker.gather(train_from_start(method, one, 'rows', worker.AFTER))
        carry = train_from_start(method, eight, 'columns', worker.BEFORE)
        worker.save(tmp_path / 'one' / method, carry)
    module = [sys.executable, '-m', 'tests.process_worker', f'127.0.0.1:{free_port()}', '2']
    run_together(
        [[*module, str(i), str(tmp_path), *methods] for i in range(2)], tmp_path, timeout=240
    )
    results = dict(np.load(tmp_path / 'results.npz'))
    for method in methods:
        for layout in worker.LAYOUTS:
            assert_same(below(results, f'{method}/{layout}/'), expected[method])
        # No device holds more than its share, from the start; what has fewer axes than the
        # parameter is on several.
        share = worker.share_held(worker.begin(method, eight, 'both'))
        assert results[f'{method}/both/share'] == results[f'{method}/both/share_after'] == share
        assert share == 1 / 8 or (cases.BY_NAME[method].compressed and share < 1 / 4)
        # Saved by one process, restored on two.
        assert_same(below(results, f'{method}/restored/'), expected_later[method])
        # Saved by two, restored on one with eight devices, and with one device.
        for mesh in (eight, one):
            carry = worker.restore(tmp_path / 'two' / method, method, mesh, 'columns')
            for path, x in worker.gather(carry).items():
                np.testing.assert_array_equal(x, results[f'{method}/both/{path}'])
            carry = worker.train(
                method, mesh, 'columns', carry, range(worker.BEFORE, worker.AFTER)
            )
            assert_same(worker.gather(carry), expected_later[method])


def test_a_failing_process_is_told_and_none_is_left(tmp_path):
    note = tmp_path / 'id'
    waiting = f'import os, time; open({str(note)!r}, "w").write(str(os.getpid())); time.sleep(60)'
    failing = f'import os, sys, time\nwhile not os.path.exists({str(note)!r}): time.sleep(0.1)\n'
    failing += 'time.sleep(0.5); sys.exit("boom")'
    commands = [[sys.executable, '-c', code] for code in (waiting, failing)]
    with pytest.raises(pytest.fail.Exception, match=r'0: still running(.|\n)*1\nboom'):
        run_together(commands, tmp_path, timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    with pytest.raises(pytest.fail.Exception, match=r'0: still running'):
        run_together(commands[:1], tmp_path, timeout=0.5)
