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


@pytest.mark.parametrize('batch_axes', [-1, 1.0, True, '1'])
def test_bad_batch_axes(batch_axes):
    with pytest.raises(ValueError, match='batch_axes must be an integer >= 0'):
        LeafRule(batch_axes=batch_axes)


def test_bad_precondition():
    with pytest.raises(ValueError, match='precondition must be True, False or None'):
        LeafRule(precondition='adam')
