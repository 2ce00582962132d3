"""Shampoo and Sketchy against dense matrices, and what they have in common."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import precond_optax
from precond_optax import LeafRule
from precond_optax.kernels import matrix_root
from tests import oracles, quick
from tests.test_mbag import gradients, last_update

shampoo, sketchy = precond_optax.scale_by_shampoo, precond_optax.scale_by_sketchy
PLAIN = {'b1': 0.0, 'b2': 0.9, 'eps': 1e-3, 'graft': None, 'update_every': 1}
METHODS = {'shampoo': (shampoo, {}), 'sketchy': (sketchy, {'rank': 2})}
both = pytest.mark.parametrize('method', METHODS)
shampoo_s = pytest.mark.parametrize('method', quick.every(2, METHODS))  # Sketchy's are slow


def make(method, **keywords):
    factory, own = METHODS[method]
    return factory(**PLAIN | own | keywords)


def expected(method, grads, **keywords):
    own = {'b2': 0.9, 'eps': 1e-3, 'block_size': 512, **METHODS[method][1]}
    return oracles.kronecker_direction(grads, **own | keywords)


def assert_near(found, wanted, rtol=1e-9):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=rtol * np.abs(wanted).max())


@both
@pytest.mark.parametrize(
    ('shape', 'size'),
    [((6, 4), 512), ((7, 5), 3), ((1, 5), 3), ((5, 1), 512), ((2, 5, 3), 3), ((3, 2, 2, 4), 3)],
)
def test_blocks_of_any_number_of_axes(method, shape, size):
    """Roots -1/4 for two axes, -1/6 for three, -1/8 for four; the last blocks are shorter."""
    grads = gradients(shape, 4)
    found, state = last_update(make(method, block_size=size), grads)
    assert_near(found, expected(method, grads, block_size=size))
    assert not np.any(state.failed_roots)


@both
@pytest.mark.parametrize('b2', [0.0, 1.0])
def test_sums_and_no_memory(method, b2):
    grads = gradients((6, 4), 4)
    found, _ = last_update(make(method, b2=b2), grads)
    assert_near(found, expected(method, grads, b2=b2))


def test_roots_by_matrix_products():
    grads = gradients((6, 5), 4)
    found, _ = last_update(make('shampoo', block_size=4, root='newton_schulz'), grads)
    assert_near(found, expected('shampoo', grads, block_size=4), 1e-6)


@both
@pytest.mark.parametrize(('every', 'steps'), [(3, 3), (3, 4), (3, 6), (2, 3)])
def test_roots_that_are_some_steps_old(method, every, steps):
    """Shampoo's statistics take every gradient all the same, a sketch those of its steps."""
    grads = gradients((6, 4), steps)
    found, _ = last_update(make(method, update_every=every), grads)
    assert_near(found, expected(method, grads, update_every=every))


def test_shampoo_gathers_between_its_roots():
    grads = gradients((6, 4), 3)
    _, often = last_update(make('shampoo'), grads)
    _, rarely = last_update(make('shampoo', update_every=5), grads)
    for axis in (0, 1):
        np.testing.assert_allclose(often.statistics[axis], rarely.statistics[axis], rtol=1e-12)


@both
def test_leaves_take_turns(method):
    """All at first, then each in its own step, the dearest first."""
    shapes = {'a': (9, 8), 'b': (5, 4), 'c': (3, 2)}
    tx, field = make(method, update_every=3), {'shampoo': 'roots', 'sketchy': 'vectors'}[method]
    grads = [
        {k: jnp.asarray(g) for k, g in zip(shapes, three, strict=True)}
        for three in zip(*(gradients(s, 7) for s in shapes.values()), strict=True)
    ]
    state, moved, updates = tx.init(grads[0]), [], []
    update = jax.jit(tx.update)
    for grad in grads:
        direction, new = update(grad, state)
        updates.append(direction)
        held = getattr(state, field)[0], getattr(new, field)[0]
        moved.append(''.join(k for k in shapes if np.any(held[0][k] != held[1][k])))
        state = new
    assert moved == ['abc', *'bcabca']
    # And the bias is that of the gradients taken.
    taken = [0, 1, 4] if method == 'sketchy' else range(5)
    first = [np.asarray(grad['b'], np.float64) for grad in grads[:5]]
    assert_near(updates[4]['b'], expected(method, first, taken=taken), 1e-4)


