"""The shared basis' kernel against dense matrices, and what holds by its definition."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precond_optax.kernels import matrix_root
from precond_optax.kernels import shared_basis as kernel
from tests import oracles

SUM = {'b2': 1.0, 'weight': 1.0}
METHODS = ('eigh', 'newton_schulz')  # 'auto' is one of them


def start(rank, block, outputs, dtype='float32', seed=0):
    """A random basis and empty statistics: basis, coefficients, residual, root."""
    basis = kernel.random_basis(jax.random.key(seed), rank, block, jnp.dtype(dtype))
    square = (*outputs, rank, rank)
    return basis, jnp.zeros(square, dtype), jnp.zeros(outputs, dtype), jnp.zeros(square, dtype)


@functools.lru_cache
def refresh(**keywords):
    return jax.jit(functools.partial(kernel.refresh, **keywords))


def run(grads, rank, *, eps=1e-8, dtype='float32', block_ndim=1, **keywords):
    """The directions of all steps and the statistics after them."""
    grads = [jnp.asarray(g, dtype) for g in grads]
    shape = grads[0].shape
    stats = start(rank, shape[:block_ndim], shape[block_ndim:], dtype)
    directions, step = [], refresh(**{**SUM, **keywords}, eps=eps)
    for grad in grads:
        *stats, failed = step(grad, *stats)
        assert not np.any(failed)
        directions.append(kernel.apply(grad, *stats, eps=eps))
    return directions, stats


def assert_close(actual, expected, rtol):
    scale = np.abs(expected).max()
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual / scale, np.asarray(expected) / scale, atol=rtol, rtol=0)


@st.composite
def cases(draw):
    block, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    return (
        block,
        outputs,
        draw(st.integers(1, block)),
        draw(st.integers(1, 6)),  # steps
        draw(st.sampled_from([1.0, 0.9])),
        draw(st.sampled_from([1, 2])),  # power iterations
        draw(st.sampled_from(['spectral', 'frobenius'])),
        draw(st.integers(0, 2**16)),
    )


@given(cases())
@settings(max_examples=10)
def test_direction_is_the_dense_oracles(case):
    block, outputs, rank, steps, b2, iterations, norm, seed = case
    rng = np.random.default_rng(seed)
    grads = [rng.normal(size=(block, outputs)) for _ in range(steps)]
    with jax.enable_x64(True):
        basis = np.asarray(start(rank, (block,), (outputs,), 'float64')[0]).T
        directions, _ = run(
            grads,
            rank,
            eps=1e-2,
            dtype='float64',
            b2=b2,
            weight=1.0 if b2 == 1 else 1 - b2,
            power_iterations=iterations,
            residual_norm=norm,
            norm_steps=2000,
        )
    expected = oracles.shared_basis_direction(
        grads,
        basis,
        eps=1e-2,
        b2=b2,
        power_iterations=iterations,
        norm=2 if norm == 'spectral' else 'fro',
    )
    # Power iteration closes on two near eigenvalues slowly; the rest is exact.
    assert_close(directions[-1], expected, 1e-8 if norm == 'frobenius' else 1e-3)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(('dtype', 'rtol'), [('float64', 1e-9), ('float32', 1e-3)])
def test_full_rank_is_exact_block_adagrad_at_every_step(rng, method, dtype, rtol):
    grads = [rng.normal(size=(6, 5)) * np.geomspace(1, 0.05, 6)[:, None] for _ in range(12)]
    with jax.enable_x64(dtype == 'float64'):
        directions, stats = run(grads, 6, eps=1e-3, dtype=dtype, method=method)
    for step, direction in enumerate(directions, start=1):
        expected = oracles.block_adagrad_direction(grads[:step], eps=1e-3)
        assert_close(direction, expected, rtol)
    # Until six gradients are in, something is subtracted and given back.
    assert np.all(np.asarray(stats[2]) > 0)


@pytest.mark.parametrize(('dtype', 'rtol'), [('float64', 1e-7), ('float32', 1e-2)])
@pytest.mark.parametrize('outputs', [1, 6])
def test_gradients_of_low_rank_give_exact_block_adagrad(rng, outputs, dtype, rtol):
    space, _ = np.linalg.qr(rng.normal(size=(12, 3)))
    grads = [space @ rng.normal(size=(3, outputs)) for _ in range(10)]
    with jax.enable_x64(dtype == 'float64'):
        directions, stats = run(grads, 4, eps=1e-3, dtype=dtype)
    for step, direction in enumerate(directions, start=1):
        expected = oracles.block_adagrad_direction(grads[:step], eps=1e-3)
        assert_close(direction, expected, rtol)
    assert np.max(stats[2]) < (1e-12 if dtype == 'float64' else 1e-4)


def test_the_error_is_bounded_by_the_residual_and_shrinks_with_the_rank(rng):
    spectrum = 1 / np.arange(1, 13)[:, None]
    grads = [rng.normal(size=(12, 8)) * spectrum for _ in range(30)]
    exact = sum(np.einsum('ai,bi->iab', g, g) for g in grads)
    errors, bounds = [], []
    for rank in (1, 3, 6, 9, 12):
        with jax.enable_x64(True):
            _, (basis, coefficients, residual, _) = run(
                grads, rank, dtype='float64', norm_steps=300
            )
            held = np.asarray(kernel.to_dense(basis, coefficients, jnp.zeros_like(residual)))
        error = np.linalg.norm(exact - held, 2, axis=(1, 2))
        assert np.all(error <= np.asarray(residual) * (1 + 1e-3))
        errors.append(error.mean())
        bounds.append(residual.mean())
        # So what preconditions is no smaller than the second moment: the proofs rest on it.
        whole = held + np.asarray(residual)[:, None, None] * np.eye(12)
        assert np.all(np.linalg.eigvalsh(whole - exact) > -1e-3 * np.asarray(residual)[:, None])
    assert np.all(np.diff(errors) < 0)
    assert np.all(np.diff(bounds) < 0)


def test_apply_is_a_dense_inverse_root(rng):
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(7, 3)))[0].T, 'float32')
    factors = rng.normal(size=(5, 3, 3))
    coefficients = jnp.asarray(factors @ factors.transpose(0, 2, 1), 'float32')
    residual, grad = jnp.asarray(rng.uniform(0.1, 1, 5), 'float32'), rng.normal(size=(7, 5))
    root = matrix_root.from_decomposition(*matrix_root.decompose(coefficients), residual + 1e-2)
    direction = kernel.apply(
        jnp.asarray(grad, 'float32'), basis, coefficients, residual, root, eps=1e-2
    )
    dense = np.asarray(kernel.to_dense(basis, coefficients, residual + 1e-2), np.float64)
    expected = np.einsum('iab,bi->ai', oracles.inverse_square_root(dense), grad)
    assert_close(direction, expected, 1e-5)


def test_rounding_outside_the_basis_is_not_blown_up(rng):
    """A gradient inside it leaves noise outside, where next to nothing has been seen so far."""
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(7, 3)))[0].T, 'float32')
    grad = basis.T @ jnp.asarray(rng.normal(size=(3, 5)), 'float32')
    eye = jnp.broadcast_to(jnp.eye(3), (5, 3, 3))
    direction = kernel.apply(grad, basis, eye, jnp.full(5, 1e-20), eye, eps=0.0)
    assert_close(direction, np.asarray(grad), 1e-3)


def test_accumulate_adds_the_spectral_norm_of_what_the_basis_misses(rng):
    basis, coefficients, residual, _ = start(3, (7,), (5,))
    grad = rng.normal(size=(7, 5)).astype(np.float32)
    coefficients, residual = coefficients + jnp.eye(3), residual + 2
    new, rest = kernel.accumulate(grad, basis, coefficients, residual, b2=0.5, weight=0.25)
    rows = np.asarray(basis, np.float64)
    moments = 0.5 * rows.T @ rows + 0.25 * np.einsum('ai,bi->iab', grad, grad)
    missed = moments - rows.T @ np.asarray(new, np.float64) @ rows
    np.testing.assert_allclose(rest, 1 + np.linalg.norm(missed, 2, axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new, rows @ moments @ rows.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_basis_stays_orthonormal(dtype):
    @jax.jit
    def train(stats):
        def step(stats, key):
            grad = jax.random.normal(key, (40, 20)) / jnp.arange(1.0, 41)[:, None]
            grad = grad.astype(dtype).astype('float32')
            return kernel.refresh(grad, *stats, **SUM, eps=1e-8)[:-1], None

        return jax.lax.scan(step, stats, jax.random.split(jax.random.key(0), 1000))[0]

    basis, coefficients, residual, root = train(start(8, (40,), (20,)))
    np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=2e-6)
    for x in (coefficients, residual, root):
        assert np.all(np.isfinite(x))
    assert np.linalg.eigvalsh(np.asarray(coefficients)).min() > -1e-3


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('norm', kernel.RESIDUAL_NORMS)
@pytest.mark.parametrize('scale', [0.0, 1e-18, 1.0, 1e15])
@pytest.mark.parametrize('kind', ['full', 'rank_one', 'same', 'one_block'])
def test_nothing_is_nan(rng, kind, scale, norm, method):
    grads = [rng.normal(size=(6, 5)) for _ in range(6)]
    if kind == 'rank_one':
        grads = [np.outer(rng.normal(size=6), rng.normal(size=5)) for _ in range(6)]
    if kind == 'same':
        grads = grads[:1] * 6
    if kind == 'one_block':  # beside blocks that are nearly zero
        grads = [g * np.eye(5)[2] + 1e-20 * g for g in grads]
    directions, stats = run(
        [scale * g for g in grads], 3, eps=0.0, method=method, residual_norm=norm
    )
    for x in (*directions, *stats):
        assert np.all(np.isfinite(x))
    if scale == 0:
        assert not np.any(directions[-1])
    # With eps 0 the direction does not depend on the scale.
    if scale > 0 and method == 'eigh' and kind == 'full':
        expected, _ = run(grads, 3, eps=0.0, residual_norm=norm)
        assert_close(directions[-1], np.asarray(expected[-1]), 1e-2)


def test_a_row_that_no_gradient_reaches_stays(rng):
    """QR alone would put coordinate axes in its place, here those of dead inputs, for ever."""
    dead = 4
    grads = [np.zeros((10, 6))] + [rng.normal(size=(10, 6)) for _ in range(3)]
    for grad in grads:
        grad[:dead] = 0
    directions, (basis, *_) = run(grads, 3)
    held = np.asarray(basis)[:, dead:]
    assert np.linalg.norm(held) > 0.99 * math.sqrt(3)
    assert np.any(directions[-1])


def failing(block):
    """``decompose`` that gives up on one block."""
    decompose = matrix_root.decompose

    def changed(matrices):
        values, vectors = decompose(matrices)
        if matrices.ndim < 3:
            return values, vectors
        return values.at[block].set(jnp.nan), vectors.at[block].set(jnp.nan)

    return changed


def test_a_failed_root_keeps_the_last_one_in_the_new_basis(rng, monkeypatch):
    grads = [jnp.asarray(rng.normal(size=(6, 5)), 'float32') for _ in range(4)]
    _, stats = run(grads[:3], 3)
    good = kernel.refresh(grads[3], *stats, **SUM, eps=1e-8)
    monkeypatch.setattr(matrix_root, 'decompose', failing(2))
    bad = kernel.refresh(grads[3], *stats, **SUM, eps=1e-8)
    assert np.asarray(bad[-1]).tolist() == [False, False, True, False, False]
    assert all(np.all(np.isfinite(x)) for x in bad)
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(bad[3][jnp.array(others)], good[3][jnp.array(others)], rtol=1e-5)
    turn = np.asarray(bad[0] @ stats[0].T)
    np.testing.assert_allclose(bad[3][2], turn @ stats[3][2] @ turn.T, rtol=1e-4, atol=1e-5)


def test_a_gradient_whose_square_overflows_leaves_the_statistics(rng):
    grads = [jnp.asarray(rng.normal(size=(6, 5)), 'float32') for _ in range(4)]
    _, stats = run(grads[:3], 3)
    huge = grads[3].at[1, 2].set(1e25)
    *new, failed = kernel.refresh(huge, *stats, **SUM, eps=1e-8)
    assert np.asarray(failed).tolist() == [False, False, True, False, False]
    assert all(np.all(np.isfinite(x)) for x in new)
    assert np.all(np.isfinite(kernel.apply(huge, *new, eps=1e-8)))
    # A NaN is left out of the statistics as well, and shows in its block of the update.
    *new, failed = kernel.refresh(grads[3].at[1, 2].set(jnp.nan), *stats, **SUM, eps=1e-8)
    assert all(np.all(np.isfinite(x)) for x in new)
    coefficients, residual = kernel.accumulate(huge, *stats[:3], **SUM)
    assert np.all(np.isfinite(coefficients))
    assert np.all(np.isfinite(residual))


@pytest.mark.parametrize('norm', kernel.RESIDUAL_NORMS)
def test_several_axes_are_one(rng, norm):
    grads = [rng.normal(size=(2, 3, 5, 2)) for _ in range(3)]
    with jax.enable_x64(True):
        many, stats = run(grads, 4, dtype='float64', block_ndim=2, residual_norm=norm)
        flat, _ = run([g.reshape(6, 10) for g in grads], 4, dtype='float64', residual_norm=norm)
    assert [x.shape for x in stats] == [(4, 2, 3), (5, 2, 4, 4), (5, 2), (5, 2, 4, 4)]
    # The same random numbers: the start is drawn for the block's size.
    assert_close(np.reshape(many[-1], (6, 10)), np.asarray(flat[-1]), 1e-9)


@pytest.mark.parametrize('method', METHODS)
def test_no_array_is_larger_than_the_leaf_or_the_coefficients(method):
    """Neither an M_i (m, b, b) nor A (b, b) nor anything (m, b, k): from the compiled text."""
    block, outputs, rank = 96, 112, 8
    stats = start(rank, (block,), (outputs,))
    grad = jnp.ones((block, outputs))

    def step(grad, *stats):
        *stats, failed = kernel.refresh(grad, *stats, **SUM, eps=1e-8, method=method)
        return kernel.apply(grad, *stats, eps=1e-8), stats, failed

    compiled = jax.jit(step).lower(grad, *stats).compile()
    sizes = {
        math.prod(map(int, shape.split(',')))
        for shape in re.findall(r'\bf32\[([\d,]+)\]', compiled.as_text())
    }
    largest = max(block * outputs, outputs * rank * rank)
    assert max(sizes) <= largest
    assert block * outputs in sizes
    # And not many of them at a time: the gradient's copies, a few sets of coefficients.
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 4 * (6 * outputs * rank * rank + 4 * block * outputs)
