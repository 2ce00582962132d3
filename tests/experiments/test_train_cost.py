"""The times of whole steps: what is run, and how it is shown."""

import dataclasses

import numpy as np
import pytest

from experiments import train_cost
from tests.experiments.test_table import small  # noqa: F401 (a fixture)


def test_rows_train_in_turn(small, monkeypatch):  # noqa: F811
    """The first turn does not count, nor what comes before a method begins."""
    small.rows.shampoo = dict(optimizer='shampoo', settings=dict(start_step=5, block_size=8))
    order, real = [], train_cost._Row.run

    def noted(row):
        real(row)
        order.append(row)
        assert row.seconds[-1] > 0

    monkeypatch.setattr(train_cost._Row, 'run', noted)
    found = train_cost.measure(small, ['adam', 'band_4', 'shampoo'], 3, None)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(found, 3)
    begun = -(-5 // small.settings.log_every)
    assert len(order) == begun + 4 * 3
    turns = [set(order[at : at + 3]) for at in range(begun, len(order), 3)]
    assert all(len(turn) == 3 for turn in turns)


def test_the_table(small):  # noqa: F811
    found = {'adam': [0.1, 0.2, 0.15], 'band_4': [0.3, 0.3, 0.2], 'sgd': [0.1] * 3}
    text = train_cost.render(small, found)
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()]
    assert rows[0][-1] == 'ratio to adam'
    assert [row[0] for row in rows[2:]] == ['sgd', 'adam', 'SONew, band 4']
    assert rows[4][1:] == ['300.0', '200.0 to 300.0', '2.00']
    assert np.isclose(float(rows[2][3]), 0.67)


def test_a_stream_is_refused(small, monkeypatch):  # noqa: F811
    check = train_cost.train.check
    monkeypatch.setattr(
        train_cost.train, 'check', lambda *a: dataclasses.replace(check(*a), stream=object())
    )
    with pytest.raises(ValueError, match='batches come from the host'):
        train_cost.measure(small, ['adam'], 1, None)