@both
def test_one_axis_has_a_square_root(method):
    """Only where a rule asks for it: then it is full-matrix AdaGrad, or its sketch."""
    grads = gradients((5,), 4)
    layout = {'': LeafRule(precondition=True)}
    found, _ = last_update(make(method, layout=layout), grads)
    assert_near(found, expected(method, grads))
    if method == 'shampoo':
        second = oracles.moments(grads, 0.0, 0.9)[1]
        shift = 1e-3 * np.linalg.eigvalsh(second).max()
        assert_near(found, oracles.inverse_square_root(second, shift) @ grads[-1], 1e-9)


@both
def test_merged_axes_are_one(method):
    grads = gradients((4, 2, 3), 4)
    layout = {'': LeafRule(merge_axes=((1, 2),))}
    found, _ = last_update(make(method, layout=layout, block_size=4), grads)
    wanted = expected(method, [g.reshape(4, 6) for g in grads], block_size=4)
    assert_near(found, wanted.reshape(4, 2, 3))


@both
def test_batch_axes_stack_leaves(method):
    grads = gradients((3, 5, 4), 4)
    layout = {'': LeafRule(batch_axes=1)}
    stacked, _ = last_update(make(method, layout=layout, graft='sgd'), grads)
    for layer in range(3):
        alone, _ = last_update(make(method, graft='sgd'), [g[layer] for g in grads])
        assert_near(stacked[layer], alone, 1e-8)


@shampoo_s
def test_a_block_is_a_leaf_of_its_own(method):
    """And what fills the last one up changes nothing: no size of block has whole ones here."""
    grads = gradients((7, 5), 4)
    whole, _ = last_update(make(method, block_size=4), grads)
    for rows in (slice(0, 4), slice(4, 7)):
        for columns in (slice(0, 4), slice(4, 5)):
            alone, _ = last_update(make(method), [g[rows, columns] for g in grads])
            assert_near(whole[rows, columns], alone, 1e-8)
    large, _ = last_update(make(method, block_size=7), grads)
    none, _ = last_update(make(method), grads)
    assert_near(large, none)
    assert np.abs(large - whole).max() > 0.01


@pytest.mark.parametrize(
    ('shape', 'keywords'), [((9, 2), {'b2': 1.0}), ((2, 5, 3), {'block_size': 4, 'graft': 'sgd'})]
)
def test_a_sketch_of_full_rank_is_shampoo(shape, keywords):
    grads = gradients(shape, 5)
    sketched, _ = last_update(make('sketchy', rank=9, **keywords), grads)
    full, _ = last_update(make('shampoo', **keywords), grads)
    assert_near(sketched, full)
    less, _ = last_update(make('sketchy', rank=1, **keywords), grads)
    assert np.abs(less - full).max() > 0.01 * np.abs(full).max()


def test_a_constant_gradient_becomes_orthogonal():
    """The scale that u has without grafting: singular values 1, whatever the gradient's."""
    grads = [1e3 * gradients((5, 4), 1)[0]] * 3
    left, _, right = np.linalg.svd(grads[0], full_matrices=False)
    for method in METHODS:
        found, _ = last_update(
            make(method, eps=0.0, rank=4) if method == 'sketchy' else make(method, eps=0.0), grads
        )
        assert_near(found, left @ right, 1e-6)


