"""The tridiagonal and diagonal kernels: optimality condition, dense oracle, stability."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precond_optax.kernels import chain, diagonal, tridiagonal
from tests import oracles

KERNELS = {0: diagonal, 1: tridiagonal}
DAMPING = dict(eps=1e-6, relative_eps=0.0, edge_tolerance=1e-7)


def second_moment(rng, shape, steps, order, scale=1.0):
    """Arrays d and e of a leaf, and the dense matrix, of a mean of `steps` outer products."""
    grads = scale * rng.normal(size=(steps, *shape))
    lines = np.stack([oracles.line(g, order) for g in grads])
    dense = lines.T @ lines / steps
    diag = np.diag(dense).reshape(shape, order=order)
    edge = np.append(np.diag(dense, 1), 0).reshape(shape, order=order)
    return jnp.asarray(diag), jnp.asarray(edge), dense


def axes_of(shape, order):
    return tuple(range(len(shape))) if order == 'F' else tuple(range(len(shape)))[::-1]


@st.composite
def problems(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    steps = draw(st.integers(2, 8))
    seed = draw(st.integers(0, 2**16))
    return shape, steps, draw(st.sampled_from('FC')), seed


@given(problems())
def test_band_of_inverse_of_x_is_band_of_h(problem):
    """The optimality (KKT) condition, the definition of the method."""
    shape, steps, order, seed = problem
    with jax.enable_x64(True):
        diag, edge, dense = second_moment(np.random.default_rng(seed), shape, steps, order)
        axes = axes_of(shape, order)
        for band, kernel in KERNELS.items():
            off = (edge,) * band
            psi, schur = kernel.factor(
                diag, off, eps=1e-3, relative_eps=0, edge_tolerance=0, axes=axes
            )
            x = np.asarray(kernel.to_dense(psi, schur, axes=axes))
            np.testing.assert_array_equal(x, oracles.band_of(x, band))
            expected = oracles.band_of(oracles.damped(dense, 1e-3), band)
            np.testing.assert_allclose(
                oracles.band_of(np.linalg.inv(x), band), expected, rtol=1e-8, atol=1e-10
            )


@given(problems())
def test_dense_form_is_the_clique_formula_and_apply_is_its_product(problem):
    shape, steps, order, seed = problem
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        diag, edge, dense = second_moment(rng, shape, steps, order)
        axes = axes_of(shape, order)
        for band, kernel in KERNELS.items():
            factors = kernel.factor(diag, (edge,) * band, **DAMPING, axes=axes)
            h = oracles.damped(oracles.band_of(dense, band), 1e-6)
            h = oracles.drop_edges(h, 1e-7) if band else h
            x = oracles.banded_inverse(h, band)
            np.testing.assert_allclose(kernel.to_dense(*factors, axes=axes), x, rtol=1e-6)
            m = rng.normal(size=shape)
            applied = kernel.apply(*factors, jnp.asarray(m), axes=axes)
            np.testing.assert_allclose(
                oracles.line(applied, order), x @ oracles.line(m, order), rtol=1e-6, atol=1e-9
            )


@given(problems())
def test_accumulate_is_the_mean_of_outer_products(problem):
    shape, steps, order, seed = problem
    grads = np.random.default_rng(seed).normal(size=(steps, *shape)).astype(np.float32)
    axes = axes_of(shape, order)
    diag, off = jnp.zeros(shape), (jnp.zeros(shape),)
    for g in grads:
        diag, off = tridiagonal.accumulate(jnp.asarray(g), diag, off, b2=0.9, axes=axes)
    _, dense = oracles.moments(list(grads), 0.0, 0.9, order)
    dense *= 1 - 0.9**steps
    np.testing.assert_allclose(oracles.line(diag, order), np.diag(dense), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        oracles.line(off[0], order)[:-1], np.diag(dense, 1), rtol=1e-5, atol=1e-6
    )
    assert oracles.line(off[0], order)[-1] == 0


class Variants(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_same_jitted_and_not(self):
        rng = np.random.default_rng(0)
        diag, edge, _ = second_moment(rng, (4, 3), 5, 'F')
        diag, edge = diag.astype('float32'), edge.astype('float32')
        m = jnp.asarray(rng.normal(size=(4, 3)), 'float32')

        def direction(diag, edge, m):
            psi, schur = tridiagonal.factor(diag, (edge,), **DAMPING, axes=(0, 1))
            return tridiagonal.apply(psi, schur, m, axes=(0, 1))

        expected = direction(diag, edge, m)
        np.testing.assert_allclose(
            self.variant(direction)(diag, edge, m), expected, rtol=2e-5, atol=1e-6
        )


def test_batch_axes_are_separate_chains(rng):
    stack = [second_moment(rng, (3, 2), 4, 'F') for _ in range(3)]
    diag, edge = (jnp.stack([s[i] for s in stack]) for i in (0, 1))
    psi, schur = tridiagonal.factor(diag, (edge,), **DAMPING, axes=(1, 2))
    dense = tridiagonal.to_dense(psi, schur, axes=(1, 2))
    assert dense.shape == (3, 6, 6)
    for i in range(3):
        alone = tridiagonal.factor(diag[i], (edge[i],), **DAMPING, axes=(0, 1))
        np.testing.assert_array_equal(dense[i], tridiagonal.to_dense(*alone, axes=(0, 1)))


def test_toeplitz_closed_form():
    """tridiag(c, 1, c) of an AR(1) process: H_ij = c^|i-j| has a tridiagonal inverse, exactly."""
    n, c = 12, 0.6
    with jax.enable_x64(True):
        h = c ** abs(np.subtract.outer(np.arange(n), np.arange(n)))
        edge = jnp.append(jnp.full(n - 1, c), 0.0)
        psi, schur = tridiagonal.factor(
            jnp.ones(n), (edge,), eps=0.0, relative_eps=0.0, edge_tolerance=0.0, axes=(0,)
        )
        x = tridiagonal.to_dense(psi, schur, axes=(0,))
        np.testing.assert_allclose(x, np.linalg.inv(h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('scale', [0.0, 1e-30, 1e-10, 1.0, 1e8, 1e15])
@pytest.mark.parametrize('kind', ['rank_one', 'equal', 'random', 'one_entry'])
@pytest.mark.parametrize('stored', ['float32', 'bfloat16'])
def test_x_is_finite_and_positive_definite(rng, scale, kind, stored):
    g = {
        'rank_one': rng.normal(size=(1, 12)),
        'equal': np.ones((4, 12)),
        'random': rng.normal(size=(30, 12)),
        'one_entry': np.eye(12)[:1],
    }[kind].astype(np.float32) * np.float32(scale)
    diag = jnp.asarray((g * g).mean(0)).astype(stored).astype('float32')
    edge = (g[:, :-1] * g[:, 1:]).mean(0)
    edge = jnp.append(jnp.asarray(edge), 0).astype(stored).astype('float32')
    tolerance = 1e-7 if stored == 'float32' else 0.0078
    psi, schur = tridiagonal.factor(
        diag, (edge,), eps=1e-6, relative_eps=0.0, edge_tolerance=tolerance, axes=(0,)
    )
    assert np.all(np.isfinite(psi[0]))
    assert np.all(np.asarray(schur) > 0)
    # X = L diag(1/S) L^T with L unit triangular is positive definite once S > 0 and L is finite;
    # in float64 its eigenvalues show it.
    lower = np.eye(12) - np.diag(np.asarray(psi[0], np.float64)[:-1], -1)
    x = lower @ np.diag(1 / np.asarray(schur, np.float64)) @ lower.T
    assert np.linalg.eigvalsh(x * float(np.max(schur)))[0] > 0
    m = jnp.asarray(g[0])
    u = tridiagonal.apply(psi, schur, m, axes=(0,))
    assert np.all(np.isfinite(u))
    assert float(jnp.vdot(u.astype('float32'), m)) >= 0


def test_relative_eps_adds_a_share_of_the_largest_row_sum(rng):
    with jax.enable_x64(True):
        diag, edge, dense = second_moment(rng, (3, 3), 5, 'F')
        h = oracles.band_of(dense, 1)
        damped = diagonal.damp(diag, (edge,), eps=1e-6, relative_eps=0.1, axes=(0, 1))
        expected = np.diag(oracles.damped(h, 1e-6, 0.1))
        np.testing.assert_allclose(oracles.line(damped, 'F'), expected)
        traced = jax.jit(
            lambda r: diagonal.damp(diag, (edge,), eps=1e-6, relative_eps=r, axes=(0, 1))
        )
        np.testing.assert_allclose(traced(0.1), damped)
        np.testing.assert_allclose(
            traced(0.0), diagonal.damp(diag, (edge,), eps=1e-6, relative_eps=0.0, axes=(0, 1))
        )


def test_chain_of_one_entry():
    psi, schur = tridiagonal.factor(jnp.ones((1, 1)), (jnp.zeros((1, 1)),), **DAMPING, axes=(0, 1))
    assert psi[0].item() == 0
    np.testing.assert_allclose(schur.item(), 1 + 1e-6)
    assert chain.successor(jnp.ones((1, 1)), (0, 1)).item() == 0
