"""All sparsity patterns, by the same checks: optimality condition, dense oracle, stability."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precond_optax.kernels import banded, chain, diagonal, tridiagonal
from tests import oracles, quick

# A pattern and its number of off-diagonals; the banded one takes all.
PATTERNS = [
    (diagonal, 0),
    (tridiagonal, 1),
    (banded, 0),
    (banded, 1),
    (banded, 2),
    (banded, 3),
    (banded, 4),
    (banded, banded.MAX_UNROLLED),
    (banded, banded.MAX_UNROLLED + 1),
]
IDS = [f'{kernel.__name__.rsplit(".", 1)[1]}_{band}' for kernel, band in PATTERNS]
DAMPING = dict(eps=1e-6, relative_eps=0.0, edge_tolerance=1e-7)


def axes_of(shape, order):
    return tuple(range(len(shape))) if order == 'F' else tuple(range(len(shape)))[::-1]


def diagonals(dense, shape, order, band, dtype='float64'):
    """The arrays d and (e^1, ..) of a leaf from the dense matrix of its chain."""
    n = len(dense)
    arrays = []
    for k in range(band + 1):
        line = np.append(np.diag(dense, k), np.zeros(min(k, n)))
        arrays.append(jnp.asarray(line.reshape(shape, order=order).astype(dtype)))
    return arrays[0], tuple(arrays[1:])


def second_moment(rng, shape, steps, order, scale=1.0):
    """The dense matrix of a mean of ``steps`` outer products, in chain order."""
    lines = np.stack([oracles.line(scale * rng.normal(size=shape), order) for _ in range(steps)])
    return lines.T @ lines / steps


@st.composite
def problems(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    steps = draw(st.integers(2, 8))
    seed = draw(st.integers(0, 2**16))
    return shape, steps, draw(st.sampled_from('FC')), seed, draw(st.sampled_from(PATTERNS))


@given(problems())
def test_band_of_inverse_of_x_is_band_of_h(problem):
    """The optimality (KKT) condition, the definition of the method."""
    shape, steps, order, seed, (kernel, band) = problem
    with jax.enable_x64(True):
        dense = second_moment(np.random.default_rng(seed), shape, steps, order)
        axes = axes_of(shape, order)
        diag, offdiag = diagonals(dense, shape, order, band)
        factors = kernel.factor(
            diag, offdiag, eps=1e-3, relative_eps=0, edge_tolerance=0, axes=axes
        )
        x = np.asarray(kernel.to_dense(*factors, axes=axes))
        np.testing.assert_array_equal(x, oracles.band_of(x, band))
        expected = oracles.band_of(oracles.damped(dense, 1e-3), band)
        np.testing.assert_allclose(
            oracles.band_of(np.linalg.inv(x), band), expected, rtol=1e-7, atol=1e-9
        )


@given(problems())
def test_dense_form_is_the_clique_formula_and_apply_is_its_product(problem):
    shape, steps, order, seed, (kernel, band) = problem
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        dense = second_moment(rng, shape, steps, order)
        axes = axes_of(shape, order)
        diag, offdiag = diagonals(dense, shape, order, band)
        damping = {**DAMPING, 'eps': 1e-4}
        factors = kernel.factor(diag, offdiag, **damping, axes=axes)
        h = oracles.damped(oracles.band_of(dense, band), 1e-4)
        x = oracles.banded_inverse(h, band)
        scale = abs(x).max()
        np.testing.assert_allclose(
            kernel.to_dense(*factors, axes=axes) / scale, x / scale, rtol=1e-6, atol=1e-8
        )
        # Where no edge is dropped the two oracles are one.
        other = oracles.banded_inverse_with_drops(h, band, 0.0)
        np.testing.assert_allclose(other / scale, x / scale, rtol=1e-6, atol=1e-8)
        m = rng.normal(size=shape)
        applied = kernel.apply(*factors, jnp.asarray(m), axes=axes)
        np.testing.assert_allclose(
            oracles.line(applied, order) / scale,
            x @ oracles.line(m, order) / scale,
            rtol=1e-6,
            atol=1e-8,
        )


@given(problems(), st.sampled_from([1e-2, 0.2, 0.6]))
def test_edges_are_dropped_where_the_tolerance_says(problem, tolerance):
    shape, steps, order, seed, (kernel, band) = problem
    with jax.enable_x64(True):
        dense = second_moment(np.random.default_rng(seed), shape, steps, order)
        axes = axes_of(shape, order)
        diag, offdiag = diagonals(dense, shape, order, band)
        factors = kernel.factor(
            diag, offdiag, eps=1e-3, relative_eps=0.0, edge_tolerance=tolerance, axes=axes
        )
        h = oracles.damped(oracles.band_of(dense, band), 1e-3)
        expected = oracles.banded_inverse_with_drops(h, band, tolerance)
        np.testing.assert_allclose(
            kernel.to_dense(*factors, axes=axes), expected, rtol=1e-7, atol=1e-9
        )


@given(problems())
def test_accumulate_is_the_mean_of_outer_products(problem):
    shape, steps, order, seed, (kernel, band) = problem
    grads = np.random.default_rng(seed).normal(size=(steps, *shape)).astype(np.float32)
    axes = axes_of(shape, order)
    diag, offdiag = jnp.zeros(shape), (jnp.zeros(shape),) * band
    for g in grads:
        diag, offdiag = kernel.accumulate(jnp.asarray(g), diag, offdiag, b2=0.9, axes=axes)
    _, dense = oracles.moments(list(grads), 0.0, 0.9, order)
    expected = diagonals(dense * (1 - 0.9**steps), shape, order, band, 'float32')
    chex.assert_trees_all_close((diag, offdiag), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('band', [1, 2, 4, banded.MAX_UNROLLED, banded.MAX_UNROLLED + 1])
def test_all_bands_are_one_method(rng, band):
    """A wider band whose further diagonals are what the narrow X implies changes nothing."""
    with jax.enable_x64(True):
        dense = oracles.damped(second_moment(rng, (12,), 30, 'F'), 1e-3)
        narrow = oracles.banded_inverse(oracles.band_of(dense, 1), 1)
        diag, offdiag = diagonals(np.linalg.inv(narrow), (12,), 'F', band)
        factors = banded.factor(
            diag, offdiag, eps=0.0, relative_eps=0.0, edge_tolerance=0.0, axes=(0,)
        )
        np.testing.assert_allclose(
            banded.to_dense(*factors, axes=(0,)), narrow, rtol=1e-9, atol=1e-9
        )


def test_a_band_over_the_whole_chain_is_the_full_inverse(rng):
    with jax.enable_x64(True):
        dense = second_moment(rng, (2, 3), 10, 'F')
        for band in (5, 6, 10):
            diag, offdiag = diagonals(dense, (2, 3), 'F', band)
            factors = banded.factor(diag, offdiag, **DAMPING, axes=(0, 1))
            np.testing.assert_allclose(
                banded.to_dense(*factors, axes=(0, 1)),
                np.linalg.inv(oracles.damped(dense, 1e-6)),
                rtol=1e-8,
            )


def test_the_two_solves_agree(rng):
    shape, band = (6, 5), 5
    diag, offdiag = diagonals(second_moment(rng, shape, 40, 'F'), shape, 'F', band, 'float32')
    unrolled = banded._solve_unrolled(diag, offdiag, 1e-7, (0, 1))
    looped = banded._solve_looped(diag, offdiag, 1e-7, (0, 1))
    chex.assert_trees_all_close(unrolled, looped, rtol=1e-3, atol=1e-5)


class Variants(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_same_jitted_and_not(self):
        rng = np.random.default_rng(0)
        dense = oracles.damped(second_moment(rng, (4, 3), 9, 'F'), 1e-1)
        m = jnp.asarray(rng.normal(size=(4, 3)), 'float32')
        for kernel, band in PATTERNS:
            arguments = (*diagonals(dense, (4, 3), 'F', band, 'float32'), m)

            def direction(diag, offdiag, m, kernel=kernel):
                factors = kernel.factor(diag, offdiag, **DAMPING, axes=(0, 1))
                return kernel.apply(*factors, m, axes=(0, 1))

            np.testing.assert_allclose(
                self.variant(direction)(*arguments),
                direction(*arguments),
                rtol=1e-4,
                atol=1e-5,
            )


@pytest.mark.parametrize(('kernel', 'band'), PATTERNS, ids=IDS)
def test_batch_axes_are_separate_chains(rng, kernel, band):
    stack = [
        diagonals(second_moment(rng, (3, 2), 4, 'F'), (3, 2), 'F', band, 'float32')
        for _ in range(3)
    ]
    diag, offdiag = jax.tree.map(lambda *x: jnp.stack(x), *stack)
    dense = kernel.to_dense(*kernel.factor(diag, offdiag, **DAMPING, axes=(1, 2)), axes=(1, 2))
    assert dense.shape == (3, 6, 6)
    for i, single in enumerate(stack):
        alone = kernel.factor(*single, **DAMPING, axes=(0, 1))
        np.testing.assert_array_equal(dense[i], kernel.to_dense(*alone, axes=(0, 1)))


@pytest.mark.parametrize(('kernel', 'band'), PATTERNS[1:], ids=IDS[1:])
def test_toeplitz_closed_form(kernel, band):
    """An AR(1) process, H_ij = c^|i-j|, has a tridiagonal inverse: any band gives it exactly."""
    n, c = 12, 0.6
    with jax.enable_x64(True):
        h = c ** abs(np.subtract.outer(np.arange(n), np.arange(n)))
        diag, offdiag = diagonals(h, (n,), 'F', band)
        factors = kernel.factor(
            diag, offdiag, eps=0.0, relative_eps=0.0, edge_tolerance=0.0, axes=(0,)
        )
        expected = np.linalg.inv(h) if band else np.eye(n)
        np.testing.assert_allclose(
            kernel.to_dense(*factors, axes=(0,)), expected, rtol=1e-12, atol=1e-12
        )


def gradients(kind, rng):
    """Some gradients of 12 entries."""
    return {
        'rank_one': lambda: rng.normal(size=(1, 12)),
        'rank_three': lambda: rng.normal(size=(3, 12)),
        'equal': lambda: np.ones((4, 12)),
        'equal_pairs': lambda: np.repeat(rng.normal(size=(30, 6)), 2, axis=1),
        'random': lambda: rng.normal(size=(30, 12)),
        'one_entry': lambda: np.eye(12)[:1],
        'mixed_scales': lambda: rng.normal(size=(30, 12)) * 10.0 ** rng.integers(-15, 15, 12),
    }[kind]()


KINDS = ['rank_one', 'rank_three', 'equal', 'equal_pairs', 'random', 'one_entry', 'mixed_scales']


SCALES = [0.0, 1e-30, 1e-10, 1.0, 1e8, 1e15]


@pytest.mark.parametrize(
    ('scale', 'kind', 'stored', 'eps'),
    quick.every(5, itertools.product(SCALES, KINDS, ['float32', 'bfloat16'], [0.0, 1e-6])),
)
def test_x_is_finite_and_positive_definite(rng, scale, kind, stored, eps):
    if kind == 'mixed_scales' and scale > 1:
        scale = 1.0  # squares of 1e30 overflow float32
    g = gradients(kind, rng).astype(np.float32) * np.float32(scale)
    dense = (g.astype(np.float64).T @ g / len(g)).astype(np.float32)
    m = jnp.asarray(g[0])
    tolerance = 1e-7 if stored == 'float32' else 0.0078
    for kernel, band in PATTERNS:
        diag, offdiag = jax.tree.map(
            lambda x: x.astype(stored).astype('float32'),
            diagonals(dense, (12,), 'F', band, 'float32'),
        )
        psi, schur = kernel.factor(
            diag, offdiag, eps=eps, relative_eps=0.0, edge_tolerance=tolerance, axes=(0,)
        )
        assert all(np.all(np.isfinite(p)) for p in psi)
        assert np.all(np.isfinite(schur))
        assert np.all(np.asarray(schur) > 0)
        with jax.enable_x64(True):
            psi, schur = jax.tree.map(
                lambda x: jnp.asarray(np.asarray(x), 'float64'), (psi, schur)
            )
            x = np.asarray(kernel.to_dense(psi, schur, axes=(0,)))
            # In the units of the preconditioner's own diagonal: a congruence keeps the signs of
            # the eigenvalues, and 1e-30 beside 1e+30 would drown in float64.
            units = 1 / np.sqrt(np.diag(x))
            assert np.linalg.eigvalsh(x * np.outer(units, units))[0] > 0
            u = kernel.apply(psi, schur, jnp.asarray(m, 'float64'), axes=(0,))
            assert float(jnp.vdot(u, m)) >= 0
        u = kernel.apply(*jax.tree.map(lambda x: x.astype('float32'), (psi, schur)), m, axes=(0,))
        if scale <= 1e8:  # 1e15 by 1 / 1e-38 overflows
            assert np.all(np.isfinite(u))


@pytest.mark.parametrize('band', [2, 4, banded.MAX_UNROLLED + 1])
def test_identical_neighbours_keep_the_solve_well_posed(rng, band):
    """Each entry twice: the copy adds nothing, the rest is preconditioned as without it."""
    half = rng.normal(size=(200, 6))
    g = np.repeat(half, 2, axis=1)
    diag, offdiag = diagonals(g.T @ g / 200, (12,), 'F', band, 'float32')
    psi, _ = banded.factor(
        diag, offdiag, eps=0.0, relative_eps=0.0, edge_tolerance=1e-5, axes=(0,)
    )
    # The first of each pair is what its copy says: dropped. The copies see the next pair once.
    assert np.all([np.all(p[::2] == 0) for p in psi])
    assert np.all(psi[1][1::2] == 0)
    assert np.all(abs(psi[0][1:-1:2]) > 0)
    assert max(float(abs(p).max()) for p in psi) < 1


@pytest.mark.parametrize('band', [1, 3])
def test_relative_eps_adds_a_share_of_the_largest_row_sum(rng, band):
    with jax.enable_x64(True):
        dense = second_moment(rng, (3, 3), 5, 'F')
        h = oracles.band_of(dense, band)
        diag, offdiag = diagonals(dense, (3, 3), 'F', band)
        damped = diagonal.damp(diag, offdiag, eps=1e-6, relative_eps=0.1, axes=(0, 1))
        expected = np.diag(oracles.damped(h, 1e-6, 0.1))
        np.testing.assert_allclose(oracles.line(damped, 'F'), expected)
        traced = jax.jit(
            lambda r: diagonal.damp(diag, offdiag, eps=1e-6, relative_eps=r, axes=(0, 1))
        )
        np.testing.assert_allclose(traced(0.1), damped)
        np.testing.assert_allclose(
            traced(0.0), diagonal.damp(diag, offdiag, eps=1e-6, relative_eps=0.0, axes=(0, 1))
        )


@pytest.mark.parametrize(('kernel', 'band'), PATTERNS[1:], ids=IDS[1:])
def test_chain_of_one_entry(kernel, band):
    offdiag = (jnp.zeros((1, 1)),) * band
    psi, schur = kernel.factor(jnp.ones((1, 1)), offdiag, **DAMPING, axes=(0, 1))
    assert all(p.item() == 0 for p in psi)
    np.testing.assert_allclose(schur.item(), 1 + 1e-6)
    assert chain.successor(jnp.ones((1, 1)), (0, 1)).item() == 0