@both
def test_graft_momentum_and_start_step(method):
    grads = gradients((6, 4), 4)
    keywords = {'graft': 'rmsprop_normalized', 'start_step': 2}
    mean = np.zeros((6, 4))
    for t in range(1, 5):
        own = oracles.normalized_rms_direction(grads[:t], 0.9)
        u = expected(method, grads[:t])
        u = own if t <= 2 else u * np.linalg.norm(own) / np.linalg.norm(u)
        mean = 0.8 * mean + 0.2 * u
    plain, state = last_update(make(method, b1=0.8, **keywords), grads)
    assert_near(plain, mean / (1 - 0.8**4))
    assert_near(state.mu, mean)
    nesterov, _ = last_update(make(method, b1=0.8, nesterov=True, **keywords), grads)
    assert_near(nesterov, 0.8 * mean / (1 - 0.8**5) + 0.2 * u / (1 - 0.8**4))


@both
def test_other_leaves_get_the_grafting_direction(method):
    """Too long, too many axes, too few, or as a rule says; with momentum, and no matrices."""
    cases = [
        ((9, 4), {'max_dim': 8}, 'grafting direction, axis of 9 > max_dim=8'),
        ((5,), {}, 'grafting direction'),
        ((4, 3), {'layout': {'': LeafRule(precondition=False)}}, 'grafting direction'),
        (
            (2, 1, 2, 1, 2, 1),
            {},
            'grafting direction, 6 axes > 5; merge_axes makes them fewer',
        ),
    ]
    for shape, keywords, treatment in cases:
        grads = gradients(shape, 3)
        tx = make(method, **{'graft': 'rmsprop_normalized', **keywords})
        found, state = last_update(tx, grads)
        assert_near(found, oracles.normalized_rms_direction(grads, 0.9))
        matrices = state.statistics if method == 'shampoo' else state.vectors
        assert matrices == (optax.MaskedNode(),) * 5
        plan = precond_optax.plan(tx, jnp.zeros(shape))
        assert plan.leaves[0].treatment == treatment


def test_the_plan_names_blocks_and_rules_override():
    params = {'kernel': jnp.zeros((2, 20, 6)), 'small': jnp.zeros((8, 8))}
    layout = {'kernel': LeafRule(batch_axes=1, block_size=16), 'small': LeafRule(rank=3)}
    for factory, wanted in (
        (precond_optax.shampoo, ('4 blocks of 16x6, roots -1/4', '1 blocks of 8x8, roots -1/4')),
        (
            precond_optax.sketchy,
            (
                '4 blocks of 16x6, sketches of rank 256, roots -1/4',
                '1 blocks of 8x8, sketches of rank 3, roots -1/4',
            ),
        ),
    ):
        tx = factory(1e-3, layout=layout)
        plan = precond_optax.plan(tx, params)
        assert tuple(leaf.treatment for leaf in plan.leaves) == wanted
        held = jax.eval_shape(tx.init, params)
        assert plan.state_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))


@shampoo_s
def test_a_failed_root_keeps_the_last(method, monkeypatch):
    decompose = matrix_root.decompose

    def gives_up_on_the_first_block(matrices):
        values, vectors = decompose(matrices)
        axis = matrices.ndim - 4  # before it may be a stack of axes
        first = jnp.arange(matrices.shape[axis]).reshape(-1, *(1,) * 3) == 0
        return jnp.where(first[..., 0], jnp.nan, values), vectors

    def steps(tx, state, count):
        for g in gradients((7, 3), count):
            updates, state = jax.jit(tx.update)(jnp.asarray(g, jnp.float32), state)
        return updates, state

    tx = make(method, block_size=4, graft='sgd')
    _, before = steps(tx, tx.init(jnp.zeros((7, 3))), 2)
    monkeypatch.setattr(matrix_root, 'decompose', gives_up_on_the_first_block)
    jax.clear_caches()
    fresh = make(method, block_size=4, graft='sgd')
    updates, after = steps(fresh, before, 3)
    none, _ = steps(fresh, fresh.init(jnp.zeros((7, 3))), 3)
    jax.clear_caches()
    assert after.failed_roots.tolist() == [6.0]  # an axis each, three times
    assert np.all(np.isfinite(updates))
    field = {'shampoo': 'roots', 'sketchy': 'vectors'}[method]
    for axis in (0, 1):
        old, new = (np.asarray(getattr(s, field)[axis]) for s in (before, after))
        np.testing.assert_array_equal(new[0], old[0])
        assert np.any(new[1] != old[1])
    assert not np.any(none[:4])  # without any root yet: a block that waits


