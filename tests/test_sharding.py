"""What the compiler makes of a sharded step: only borders move."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from tests.compiled import collectives


@pytest.mark.parametrize('order', ['F', 'C'])
@pytest.mark.parametrize(
    ('shape', 'spec'),
    [
        ((512, 256), P('x', 'y')),
        ((512, 256), P(('x', 'y'), None)),
        ((512, 256), P(None, ('x', 'y'))),
        ((8, 128, 128), P('x', 'y', None)),
        ((8, 128, 128), P(None, 'x', 'y')),
    ],
)
def test_only_borders_move(shape, spec, order):
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    params = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
    tx = precond_optax.sonew(1e-3, order=order)
    state = tx.init(params)
    assert all(x.sharding == params.sharding for x in jax.tree.leaves(state) if x.ndim)
    found = collectives(jax.jit(tx.update).lower(params, state, params).compile().as_text())
    assert {kind for kind, _ in found} == {'collective-permute', 'all-reduce'}
    shard = NamedSharding(mesh, spec).shard_shape(shape)
    # The largest face of a shard; an all-reduce carries the two norms of the graft.
    border = 4 * max(
        (params.size // mesh.size) // shard[axis]
        for axis in range(len(shape))
        if shard[axis] < shape[axis]
    )
    assert all(size <= border for kind, size in found if kind == 'collective-permute')
    assert all(size <= 8 for kind, size in found if kind == 'all-reduce')
    # Four shifted arrays (g, a, m, psi z), each by no more than its faces.
    moved = sum(size for kind, size in found if kind == 'collective-permute')
    assert moved <= 4 * 3 * border
