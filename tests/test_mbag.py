"""MBAG against dense matrices; its groups, its roots' turns, its scales."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import precond_optax
from precond_optax import LeafRule
from precond_optax.kernels import mini_block
from tests import oracles
from tests.checks import random_tree

scale_by = precond_optax.scale_by_mbag
SHAPES = [(6, 4), (5, 3), (2, 5, 3), (3, 2, 4, 2), (1, 7), (4, 1)]
VARIANTS = {
    'sum': {},
    'ema': {'decay': 0.9},
    'n': {'root': False},
    'ema_n': {'decay': 0.9, 'root': False},
}


def gradients(shape, steps=6, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for _ in range(steps)]


def last_update(tx, grads, dtype='float64'):
    """The update of the last step, for one leaf."""
    with jax.enable_x64(dtype == 'float64'):
        state, update = tx.init(jnp.zeros(grads[0].shape, dtype)), jax.jit(tx.update)
        for grad in grads:
            direction, state = update(jnp.asarray(grad, dtype), state)
        return np.asarray(direction, np.float64), state


@pytest.mark.parametrize('order', ['F', 'C'])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('variant', VARIANTS)
def test_exact_roots(variant, shape, order):
    """Many steps of Newton-Schulz: the exact inverse root, group by group."""
    keywords = {'damping': 0.1, 'momentum': 0.7, **VARIANTS[variant]}
    grads = gradients(shape)
    # The rule keeps a (3, 2, 4, 2) leaf from being taken for a convolution.
    layout = {'': LeafRule(block_size=4)}
    tx = scale_by(root_every=1, newton_schulz_steps=40, order=order, layout=layout, **keywords)
    found, _ = last_update(tx, grads)
    groups = oracles.chain_groups(shape, 4, order)
    expected = oracles.mbag_direction(grads, groups, **keywords)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('steps', [1, 5, 10])
@pytest.mark.parametrize('variant', ['sum', 'ema'])
def test_few_newton_schulz_steps_are_the_printed_ones(variant, steps):
    """And so are roots that are some steps old, and the zeros that fill up the last group."""
    keywords = {'root_every': 4, **VARIANTS[variant]}
    grads = gradients((5, 3), steps=7)
    tx = scale_by(block_size=4, newton_schulz_steps=steps, **keywords)
    found, _ = last_update(tx, grads)
    groups = oracles.chain_groups((5, 3), 4)
    expected = oracles.mbag_direction(grads, groups, steps=steps, size=4, **keywords)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(('dtype', 'rtol'), [('float32', 1e-3), ('bfloat16', 3e-2)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_lower_dtypes(variant, dtype, rtol):
    grads = [np.asarray(jnp.asarray(g, dtype), np.float64) for g in gradients((8, 4), 20)]
    keywords = {'damping': 0.1, **VARIANTS[variant]}
    tx = scale_by(block_size=8, root_every=1, newton_schulz_steps=20, **keywords)
    found, state = last_update(tx, grads, dtype)
    expected = oracles.mbag_direction(grads, oracles.chain_groups((8, 4), 8), **keywords)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())
    assert not np.any(state.failed_roots)


def test_default_steps_are_enough_for_the_default_damping():
    """Ten steps at a condition of some thousands, roots in steps 1 and 51: AdaGrad's direction."""
    grads = gradients((32, 4), 51)
    exact = oracles.mbag_direction(grads, oracles.chain_groups((32, 4), 32), momentum=0)
    found, _ = last_update(scale_by(momentum=0.0), grads, 'float32')
    cosine = np.vdot(found, exact) / np.linalg.norm(found) / np.linalg.norm(exact)
    assert cosine > 0.99


