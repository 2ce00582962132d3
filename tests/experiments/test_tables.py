"""The tables of accuracy, sharding, roots and mini-blocks, on as little as they take."""

import pytest

from experiments import accuracy, matrix_roots, mini_blocks, sharding, workdir
from tests import test_sharding


def test_accuracy_compares_with_the_oracle(monkeypatch):
    grads = accuracy.gradients(2)
    assert [g.shape for g in grads] == [(64, 16)] * 2
    small = [g[:6, :4] for g in grads]
    exact = accuracy.measure(small, 'float32', band=2, eps=1e-2)
    rough = accuracy.measure(small, 'bfloat16 statistics, nearest', band=2, eps=1e-6)
    assert exact['error'] < 1e-5 < rough['error']
    assert exact['dropped'] == 0 < rough['dropped'] < 1
    monkeypatch.setattr(accuracy, 'DTYPES', {'float32': ('float32', {})})
    monkeypatch.setattr(accuracy, 'STEPS', (2,))
    monkeypatch.setattr(accuracy, 'EPS', (1e-2,))
    rows = [
        {'eps': 1e-2, 'dtype': 'float32', 'steps': 2, 'band': band} | rough
        for band in accuracy.BANDS
    ]
    assert '% dropped)' in accuracy.render(rows)


def test_sharding_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(test_sharding, 'WAYS', {(16, 8): [sharding.P('x', 'y')]})
    monkeypatch.setattr(sharding, 'BANDS', (1,))
    moved, held = sharding.collective_bytes(), sharding.device_bytes()
    assert held[0]['jit_init'] == held[0]['total']
    counts = 4 * 2  # the step counts of SONew and of its alias, if any, on every device
    assert abs(held[0]['state_sharding'] - held[0]['total'] / 8) <= counts
    assert held[0]['after_an_update'] == held[0]['state_sharding']
    # A shard is (4, 4): four shifts of two faces of four entries, and the norms.
    assert sum(size for _, size in moved[0]['collectives']) == 4 * 2 * 4 * 4 + 16
    text = sharding.render(moved, held)
    workdir.save_tables(str(tmp_path), 'sharding', {'moved': moved, 'held': held}, text)
    assert '| 16x8 ' in capsys.readouterr().out
    assert (tmp_path / 'sharding.md').read_text() == text + '\n'
    assert '"commit"' in (tmp_path / 'sharding.json').read_text()


@pytest.mark.slow
def test_matrix_roots_tables(monkeypatch):
    for name, value in {
        'BATCHES': {4: 3},
        'STEPS': (5, 25),
        'CONDITIONS': (1e2,),
        'SHIFTS': (1e-2,),
        'BLOCK': 6,
        'OUTPUTS': 3,
        'PRECISION_CASES': {'extra rows': (3, 1, {'directions': 2})},
        'PRECISION_STEPS': 4,
        'NORM_STEPS': (2, 32),
        'NORM_TIMES': 3,
        'NORM_RANK': 2,
    }.items():
        monkeypatch.setattr(matrix_roots, name, value)
    monkeypatch.setattr(accuracy, 'gradients', matrix_roots.random_gradients)
    roots, times = matrix_roots.compare_roots(), matrix_roots.time_roots(repeats=1)
    errors = {(row['condition'], row['method']): row['largest'] for row in roots}
    assert len(roots) == 6
    for condition in (0, 1e2):  # 0: the matrices with a shift
        assert errors[condition, 'eigh'] < 1e-4
        assert errors[condition, '25 steps'] < 1e-4 < errors[condition, '5 steps']
    assert all(row['ms'] > 0 for row in times)
    precisions = matrix_roots.compare_precisions()
    for full, low in zip(precisions[::2], precisions[1::2], strict=True):
        assert (full['products'], low['products']) == ('full', 'bfloat16')
        for measure in ('largest', 'orthonormality', 'residual'):
            assert full[measure] < 0.01 * low[measure]
    norms = matrix_roots.compare_norms()
    assert all(row['smallest'] > 0.999 for row in norms if row['norm'] == 'frobenius')
    assert all(row['largest'] < 1.001 for row in norms if row['norm'] != 'frobenius')
    text = matrix_roots.render(roots, times, precisions, norms)
    assert text.count('\n\n| ') == 6


def test_mini_blocks_show_the_drift_and_the_roots(monkeypatch):
    """The printed formula's inverse is no longer definite, and a nan is one in the table."""
    monkeypatch.setattr(mini_blocks, 'SPREADS', ((10.0, 1e-5),))
    monkeypatch.setattr(mini_blocks, 'CONDITIONS', (1e2, 1e8))
    monkeypatch.setattr(mini_blocks, 'ROOT_STEPS', (5, 30))
    drift, roots = mini_blocks.drift(3000), mini_blocks.root_errors()
    assert [row['steps'] for row in drift] == [100, 1000, 3000]
    assert drift[-1]['printed formula'][0] < 0
    assert 0.9 < drift[-1]['factor'][0] < drift[-1]['factor'][1] < 1.1
    few, enough, _, ill = roots
    assert few['H^(1/2) from S'] > 0.1 > 1e-5 > enough['H^(1/2) from S']
    assert ill['H^(1/2) from S'] < 1e-3
    text = mini_blocks.render([*drift, drift[0] | {'factor': None}], roots)
    assert 'not finite' in text
    assert '| 1e+08     |                  30 |' in text
