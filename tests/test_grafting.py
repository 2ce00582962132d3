"""Grafting by itself; with SONew it is in test_sonew.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from precond_optax import LeafRule, grafting
from tests import oracles


@pytest.mark.parametrize('axes', [(0, 1, 2), (1, 2)])
def test_rescale_takes_one_direction_and_the_other_norm(rng, axes):
    u, w = (jnp.asarray(rng.normal(size=(3, 4, 2)), 'float32') for _ in range(2))
    result = np.asarray(grafting.rescale(u, w, axes), np.float64)
    wanted = np.sqrt((np.asarray(w, np.float64) ** 2).sum(axis=axes))
    np.testing.assert_allclose(np.sqrt((result**2).sum(axis=axes)), wanted, rtol=1e-5)
    ratio = result / np.asarray(u, np.float64)
    np.testing.assert_allclose(
        ratio, np.broadcast_to(ratio.mean(axis=axes, keepdims=True), ratio.shape), rtol=1e-4
    )
    assert np.all(ratio > 0)


def test_zero_direction_stays_zero():
    for w in (jnp.ones((2, 3)), jnp.zeros((2, 3))):
        np.testing.assert_array_equal(grafting.rescale(jnp.zeros((2, 3)), w, (0, 1)), 0)


def test_normalized_rms_is_the_oracles(rng):
    grads = [rng.normal(size=(3, 2)).astype(np.float32) for _ in range(4)]
    tx = grafting.scale_by_normalized_rms(0.9)
    state = tx.init(jnp.zeros((3, 2)))
    for grad in grads:
        updates, state = jax.jit(tx.update)(jnp.asarray(grad), state)
    expected = oracles.normalized_rms_direction(grads, 0.9)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_normalized_rms_of_stacked_layers(rng):
    grads = jnp.asarray(rng.normal(size=(3, 2, 2)), 'float32')
    stacked = grafting.scale_by_normalized_rms(0.9, layout={'': LeafRule(batch_axes=1)})
    alone = grafting.scale_by_normalized_rms(0.9)
    updates, _ = stacked.update(grads, stacked.init(grads))
    for i in range(3):
        expected, _ = alone.update(grads[i], alone.init(grads[i]))
        np.testing.assert_allclose(updates[i], expected, rtol=1e-5)


@pytest.mark.parametrize('graft', [None, 'adam', optax.adam(1.0), optax.scale_by_lion()])
def test_kinds_that_are_taken(graft):
    grafting.check(graft)


@pytest.mark.parametrize('graft', ['Adam', '', 0, optax.adam, (1, 2)])
def test_kinds_that_are_not(graft):
    with pytest.raises(ValueError, match=r'graft must be one of None, .* got'):
        grafting.check(graft)