def test_a_mean_with_exact_roots_is_block_adam_without_bias_correction():
    """The eps is what is left of the damping; the direction takes the gradient, not its mean."""
    grads, decay, damping = gradients((8, 3), 5), 0.8, 0.01
    tx = scale_by(
        momentum=0.0,
        damping=damping,
        decay=decay,
        block_size=4,
        root_every=1,
        newton_schulz_steps=40,
    )
    found, _ = last_update(tx, grads)
    corrected = 1 - decay ** len(grads)
    eps = damping * decay ** len(grads) / corrected
    adam = precond_optax.scale_by_block_adam(b1=0.0, b2=decay, eps=eps, block_size=4)
    expected, _ = last_update(adam, grads)
    np.testing.assert_allclose(found, expected / np.sqrt(corrected), rtol=1e-8)


def test_one_group_is_full_matrix_adagrad_and_turns_with_it():
    """For any orthogonal Q the direction of Q g is Q times that of g."""
    grads = gradients((3, 4), 5)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    tx = scale_by(block_size=12, root_every=1, newton_schulz_steps=30)
    found, _ = last_update(tx, grads)
    turned, _ = last_update(tx, [(turn @ g.ravel('F')).reshape(3, 4, order='F') for g in grads])
    np.testing.assert_allclose(turned.ravel('F'), turn @ found.ravel('F'), rtol=1e-8)


@pytest.mark.parametrize(('variant', 'power'), [('sum', 0), ('ema', 0), ('n', -1), ('ema_n', -1)])
def test_scale_law(variant, power):
    """With c g for g and c^2 damping: the same direction of roots, c^-1 of it of inverses."""
    grads, scale = gradients((6, 4)), 8.0
    make = functools.partial(scale_by, block_size=4, root_every=1, **VARIANTS[variant])
    found, _ = last_update(make(damping=0.1), grads)
    scaled, _ = last_update(make(damping=0.1 * scale**2), [scale * g for g in grads])
    np.testing.assert_allclose(scaled, found * scale**power, rtol=1e-9)


@pytest.mark.parametrize(('shape', 'size'), [((3, 3, 4, 2), 9), ((2, 2, 2, 3, 2), 8)])
@pytest.mark.parametrize('order', ['F', 'C'])
def test_convolutions_have_a_group_for_each_filter(shape, size, order):
    grads = gradients(shape)
    tx = scale_by(root_every=1, newton_schulz_steps=40, order=order)
    found, _ = last_update(tx, grads)
    index = np.arange(np.prod(shape)).reshape(size, -1)
    expected = oracles.mbag_direction(grads, list(index.T))
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_which_leaves_are_convolutions():
    """Filters of one entry are none, huge ones no group; attention kernels are chains."""
    tx = precond_optax.mbag(1e-3, layout={'merged': LeafRule(merge_axes=((0, 1),))})
    shapes = {
        '3x3': ((3, 3, 4, 8), '32 mini-blocks of 9 along axes 0, 1'),
        '1x1': ((1, 1, 64, 8), '16 mini-blocks of 32 along axes 0, 1, 2'),
        '12x12': ((12, 12, 2, 8), '72 mini-blocks of 32 along axes 0, 1, 2'),
        'attention': ((64, 4, 8), '64 mini-blocks of 32 along axis 0'),
        'merged': ((3, 3, 32, 8), '72 mini-blocks of 32'),
        'bias': ((64,), 'AdaGrad direction'),
        'scalar': ((), 'AdaGrad direction'),
    }
    params = {k: jax.ShapeDtypeStruct(shape, 'float32') for k, (shape, _) in shapes.items()}
    for leaf in precond_optax.plan(tx, params).leaves:
        assert leaf.treatment.startswith(shapes[leaf.path][1]), leaf


@pytest.mark.parametrize('variant', VARIANTS)
def test_groups_of_one_entry(variant):
    """AdaGrad or RMSProp without bias correction, and their squares."""
    grads = gradients((7,))
    keywords = {'damping': 0.1, **VARIANTS[variant]}
    expected = oracles.mbag_direction(grads, [[i] for i in range(7)], **keywords)
    found, _ = last_update(scale_by(**keywords), grads)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    for layout in ({'': LeafRule(precondition=False)}, {'': LeafRule(block_size=1)}):
        columns = [g[:, None] for g in grads]
        found, _ = last_update(scale_by(**keywords, layout=layout), columns)
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-10)


