"""The kernels of mini-blocks against `mini_block`, interpreted, and where MBAG takes them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from precond_optax import placement
from precond_optax.kernels import mini_block, mini_block_tiles
from tests import quick

# The groups' axes, and their entries.
CASES = [
    ((37,), 32),  # rows that do not fill the last tile
    ((3, 16), 16),  # one batch of them
    ((3, 5), 32),
    ((16, 3), 32),  # which a TPU holds the other way round
    ((2, 3, 5), 16),
    ((16, 3, 5), 16),  # held as (3, 5, 16)
    pytest.param((9,), 64, marks=pytest.mark.slow),
    pytest.param((5,), 128, marks=pytest.mark.slow),
]
each_case = pytest.mark.parametrize(('batch', 'size'), CASES)
HARD = {
    'zero': lambda g: 0 * g,
    'huge': lambda g: 1e30 * g,
    'tiny': lambda g: 1e-30 * g,
    'one nan': lambda g: g.at[..., 0, 3].set(jnp.nan),
    'one infinite': lambda g: g.at[..., -1, 0].set(jnp.inf),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Of 16 groups of 32 entries."""
    monkeypatch.setattr(mini_block_tiles, '_TILE_ENTRIES', 2**14)


def arrays(rng, batch, size):
    grad = jnp.asarray(rng.normal(size=(*batch, size)), jnp.float32)
    matrices = rng.normal(size=(*batch, size * size)) / math.sqrt(size)
    return grad, jnp.asarray(matrices, jnp.float32)


def assert_near(got, expected, atol=1e-5):
    def compare(a, b):
        finite = np.abs(b[np.isfinite(b)]).max(initial=1e-30)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol * finite)

    jax.tree.map(compare, jax.device_get(got), jax.device_get(expected))


@each_case
def test_an_inverse_is_updated_in_one_pass(batch, size, rng):
    grad, factor = arrays(rng, batch, size)
    got = mini_block_tiles._add_to_inverse(True, grad, factor)
    assert_near(got, mini_block.add_to_inverse(grad, factor))
    got = mini_block_tiles._step_by_inverse(True, grad, factor)
    assert_near(got, mini_block.step_by_inverse(grad, factor))


@each_case
def test_a_mean_is_updated_in_one_pass(batch, size, rng):
    grad, moment = arrays(rng, batch, size)
    got = mini_block_tiles._accumulate(True, grad, moment, jnp.array(0.9))
    assert_near(got, mini_block.accumulate(grad, moment, decay=0.9))


@each_case
@pytest.mark.parametrize('times', [1, 2])
def test_groups_times_their_matrices(batch, size, times, rng):
    x, matrices = arrays(rng, batch, size)
    got = mini_block_tiles._apply(True, matrices, x, times=times)
    assert_near(got, mini_block.apply(matrices, x, times=times))
    once = np.einsum('...ij,...j->...i', mini_block.square(matrices), x)
    if times == 1:
        assert_near(got, once)


@pytest.mark.parametrize('kind', HARD)
def test_hard_gradients(kind, rng):
    """Groups whose gradient is not finite stay as they are, and the others know nothing of it."""
    grad, factor = arrays(rng, (2, 5), 16)
    grad = HARD[kind](grad)
    got = mini_block_tiles._add_to_inverse(True, grad, factor)
    assert_near(got, mini_block.add_to_inverse(grad, factor))
    assert np.all(np.isfinite(got))
    got = mini_block_tiles._accumulate(True, grad, factor, jnp.array(0.9))
    assert_near(got, mini_block.accumulate(grad, factor, decay=0.9))
    assert np.all(np.isfinite(got))


def test_in_a_tpu_s_memory(rng):
    """Tiles in any order, results where arguments are, copies that wait, memory full of NaN."""
    grad, factor = arrays(rng, (48,), 32)
    memory = pltpu.InterpretParams(uninitialized_memory='nan', random_seed=1)
    got = mini_block_tiles._step_by_inverse(memory, grad, factor)
    assert_near(got, mini_block.step_by_inverse(grad, factor))


