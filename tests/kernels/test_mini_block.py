"""Mini-blocks: how leaves are cut, and their statistics against dense matrices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precond_optax.kernels import mini_block
from tests import oracles

SHAPES = [(1,), (7,), (6, 4), (64, 3), (3, 3, 4, 2), (2, 8, 5), (1, 9), (5, 1, 4)]


@given(st.sampled_from(SHAPES), st.integers(1, 40), st.sampled_from('FC'), st.data())
def test_groups_are_those_of_the_chain(shape, block_size, order, data):
    """Some leading axes are batch axes; the others' chain is cut, and put together again."""
    batch = data.draw(st.integers(0, len(shape) - 1))
    chain = range(batch, len(shape))
    blocks = mini_block.partition(shape, chain if order == 'F' else chain[::-1], block_size)
    index = jnp.arange(math.prod(shape)).reshape(shape) + 1
    groups = blocks.split(index)
    assert groups.shape == (*blocks.batch, blocks.size)
    assert len(blocks.axes) == len(blocks.batch)
    assert blocks.size == min(block_size, math.prod(shape[batch:]))
    np.testing.assert_array_equal(blocks.join(groups), index)
    found = [set(row[row > 0]) for row in np.asarray(groups).reshape(-1, blocks.size)]
    expected = [
        set(np.asarray(layer).ravel()[group])
        for layer in np.asarray(index).reshape(-1, *shape[batch:])
        for group in oracles.chain_groups(shape[batch:], block_size, order)
    ]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    assert blocks.padded == any(len(group) < blocks.size for group in expected)


def test_batch_axes_are_the_leafs_where_no_group_spans_them():
    for shape, size, batch, axes, span in (
        ((64, 10), 32, (10, 2), (1, 0), (0,)),
        ((16, 10), 32, (5,), (1,), (0, 1)),
        ((48, 10), 32, (15,), (1,), (0, 1)),
        ((3, 3, 4, 2), 9, (2, 4, 1), (3, 2, 1), (0, 1)),
        ((5, 3), 4, (4,), (1,), (0, 1)),  # padded
    ):
        blocks = mini_block.partition(shape, range(len(shape)), size)
        assert (blocks.batch, blocks.axes, blocks.span) == (batch, axes, span), shape


def test_where_names_the_shards_that_hold_whole_groups():
    for shape, size, text in (
        ((64, 10), 32, 'along axis 0 (whole in shards of a multiple of 32 along axis 0)'),
        ((48, 10), 32, 'along axes 0, 1 (whole in shards of a multiple of 2 along axis 1)'),
        ((5, 3), 4, 'along axes 0, 1 (whole in no shard)'),
    ):
        assert mini_block.partition(shape, (0, 1), size).where() == text


def identities(count, size, dtype='float32'):
    return jnp.broadcast_to(jnp.eye(size, dtype=dtype).reshape(-1), (count, size * size))


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_the_factor_is_that_of_the_inverse(dtype):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(20, 3, 5)) * np.geomspace(1, 1e-2, 5)
    with jax.enable_x64(dtype == 'float64'):
        factor = identities(3, 5, dtype) * 10
        moment = np.broadcast_to(np.eye(5) / 100, (3, 5, 5))
        for grad in grads:
            factor = mini_block.add_to_inverse(jnp.asarray(grad, dtype), factor)
            moment = moment + grad[:, :, None] * grad[:, None, :]
            square = np.asarray(mini_block.square(factor), np.float64)
            product = square @ np.swapaxes(square, -1, -2)
            inverse = np.linalg.inv(moment)
            tolerance = 1e-12 if dtype == 'float64' else 3e-5
            np.testing.assert_allclose(product, inverse, rtol=0, atol=tolerance * inverse.max())


def sherman_morrison(grad, inverse):
    """What the paper prints, made symmetric: the broken twin of `add_to_inverse`."""
    h = mini_block.apply(inverse, grad)
    inverse -= mini_block.outer(h, h) / (1 + jnp.sum(grad * h, -1, keepdims=True))
    square = mini_block.square(inverse)
    return ((square + jnp.swapaxes(square, -1, -2)) / 2).reshape(inverse.shape)


def drift(update, start, to_inverse, steps=10_000):
    """After float32 steps of condition 1e8, the extreme eigenvalues of H in units of the exact."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    spread = (turn * np.geomspace(10, 1e-5, 16)).T
    grads = (rng.normal(size=(steps, 4, 16)) @ spread).astype(np.float32)
    matrices = identities(4, 16) * start
    found, _ = jax.jit(functools.partial(jax.lax.scan, lambda m, g: (update(g, m), None)))(
        matrices, grads
    )
    found, wide = mini_block.square(found), grads.astype(np.float64)
    exact = np.einsum('tba,tbc->bac', wide, wide) + 0.01 * np.eye(16)
    half = np.linalg.cholesky(exact)  # exact^(1/2) H exact^(1/2) is the identity
    relative = np.swapaxes(half, -1, -2) @ to_inverse(np.asarray(found, np.float64)) @ half
    return np.linalg.eigvalsh((relative + np.swapaxes(relative, -1, -2)) / 2)


def test_the_inverse_does_not_drift():
    """Symmetric and positive definite after 10,000 steps, and within a tenth of the exact."""
    values = drift(mini_block.add_to_inverse, 10, lambda s: s @ np.swapaxes(s, -1, -2))
    assert values.min() > 0.9
    assert values.max() < 1.1


def test_the_printed_formula_drifts():
    """So the check above can fail: H by the formula itself is not even definite."""
    assert drift(sherman_morrison, 100, lambda h: h).min() < 0


def test_mean_of_second_moments():
    grad = np.random.default_rng(0).normal(size=(2, 3))
    found = mini_block.accumulate(jnp.asarray(grad), identities(2, 3), decay=0.75)
    expected = 0.75 * np.eye(3) + 0.25 * np.einsum('bi,bj->bij', grad, grad)
    np.testing.assert_allclose(mini_block.square(found), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    'update', [mini_block.add_to_inverse, functools.partial(mini_block.accumulate, decay=0.9)]
)
def test_what_is_not_finite_changes_its_own_group_alone(update):
    held = identities(3, 2)
    grad = jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [jnp.inf, 0.0]])
    new = update(grad, held)
    np.testing.assert_array_equal(new[1:], held[1:])
    assert np.any(new[0] != held[0])


def test_huge_and_zero_gradients():
    held = identities(3, 2)
    grad = jnp.array([[1e30, 0.0], [0.0, 0.0], [3e37, 3e37]])
    new = mini_block.add_to_inverse(grad, held)
    assert np.all(np.isfinite(new))
    np.testing.assert_allclose(new[0], [0, 0, 0, 1], atol=1e-7)
    np.testing.assert_array_equal(new[1], held[1])