@pytest.mark.parametrize('rule', [{'order': 'C'}, {'block_size': 4}])
def test_the_rule_of_a_leaf_goes_before_the_arguments(rule):
    grads, keywords = gradients((4, 6)), {'order': 'F', 'block_size': 3, 'root_every': 1}
    found, _ = last_update(scale_by(**keywords, layout={'': LeafRule(**rule)}), grads)
    expected, _ = last_update(scale_by(**keywords | rule), grads)
    np.testing.assert_array_equal(found, expected)
    without, _ = last_update(scale_by(**keywords), grads)
    assert np.any(found != without)


def test_optax_has_the_same_adagrad():
    """But for a root of 1 in place of the damping's, when the first step is taken."""
    grads = gradients((5,))
    ours, _ = last_update(scale_by(momentum=0.0, damping=0.1), grads)
    theirs, _ = last_update(optax.scale_by_rss(initial_accumulator_value=0.1, eps=0.0), grads)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_leaves_take_turns_with_their_roots():
    """The largest in steps 1, 4, 7; the others one and two steps later; all in the first."""
    shapes = {'large': (8, 8), 'middle': (8, 4), 'small': (4, 4)}
    tx = scale_by(block_size=4, root_every=3)
    params = random_tree(0, shapes=shapes)
    state, changes = tx.init(params), []
    for step in range(7):
        _, new = jax.jit(tx.update)(random_tree(step, shapes=shapes), state)
        changes.append({k for k in shapes if np.any(new.root[k] != state.root[k])})
        state = new
    assert changes[0] == set(shapes)
    turns = [{'large'}, {'middle'}, {'small'}]
    assert changes[1:] == [turns[step % 3] for step in range(1, 7)]


@pytest.mark.parametrize('every', [1, 10])
def test_a_mean_forgets_in_a_pause(every):
    """What comes back after it takes a step by its own size, or by the last root's, as long."""
    decay, taken, pause = 0.9, 101, 92
    gradient = np.array([[1.0], [0.0], [0.0], [0.0]])
    grads = [gradient] * taken + [0 * gradient] * pause + [gradient]
    tx = scale_by(momentum=0.0, damping=0.01, decay=decay, block_size=4, root_every=every)
    found, _ = last_update(tx, grads)
    held = 1 + (0.01 - 1) * decay**taken  # before the pause
    if every == 1:
        moment = decay ** (pause + 1) * held + (1 - decay)
    else:  # the last root is that of step 191, of 194
        moment = decay ** (191 - taken) * held
    np.testing.assert_allclose(found, gradient / np.sqrt(moment), rtol=1e-6)
    assert (found[0, 0] < (1 - decay) ** -0.5) == (every == 1)


