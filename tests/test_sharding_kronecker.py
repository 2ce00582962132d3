"""What moves in a sharded step of Shampoo and Sketchy: nothing, where shards hold whole blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from precond_optax import LeafRule
from tests import checks
from tests.compiled import collectives

KINDS = (AxisType.Auto, AxisType.Explicit)
PLAIN = {'graft': None, 'update_every': 2, 'eps': 0.1}
MAKE = {
    'shampoo': lambda **k: precond_optax.scale_by_shampoo(**PLAIN, **k),
    'products': lambda **k: precond_optax.scale_by_shampoo(root='newton_schulz', **PLAIN, **k),
    'sketchy': lambda **k: precond_optax.scale_by_sketchy(rank=3, **PLAIN, **k),
}
# Shape, rule, the parameter's spec, the first entries of the spec of all that its blocks have.
WHOLE = [
    ((64, 32), {}, P('x', 'y'), ('x', 'y')),
    ((8, 32, 16), {'batch_axes': 1}, P('x', None, 'y'), ('x', None, 'y')),
    ((16, 4, 16), {'merge_axes': ((1, 2),)}, P('y', 'x'), ('y', 'x')),
]
MADE = [
    *((name, *WHOLE[0], kind) for name in MAKE for kind in KINDS),
    *(('shampoo', *case, AxisType.Auto) for case in WHOLE[1:]),
]
# The last block is filled up; one block for two devices.
GATHERED = [('shampoo', (36, 8), P('x', 'y')), ('sketchy', (32, 8), P('x', 'y'))]


def on_a_mesh(kind):
    return jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind,) * 2)


@pytest.mark.parametrize(('name', 'shape', 'rule', 'spec', 'expected', 'kind'), MADE)
def test_nothing_moves_where_shards_hold_whole_blocks(name, shape, rule, spec, expected, kind):
    mesh = on_a_mesh(kind)
    tx = MAKE[name](block_size=8, layout={'': LeafRule(**rule)})
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        shardings = precond_optax.state_sharding(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        eager = tx.init(params)
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
    fields = ('vectors', 'values', 'escaped') if name == 'sketchy' else ('statistics', 'roots')
    held = [
        (getattr(s, field)[axis], axis)
        for s in (state, eager)
        for field in fields
        for axis in (0, 1)
    ]
    for array, _ in held:
        wanted = NamedSharding(mesh, P(*expected))
        assert array.sharding.is_equivalent_to(wanted, array.ndim), array.sharding.spec
    # The counts of failed roots, one number each; some compilers send several at once.
    found = collectives(compiled.as_text())
    assert {kind for kind, _ in found} <= {'all-reduce'}, found
    assert sum(size for _, size in found) <= 4 * 4, found


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize(('name', 'shape', 'spec'), GATHERED)
def test_other_shards_are_gathered_and_give_the_same(name, shape, spec, kind):
    """So the check above can fail."""
    tx, mesh = MAKE[name](block_size=8), on_a_mesh(kind)
    alone, _ = checks.run(tx, {'leaf': jnp.ones(shape)})
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, spec)
        params = {'leaf': jax.device_put(jnp.ones(shape), where)}
        state = tx.init(params)
        update = jax.jit(tx.update)
        for step in range(3):
            grads = checks.random_tree(step, shapes={'leaf': shape})
            grads = jax.device_put(grads, {'leaf': where})
            updates, state = update(grads, state, params)
        text = update.lower(grads, state, params).compile().as_text()
    np.testing.assert_allclose(updates['leaf'], alone['leaf'], rtol=1e-4, atol=1e-5)
    assert set(collectives(text)) - {('all-reduce', 4)}