@both
def test_without_any_root_the_grafting_direction_is_taken(method):
    """As where the first gradient is zero and the next root some steps away."""
    grads = [np.zeros((4, 3)), *gradients((4, 3), 2)]
    found, _ = last_update(make(method, update_every=5, graft='sgd'), grads)
    assert_near(found, grads[-1])
    found, _ = last_update(make(method, update_every=5), grads)
    assert not np.any(found)


@pytest.mark.parametrize(
    ('scale', 'method'), quick.every(2, itertools.product([1e-15, 1e15, 1e25], METHODS))
)
def test_any_size_and_condition_is_finite(method, scale):
    rng = np.random.default_rng(0)
    column = np.geomspace(1, 1e-8, 8)[:, None]
    kinds = {'rank_one': rng.normal(size=(8, 1)) * rng.normal(size=6), 'ill': column * np.ones(6)}
    grads = {k: jnp.asarray(scale * g, 'float32') for k, g in kinds.items()}
    tx = make(method, eps=0.0, graft='adam')
    state = tx.init(grads)
    for dtype in ('float32', 'bfloat16'):
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), grads)
        new = state
        for _ in range(3):
            updates, new = jax.jit(tx.update)(cast, new)
        own = new._replace(graft=None)  # Optax's Adam has an infinite second moment of 1e25
        assert all(np.all(np.isfinite(np.asarray(x, float))) for x in jax.tree.leaves(updates))
        assert all(np.all(np.isfinite(np.asarray(x, float))) for x in jax.tree.leaves(own))


@pytest.mark.parametrize('root', ['eigh', 'newton_schulz'])
def test_statistics_in_bfloat16(root):
    grads = gradients((8, 6), 20)
    keywords = {'root': root, 'update_every': 2}
    exact, _ = last_update(make('shampoo', **keywords), grads, 'float32')
    tx = make('shampoo', **keywords, stats_dtype='bfloat16')
    found, state = last_update(tx, grads, 'float32')
    assert {x.dtype.name for x in jax.tree.leaves((state.statistics, state.roots))} == {'bfloat16'}
    assert 0 < np.linalg.norm(found - exact) < 0.2 * np.linalg.norm(exact)
    assert not np.any(state.failed_roots)


@both
@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        ({'b1': 1.0}, r'b1 must be in \[0, 1\), got 1.0'),
        ({'b2': 1.1}, r'b2 must be in \[0, 1\], got 1.1'),
        ({'eps': -1.0}, r'eps must be in \[0, inf\), got -1.0'),
        ({'block_size': 0}, 'block_size must be an integer >= 1, got 0'),
        ({'update_every': 0}, 'update_every must be an integer >= 1, got 0'),
        ({'max_dim': 0}, 'max_dim must be an integer >= 1, got 0'),
        ({'start_step': -1}, r'start_step must be in \[0, inf\), got -1'),
        ({'graft': 'adamw'}, 'graft must be one of'),
        ({'nesterov': 1}, 'nesterov must be True or False, got 1'),
        ({'mu_dtype': 'int8'}, 'mu_dtype must be None or a floating dtype'),
        ({'layout': 3}, 'layout must be None'),
    ],
)
def test_wrong_arguments_are_named(method, keywords, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method][0](**keywords)


def test_wrong_arguments_of_one_method_and_wrong_leaves():
    for factory, keywords, message in (
        (shampoo, {'root': 'qr'}, 'root must be one of'),
        (shampoo, {'stats_dtype': 'int8'}, 'stats_dtype must be None or a floating dtype'),
        (sketchy, {'rank': 0}, 'rank must be an integer >= 1, got 0'),
    ):
        with pytest.raises(ValueError, match=message):
            factory(**keywords)
    for factory in (shampoo, sketchy):
        with pytest.raises(ValueError, match='layer/kernel: leaves must be of a real floating'):
            factory().init({'layer': {'kernel': jnp.zeros((2, 2), 'int32')}})
