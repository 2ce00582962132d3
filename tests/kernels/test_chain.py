"""The shift along the chain against NumPy's flattening."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precond_optax.kernels import chain


@st.composite
def arrays_and_axes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    batch = draw(st.integers(0, len(shape) - 1))
    order = draw(st.sampled_from('FC'))
    axes = tuple(range(batch, len(shape)))
    x = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    return x, axes if order == 'F' else axes[::-1], batch, order


def shifted(x, batch, order, step):
    """By NumPy: flatten each chain, move it, put it back."""
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:batch]):
        flat = x[index].ravel(order=order)
        moved = np.zeros_like(flat)
        if step == 1:
            moved[:-1] = flat[1:]
        else:
            moved[1:] = flat[:-1]
        out[index] = moved.reshape(x[index].shape, order=order)
    return out


@given(arrays_and_axes())
def test_shifts_equal_those_of_the_flattened_chain(drawn):
    x, axes, batch, order = drawn
    successor = chain.successor(jnp.asarray(x), axes)
    predecessor = chain.predecessor(jnp.asarray(x), axes)
    np.testing.assert_array_equal(successor, shifted(x, batch, order, 1))
    np.testing.assert_array_equal(predecessor, shifted(x, batch, order, -1))


@given(arrays_and_axes())
def test_sum_of_predecessors_is_the_sum_of_shifts(drawn):
    x, axes, batch, order = drawn
    arrays = [x, 100 * x, 10_000 * x]
    expected, moved = 0, arrays
    for k in range(3):
        moved = [shifted(m, batch, order, -1) for m in moved]
        expected = expected + moved[k]
    np.testing.assert_array_equal(chain.sum_of_predecessors(arrays, axes), expected)


@given(arrays_and_axes())
def test_line_is_the_flattened_chain(drawn):
    x, axes, batch, order = drawn
    line = np.asarray(chain.to_line(jnp.asarray(x), axes))
    for index in np.ndindex(x.shape[:batch]):
        np.testing.assert_array_equal(line[index], x[index].ravel(order=order))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32'])
def test_dtype_is_kept(dtype):
    x = jnp.ones((3, 2), dtype)
    assert chain.successor(x, (0, 1)).dtype == dtype
    assert chain.predecessor(x, (1, 0)).dtype == dtype


def test_scalar_chain_has_no_neighbours():
    assert chain.successor(jnp.float32(3), ()) == 0
    assert chain.predecessor(jnp.float32(3), ()) == 0
