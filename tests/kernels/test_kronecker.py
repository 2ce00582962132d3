"""Blocks and what is done to each of their axes, against dense matrices; sketches likewise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precond_optax.kernels import kronecker, matrix_root, sketch
from tests import oracles
from tests.kernels.test_matrix_root import FULL, SCALES, batch, relative_errors

pth_root = jax.jit(matrix_root.inverse_pth_root, static_argnums=(1, 3, 4))
update = jax.jit(sketch.update)
apply = jax.jit(sketch.apply, static_argnames='p')

# Shape, batch axes, groups of the others, and the shape that merging gives.
CUTS = [
    ((7, 5), 0, ((0,), (1,)), (7, 5)),
    ((2, 6, 4), 1, ((1,), (2,)), (2, 6, 4)),
    ((5, 2, 3), 0, ((0,), (1, 2)), (5, 6)),
    ((3, 2, 4, 2), 0, ((0, 1), (2,), (3,)), (6, 4, 2)),
    ((2, 3, 5), 2, ((2,),), (2, 3, 5)),
]


@pytest.mark.parametrize('size', [2, 10])
@pytest.mark.parametrize(('shape', 'lead', 'groups', 'merged'), CUTS)
def test_blocks_are_slices_filled_up(rng, shape, lead, groups, merged, size):
    x = rng.normal(size=shape)
    blocks = kronecker.partition(shape, lead, groups, size)
    cut = np.asarray(jax.jit(blocks.split)(x), np.float32)
    assert cut.shape == (*blocks.batch, *blocks.sizes)
    dims = x.reshape(merged).astype(np.float32)
    counts = blocks.batch[lead:]
    for number in np.ndindex(*counts):
        place = tuple(slice(n * s, (n + 1) * s) for n, s in zip(number, blocks.sizes, strict=True))
        expected = dims[(..., *place)]
        found = cut[(*(slice(None) for _ in range(lead)), *number)]
        np.testing.assert_array_equal(found[(..., *map(slice, expected.shape[lead:]))], expected)
        np.testing.assert_allclose((found**2).sum(), (expected**2).sum(), rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(blocks.join)(cut), x.astype(np.float32))
    assert blocks.axes == tuple(group[0] for group in groups)


def test_each_axis_has_its_own_matrix(rng):
    """Three axes of different lengths, so that no two can be taken for each other."""
    grads = rng.normal(size=(2, 6, 2, 3, 4))  # steps, blocks, axes
    statistics = [jnp.zeros((6, size, size)) for size in (2, 3, 4)]
    for grad in grads:
        statistics = kronecker.accumulate(jnp.asarray(grad), statistics, b2=0.5, weight=2.0)
    for axis, found in enumerate(statistics):
        rows = [[oracles.unfolded(block, axis) for block in grad] for grad in grads]
        expected = [2 * b @ b.T + a @ a.T for a, b in zip(*rows, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    applied = kronecker.apply(jnp.asarray(grads[0]), statistics)
    for i, block in enumerate(grads[0]):
        for axis in range(3):
            block = oracles.along_axis(np.asarray(statistics[axis][i]), block, axis)
        np.testing.assert_allclose(applied[i], block, rtol=1e-4, atol=1e-3)


def test_a_square_that_is_not_finite_is_left_out_of_its_own_block():
    for bad in (np.nan, np.inf, 1e30):
        blocks = jnp.ones((2, 2, 3)).at[1, 0, 2].set(bad)
        start = [jnp.zeros((2, 2, 2)), jnp.zeros((2, 3, 3))]
        found = kronecker.accumulate(blocks, start, b2=0.9, weight=1.0)[0]
        np.testing.assert_array_equal(found, [np.full((2, 2), 3), np.zeros((2, 2))])


@pytest.mark.parametrize(
    ('size', 'dtype', 'p'),
    [(5, 'float32', 2), (1, 'float64', 4), (16, 'float32', 4), (5, 'float64', 6)],
)
@pytest.mark.parametrize('method', ['eigh', 'newton_schulz'])
def test_pth_roots_are_the_oracles(rng, size, dtype, method, p):
    """Of all scales and conditions, with a shift and without."""
    with jax.enable_x64(dtype == 'float64'):
        x, smallest = batch(FULL, size, dtype, rng)
        for eps in (0.0, 1e-2):
            root, failed = pth_root(x, p, eps, method, 0.0)
            assert root.dtype == dtype
            assert not np.any(failed)
            exact = [[oracles.relative_inverse_root(one, p, eps) for one in row] for row in x]
            # The products' largest eigenvalue is a power iteration's; and their least shift.
            rounding = 100 * size * np.finfo(dtype).eps * (1 + 1 / (smallest + eps))
            slack = rounding + (0.1 * eps / (smallest + eps) if method != 'eigh' else 0)
            errors = relative_errors(root, np.array(exact, np.float64))
            np.testing.assert_array_less(errors, slack[:, None] + np.zeros_like(errors))


def test_pth_roots_tell_where_they_failed(rng):
    x = batch(FULL, 5, 'float32', rng, [1.0])[0][:, 0]
    x = np.concatenate([x, np.full((1, 5, 5), np.nan, np.float32), np.zeros((1, 5, 5))])
    for method in ('eigh', 'newton_schulz', 'auto'):
        roots, failed = pth_root(jnp.asarray(x), 4, 1e-3, method, 0.0)
        assert failed.tolist() == [False] * 4 + [True, False]
        np.testing.assert_array_equal(roots[-1], 0)
    # Too few steps are told from enough.
    matrix = jnp.diag(jnp.geomspace(1, 1e-5, 6))
    newton = jax.jit(matrix_root.coupled_newton, static_argnums=1)
    assert newton(matrix, 4, 20)[1] < 1e-3
    assert newton(matrix, 4, 8)[1] > 0.5


def test_rank_one_has_bounded_roots(rng):
    """What rounding leaves of the other eigenvalues is not blown up."""
    vector = rng.normal(size=16).astype(np.float32)
    for scale in SCALES[1:-1]:
        x = jnp.asarray(scale * np.outer(vector, vector), jnp.float32)
        for method in ('eigh', 'newton_schulz'):
            root, failed = pth_root(x, 4, 0.0, method, 0.0)
            assert not failed
            size = oracles.spectral_norm(root) * oracles.spectral_norm(x) ** 0.25
            assert size <= 1.1 * np.finfo(np.float32).eps ** -0.25


def dense(vectors, values, escaped):
    vectors, eye = np.asarray(vectors, np.float64), np.eye(vectors.shape[-2])
    inside = (vectors * np.asarray(values)[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    return inside + np.asarray(escaped)[..., None, None] * eye


# The size, the rank, the columns: M formed, or a QR where these are fewer.
SKETCHES = [(6, 2, 5), (6, 6, 5), (9, 2, 3), (9, 3, 1), (5, 1, 4), (1, 1, 3), (4, 3, 1)]


@pytest.mark.parametrize(('size', 'rank', 'count'), SKETCHES)
def test_sketches_are_the_oracles(rng, size, rank, count):
    grads = rng.normal(size=(6, 2, size, count))
    with jax.enable_x64(True):
        held = jnp.zeros((2, size, rank)), jnp.zeros((2, rank)), jnp.zeros(2)
        for grad in grads:
            *held, failed = update(jnp.asarray(grad), *held, b2=0.8, weight=0.2)
            assert not np.any(failed)
        applied = apply(jnp.asarray(grads[-1]), *held, p=4, eps=1e-2)
        full = np.zeros((2, size, size))
        for i in range(2):
            matrix, escaped = np.zeros((size, size)), 0.0
            for grad in grads[:, i]:
                full[i] = 0.8 * full[i] + 0.2 * grad @ grad.T
                matrix = 0.8 * matrix + 0.2 * grad @ grad.T
                matrix, cut = oracles.frequent_directions(matrix, rank)
                escaped = 0.8 * escaped + cut
            expected = matrix + escaped * np.eye(size)
            np.testing.assert_allclose(dense(*held)[i], expected, rtol=1e-9, atol=1e-9)
            root = oracles.relative_inverse_root(matrix, 4, 1e-2, escaped)
            np.testing.assert_allclose(applied[i], root @ grads[-1, i], rtol=1e-9, atol=1e-9)
        # Never below the second moment, and that itself where nothing has to be left out.
        least = np.linalg.eigvalsh(dense(*held) - full).min()
        assert least >= -1e-10
        if rank == size:
            np.testing.assert_allclose(dense(*held), full, rtol=1e-9, atol=1e-10)
        vectors = np.asarray(held[0])
        gram = np.swapaxes(vectors, -1, -2) @ vectors
        wanted = np.eye(rank) * (np.asarray(held[1]) > 0)[:, None, :]
        np.testing.assert_allclose(gram, wanted, atol=1e-9)


def test_a_subspace_that_fits_is_held_exactly(rng):
    """K directions, not k - 1: what is taken off is the first eigenvalue left out.

    In each update rounding leaves out about half a unit of the largest, which adds up.
    """
    span = rng.normal(size=(32, 3))
    held, full = (jnp.zeros((32, 3)), jnp.zeros(3), jnp.zeros(())), np.zeros((32, 32))
    for count in range(1, 101):
        grad = span @ rng.normal(size=(3, 40))
        *held, _ = update(jnp.asarray(grad, jnp.float32), *held, b2=1.0, weight=1.0)
        full += grad @ grad.T
        if count == 10:
            assert held[2] < 1e-5 * full.max()
            np.testing.assert_allclose(dense(*held) / full.max(), full / full.max(), atol=1e-5)
    largest = np.linalg.eigvalsh(full)[-1]
    assert held[2] < 60 * np.finfo('float32').eps * largest
    np.testing.assert_allclose(dense(*held) / largest, full / largest, atol=1e-5)


@pytest.mark.parametrize('count', [1, 6])
@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e30])
def test_a_failed_sketch_stays_as_it_was(rng, bad, count):
    grads = jnp.asarray(rng.normal(size=(2, 8, count)), jnp.float32)
    start = jnp.zeros((2, 8, 3)), jnp.zeros((2, 3)), jnp.zeros(2)
    *held, _ = update(grads, *start, b2=0.9, weight=0.1)
    *after, failed = update(grads.at[1, 0, 0].set(bad), *held, b2=0.9, weight=0.1)
    assert failed.tolist() == [False, True]
    for new, old in zip(after, held, strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        assert np.all(np.isfinite(new))
    assert np.any(after[1][0] != held[1][0])


@pytest.mark.parametrize('scale', [0.0, 1e-15, 1.0, 1e15])
@pytest.mark.parametrize('kind', ['rank one', 'ill conditioned', 'random'])
def test_sketches_of_any_size_are_finite(rng, kind, scale):
    grad = {
        'rank one': np.outer(rng.normal(size=8), rng.normal(size=6)),
        'ill conditioned': rng.normal(size=(8, 6)) * np.geomspace(1, 1e-8, 8)[:, None],
        'random': rng.normal(size=(8, 6)),
    }[kind]
    columns = jnp.asarray(scale * grad, jnp.float32)
    for rank in (1, 4, 8):
        held = jnp.zeros((8, rank)), jnp.zeros(rank), jnp.zeros(())
        for _ in range(3):
            *held, failed = update(columns, *held, b2=0.9, weight=0.1)
            assert not failed
        for eps in (0.0, 1e-6):
            found = apply(columns, *held, p=4, eps=eps)
            assert np.all(np.isfinite(found))
            assert np.any(found) == (scale > 0)
