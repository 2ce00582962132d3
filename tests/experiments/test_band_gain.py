"""What neighbours tell, against conditional variances of dense second moments."""

import numpy as np
import pytest

from experiments import band_gain

STEPS, ENTRIES, CHAINS = 60, 7, 3
EPS = 1e-3


def by_definition(lines, band, b2):
    """Mean log share that a regression on the next ``band`` entries leaves, dense, float64."""
    steps = len(lines)
    weights = b2 ** np.arange(steps)[::-1] * (1 - b2) / (1 - b2**steps)
    logs = []
    for chain in np.moveaxis(lines.astype(np.float64), 2, 0):
        moment = np.einsum('t,ti,tj->ij', weights, chain, chain)
        damped = moment + EPS * np.eye(ENTRIES)
        for j in range(ENTRIES):
            if moment[j, j] > EPS:
                known = slice(j + 1, j + 1 + band)
                told = damped[known, j] @ np.linalg.pinv(damped[known, known]) @ damped[known, j]
                logs.append(np.log(1 - told / damped[j, j]))
    return np.mean(logs)


@pytest.fixture
def lines(rng):
    """Each entry is in part what the one after it is, and one entry is dead."""
    found = rng.normal(size=(STEPS, ENTRIES, CHAINS))
    for j in reversed(range(ENTRIES - 1)):
        found[:, j] += 0.8 * found[:, j + 1]
    found[:, 2] = 0
    return found.astype(np.float32)


@pytest.mark.parametrize('b2', [0.9, 0.99])
def test_gains_are_logs_of_conditional_variances(lines, b2):
    bands = (1, 2, 4)
    found = band_gain.gains(lines, bands, b2, EPS)
    exact = [by_definition(lines, band, b2) for band in bands]
    np.testing.assert_allclose(found, exact, rtol=1e-4)
    assert found[0] > found[1] > found[2]


def test_layers_by_order(lines):
    """Along the outputs nothing is to be told; bands as long as a chain are left out."""
    found = band_gain.measure(lines, (1, 2, 4), 24, 0.99, EPS)
    assert found['shape'] == (ENTRIES, CHAINS)
    assert list(found['gains']['F']) == ['1', '2', '4']
    assert list(found['gains']['C']) == ['1', '2']
    assert found['gains']['F']['1'] < -0.3 < -0.1 < found['gains']['C']['1'] <= 0
    rows = band_gain.render({'dense_0': found}, (1, 2, 4)).splitlines()
    assert rows[0].split('|')[4:-1] == [' band 1 ', ' band 2 ', ' band 4 ']
    assert rows[-1].rstrip(' |').endswith(f'{found["gains"]["C"]["2"]:.2f}')
    assert '7 x 3' in rows[2]
    empty = band_gain.gains(np.zeros_like(lines), (1,), 0.9, EPS)
    assert empty == [0.0]


def test_damping_too_small_for_identical_neighbours(lines):
    lines[:, 3:] = lines[:, 3:4]
    with pytest.raises(ValueError, match='--eps: 0 is too small'):
        band_gain.gains(lines, (1, 3), 0.9, 0.0)
