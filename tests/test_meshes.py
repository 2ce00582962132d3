"""A step on eight devices is one device's, in whatever way it is put on them.

Plain jit over a mesh and pmap are in `checks.py`; here are axes that do not divide and shard_map.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from precond_optax import LeafRule, state_sharding
from tests import cases, checks, quick

SHAPES = {'matrix': (16, 8), '3d': (8, 2, 8), 'vector': (8,)}
STEPS = 3
CASES = [case for case in cases.TABLE if case.layout]

every_case = pytest.mark.parametrize('case', quick.rows(CASES, only=('sonew', 'mbag')))


def make_mesh(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def gradients(step, copies, shapes=SHAPES):
    """One gradient for each of some replicas, stacked."""
    trees = [checks.random_tree(100 * step + i, shapes=shapes) for i in range(copies)]
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def on_one_device(tx, copies=1, shapes=SHAPES):
    """The last update and the state, with the mean of the replicas' gradients."""
    params = checks.random_tree(0, shapes=shapes)
    state = tx.init(params)
    for step in range(STEPS):
        mean = jax.tree.map(lambda x: jnp.asarray(x.mean(0)), gradients(step, copies, shapes))
        updates, state = jax.jit(tx.update)(mean, state, params)
    return updates, state


def assert_same(actual, expected):
    checks.assert_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-4, atol=1e-5)


@every_case
def test_axes_that_do_not_divide(case):
    """Such arrays are sharded inside jit only: the compiler pads the last pieces."""
    shapes = {'matrix': (13, 7), '3d': (5, 3, 9), 'vector': (7,)}
    specs = {'matrix': P('x', 'y'), '3d': P('y', None, 'x'), 'vector': P('x')}
    mesh, tx = make_mesh((4, 2), ('x', 'y')), case.make(1.0)

    def cut(tree):
        """Every array of a parameter's shape, sharded like it."""
        by_shape = {shapes[k]: NamedSharding(mesh, spec) for k, spec in specs.items()}
        return jax.tree.map(
            lambda x: (
                jax.lax.with_sharding_constraint(x, by_shape[x.shape])
                if x.shape in by_shape
                else x
            ),
            tree,
        )

    @jax.jit
    def update(grads, state, params):
        return cut(tx.update(cut(grads), cut(state), cut(params)))

    params = checks.random_tree(0, shapes=shapes)
    state = tx.init(params)
    for step in range(STEPS):
        grads = jax.tree.map(lambda x: x[0], gradients(step, 1, shapes))
        last, (updates, state) = state, update(grads, state, params)
    assert_same((updates, state), on_one_device(tx, shapes=shapes))
    # The pieces are there: (13, 7) in (4, 2) is worked on in pieces of (4, 4).
    assert 'f32[4,4]' in update.lower(grads, last, params).compile().as_text()


@every_case
def test_data_parallel_shard_map(case):
    mesh, tx = make_mesh((8,), ('data',)), case.make(1.0)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P('data'), P(), P()), out_specs=(P(), P())
    )
    def update(grads, state, params):
        mean = jax.tree.map(lambda x: jax.lax.psum(x[0], 'data') / 8, grads)
        return tx.update(mean, state, params)

    params = checks.random_tree(0, shapes=SHAPES)
    state = tx.init(params)
    for step in range(STEPS):
        updates, state = update(gradients(step, 8), state, params)
    assert_same((updates, state), on_one_device(tx, copies=8))


@pytest.mark.parametrize(
    ('kind', 'case'),
    [
        *quick.every(2, [(AxisType.Auto, case) for case in CASES]),
        (AxisType.Explicit, cases.BY_NAME['sonew']),
    ],
    ids=lambda value: value.name,
)
def test_shard_map_manual_over_data_only(kind, case):
    """The compiler still sees the whole parameter, sharded over 'model'."""
    mesh, tx = make_mesh((2, 4), ('data', 'model'), kind), case.make(1.0)
    specs = {'matrix': P(None, 'model'), '3d': P('model'), 'vector': P('model')}

    def place(tree, *axes):
        shardings = {k: NamedSharding(mesh, P(*axes, *spec)) for k, spec in specs.items()}
        return jax.device_put(tree, shardings)

    with jax.set_mesh(mesh):

        @jax.jit
        @functools.partial(
            jax.shard_map,
            in_specs=(P('data'), P(), P()),
            out_specs=(P(), P()),
            axis_names={'data'},
        )
        def update(grads, state, params):
            mean = jax.tree.map(lambda x: jax.lax.psum(x[0], 'data') / 2, grads)
            return tx.update(mean, state, params)

        params = place(checks.random_tree(0, shapes=SHAPES))
        state = jax.jit(tx.init, out_shardings=state_sharding(tx, params))(params)
        for step in range(STEPS):
            updates, state = update(place(gradients(step, 2), 'data'), state, params)
    for leaf in (x for x in jax.tree.leaves((updates, state)) if x.shape == (16, 8)):
        assert leaf.sharding.shard_shape(leaf.shape) == (16, 2)
    assert_same((updates, state), on_one_device(tx, copies=2))


# A compressed state of the whole leaf does not fit a block of it.
@pytest.mark.parametrize(
    'case', [c for c in CASES if not c.compressed], ids=lambda case: case.name
)
def test_a_block_in_a_fully_manual_shard_map_is_a_leaf_of_its_own(case):
    """So the step is not the whole leaf's: it is that of a stack of blocks, one per device."""
    mesh, tx = make_mesh((8,), ('model',)), case.make(1.0)
    params = checks.random_tree(0, shapes={'matrix': (16, 8)})
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P('model') if x.ndim else P(), state)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P('model'), specs, P('model')),
        out_specs=(P('model'), specs),
    )
    def update(grads, state, params):
        return tx.update(grads, state, params)

    for step in range(STEPS):
        grads = jax.tree.map(lambda x: x[0], gradients(step, 1, {'matrix': (16, 8)}))
        updates, state = update(grads, state, params)
    actual = updates['matrix'].reshape(8, 2, 8)
    layers = case.make(1.0, layout={'': LeafRule(batch_axes=1)})
    stack = on_one_device(layers, shapes={'matrix': (8, 2, 8)})[0]['matrix']
    whole = on_one_device(tx, shapes={'matrix': (16, 8)})[0]['matrix'].reshape(8, 2, 8)
    assert_same(actual, stack)
    apart = np.abs(actual - whole).max()
    # The diagonal has no chain to end, but its graft takes its norm over a block.
    assert apart > 0.01 * np.abs(whole).max()
