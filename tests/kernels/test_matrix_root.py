"""Inverse square roots of small matrices, of every size and condition, by both methods."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from precond_optax import placement
from precond_optax.kernels import matrix_root, shared_basis
from tests import oracles

METHODS = ('eigh', 'newton_schulz')
DTYPES = ('float32', 'float64')
SIZES = (1, 2, 5, 16)
SCALES = (1e-30, 1e-10, 1.0, 1e10, 1e30)
# Of the worst full matrices; the roots' errors are that times the rounding.
CONDITION = {'float32': 1e4, 'float64': 1e10}
STEPS = {'float32': 25, 'float64': 45}
KINDS = ('well conditioned', 'ill conditioned', 'two clusters', 'identity', 'rank one', 'zero')
FULL = KINDS[:4]


def spectrum(kind, size, condition, rng):
    """Eigenvalues, the largest of them 1 if any."""
    return {
        'well conditioned': rng.uniform(0.1, 1, size),
        'ill conditioned': np.geomspace(1, 1 / condition, size),
        'two clusters': np.where(np.arange(size) < (size + 1) // 2, 1, 1 / condition),
        'identity': np.ones(size),
        'rank one': np.arange(size) == 0,
        'zero': np.zeros(size),
    }[kind]


def batch(kinds, size, dtype, rng, scales=SCALES):
    """Symmetric matrices (kinds, scales, k, k) and, for each kind, one over its condition."""
    values = np.stack([spectrum(kind, size, CONDITION[dtype], rng) for kind in kinds])
    turn = np.linalg.qr(rng.normal(size=(len(kinds), size, size)))[0]
    unit = (turn * values[:, None]) @ np.swapaxes(turn, -1, -2)
    found = (unit + np.swapaxes(unit, -1, -2))[:, None] / 2 * np.array(scales)[:, None, None]
    return found.astype(dtype), values.min(axis=1)


@functools.partial(jax.jit, static_argnames=('method', 'steps'))
def inverse_root(x, shift, *, method, steps=None):
    if method == 'eigh':
        return matrix_root.from_decomposition(*matrix_root.decompose(x), shift)
    shifted = x + shift[..., None, None] * jnp.eye(x.shape[-1], dtype=x.dtype)
    return matrix_root.newton_schulz(shifted, steps or STEPS[str(x.dtype)])[1]


# All that a batch of matrices (..., k, k) and of shifts (...) may go through, and what axes it has
# of its own.
FUNCTIONS = {
    'eigenvalues': (lambda x, s: matrix_root.decompose(x)[0], 1),
    'root_by_eigh': (functools.partial(inverse_root, method='eigh'), 2),
    'root_by_newton_schulz': (functools.partial(inverse_root, method='newton_schulz'), 2),
    'square_root': (lambda x, s: matrix_root.newton_schulz(x, 5)[0], 2),
    'error_of_newton_schulz': (lambda x, s: matrix_root.newton_schulz(x, 5)[2], 0),
    'largest_eigenvalue': (lambda x, s: matrix_root.largest_eigenvalue(x, 4), 0),
    'trace': (lambda x, s: matrix_root.trace(x), 0),
    'polar_root': (lambda x, s: matrix_root.polar_root(x, 5)[0], 2),
    'root_or_failure': (lambda x, s: matrix_root.inverse_root(x, s, 'eigh', 0.0)[0], 2),
}
FUNCTIONS = {name: (jax.jit(function), own) for name, (function, own) in FUNCTIONS.items()}


def relative_errors(found, exact):
    found = np.asarray(found, np.float64)
    return oracles.spectral_norm(found - exact) / oracles.spectral_norm(exact)


problems = given(
    st.sampled_from(SIZES), st.sampled_from(DTYPES), st.sampled_from(METHODS), st.integers(0, 999)
)


@problems
def test_roots_of_full_matrices_are_the_oracles(size, dtype, method, seed):
    with jax.enable_x64(dtype == 'float64'):
        x, smallest = batch(FULL, size, dtype, np.random.default_rng(seed))
        root = inverse_root(x, jnp.zeros(x.shape[:-2], dtype), method=method)
        assert root.dtype == dtype
        bounds = 10 * np.finfo(dtype).eps * (1 + 1 / smallest)
        errors = relative_errors(root, oracles.inverse_square_root(x))
        np.testing.assert_array_less(errors, bounds[:, None] + np.zeros_like(errors))


@problems
def test_roots_with_a_shift_are_the_oracles(size, dtype, method, seed):
    """The shift is in the matrices' units; what has no rank is then as good as the rest."""
    with jax.enable_x64(dtype == 'float64'):
        x, _ = batch(KINDS, size, dtype, np.random.default_rng(seed))
        shift = np.broadcast_to((1e-3 * np.array(SCALES)).astype(dtype), x.shape[:-2])
        root = inverse_root(x, shift, method=method)
        errors = relative_errors(root, oracles.inverse_square_root(x, shift))
        np.testing.assert_array_less(errors, 1e4 * np.finfo(dtype).eps)
        # Of zero and a shift the root is known without an oracle.
        expected = np.eye(size) / np.sqrt(shift[-1].astype(float))[:, None, None]
        np.testing.assert_allclose(root[-1], expected, rtol=1e-4)