METHODS = {
    'mbag': (precond_optax.mbag, {}),
    'ema': (precond_optax.mbag, {'decay': 0.9}),
    'n': (precond_optax.mbag, {'root': False, 'damping': 1.0}),
    'ema_n': (precond_optax.mbag, {'decay': 0.9, 'root': False, 'root_every': 2}),
    'block_adam': (precond_optax.block_adam, {'eps': 0.1, 'root_every': 2}),
    'block_adam_each': (precond_optax.block_adam, {'eps': 0.1, 'block_size': 16}),
}
SHAPES = {'kernel': (64, 10), 'odd': (48, 4), 'bias': (5,)}


@pytest.fixture
def runs(monkeypatch):
    """How often kernels are called."""
    calls, real = [], mini_block_tiles._in_tiles
    monkeypatch.setattr(
        mini_block_tiles, '_in_tiles', lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    jax.clear_caches()
    yield calls
    jax.clear_caches()


def gradients(rng):
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


@pytest.mark.parametrize('name', quick.every(2, METHODS))
def test_methods_through_their_kernels_are_xlas(name, rng, runs):
    factory, keywords = METHODS[name]
    ours, theirs = (factory(0.1, impl=impl, **keywords) for impl in ('pallas', 'xla'))
    states = [tx.init(gradients(rng)) for tx in (ours, theirs)]
    for _ in range(4):
        grads = gradients(rng)
        got, states[0] = jax.jit(ours.update)(grads, states[0])
        expected, states[1] = jax.jit(theirs.update)(grads, states[1])
    assert runs
    assert_near(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    'keywords',
    [{'stats_dtype': 'bfloat16'}, {'block_size': 8}, {'block_size': 24}, {'impl': 'auto'}],
)
def test_what_the_kernels_do_not_take_is_xlas(keywords, rng, runs):
    tx = precond_optax.mbag(0.1, **{'impl': 'pallas', **keywords})
    grads = gradients(rng)
    got, _ = tx.update(grads, tx.init(grads))
    assert jnp.isfinite(optax.tree.norm(got))
    assert not runs


def test_gpus_have_none(rng, runs, monkeypatch):
    monkeypatch.setattr(placement, 'platform', lambda: 'gpu')
    test_what_the_kernels_do_not_take_is_xlas({}, rng, runs)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_in_a_mesh_they_are_xlas(kind, rng, runs):
    """Whose products the compiler can share out."""
    tx, grad = precond_optax.mbag(0.1, impl='pallas'), gradients(rng)['kernel']
    expected, _ = precond_optax.mbag(0.1, impl='xla').update(grad, tx.init(grad))
    mesh = jax.make_mesh((2,), ('x',), axis_types=(kind,))
    with jax.set_mesh(mesh):
        given = jax.device_put(grad, NamedSharding(mesh, P(None, 'x')))
        got, _ = jax.jit(tx.update)(given, tx.init(given))
    assert not runs
    assert_near(got, expected)


def test_several_in_one_program(rng):
    """As sweeps have it: over hyperparameters, which a kernel has as scalars."""
    grads = jnp.asarray(rng.normal(size=(3, 64, 10)), jnp.float32)

    def step(impl, grad, decay):
        tx = precond_optax.mbag(0.1, decay=decay, impl=impl)
        return tx.update(grad, tx.init(grad))[0]

    decays = jnp.array([0.9, 0.8, 0.7])
    got, expected = (
        jax.jit(jax.vmap(functools.partial(step, impl)))(grads, decays)
        for impl in ('pallas', 'xla')
    )
    assert_near(got, expected)


def test_what_a_kernel_cannot_do_is_said(rng):
    tx, grad = precond_optax.mbag(0.1, impl='pallas'), gradients(rng)['kernel']
    with pytest.raises(NotImplementedError, match=r"MBAG cannot be differentiated .*impl='xla'"):
        jax.grad(lambda g: jnp.sum(tx.update(g, tx.init(grad))[0]))(grad)


@pytest.mark.parametrize('factory', [precond_optax.mbag, precond_optax.block_adam])
def test_wrong_impl(factory):
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'xla', 'pallas', got 'gpu'"):
        factory(0.1, impl='gpu')
