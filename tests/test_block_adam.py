"""Block Adam against dense matrices, and against Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import precond_optax
from precond_optax import LeafRule
from tests import oracles
from tests.test_mbag import gradients, last_update

scale_by = precond_optax.scale_by_block_adam
SHAPES = [(6, 4), (5, 3), (2, 5, 3), (3, 2, 2, 4), (1, 7), (4, 1)]


@pytest.mark.parametrize('root', ['eigh', 'newton_schulz'])
@pytest.mark.parametrize('shape', SHAPES)
def test_groups_of_inputs_of_one_output(shape, root):
    """The last group of each output is shorter; groups never hold two outputs' entries."""
    keywords = {'b1': 0.8, 'b2': 0.9, 'eps': 1e-3}
    grads = gradients(shape)
    found, _ = last_update(scale_by(block_size=4, root=root, **keywords), grads)
    groups = oracles.output_groups(shape, 4)
    expected = oracles.block_adam_direction(grads, groups, **keywords)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_outputs_of_attention_kernels():
    """By the rule: all but the first axis are outputs, or the first alone is."""
    for axes in ((1, 2), (0,)):
        grads = gradients((4, 2, 3))
        tx = scale_by(block_size=3, layout={'': LeafRule(output_axes=axes)}, eps=1e-3)
        found, _ = last_update(tx, grads)
        groups = oracles.output_groups((4, 2, 3), 3, axes)
        expected = oracles.block_adam_direction(grads, groups, eps=1e-3)
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('steps', [3, 4, 5])
def test_roots_that_are_some_steps_old(steps):
    """With the second moment, corrected for bias, of the step that took them."""
    grads = gradients((6, 4), steps)
    found, _ = last_update(scale_by(block_size=3, root_every=3, eps=1e-3), grads)
    groups = oracles.output_groups((6, 4), 3)
    expected = oracles.block_adam_direction(grads, groups, eps=1e-3, root_every=3)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('shape', [(6, 4), (7,), ()])
def test_blocks_of_one_entry_are_adam_with_eps_in_the_root(shape):
    grads = gradients(shape)
    found, _ = last_update(scale_by(block_size=1, eps=1e-4), grads)
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=0.0, eps_root=1e-4)
    expected, _ = last_update(adam, grads)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # Outside the root the same eps is another one.
    other, _ = last_update(optax.scale_by_adam(eps=1e-4), grads)
    assert not np.allclose(found, other, rtol=1e-6)
    near, _ = last_update(scale_by(block_size=1, eps=1e-16), grads)
    other, _ = last_update(optax.scale_by_adam(eps=1e-8), grads)
    np.testing.assert_allclose(near, other, rtol=1e-6)


def test_whole_outputs_and_b1_zero_is_a_mean_in_block_adagrads_place():
    """The shared basis at full rank and Block Adam with whole outputs have the same matrices."""
    grads, b2 = gradients((5, 3)), 0.9
    found, _ = last_update(scale_by(b1=0.0, b2=b2, eps=1e-3, block_size=5), grads)
    correction = 1 - b2 ** len(grads)
    columns = oracles.block_adagrad_direction(grads, b2=b2, eps=1e-3 * correction)
    np.testing.assert_allclose(found, columns * np.sqrt(correction), rtol=1e-7)


@pytest.mark.parametrize('root', ['eigh', 'newton_schulz'])
@pytest.mark.parametrize(('dtype', 'rtol'), [('float32', 1e-3), ('bfloat16', 3e-2)])
def test_lower_dtypes(dtype, rtol, root):
    grads = [np.asarray(jnp.asarray(g, dtype), np.float64) for g in gradients((8, 4), 30)]
    found, state = last_update(scale_by(block_size=8, eps=1e-4, root=root, b2=0.9), grads, dtype)
    groups = oracles.output_groups((8, 4), 8)
    expected = oracles.block_adam_direction(grads, groups, eps=1e-4, b2=0.9)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())
    assert not np.any(state.failed_roots)


def test_statistics_in_bfloat16():
    grads = gradients((8, 4), 20)
    tx = scale_by(block_size=8, stats_dtype='bfloat16', b2=0.9)
    found, state = last_update(tx, grads, 'float32')
    assert state.second_moment.dtype == jnp.bfloat16
    plain, _ = last_update(scale_by(block_size=8, b2=0.9), grads, 'float32')
    assert np.linalg.norm(found - plain) < 0.3 * np.linalg.norm(plain)


def test_a_failed_root_is_counted():
    """Where roots are kept the last one stands; where not, the group's update is zero."""
    params = jnp.ones((4, 2))
    for every in (1, 2):
        tx = scale_by(block_size=2, root_every=every)
        _, state = tx.update(params, tx.init(params))
        _, state = tx.update(params, state)
        bad = state._replace(second_moment=state.second_moment.at[1, 0, 0].set(jnp.inf))
        updates, after = tx.update(params, bad)
        assert after.failed_roots.tolist() == [1.0]
        assert np.all(np.isfinite(updates))
        if every == 1:
            assert not np.any(updates[:2, 1])
        else:
            np.testing.assert_array_equal(after.root[1, 0], state.root[1, 0])


def test_grafting_gives_the_size():
    grads = gradients((6, 4), 1)
    found, _ = last_update(scale_by(block_size=3, graft='sgd'), grads)
    np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(grads[0]), rtol=1e-9)


def test_the_plan_names_groups():
    tx = precond_optax.block_adam(1e-3, block_size=8)
    params = {'kernel': jnp.zeros((20, 6)), 'bias': jnp.zeros(6)}
    plan = precond_optax.plan(tx, params)
    treatments = {leaf.path: leaf.treatment for leaf in plan.leaves}
    assert treatments == {
        'kernel': '18 blocks of 8 along axis 0 (whole in no shard)',
        'bias': 'Adam direction',
    }
    held = jax.eval_shape(tx.init, params)
    assert plan.state_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        ({'b1': 1.0}, r'b1 must be in \[0, 1\), got 1.0'),
        ({'b2': 1.0}, r'b2 must be in \[0, 1\), got 1.0'),
        ({'eps': -1.0}, r'eps must be in \[0, inf\), got -1.0'),
        ({'block_size': 0}, 'block_size must be an integer >= 1, got 0'),
        ({'root_every': 0}, 'root_every must be an integer >= 1, got 0'),
        ({'root': 'qr'}, 'root must be one of'),
        ({'graft': 'adamw'}, 'graft must be one of'),
        ({'mu_dtype': 'int8'}, 'mu_dtype must be None or a floating dtype'),
    ],
)
def test_wrong_arguments_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        scale_by(**keywords)