@pytest.mark.parametrize('dtype', DTYPES)
def test_singular_matrices_have_bounded_roots(rng, dtype):
    """What rounding leaves of the zero eigenvalues is not blown up beyond its own root."""
    with jax.enable_x64(dtype == 'float64'):
        x, _ = batch(['rank one', 'two clusters', 'zero'], 5, dtype, rng)
        # Not positive semidefinite, as statistics in bfloat16 may be.
        x[1] -= np.array(SCALES, dtype)[:, None, None] * np.eye(5, dtype=dtype) / 100
        none = jnp.zeros(x.shape[:-2], dtype)
        root = np.asarray(inverse_root(x, none, method='eigh'), np.float64)
    np.testing.assert_array_equal(root[-1], 0)
    # In units of the largest eigenvalue's root.
    relative = root[:2] * np.sqrt(oracles.spectral_norm(x)[:2])[..., None, None]
    limit = np.finfo(dtype).eps ** -0.5
    assert np.all(oracles.spectral_norm(relative) <= 1.01 * limit)
    assert np.all(abs(relative - np.swapaxes(relative, -1, -2)) <= 1e-6 * limit)
    assert np.all(np.linalg.eigvalsh(relative) >= -1e-6 * limit)
    # And along the one direction that is there, it is the root.
    along = np.linalg.eigh(np.asarray(x[0], np.float64))[1][..., -1:]
    inside = np.swapaxes(along, -1, -2) @ relative[0] @ along
    np.testing.assert_allclose(inside, 1, rtol=1e-2)


@pytest.mark.parametrize('dtype', DTYPES)
def test_newton_schulz_does_not_pass_singular_matrices_off_as_done(rng, dtype):
    """Their zero eigenvalues' rounding has either sign, and what is negative runs away."""
    with jax.enable_x64(dtype == 'float64'):
        x, _ = batch(['rank one', 'zero'], 5, dtype, rng)
        for steps in (5, 25, 100):
            square, inverse, error = matrix_root.newton_schulz(x, steps)
            assert not np.any(error[0] < 0.5)
            for found in (square, inverse, error):
                np.testing.assert_array_equal(found[1], 0)


@pytest.mark.parametrize('p', [1, 2, 3, 4, 6])
@pytest.mark.parametrize(('least', 'rounding'), [(1e-6, 1e-7), (1e-3, 1e-7), (2e-15, 2e-16)])
def test_scaled_steps_take_all_eigenvalues_to_one(p, least, rounding):
    """In half of Newton's steps or fewer, and none near 1 is made small on the way."""
    values = np.geomspace(least, 1, 1000)
    steps = matrix_root.scaled_steps(least, p, rounding)
    smallest = 1.0
    for a, b in steps:
        values = values * (a - b * values) ** p
        smallest = min(smallest, values[-1])
        assert np.all(values <= 1 + 1e-12)
    np.testing.assert_allclose(values, 1, rtol=1e-12)
    assert smallest > 0.25**p
    slower, count = least, 0
    while slower < 1 - 1e-3:
        slower, count = slower * ((p + 1 - slower) / p) ** p, count + 1
    assert len(steps) <= 0.66 * count + 3


