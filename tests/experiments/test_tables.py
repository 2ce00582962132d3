"""The tables of accuracy and sharding, on as little as they take."""

from experiments import accuracy, sharding, workdir
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
