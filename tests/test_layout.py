"""How a leaf is seen."""

import jax
import jax.numpy as jnp
import pytest

from precond_optax import LeafRule
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
