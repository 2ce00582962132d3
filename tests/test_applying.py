"""What `update_and_apply` does beside the generic check `update_and_apply_is_both`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import precond_optax
from tests import quick

SHAPES = {'kernel': (6, 4), 'head': (4, 3), 'bias': (4,)}


def tree(rng):
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


MASKS = {
    'none': None,
    'tree': {'kernel': True, 'head': False, 'bias': False},
    'prefix': True,
    'function': matrices,
}


@pytest.mark.parametrize(
    ('decay', 'mask', 'rate'),
    quick.every(
        3,
        itertools.product(
            [0.1, optax.linear_schedule(0.1, 0.3, 2)],
            MASKS,
            [0.1, optax.linear_schedule(0.1, 0.2, 2)],
        ),
    ),
)
def test_decay_and_rate_are_those_of_the_update(decay, mask, rate, rng):
    tx = precond_optax.sonew(rate, eps=0.1, weight_decay=decay, mask=MASKS[mask])
    assert hasattr(tx.update, 'applied')
    params = expected = tree(rng)
    state = held = tx.init(params)
    step = jax.jit(functools.partial(precond_optax.update_and_apply, tx))
    for _ in range(3):
        grads = tree(rng)
        params, state = step(grads, state, params)
        updates, held = jax.jit(tx.update)(grads, held, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)
    assert jax.tree.structure(state) == jax.tree.structure(held)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, held)


def test_what_comes_after_sees_updates(rng):
    """A chain is no alias: what it does to updates is done."""
    tx = optax.chain(precond_optax.sonew(0.1, eps=0.1), optax.scale(0.0))
    params = tree(rng)
    new, _ = precond_optax.update_and_apply(tx, tree(rng), tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, new, params)


def test_the_tail_computes_nothing():
    """Decay and learning rate are in the parameters' sum: none is made of updates beside it."""
    params = jnp.ones((6, 4))

    def operations(decay):
        tx = precond_optax.sonew(0.1, weight_decay=decay)
        step = jax.jit(functools.partial(precond_optax.update_and_apply, tx))
        text = step.lower(params, tx.init(params), params).compile().as_text()
        return text.count(' multiply(')

    assert operations(0.1) <= operations(0.0) + 1


def test_any_transformation_of_optax(rng):
    tx = optax.adamw(0.1)
    params, grads = tree(rng), tree(rng)
    new, _ = precond_optax.update_and_apply(tx, grads, tx.init(params), params, value=1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, new, optax.apply_updates(params, updates))


def test_parameters_that_do_not_fit_are_named(rng):
    tx, grads = precond_optax.sonew(0.1), tree(rng)
    state = tx.init(grads)
    for params, message in (
        (None, 'the parameters are not the tree that the gradients are'),
        ({'kernel': grads['kernel']}, 'the parameters are not the tree that the gradients are'),
        (grads | {'head': jnp.ones((4, 2))}, r'head: the parameter has shape \(4, 2\)'),
    ):
        with pytest.raises(ValueError, match=message):
            precond_optax.update_and_apply(tx, grads, state, params)


def test_parameters_of_other_dtypes_than_the_kernel_s(rng):
    """Which are moved after it."""
    params = {'kernel': jnp.ones((64, 128), jnp.float16)}
    grads = {'kernel': jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)}
    tx = precond_optax.sonew(0.1, graft=None, eps=0.1, mu_dtype='float32', impl='pallas')
    state = tx.init({'kernel': jnp.zeros((64, 128))})
    new, _ = precond_optax.update_and_apply(tx, grads, state, params)
    updates, _ = tx.update(grads, state, params)
    assert new['kernel'].dtype == jnp.float16
    expected = params['kernel'] + updates['kernel']
    np.testing.assert_allclose(np.float32(new['kernel']), expected, rtol=2e-3, atol=1e-3)
