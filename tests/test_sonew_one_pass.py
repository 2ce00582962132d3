"""SONew with `impl='pallas'`, interpreted: as XLA's, for the leaves that the kernel takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from precond_optax import LeafRule
from precond_optax.kernels import fused

SHAPES = {'kernel': (64, 130), 'layers': (2, 40, 128), 'heads': (24, 8, 128), 'bias': (7,)}
LAYOUT = {'layers': LeafRule(batch_axes=1)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def sonew(impl, **keywords):
    return precond_optax.sonew(0.1, **{'layout': LAYOUT, 'eps': 1e-2, 'impl': impl} | keywords)


def gradients(rng, like=PARAMS):
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), like)


def taken(tx, params=PARAMS):
    return {e.path for e in precond_optax.plan(tx, params).leaves if 'one pass' in e.treatment}


def assert_same(got, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=3e-5 * jnp.max(jnp.abs(b), initial=1e-6)
        ),
        got,
        expected,
    )


@pytest.mark.parametrize(
    'keywords',
    [
        {},
        {'band': 0},
        {'band': 3, 'graft': 'momentum'},
        {'graft': None},
        {'graft': 'sgd'},
        {'graft': 'rmsprop_normalized'},
        {'graft': optax.scale_by_rms(0.9)},
    ],
)
def test_one_pass_is_xlas(keywords, rng):
    ours, theirs = sonew('pallas', **keywords), sonew('xla', **keywords)
    assert taken(ours) == {'kernel', 'layers', 'heads'}
    assert not taken(theirs)
    states = [ours.init(PARAMS), theirs.init(PARAMS)]
    update = [jax.jit(tx.update) for tx in (ours, theirs)]
    for _ in range(3):
        grads = gradients(rng)
        (got, states[0]), (expected, states[1]) = (
            step(grads, state) for step, state in zip(update, states, strict=True)
        )
        assert_same(got, expected)
    assert_same(states[0], states[1])


@pytest.mark.parametrize(
    'keywords',
    [
        {'order': 'C'},
        {'band': fused.MAX_BAND + 1},
        {'relative_eps': 1e-3},
        {'diagnostics': True},
        {'mu_dtype': 'bfloat16'},
        {'stats_dtype': 'bfloat16'},
    ],
)
def test_what_the_kernel_does_not_take_is_xlas(keywords, rng):
    tx = sonew('pallas', **keywords)
    assert not taken(tx)
    got, _ = tx.update(gradients(rng), tx.init(PARAMS))
    assert jnp.isfinite(optax.tree.norm(got))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_other_dtypes_are_xlas(dtype):
    with jax.enable_x64(dtype == 'float64'):
        assert not taken(sonew('pallas'), optax.tree.cast(PARAMS, jnp.dtype(dtype)))


def test_auto_is_xla_here():
    assert not taken(sonew('auto'))
    assert not taken(precond_optax.sonew(0.1))


def test_auto_is_the_kernel_on_a_single_tpu(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    assert taken(sonew('auto')) == {'kernel', 'layers', 'heads'}
    assert not taken(sonew('xla'))
    monkeypatch.setattr(jax, 'device_count', lambda: 4)
    assert not taken(sonew('auto'))


def test_several_in_one_program(rng):
    """As sweeps have it: over hyperparameters, which the kernel has as scalars."""
    params = PARAMS['kernel']
    grads = jnp.asarray(rng.normal(size=(3, *params.shape)), jnp.float32)

    def step(impl, grad, b2):
        tx = precond_optax.sonew(0.1, b2=b2, eps=1e-2, impl=impl)
        return tx.update(grad, tx.init(params))[0]

    decays = jnp.array([0.9, 0.8, 0.7])
    got, expected = (
        jax.jit(jax.vmap(lambda *x, impl=impl: step(impl, *x)))(grads, decays)
        for impl in ('pallas', 'xla')
    )
    assert_same(got, expected)


def test_a_mesh_s_leaves_are_xlas(rng):
    """Where the mesh says that a leaf is shared out; XLA could not share out a kernel."""
    mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Explicit,))
    tx = precond_optax.sonew(0.1, eps=1e-2, impl='pallas')
    grad = gradients(rng)['kernel']
    whole, _ = tx.update(grad, tx.init(grad))
    with jax.set_mesh(mesh):
        given = jax.device_put(grad, NamedSharding(mesh, P('x', None)))
        text = jax.jit(tx.update).lower(given, tx.init(given)).as_text()
        got, _ = jax.jit(tx.update)(given, tx.init(given))
    assert 'all_gather' not in text
    assert got.sharding.spec == P('x', None)
    assert_same(jax.device_get(got), whole)


def test_wrong_impl():
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'xla', 'pallas', got 'gpu'"):
        precond_optax.sonew(0.1, impl='gpu')