@pytest.mark.parametrize('p', [2, 4])
def test_scaled_steps_are_as_exact_as_newton_s(p, rng):
    """Of well conditioned matrices too, whose eigenvalues a larger scaling would cancel."""
    with jax.enable_x64(True):
        for low in (0.5, 1e-3):
            x = jnp.asarray(spread(6, low) if low < 0.5 else np.diag(np.linspace(low, 1, 6)))
            steps = matrix_root.scaled_steps(1e-14, p, 2e-16)
            found, error = matrix_root.coupled_newton(x, p, steps)
            exact = oracles.relative_inverse_root(np.asarray(x), p, 0.0)
            assert error < 1e-12
            np.testing.assert_allclose(
                oracles.spectral_norm(found - exact) / oracles.spectral_norm(exact), 0, atol=1e-12
            )


@pytest.mark.parametrize(
    ('axes', 'size', 'front'),
    [
        ((), 1, False),
        ((), 5, False),
        ((128,), 1, True),
        ((2, 128), 5, True),
        ((128, 2), 5, False),
        ((128,), matrix_root._LARGEST_IN_FRONT + 1, False),
    ],
)
def test_matrices_in_front_of_their_batch_have_the_same_roots(axes, size, front, rng, monkeypatch):
    """As a TPU holds them, but single, large and few ones."""
    x = rng.normal(size=(*axes, size, 2 * size))
    x = jnp.asarray(x @ np.swapaxes(x, -1, -2) / size, jnp.float32)
    if axes:
        x = x.at[(-1,) * len(axes)].set(0)
    functions = (
        lambda x: matrix_root.newton_schulz(x, 12)[:2],
        lambda x: matrix_root.newton_schulz(x, matrix_root.scaled_steps(1e-5, 2, 1e-7))[1],
        lambda x: matrix_root.newton_schulz(x, 2)[2],
        lambda x: matrix_root.coupled_newton(x, 4, matrix_root.scaled_steps(1e-5, 4, 1e-7))[0],
        lambda x: matrix_root.coupled_newton(x, 4, 2)[1],
        lambda x: matrix_root.largest_eigenvalue(x, 4, 2),
    )
    expected = [function(x) for function in functions]
    monkeypatch.setattr(placement, 'platform', lambda: 'tpu')
    assert not matrix_root._form_of(x).front  # of several devices, and none of them known
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    assert matrix_root._form_of(x).front == front
    for function, wanted in zip(functions, expected, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
            function(x),
            wanted,
        )