@pytest.mark.parametrize(('every', 'slices'), [(3, 3), (5, 5), (4, 3), (2, 1)])
def test_groups_take_turns_with_their_roots(every, slices, monkeypatch):
    """Each has a new one in the first step and then in one out of `every`, the same for it."""
    monkeypatch.setattr(mini_block, '_FEWEST', 1)
    tx = scale_by(block_size=4, root_every=every, newton_schulz_steps=40)
    params = jnp.zeros((8, 15))  # 15 outputs of two groups
    state, changed = tx.init(params), []
    grads = gradients((8, 15), 2 * every + 1)
    for grad in grads:
        _, new = jax.jit(tx.update)(jnp.asarray(grad, jnp.float32), state)
        changed.append(np.any(np.asarray(new.root != state.root), axis=-1))
        state = new
    assert changed[0].all()
    for start in (1, 1 + every):
        assert np.all(sum(step.astype(int) for step in changed[start : start + every]) == 1)
    np.testing.assert_array_equal(changed[1 : 1 + every], changed[1 + every :])
    numbers = [int(step.sum()) for step in changed[1 : 1 + every]]
    assert sorted(numbers) == [0] * (every - slices) + [30 // slices] * slices


def test_each_group_has_the_root_of_its_turn(monkeypatch):
    """That of the statistics in the step that took it: of the oracle, group by group."""
    monkeypatch.setattr(mini_block, '_FEWEST', 1)
    every, shape = 5, (4, 15)
    tx = scale_by(block_size=4, root_every=every, newton_schulz_steps=40, momentum=0.0)
    grads = gradients(shape, 9)
    found, _ = last_update(tx, grads)
    for output in range(15):  # each is a group, of the slice output % 5, due in step 1 + that
        last = max(t for t in range(1, 10) if t == 1 or (t - 1) % every == output % every)
        moment = 0.01 * np.eye(4) + sum(np.outer(g[:, output], g[:, output]) for g in grads[:last])
        expected = oracles.inverse_square_root(moment, 0.0) @ grads[-1][:, output]
        np.testing.assert_allclose(found[:, output], expected, rtol=1e-8)


def test_a_failed_root_keeps_the_last_one_and_is_counted():
    tx = scale_by(block_size=2, root_every=1, decay=0.9)
    params = jnp.ones((4, 2))
    _, state = tx.update(params, tx.init(params))
    poisoned = state._replace(second_moment=state.second_moment.at[1, 0, 0].set(jnp.inf))
    updates, after = tx.update(params, poisoned)
    assert after.failed_roots.tolist() == [1.0]
    np.testing.assert_array_equal(after.root[1, 0], state.root[1, 0])
    assert np.any(after.root[0] != state.root[0])
    assert np.all(np.isfinite(updates))


@pytest.mark.parametrize('graft', ['adam', 'sgd', 'momentum', 'rmsprop_normalized'])
def test_grafting_gives_the_size_before_momentum(graft):
    grads = gradients((6, 4), 1)
    found, _ = last_update(scale_by(block_size=4, graft=graft, momentum=0.0), grads)
    own, _ = last_update(scale_by(block_size=4, momentum=0.0), grads)
    size = {
        'adam': np.sqrt(24),
        'sgd': np.linalg.norm(grads[0]),
        'momentum': np.linalg.norm(grads[0]),
        'rmsprop_normalized': np.sqrt(24),
    }[graft]
    np.testing.assert_allclose(found, own * size / np.linalg.norm(own), rtol=1e-6)


def test_bfloat16_statistics():
    grads = gradients((8, 4), 20)
    for variant in VARIANTS.values():
        tx = scale_by(block_size=4, root_every=1, stats_dtype='bfloat16', damping=0.1, **variant)
        found, state = last_update(tx, grads, 'float32')
        held = {x.dtype.name for x in jax.tree.leaves((state.factor, state.second_moment))}
        assert held == {'bfloat16'}
        plain, _ = last_update(
            scale_by(block_size=4, root_every=1, damping=0.1, **variant), grads, 'float32'
        )
        assert np.linalg.norm(found - plain) < 0.3 * np.linalg.norm(plain)
        assert np.any(found != plain)


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        ({'momentum': 1.0}, r'momentum must be in \[0, 1\), got 1.0'),
        ({'damping': 0.0}, 'damping must be > 0, got 0.0'),
        ({'damping': -1.0}, r'damping must be in \[0, inf\), got -1.0'),
        ({'decay': 1.0}, r'decay must be in \[0, 1\), got 1.0'),
        ({'block_size': 0}, 'block_size must be an integer >= 1, got 0'),
        ({'root_every': 0}, 'root_every must be an integer >= 1, got 0'),
        ({'newton_schulz_steps': 0}, 'newton_schulz_steps must be an integer >= 1, got 0'),
        ({'root': 'eigh'}, "root must be True or False, got 'eigh'"),
        ({'order': 'K'}, "order must be one of 'F', 'C', got 'K'"),
        ({'graft': 'adamw'}, 'graft must be one of'),
        ({'stats_dtype': 'int8'}, 'stats_dtype must be None or a floating dtype'),
        ({'layout': 3}, 'layout must be None, a mapping'),
    ],
)
def test_wrong_arguments_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        scale_by(**keywords)


def test_wrong_rules_are_named():
    with pytest.raises(ValueError, match='block_size must be an integer >= 1, got 0'):
        LeafRule(block_size=0)
