"""How a leaf is seen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import precond_optax
from precond_optax import LeafRule, leafwise
from precond_optax import layout as layout_lib


def facts(shape, layout=None, path='block/kernel', dtype='float32'):
    return layout_lib.leaf_layout(path, jax.ShapeDtypeStruct(shape, dtype), layout)


def test_by_shape():
    assert facts((3, 4)).precondition
    assert facts((2, 3, 4)).precondition
    assert not facts((4,)).precondition
    assert not facts(()).precondition
    assert not facts((0, 4)).precondition
    assert facts((0, 4)).reason == 'no entries'


def test_first_matching_rule_wins():
    rules = {'kernel': LeafRule(batch_axes=1), 'block': LeafRule(precondition=False)}
    assert facts((2, 3, 4), rules).batch_axes == 1
    assert facts((2, 3, 4), rules).precondition
    assert not facts((2, 3), rules, path='block/table').precondition
    assert facts((2, 3), rules, path='head/table').precondition


def test_chain_axes():
    leaf = facts((5, 2, 3), {'': LeafRule(batch_axes=1)})
    assert leaf.chain_axes('F') == (1, 2)
    assert leaf.chain_axes('C') == (2, 1)


def test_function():
    def rule(path, leaf):
        assert leaf == jax.ShapeDtypeStruct((9, 3), jnp.float32)
        return LeafRule(precondition=False) if path.startswith('block') else None

    assert not facts((9, 3), rule).precondition
    assert facts((9, 3), rule, path='head').precondition
    with pytest.raises(ValueError, match=r"block/kernel: layout must return .* got 'adam'"):
        facts((9, 3), lambda path, leaf: 'adam')


def test_compute_dtype():
    for dtype, expected in [('bfloat16', 'float32'), ('float16', 'float32')]:
        assert facts((2, 2), dtype=dtype).compute_dtype == expected
    with jax.enable_x64(True):
        assert facts((2, 2), dtype='float64').compute_dtype == 'float64'


def test_numbers_are_scalars_and_eight_bit_floats_are_refused():
    assert layout_lib.leaf_layout('x', 1.5, None).shape == ()
    with pytest.raises(ValueError, match=r'block/kernel: .* 16 bits or more, got float8_e4m3fn'):
        facts((2, 2), dtype='float8_e4m3fn')


def test_too_many_batch_axes():
    with pytest.raises(ValueError, match=r"block/kernel: rule '' .* \(2, 3\): at most 2 batch"):
        facts((2, 3), {'': LeafRule(batch_axes=3)})
    with pytest.raises(ValueError, match='at most 1 batch'):
        facts((2, 3), {'': LeafRule(precondition=True, batch_axes=2)})


def test_merged_axes_are_one():
    query = facts((8, 4, 16), {'': LeafRule(merge_axes=((-2, -1),))})
    assert query.groups == ((0,), (1, 2))
    # As of the matrix (d, heads * head_dim), of which head_dim runs faster than heads.
    assert query.chain_axes('F') == (0, 2, 1)
    assert query.chain_axes('C') == (2, 1, 0)
    assert query.reason == "seen as 8x64 (rule '')"
    stacked = facts((12, 4, 16, 8), {'': LeafRule(batch_axes=1, merge_axes=((1, 2),))})
    assert stacked.groups == ((1, 2), (3,))
    assert stacked.chain_axes('F') == (2, 1, 3)
    assert stacked.reason == "seen as 64x8 after 1 batch axes (rule '')"
    # A bias of the same heads is a vector once they are one.
    assert not facts((4, 16), {'': LeafRule(merge_axes=((-2, -1),))}).precondition


@pytest.mark.parametrize(
    ('shape', 'rule'),
    [
        ((8, 4, 16), LeafRule(merge_axes=((0, 2),))),
        ((8, 4, 16), LeafRule(merge_axes=((2, 1),))),
        ((8, 4, 16), LeafRule(merge_axes=((0, 1), (1, 2)))),
        ((8, 4, 16), LeafRule(merge_axes=((2, 3),))),
        ((8, 4, 16), LeafRule(merge_axes=((-4, -3),))),
        ((8, 4, 16), LeafRule(batch_axes=1, merge_axes=((0, 1),))),
        ((8,), LeafRule(merge_axes=((-2, -1),))),
    ],
)
def test_axes_that_cannot_be_merged(shape, rule):
    with pytest.raises(ValueError, match=r"block/kernel: rule '' merges the axes .* neighbouring"):
        facts(shape, {'': rule})


def test_limits_on_what_is_preconditioned():
    rules = {'': LeafRule(max_dim=100, max_size=1000)}
    assert facts((10, 100), rules).precondition
    assert facts((101, 2), rules).reason == "axis of 101 > max_dim=100 (rule '')"
    assert facts((50, 21), rules).reason == "1050 entries > max_size=1000 (rule '')"
    # The layers of a stack are judged one by one, merged axes as one.
    assert facts((64, 10, 100), {'': LeafRule(batch_axes=1, max_size=1000)}).precondition
    heads = {'': LeafRule(merge_axes=((1, 2),), max_dim=100)}
    assert facts((8, 8, 16), heads).reason == "axis of 128 > max_dim=100 (rule '')"
    # Whatever else the rule says.
    assert not facts((101, 2), {'': LeafRule(precondition=True, max_dim=100)}).precondition


def test_band_and_order_are_handed_on():
    leaf = facts((2, 3), {'': LeafRule(band=4, order='C')})
    assert (leaf.band, leaf.order) == (4, 'C')
    assert (facts((2, 3)).band, facts((2, 3)).order) == (None, None)


BAD_RULES = [
    (dict(batch_axes=-1), 'batch_axes must be an integer >= 0, got -1'),
    (dict(batch_axes=1.0), 'batch_axes must be an integer >= 0'),
    (dict(batch_axes=True), 'batch_axes must be an integer >= 0'),
    (dict(batch_axes='1'), 'batch_axes must be an integer >= 0'),
    (dict(precondition='adam'), 'precondition must be True, False or None'),
    (dict(band=-1), 'band must be an integer >= 0, got -1'),
    (dict(order='K'), "order must be one of None, 'F', 'C', got 'K'"),
    (dict(max_size=0), 'max_size must be an integer >= 1, got 0'),
    (dict(max_dim=1e3), 'max_dim must be an integer >= 1'),
    (dict(merge_axes=(1, 2)), r'merge_axes must be a tuple of tuples .* got \(1, 2\)'),
    (dict(merge_axes=[(1, 2)]), 'merge_axes must be a tuple of tuples'),
    (dict(merge_axes=((1,),)), 'merge_axes must be a tuple of tuples of two or more'),
    (dict(merge_axes=((1, 2.0),)), 'merge_axes must be a tuple of tuples'),
]


@pytest.mark.parametrize(('keywords', 'message'), BAD_RULES)
def test_bad_rule(keywords, message):
    with pytest.raises(ValueError, match=message):
        LeafRule(**keywords)


def test_boxes_are_no_part_of_a_path():
    class Box(NamedTuple):  # as a pytree like Flax's
        value: Any

    class Attention(NamedTuple):
        query: Any
        value: Any

    tree = {'a': Box(1.0), 'b': Attention(1.0, 2.0), 'value': 3.0, 'c': {'value': 4.0}}
    with_paths = jax.tree_util.tree_leaves_with_path(tree)
    assert leafwise.paths_of(with_paths) == ['a', 'b/query', 'b/value', 'c/value', 'value']
    (alone,) = leafwise.paths_of(jax.tree_util.tree_leaves_with_path(Box(1.0)))
    assert alone == 'value'


@pytest.mark.parametrize('layout', [{'kernel$': LeafRule(order='C')}, {'value': LeafRule(band=0)}])
def test_rules_hold_under_nnx_s_optimizer(layout):
    """Which hands boxes to ``init`` and arrays to ``update``."""
    nnx = pytest.importorskip('flax.nnx')

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.value = nnx.Linear(4, 3, rngs=rngs)
            self.other = nnx.Linear(3, 4, rngs=rngs)

        def __call__(self, x):
            return self.other(nnx.tanh(self.value(x)))

    def loss(model):
        return jnp.mean((model(jnp.eye(4)) - 1) ** 2)

    model, plain = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    tx = precond_optax.sonew(0.1, layout=layout)
    assert not precond_optax.plan(tx, nnx.state(model, nnx.Param)).unmatched_rules
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    state = tx.init(params)
    for _ in range(2):
        optimizer.update(model, nnx.grad(loss)(model))
        grads = nnx.to_pure_dict(nnx.grad(loss)(plain))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        nnx.update(plain, params)
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, params)
