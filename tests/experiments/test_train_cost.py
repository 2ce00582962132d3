"""The times of whole steps: what is run, and how it is shown."""

import numpy as np

from experiments import train_cost
from tests.experiments.small import SMALL, small_task
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
    found = train_cost.measure(small, ['adam', 'band_4', 'shampoo'], 3, 2, None)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(found, 3)
    begun = 3
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


def test_a_stream_s_first_batch_is_taken_again():
    """Of a task whose batches come from the host; a segment is some calls."""
    task = small_task('pos_tagging')
    settings = {name: task[name] for name in (*SMALL['pos_tagging'], 'source', 'batch_size')}
    entries = dict(
        task='pos_tagging',
        settings=settings | dict(epochs=2, warmup_epochs=1),
        rows=dict(adam=dict(optimizer='adam'), soaa=dict(optimizer='soaa')),
    )
    found = train_cost.measure(entries, ['adam', 'soaa'], 2, 3, None)
    assert [len(seconds) for seconds in found.values()] == [2, 2]
