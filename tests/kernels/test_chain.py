"""The shift along the chain against NumPy's flattening."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

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


@pytest.mark.parametrize('devices', [1, 8])
@given(drawn=arrays_and_axes())
def test_shifts_equal_those_of_the_flattened_chain(devices, drawn):
    x, axes, batch, order = drawn
    with pytest.MonkeyPatch.context() as patch:  # a single one has a way of its own
        patch.setattr(jax, 'device_count', lambda: devices)
        later = jax.jit(lambda x: list(chain.successors(x, 5, axes)))(x)
        predecessor = jax.jit(lambda x: chain.predecessor(x, axes))(x)
    np.testing.assert_array_equal(predecessor, shifted(x, batch, order, -1))
    expected = x
    for successor in later:
        expected = shifted(expected, batch, order, 1)
        np.testing.assert_array_equal(successor, expected)


def test_on_one_cpu_the_steps_on_are_slices_of_one_array(monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    steps = jax.jit(lambda x: list(chain.successors(x, 5, (0, 1))))
    program = steps.lower(jnp.ones((8, 3))).as_text()
    assert program.count('stablehlo.concatenate') == 1
    assert 'call @' not in program  # as each roll is


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


# Each axis of the mesh (2, 2, 2) on an axis of a leaf, or on none.
ON_AXES = st.tuples(*[st.integers(-1, 2)] * 3)


@settings(max_examples=25)
@given(
    ON_AXES,
    st.permutations('xyz'),
    st.sampled_from([(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2), (2, 1)]),
)
@example((1, 1, 0), ['z', 'y', 'x'], (1, 0, 2))
def test_shifts_of_parts_equal_those_of_the_whole(on_axes, letters, axes):
    """Parts of as little as one row, on devices in a ring along several of a leaf's axes."""
    mesh = jax.make_mesh((2, 2, 2), ('x', 'y', 'z'), (AxisType.Auto,) * 3)
    names = [tuple(n for n, a in zip(letters, on_axes, strict=True) if a == i) for i in range(3)]
    shape = [2 ** len(own) * size for own, size in zip(names, (1, 3, 2), strict=True)]
    x = jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape)
    shards = chain.Shards(axes, tuple(names))

    def successors(x, axes):
        return list(chain.successors(x, 3, axes))

    for shift in (successors, chain.predecessor):
        parts = jax.shard_map(
            functools.partial(shift, axes=shards),
            mesh=mesh,
            in_specs=P(*names),
            out_specs=P(*names),
        )
        jax.tree.map(np.testing.assert_array_equal, jax.jit(parts)(x), shift(x, axes=axes))


@pytest.mark.parametrize('step', [1, -1])
def test_several_rows_beyond_a_part(step):
    """As many as are given, in the column beside where the part is the last of its ring."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), (AxisType.Auto,) * 2)
    x = jnp.arange(16 * 4).reshape(16, 4)
    shards = chain.Shards((0, 1), (('x',), ('y',)))

    def two(x):
        return chain.beyond(x[:2] if step == 1 else x[-2:], shards, step)

    got = jax.shard_map(two, mesh=mesh, in_specs=P('x', 'y'), out_specs=P('x', 'y'))(x)
    whole = jnp.roll(x, -1 if step == 1 else 1, 1)
    whole = whole.at[:, -1 if step == 1 else 0].set(0)
    rows = {1: [*x[4:6], *x[8:10], *x[12:14], *whole[:2]]}
    rows[-1] = [*whole[-2:], *x[2:4], *x[6:8], *x[10:12]]
    np.testing.assert_array_equal(got, jnp.stack(rows[step]))
