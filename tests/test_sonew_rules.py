"""SONew where a layout says how leaves are seen: who is preconditioned, bands, axes, layers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import precond_optax
from precond_optax import LeafRule
from tests import oracles
from tests.test_sonew import directions


def test_vectors_and_routed_leaves_get_adams_direction(rng):
    grads = [
        {
            'kernel': jnp.asarray(rng.normal(size=(3, 4)), 'float32'),
            'bias': jnp.asarray(rng.normal(size=4), 'float32'),
            'embedding': jnp.asarray(rng.normal(size=(5, 2)), 'float32'),
        }
        for _ in range(4)
    ]
    adam, _ = directions(optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8), grads)
    default, _ = directions(precond_optax.scale_by_sonew(b2=0.95), grads)
    for layout in (
        {'embed': LeafRule(precondition=False)},
        lambda path, leaf: LeafRule(precondition=False) if leaf.shape == (5, 2) else None,
    ):
        routed, state = directions(precond_optax.scale_by_sonew(b2=0.95, layout=layout), grads)
        for name in ('bias', 'embedding'):
            np.testing.assert_allclose(routed[name], adam[name], rtol=1e-5)
        assert state.offdiag[0]['embedding'] == optax.MaskedNode()
        np.testing.assert_array_equal(routed['kernel'], default['kernel'])
    assert not np.allclose(default['embedding'], adam['embedding'], rtol=1e-2)
    assert not np.allclose(default['kernel'], adam['kernel'], rtol=1e-2)


def test_vector_can_be_preconditioned(rng):
    grads = [rng.normal(size=6).astype(np.float32) for _ in range(3)]
    tx = precond_optax.scale_by_sonew(eps=1e-2, layout={'': LeafRule(precondition=True)})
    updates, _ = directions(tx, [jnp.asarray(g) for g in grads])
    np.testing.assert_allclose(
        updates, oracles.sonew_direction(grads, eps=1e-2), rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize('band', [0, 1, 3])
@pytest.mark.parametrize('graft', [None, 'adam', 'rmsprop_normalized'])
def test_stacked_layers_equal_the_layers_exactly(rng, graft, band):
    grads = [jnp.asarray(rng.normal(size=(3, 4, 5)), 'float32') for _ in range(4)]
    keywords = dict(band=band, graft=graft, relative_eps=1e-3)
    tx = precond_optax.scale_by_sonew(**keywords, layout={'': LeafRule(batch_axes=1)})
    alone = precond_optax.scale_by_sonew(**keywords)
    # Not jitted: compiled for other shapes, the same sums may be rounded otherwise.
    stacked = unjitted(tx, grads)
    for i in range(3):
        np.testing.assert_array_equal(stacked[i], unjitted(alone, [g[i] for g in grads]))


def unjitted(tx, grads):
    state = tx.init(grads[0])
    for grad in grads:
        updates, state = tx.update(grad, state)
    return updates


def random_grads(rng, shapes, steps=4):
    return [
        {k: jnp.asarray(rng.normal(size=s), 'float32') for k, s in shapes.items()}
        for _ in range(steps)
    ]


def test_each_leaf_has_its_rules_band_and_order(rng):
    shapes = {'embed': (6, 3), 'mlp': (3, 4), 'rest': (4, 3), 'turned': (5, 3)}
    grads = random_grads(rng, shapes)
    layout = {
        'embed': LeafRule(precondition=False),
        'mlp': LeafRule(band=4),
        'turned': LeafRule(order='C', band=2),
    }
    updates, state = directions(precond_optax.scale_by_sonew(eps=1e-2, layout=layout), grads)
    chains = {'mlp': dict(band=4), 'rest': dict(band=1), 'turned': dict(band=2, order='C')}
    for name, keywords in chains.items():
        expected = oracles.sonew_direction([g[name] for g in grads], eps=1e-2, **keywords)
        np.testing.assert_allclose(updates[name], expected, rtol=2e-3, atol=1e-4)
        arrays = [tree[name] for tree in state.offdiag if tree[name] != optax.MaskedNode()]
        assert len(arrays) == keywords['band']
    adam, _ = directions(optax.scale_by_adam(b2=0.9), grads)
    np.testing.assert_allclose(updates['embed'], adam['embed'], rtol=1e-5)


def test_merged_heads_are_the_matrix(rng):
    grads = random_grads(rng, {'query': (4, 2, 3), 'out': (2, 3, 4)})
    layout = {
        'query': LeafRule(merge_axes=((-2, -1),)),
        'out': LeafRule(merge_axes=((0, 1),)),
    }
    matrices = [{'query': g['query'].reshape(4, 6), 'out': g['out'].reshape(6, 4)} for g in grads]
    for order in 'FC':
        keywords = dict(band=2, order=order)
        merged, _ = directions(precond_optax.scale_by_sonew(**keywords, layout=layout), grads)
        whole, _ = directions(precond_optax.scale_by_sonew(**keywords), matrices)
        plain, _ = directions(precond_optax.scale_by_sonew(**keywords), grads)
        for name, expected in whole.items():
            np.testing.assert_allclose(
                merged[name].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5
            )
        same = np.allclose(merged['query'], plain['query'], rtol=1e-2)
        assert same == (order == 'C')  # where the last axis runs fastest anyway


def test_a_leaf_has_no_more_bands_than_its_chain():
    params = {'pair': jnp.zeros((1, 2)), 'one': jnp.zeros((1, 1)), 'more': jnp.zeros((3, 3))}
    state = precond_optax.scale_by_sonew(band=4).init(params)
    held = {k: sum(tree[k] != optax.MaskedNode() for tree in state.offdiag) for k in params}
    assert held == {'pair': 1, 'one': 0, 'more': 4}


def test_a_layout_function_may_lower_the_band_only(rng):
    grads = random_grads(rng, {'a': (3, 3), 'b': (3, 3)})

    def lower(path, leaf):
        return LeafRule(band=1) if path == 'a' else None

    updates, _ = directions(precond_optax.scale_by_sonew(band=2, layout=lower), grads)
    for name, band in (('a', 1), ('b', 2)):
        expected = oracles.sonew_direction([g[name] for g in grads], band=band)
        np.testing.assert_allclose(updates[name], expected, rtol=2e-3, atol=1e-3)
    tx = precond_optax.scale_by_sonew(layout=lambda path, leaf: LeafRule(band=2))
    with pytest.raises(ValueError, match=r'^a: the layout function asks for band=2'):
        tx.init(grads[0])


def test_stacked_biases_are_vectors_still(rng):
    grads = [jnp.asarray(rng.normal(size=(3, 4)), 'float32') for _ in range(2)]
    tx = precond_optax.scale_by_sonew(layout={'': LeafRule(batch_axes=1)})
    updates, state = directions(tx, grads)
    adam, _ = directions(optax.scale_by_adam(b2=0.9), grads)
    np.testing.assert_allclose(updates, adam, rtol=1e-5)
    assert state.offdiag == (optax.MaskedNode(),)
