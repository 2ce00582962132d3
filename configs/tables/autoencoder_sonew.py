"""A study of SONew on the autoencoder: one thing at a time is not as in the searched row.

The last rows have together what helped alone. Longer means, ``mean_eps``, the other order,
weight decay and more bands are in `autoencoder_sonew_long.py`, at the whole length.

python -m experiments.table --table=configs/tables/autoencoder_sonew.py --epochs=30 ...
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import config_dict

# The best of the search of the tridiagonal row of `autoencoder.py`, with three digits.
BASE = dict(learning_rate=6.38e-3, b1=0.929, b2=0.946, eps=1.03e-4)
_WIDEST = ('dense_0/kernel', 'dense_7/kernel')  # the pixels' kernels, (784, 1000) and (1000, 784)


def _bands(band: int, others: bool) -> tuple[tuple[str, dict[str, int]], ...]:
    """A band for the pixels' kernels, or for all others."""
    pixels = '|'.join(_WIDEST)
    return ((f'^(?!{pixels}).*kernel' if others else pixels, dict(band=band)),)


def _changes() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is changed, as the row is called, and to what."""
    yield 'as searched', {}
    for factor in (0.5, 0.7, 1.4):
        yield f'learning rate x {factor}', dict(learning_rate=factor * BASE['learning_rate'])
    for b1 in (0.85, 0.9):
        yield f'b1 {b1}', dict(b1=b1)
    for b2 in (0.9, 0.97, 0.99):
        yield f'b2 {b2}', dict(b2=b2)
    for ends in ((0.9, 0.99), (0.946, 0.995)):
        yield f'b2 from {ends[0]} to {ends[1]}', dict(schedules=dict(b2=ends))
    yield 'Nesterov', dict(nesterov=True)
    for factor in (0.01, 0.1, 10.0):
        yield f'eps x {factor:g}', dict(eps=factor * BASE['eps'])
    yield 'eps from x 1 to x 0.01', dict(schedules=dict(eps=(BASE['eps'], 0.01 * BASE['eps'])))
    for tolerance in (1e-3, 1e-1):
        yield f'edge tolerance {tolerance:g}', dict(edge_tolerance=tolerance)
    for graft in ('momentum', 'sgd', 'rmsprop_normalized', None):
        yield f'graft {graft}', dict(graft=graft)
    # Whose norm is that of signs, several times Adam's.
    for factor in (0.1, 0.25):
        yield (
            f'graft rmsprop_normalized, rate x {factor}',
            dict(graft='rmsprop_normalized', learning_rate=factor * BASE['learning_rate']),
        )
    for band in (2, 4):
        yield f'band {band}', dict(band=band)
    yield 'band 4 on the pixels', dict(band=1, layout=_bands(4, others=False))
    yield 'band 4 on the others', dict(band=1, layout=_bands(4, others=True))
    slower, smaller = (0.946, 0.995), (BASE['eps'], 0.01 * BASE['eps'])
    both = dict(schedules=dict(b2=slower, eps=smaller))
    yield 'eps x 0.1, b2 rising', dict(eps=0.1 * BASE['eps'], schedules=dict(b2=slower))
    yield 'eps falling, b2 rising', both
    yield 'band 4, eps x 0.1', dict(band=4, eps=0.1 * BASE['eps'])
    yield 'band 4, eps falling, b2 rising', dict(band=4, **both)


def table(
    base: dict[str, Any], changes: Iterable[tuple[str, dict[str, Any]]]
) -> config_dict.ConfigDict:
    """A study: a row for each change to SONew's settings, the first of which is the reference."""
    rows = {
        re.sub(r'\W+', '_', label): dict(optimizer='sonew', settings={**base, **own}, label=label)
        for label, own in changes
    }
    return config_dict.ConfigDict(
        dict(
            task='autoencoder',
            settings={},
            metrics=(('train_loss', 'train loss'), ('test_loss', 'test loss')),
            reference=next(iter(rows)),
            rows=rows,
        )
    )


def get_config() -> config_dict.ConfigDict:
    return table(BASE, _changes())
