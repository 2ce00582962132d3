"""Stochastic rounding against what it promises: neighbours only, and the mean kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precond_optax.kernels import rounding
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


def normal(values):
    """A mean of many numbers uniform in [-1/2, 1/2) or their products, by its deviation."""
    return abs(np.mean(values)) / np.std(values) * np.sqrt(np.size(values))


def test_bits_are_uniform_and_know_nothing_of_their_neighbours():
    index = rounding.positions((1 << 20,))
    last = None
    for step in range(3):
        key = jax.random.fold_in(KEY, step)
        drawn = np.asarray(rounding.bits(rounding.seeds(key), index)).astype(np.int64)
        counts = np.bincount(drawn, minlength=1 << 16)
        assert len(counts) == 1 << 16
        assert abs(np.sum((counts - 16) ** 2 / 16) / (1 << 16) - 1) < 0.03
        centred = (drawn + 0.5) / (1 << 16) - 0.5
        assert normal(centred) < 4.5
        for lag in (1, 2, 3, 8, 128, 512, 1000, 4096, 1 << 16):
            assert normal(centred[lag:] * centred[:-lag]) < 4.5
        for bit in range(16):
            assert normal(((drawn >> bit) & 1) - 0.5) < 4.5
        if last is not None:  # the step before
            for lag in (0, 1, 128):
                assert normal(centred[lag:] * last[: len(last) - lag]) < 4.5
        last = centred


def test_one_entry_s_bits_over_the_steps():
    keys = jax.vmap(lambda step: jax.random.fold_in(KEY, step))(jnp.arange(20000))
    index = jnp.arange(32, dtype=jnp.uint32)
    drawn = jax.vmap(lambda key: rounding.bits(rounding.seeds(key), index))(keys)
    centred = (np.asarray(drawn) + 0.5) / (1 << 16) - 0.5
    for column in centred.T:
        assert normal(column) < 4.5
        assert normal(column[1:] * column[:-1]) < 4.5


def test_a_part_s_bits_are_the_whole_s():
    """By the strides of the whole and the number of the part's first entry, past 2^32 as well."""
    shape = (6, 5, 4)
    whole = rounding.positions(shape)
    np.testing.assert_array_equal(whole.ravel(), np.arange(120))
    part = rounding.positions((2, 5, 3), strides=(20, 4, 1), start=4 * 20 + 1)
    np.testing.assert_array_equal(part, whole[4:, :, 1:])
    far = rounding.positions((3, 2), strides=(1 << 31, 1))
    np.testing.assert_array_equal(far[:, 0], [0, 1 << 31, 0])