@pytest.mark.parametrize('kind', [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize(('devices', 'front'), [(1, True), (8, False)])
def test_a_batch_that_is_shared_out_keeps_its_form(devices, front, kind, monkeypatch):
    """A part of it need not fill the lanes."""
    monkeypatch.setattr(placement, 'platform', lambda: 'tpu')
    mesh = jax.make_mesh((devices,), ('x',), axis_types=(kind,), devices=jax.devices()[:devices])
    x = jax.device_put(jnp.ones((1024, 3, 3)), NamedSharding(mesh, P('x')))
    forms = []

    @jax.jit
    def roots(x):
        forms.append(matrix_root._form_of(x))
        return matrix_root.newton_schulz(x, 5)

    with jax.set_mesh(mesh):
        results = roots(x)
    assert [form.front for form in forms] == [front]
    assert all(result.sharding.is_equivalent_to(x.sharding, result.ndim) for result in results)


def test_negative_eigenvalues_count_as_zero():
    values, shift = jnp.array([-0.5, 1.0]), jnp.array(0.25)
    root = matrix_root.from_decomposition(values, jnp.eye(2), shift)
    np.testing.assert_allclose(root, np.diag([2, 1.25**-0.5]), rtol=1e-6)
    # Without a shift they are raised to the largest one's rounding, as what is nearly zero is.
    eps = np.finfo(np.float32).eps
    for low in (-0.5, 0.0, 1e-9):
        root = matrix_root.from_decomposition(jnp.array([low, 4.0]), jnp.eye(2), 0 * shift)
        np.testing.assert_allclose(root, np.diag([(4 * eps) ** -0.5, 0.5]), rtol=1e-6)


@given(st.sampled_from(SIZES), st.sampled_from(DTYPES), st.integers(0, 999))
def test_the_decomposition_is_one(size, dtype, seed):
    with jax.enable_x64(dtype == 'float64'):
        x, _ = batch(KINDS, size, dtype, np.random.default_rng(seed))
        values, vectors = (np.asarray(a, np.float64) for a in jax.jit(matrix_root.decompose)(x))
    assert np.all(np.diff(values) >= 0)
    rounding = 10 * size * np.finfo(dtype).eps
    norms = oracles.spectral_norm(x)
    swapped = np.swapaxes(vectors, -1, -2)
    assert np.all(abs(vectors @ swapped - np.eye(size)) <= rounding)
    again = (vectors * values[..., None, :]) @ swapped
    assert np.all(oracles.spectral_norm(again - x) <= rounding * norms)
    expected = np.linalg.eigvalsh(np.asarray(x, np.float64))
    assert np.all(abs(values - expected) <= rounding * norms[..., None])


@pytest.mark.parametrize('dtype', DTYPES)
def test_the_two_roots_of_newton_schulz_belong_together(rng, dtype):
    with jax.enable_x64(dtype == 'float64'):
        x, smallest = batch(FULL, 5, dtype, rng)
        square, inverse, _ = matrix_root.newton_schulz(x, STEPS[dtype])
        square, inverse = np.asarray(square, np.float64), np.asarray(inverse, np.float64)
    bounds = (100 * np.finfo(dtype).eps / smallest)[:, None, None, None]
    assert np.all(abs(square @ inverse - np.eye(5)) <= bounds)
    assert np.all(relative_errors(square @ square, x) <= bounds[..., 0, 0])


def spread(size, smallest):
    """One eigenvalue is small, and its direction has a share in all entries."""
    return np.eye(size) - (1 - smallest) * np.full((size, size), 1 / size)


@pytest.mark.parametrize('dtype', DTYPES)
def test_newton_schulz_tells_where_it_has_not_converged(rng, dtype):
    """Its error bounds the root's own: no direction that is far off is lost among good ones."""
    rounding = np.finfo(dtype).eps
    with jax.enable_x64(dtype == 'float64'):
        x = np.stack(
            [spread(64, 1 / condition) for condition in (1e1, 1e2, 1e3, CONDITION[dtype])]
            + list(batch(['ill conditioned'], 64, dtype, rng, [1])[0][0])
        ).astype(dtype)
        run = jax.jit(matrix_root.newton_schulz)
        exact = oracles.inverse_square_root(x)
        seen = []
        for steps in (1, 3, 5, 8, 12, 20, STEPS[dtype]):
            _, root, reported = run(x, steps)
            errors = relative_errors(root, exact)
            slack = 10 * rounding * np.array([1e1, 1e2, 1e3] + [CONDITION[dtype]] * 2)
            np.testing.assert_array_less(errors, reported + slack)
            seen.append(np.asarray(reported))
    few, enough = seen[1], seen[-1]
    assert np.all(few[2:] > 0.5)
    assert np.all(enough < 1e-3)
    # One well conditioned enough has converged long before.
    assert seen[4][0] < 1e-3


@pytest.mark.parametrize(
    ('dtype', 'condition'),
    [('float32', 1e3), ('float32', 1e5), ('float64', 1e5), ('float64', 1e10)],
)
def test_newton_schulz_wants_as_many_steps_as_its_docstring_says(dtype, condition):
    with jax.enable_x64(dtype == 'float64'):
        x = jnp.diag(jnp.geomspace(1, 1 / condition, 6, dtype=dtype))
        steps = math.ceil(math.log(condition) / math.log(9 / 4)) + 5
        run = jax.jit(matrix_root.newton_schulz)
        assert run(x, steps)[2] < 0.01
        assert run(x, steps - 8)[2] > 0.1


def factors_of(x, rng):
    """S with S S^T = X, neither symmetric nor triangular, in float64."""
    values, vectors = np.linalg.eigh(np.asarray(x, np.float64))
    turn = np.linalg.qr(rng.normal(size=x.shape))[0]
    return vectors * np.sqrt(values.clip(min=0))[..., None, :] @ turn


@pytest.mark.parametrize('steps', [1, 5, 10])
def test_polar_roots_are_the_iterates_of_newton_schulz(rng, steps):
    """Those of methods.md, before they converge."""
    with jax.enable_x64(True):
        x, _ = batch(FULL, 5, 'float64', rng, [1e-3, 1.0, 1e6])
        found, _ = matrix_root.polar_root(jnp.asarray(factors_of(x, rng)), steps)
        coupled, _, _ = matrix_root.newton_schulz(x, steps)
    expected = [[oracles.newton_schulz_roots(one, steps)[0] for one in row] for row in x]
    assert np.all(relative_errors(found, np.array(expected)) < 1e-12)
    assert np.all(relative_errors(coupled, np.array(expected)) < 1e-12)


@given(st.sampled_from(SIZES), st.sampled_from(DTYPES), st.integers(0, 999))
def test_polar_roots_are_exact_in_the_end(size, dtype, seed):
    """To the rounding times the root of the condition, of which `newton_schulz` needs all."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(dtype == 'float64'):
        x, smallest = batch(KINDS, size, dtype, rng)
        found, error = matrix_root.polar_root(jnp.asarray(factors_of(x, rng), dtype), 60)
        values, vectors = np.linalg.eigh(np.asarray(x, np.float64))
        exact = (vectors * np.sqrt(values.clip(min=0))[..., None, :]) @ np.swapaxes(
            vectors, -1, -2
        )
        norm = np.sqrt(oracles.spectral_norm(x))
        errors = oracles.spectral_norm(np.asarray(found, np.float64) - exact)
        # Of a singular one the smallest eigenvalue's own root has the rounding of its factor.
        bound = 30 * np.finfo(dtype).eps ** 0.5 if size > 1 else 30 * np.finfo(dtype).eps
        assert np.all(errors <= bound * norm + 1e-30)
        full = errors[: len(FULL)] / norm[: len(FULL)]
        bounds = 100 * np.finfo(dtype).eps / np.sqrt(smallest[: len(FULL)])
        assert np.all(full <= bounds[:, None])
        assert np.all(error[: len(FULL)] < 1e-2)


def test_polar_roots_of_a_condition_that_newton_schulz_cannot_take(rng):
    values = np.geomspace(1, 1e-10, 8)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    x = (turn * values) @ turn.T
    found, _ = matrix_root.polar_root(jnp.asarray(factors_of(x, rng), jnp.float32), 40)
    weighted = (turn.T @ np.asarray(found, np.float64) @ turn) / np.sqrt(values)
    np.testing.assert_allclose(np.diag(weighted), 1, rtol=0.05)
    lost, _, _ = matrix_root.newton_schulz(jnp.asarray(x, jnp.float32), 40)
    assert not np.allclose(np.diag(turn.T @ lost @ turn) / np.sqrt(values), 1, rtol=0.05)


@pytest.mark.parametrize('method', [*METHODS, 'auto'])
def test_roots_by_any_method_and_which_failed(rng, method):
    x, _ = batch(FULL, 5, 'float32', rng, [1.0])
    x = np.concatenate([x[:, 0], np.full((1, 5, 5), np.nan, np.float32)])
    root, failed = matrix_root.inverse_root(x, 0.01, method, 0.0)
    assert failed.tolist() == [False] * 4 + [True]
    assert np.all(relative_errors(root[:4], oracles.inverse_square_root(x[:4], 0.01)) < 1e-4)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('where', [np.s_[1], np.s_[1, 0, 0]], ids=['whole', 'one_entry'])
@pytest.mark.parametrize('name', [name for name in FUNCTIONS if name != 'trace'])
def test_what_is_not_finite_spoils_its_own_matrix_alone(rng, name, where, bad):
    function, _ = FUNCTIONS[name]
    good = batch(['well conditioned'], 4, 'float32', rng, [1, 1, 1])[0][0]
    x = good.copy()
    x[where] = bad
    for shift in (np.zeros(3, np.float32), np.full(3, 0.5, np.float32)):
        found, expected = np.asarray(function(x, shift)), np.asarray(function(good, shift))
        assert np.all(np.isnan(found[1]))
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    if name.startswith('root') and np.isnan(bad):
        shift[1] = bad
        found = np.asarray(function(good, shift))
        assert np.all(np.isnan(found[1]))
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


def test_scalar_roots():
    x = jnp.array([0.0, 4.0, np.inf, np.nan, 1e-30, 1e30])
    found = matrix_root.inverse_square_root(x)
    np.testing.assert_allclose(found, [0, 0.5, 0, np.nan, 1e15, 1e-15], rtol=1e-6)
    assert matrix_root.trace(jnp.arange(8.0).reshape(2, 2, 2)).tolist() == [3, 11]


@given(st.sampled_from(SIZES), st.sampled_from(DTYPES), st.integers(0, 999))
def test_the_largest_eigenvalue_comes_from_below(size, dtype, seed):
    with jax.enable_x64(dtype == 'float64'):
        x, _ = batch(KINDS, size, dtype, np.random.default_rng(seed))
        exact = oracles.spectral_norm(x)
        run, last = jax.jit(matrix_root.largest_eigenvalue), np.zeros(x.shape[:-2])
        rounding = 1 + 10 * np.finfo(dtype).eps
        for steps in (1, 2, 4, 8, 64):
            found = np.asarray(run(x, steps), np.float64)
            assert np.all(found <= exact * rounding)
            assert np.all(found * rounding >= last)  # and never falls
            last = found
        # Where no other eigenvalue is near, it is there; near ones keep it back by a little.
        for i, share in ((3, 1 - 1e-5), (4, 1 - 1e-5), (1, 0.99), (0, 0.9), (2, 0.9)):
            assert np.all(found[i] >= share * exact[i])
        np.testing.assert_array_equal(found[-1], 0)


def test_the_start_of_the_power_iteration_is_a_generic_unit_vector():
    for size in (1, 2, 64):
        found = matrix_root.generic_unit_vector(size, jnp.dtype('float32'))
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found), 1, rtol=1e-6)
        assert np.all(abs(found) > 1e-4)
        np.testing.assert_array_equal(found, matrix_root.generic_unit_vector(size, found.dtype))


@pytest.mark.parametrize('axes', [(), (12,), (3, 4), (2, 1, 3, 2)])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_any_number_of_batch_axes(rng, name, axes):
    function, own = FUNCTIONS[name]
    count = math.prod(axes)
    x = batch(['well conditioned'], 4, 'float32', rng, np.linspace(1, 2, count))[0][0]
    shifts = np.linspace(0, 1, count, dtype=np.float32)
    found = function(x.reshape(*axes, 4, 4), shifts.reshape(axes))
    assert found.shape == axes + (4,) * own
    alone = np.stack([function(*pair) for pair in zip(x, shifts, strict=True)])
    np.testing.assert_allclose(found, alone.reshape(found.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_the_shared_basis_takes_enough_steps_of_newton_schulz(rng, dtype):
    """Statistics of rank one and an eps far below them: the least shift is all there is."""
    with jax.enable_x64(dtype == 'float64'):
        state = (jnp.eye(8, dtype=dtype), jnp.zeros((3, 8, 8), dtype), jnp.zeros(3, dtype))
        grad = jnp.asarray(10 * rng.normal(size=(8, 3)), dtype)
        refresh = functools.partial(shared_basis.refresh, b2=1.0, weight=1.0, eps=1e-20)
        refresh = jax.jit(functools.partial(refresh, method='newton_schulz'))
        *_, root, failed = refresh(grad, *state, state[1])
        assert not np.any(failed)
        assert np.all(np.isfinite(root))
        assert np.all(oracles.spectral_norm(root) > 0)


def dots(jaxpr):
    """All products of matrices in a jaxpr and what it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from dots(inner)


def refresh_with(**keywords):
    state = (jnp.eye(3, 5), jnp.ones((4, 3, 3)), jnp.ones(4), jnp.ones((4, 3, 3)))
    run = functools.partial(shared_basis.refresh, b2=1.0, weight=1.0, eps=1e-6, **keywords)
    return run, (jnp.ones((5, 4)), *state), 10


@pytest.mark.parametrize(
    ('function', 'arguments', 'least'),
    [
        (matrix_root.from_decomposition, (jnp.ones(3), jnp.eye(3), jnp.ones(())), 1),
        (functools.partial(matrix_root.newton_schulz, steps=3), (jnp.eye(3),), 4),
        (
            functools.partial(matrix_root.largest_eigenvalue, steps=3, squarings=1),
            (jnp.eye(3),),
            1,
        ),
        refresh_with(),
        refresh_with(extra_rows=jnp.ones((1, 5)), residual_norm='frobenius'),
        refresh_with(method='newton_schulz'),
    ],
)
def test_every_product_is_in_full_precision(function, arguments, least):
    """On a CPU nothing else would show it: it has no lower precision."""
    found = list(dots(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert len(found) >= least
    for equation in found:
        assert equation.params['precision'] == (jax.lax.Precision.HIGHEST,) * 2, equation
