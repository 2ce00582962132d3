"""Stochastic rounding against what it promises: neighbours only, and the mean kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precond_optax.kernels.rounding import stochastic_round

KEY = jax.random.key(0)


@pytest.mark.parametrize('scale', [1e-30, 1.0, -3e20])
def test_neighbours_with_the_odds_that_keep_the_mean(rng, scale):
    values = (scale * rng.uniform(1, 2, size=20)).astype(np.float32)
    rounded = stochastic_round(KEY, jnp.tile(values, (40000, 1))).astype('float32')
    for value, column in zip(values, np.asarray(rounded).T, strict=True):
        nearest = np.float32(jnp.asarray(value, 'bfloat16'))
        ulp = 2.0 ** (np.floor(np.log2(abs(value))) - 7)
        below = np.floor(value / ulp) * ulp
        assert set(np.unique(column)) <= {np.float32(below), np.float32(below + ulp)}
        assert nearest in column or abs(value - nearest) < ulp / 1000
        np.testing.assert_allclose(column.astype(np.float64).mean(), value, atol=0.02 * ulp)


def test_what_bfloat16_holds_is_left_as_it_is():
    values = jnp.asarray([0.0, 1.0, -1.5, 2.0**-100, jnp.inf, -jnp.inf, 3.38953139e38])
    for seed in range(20):
        np.testing.assert_array_equal(stochastic_round(jax.random.key(seed), values), values)


def test_nan_stays():
    bits = jnp.asarray([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF], jnp.uint32)
    values = jnp.tile(jax.lax.bitcast_convert_type(bits, jnp.float32), 100)
    assert jnp.isnan(stochastic_round(KEY, values)).all()
