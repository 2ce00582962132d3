"""What moves in a sharded step with mini-blocks: nothing, where a shard holds whole ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from precond_optax import LeafRule
from precond_optax.kernels import mini_block
from tests import checks, quick
from tests.compiled import collectives

KINDS = (AxisType.Auto, AxisType.Explicit)
MBAG = {
    'sum': precond_optax.scale_by_mbag,
    'ema': lambda **k: precond_optax.scale_by_mbag(decay=0.9, **k),
    'n': lambda **k: precond_optax.scale_by_mbag(root=False, **k),
}
ADAM = {
    root: lambda root=root, **k: precond_optax.scale_by_block_adam(
        root=root, root_every=2, eps=0.1, **k
    )
    for root in ('eigh', 'newton_schulz')
}
# Shape, rule, the parameter's spec, that of the stored matrices.
WHOLE = [
    ((512, 64), {}, P('x', 'y'), P('y', 'x', None)),
    ((512, 64), {}, P('y', 'x'), P('x', 'y', None)),
    ((512, 64), {}, P(('x', 'y')), P(None, ('x', 'y'), None)),
    ((8, 64, 32), {'batch_axes': 1}, P('x', None, 'y'), P('x', 'y', None, None)),
]
# Of so many groups that their roots are taken in several steps.
MANY = [
    ((512, 192), {}, P('y', 'x'), P('x', 'y', None)),
    ((48, 6000), {}, P(None, ('x', 'y')), P(('x', 'y'), None)),
]
MBAG_ALONE = [
    ((48, 64), {}, P(None, ('x', 'y')), P(('x', 'y'), None)),  # two columns are three groups
    ((3, 3, 16, 8), {}, P(None, None, 'x', 'y'), P('y', 'x', None, None)),
    ((64, 8, 16), {}, P('y', 'x', None), P(None, 'x', 'y', None)),
]
MADE = [
    *((MBAG['sum'], *case) for case in WHOLE + MBAG_ALONE + MANY),
    (MBAG['ema'], *MANY[0]),
    *((make, *WHOLE[0]) for make in (MBAG['ema'], MBAG['n'], *ADAM.values())),
    (ADAM['eigh'], *WHOLE[-1]),
]
GATHERED = [
    (MBAG['sum'], (48, 64), P('x')),  # two columns are three groups
    (MBAG['sum'], (40, 5), P('x')),  # the last group is filled up
    (MBAG['sum'], (96, 4), P(('x', 'y'))),  # three groups for eight devices
    (ADAM['newton_schulz'], (40, 8), P('x', 'y')),  # the last group of each output is filled up
]


def step_on_a_mesh(make, shape, rule, spec, kind):
    """The compiled update of a leaf and where its matrices are: by jit's init and the eager."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, spec)
        params = jax.device_put(jnp.ones(shape), where)
        tx = make(layout={'': LeafRule(**rule)})
        shardings = precond_optax.state_sharding(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        eager = tx.init(params)
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
    matrices = [x for x in jax.tree.leaves((state, eager)) if x.ndim and x.shape != shape]
    return compiled, [x for x in matrices if x.shape[-1] >= 9]


@pytest.mark.parametrize(
    ('make', 'shape', 'rule', 'spec', 'expected', 'kind'),
    [
        case
        for first, kind in enumerate(KINDS)
        for case in quick.every(2, [(*made, kind) for made in MADE], first)
    ],
)
def test_nothing_moves_where_shards_hold_whole_groups(make, shape, rule, spec, expected, kind):
    compiled, matrices = step_on_a_mesh(make, shape, rule, spec, kind)
    assert matrices
    for held in matrices:
        wanted = NamedSharding(held.sharding.mesh, expected)
        assert held.sharding.is_equivalent_to(wanted, held.ndim), held.sharding.spec
    # The count of failed roots is one number.
    found = collectives(compiled.as_text())
    assert set(found) <= {('all-reduce', 4)}, found


def test_roots_of_many_groups_are_spread():
    """In the cases that say so."""
    assert mini_block.slices((192, 16), every=50) == (0, 3)
    assert mini_block.slices((9000,), every=50) == (0, 45)


@pytest.mark.parametrize(
    ('make', 'shape', 'spec', 'kind'),
    [
        case
        for first, kind in enumerate(KINDS)
        for case in quick.every(2, [(*made, kind) for made in GATHERED], first)
    ],
)
def test_other_shards_are_gathered_and_give_the_same(make, shape, spec, kind):
    """So the check above can fail."""
    tx = make()
    alone, _ = checks.run(tx, {'leaf': jnp.ones(shape)})
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, spec)
        params = {'leaf': jax.device_put(jnp.ones(shape), where)}
        state = tx.init(params)
        for step in range(3):
            grads = checks.random_tree(step, shapes={'leaf': shape})
            grads = jax.device_put(grads, {'leaf': where})
            updates, state = jax.jit(tx.update)(grads, state, params)
        text = jax.jit(tx.update).lower(grads, state, params).compile().as_text()
    np.testing.assert_allclose(updates['leaf'], alone['leaf'], rtol=1e-4, atol=1e-5)
    assert set(collectives(text)) - {('all-reduce', 4)}
