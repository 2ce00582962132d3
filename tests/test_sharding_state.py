"""State made on the shardings that `state_sharding` gives is never whole on a device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from precond_optax import state_sharding
from tests import checks, compiled, quick

SHAPES = {'matrix': (32, 16), '3d': (16, 2, 8), 'vector': (64,)}
SPECS = {'matrix': P('x', 'y'), '3d': P('x', None, 'y'), 'vector': P(('x', 'y'))}
SMALL = 16  # what has no more entries belongs to no parameter here

sonew = precond_optax.sonew
WHOLE_TREE = {
    'adam': optax.adam(1e-3),
    'adamw': optax.adamw(1e-3),
    'lion': optax.lion(1e-3),
    'momentum': optax.sgd(1e-3, momentum=0.9),
    'muon': optax.contrib.muon(1e-3),
    'lbfgs': optax.lbfgs(memory_size=3),
    'sonew': sonew(1e-3),
    'sonew_diagonal': sonew(1e-3, band=0),
    'sonew_graft_momentum': sonew(1e-3, graft='momentum'),
    'sonew_graft_rmsprop': sonew(1e-3, graft='rmsprop_normalized'),
    'sonew_graft_lion': sonew(1e-3, graft=optax.scale_by_lion()),
    'chain': optax.chain(optax.clip_by_global_norm(1.0), sonew(1e-3), optax.ema(0.9)),
    'masked': optax.masked(sonew(1e-3), {'matrix': True, '3d': False, 'vector': True}),
    'partition': optax.partition(
        {'matrix': sonew(1e-3), 'other': optax.adam(1e-3)},
        {'matrix': 'matrix', '3d': 'matrix', 'vector': 'other'},
    ),
    'inject': optax.inject_hyperparams(sonew, static_args=('band',))(1e-3),
    'multi_steps': optax.MultiSteps(sonew(1e-3), 2),
    'apply_if_finite': optax.apply_if_finite(sonew(1e-3), 3),
    'schedule_free': optax.contrib.schedule_free(sonew(1e-3, b1=0.0), 1e-3),
    'noise': optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), sonew(1e-3)),
}
EXPLICIT = (
    'adam',
    'muon',
    'lbfgs',
    'sonew',
    'sonew_graft_rmsprop',
    'masked',
    'partition',
    'inject',
    'multi_steps',
)
# Optax's own updates of these contract two sharded axes, which explicit meshes refuse.
AUTO_UPDATE_ONLY = ('muon', 'lbfgs')


def make_mesh(kind):
    return jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind,) * 2)


def place(tree, mesh, specs=SPECS):
    return {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in tree.items()}


def bytes_by_device(tree):
    """Of every device, those with nothing too."""
    return dict.fromkeys(jax.devices(), 0) | compiled.bytes_by_device(tree)


def share(state, mesh):
    """The bytes that each device should hold."""
    leaves = jax.tree.leaves(state)
    cut = sum(x.nbytes for x in leaves if x.size > SMALL)
    assert cut > 0
    return cut // mesh.size + sum(x.nbytes for x in leaves if x.size <= SMALL)


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        *quick.every(2, [(AxisType.Auto, name) for name in WHOLE_TREE]),
        *quick.every(2, [(AxisType.Explicit, name) for name in EXPLICIT], first=1),
    ],
    ids=lambda value: getattr(value, 'name', value),
)
def test_a_device_holds_its_share(kind, name):
    tx, mesh, whole = WHOLE_TREE[name], make_mesh(kind), checks.random_tree(0, shapes=SHAPES)
    with jax.set_mesh(mesh):
        params = place(whole, mesh)
        shardings = state_sharding(tx, params)
        init = jax.jit(tx.init, out_shardings=shardings).lower(params).compile()
        state = init(params)
        wanted = dict.fromkeys(jax.devices(), share(state, mesh))
        assert bytes_by_device(state) == wanted
        # And no more on the way there: 8 bytes are a pointer to each result.
        memory, pointers = init.memory_analysis(), 8 * len(jax.tree.leaves(state))
        assert memory.output_size_in_bytes + memory.temp_size_in_bytes <= (
            share(state, mesh) + pointers
        )
        assert jax.tree.structure(state) == jax.tree.structure(shardings)
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
        if kind is AxisType.Explicit and name in AUTO_UPDATE_ONLY:
            return
        extra = {}
        if name == 'lbfgs':
            extra = {'value': 1.0, 'grad': params, 'value_fn': optax.tree.norm}
        _, state = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))(params, state, params)
        assert bytes_by_device(state) == wanted


def test_the_values_are_those_of_init():
    mesh, whole = make_mesh(AxisType.Auto), checks.random_tree(0, shapes=SHAPES)
    params = place(whole, mesh)
    for tx in WHOLE_TREE.values():
        state = jax.jit(tx.init, out_shardings=state_sharding(tx, params))(params)
        plain = tx.init(whole)
        assert checks.types(jax.device_get(state)) == checks.types(jax.device_get(plain))
        as_numbers = lambda x: (  # noqa: E731
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        checks.assert_equal(jax.tree.map(as_numbers, state), jax.tree.map(as_numbers, plain))


def test_plain_jit_holds_all_on_a_device():
    """The contrast, in an Auto mesh: a device that holds state holds eight times its share.

    Without a mesh in the context it is a single device: ``init`` needs the shapes alone, so jit
    drops the arguments and with them their devices.
    """
    mesh, tx = make_mesh(AxisType.Auto), sonew(1e-3)
    params = place(checks.random_tree(0, shapes=SHAPES), mesh)
    state = jax.jit(tx.init)(params)
    everything = sum(x.nbytes for x in jax.tree.leaves(state))
    assert sorted(bytes_by_device(state).values()) == [0] * 7 + [everything]
    with jax.set_mesh(mesh):
        state = jax.jit(sonew(1e-3).init)(params)
    assert bytes_by_device(state) == dict.fromkeys(jax.devices(), everything)


def specs_by_path(tx, shapes, specs):
    """From the path of each leaf of the state to its spec, without trailing Nones."""
    mesh = make_mesh(AxisType.Auto)
    params = {
        k: jax.ShapeDtypeStruct(v, jnp.float32, sharding=NamedSharding(mesh, specs[k]))
        for k, v in shapes.items()
    }
    found = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(state_sharding(tx, params)):
        spec = tuple(sharding.spec)
        while spec and spec[-1] is None:
            spec = spec[:-1]
        found[jax.tree_util.keystr(path, simple=True, separator='/')] = spec
    return found


def test_factored_moments_follow_the_axes_they_keep():
    shapes = {'matrix': (32, 16), 'square': (16, 16), 'batch': (2, 32, 16), 'vector': (64,)}
    specs = {'matrix': P('x', 'y'), 'square': P('x', 'y'), 'batch': P('y', 'x'), 'vector': P('x')}
    found = specs_by_path(optax.adafactor(1e-3, min_dim_size_to_factor=8), shapes, specs)
    row, col = ({k: found[f'0/{name}/{k}'] for k in shapes} for name in ('v_row', 'v_col'))
    # The longer axis is left out of v_row, the other one out of v_col; which of a square's two
    # axes is left, the shape does not tell.
    assert row == {'matrix': ('y',), 'square': (), 'batch': ('y',), 'vector': ()}
    assert col == {'matrix': ('x',), 'square': (), 'batch': ('y', 'x'), 'vector': ()}
    assert found['0/v/vector'] == ('x',)
    assert found['0/v/matrix'] == ()


def test_a_square_whose_axes_are_sharded_alike():
    """Whichever axis is kept, neither is sharded, or there is but one that fits."""
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    shapes = {'none': (16, 16), 'batch': (4, 16, 16)}
    found = specs_by_path(tx, shapes, {'none': P(), 'batch': P('x')})
    assert found['0/v_row/none'] == found['0/v_col/none'] == ()
    assert found['0/v_row/batch'] == found['0/v_col/batch'] == ('x',)


def test_a_memory_has_a_leading_axis():
    # As long as the parameter's own axis, which is not mistaken for it.
    found = specs_by_path(optax.lbfgs(memory_size=8), {'k': (8, 8)}, {'k': P('x', 'y')})
    assert found['0/diff_params_memory/k'] == (None, 'x', 'y')
    assert found['0/weights_memory'] == ()


def test_names_of_hyperparameters_and_labels_are_not_mistaken():
    shapes = {'b1': (64,), 'count': (64,), 'mu': (64,), 'nu': (16,)}
    specs = {'b1': P('x'), 'count': P('y'), 'mu': P(('x', 'y')), 'nu': P()}
    tx = optax.partition(
        {'mu': optax.inject_hyperparams(optax.adam)(1e-3), 'nu': optax.sgd(1e-3, momentum=0.9)},
        {'b1': 'mu', 'count': 'mu', 'mu': 'mu', 'nu': 'nu'},
    )
    inner = 'inner_states/mu/inner_state/'
    found = specs_by_path(tx, shapes, specs)
    assert found[inner + 'hyperparams/b1'] == found[inner + 'count'] == ()
    for name in ('b1', 'count', 'mu'):
        for moment in ('mu', 'nu'):
            assert found[f'{inner}inner_state/0/{moment}/{name}'] == tuple(specs[name])


def test_parameters_that_are_one_array():
    sharding = NamedSharding(make_mesh(AxisType.Auto), P('x'))
    params = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)
    state = state_sharding(sonew(1e-3), params)[0]
    assert state.mu == state.nu == state.offdiag[0] == sharding
    assert state.count.spec == P()


def test_parameters_in_lists():
    mesh = make_mesh(AxisType.Auto)
    params = [
        jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec in (P('x'), P('y'))
    ]
    state = state_sharding(sonew(1e-3, graft='rmsprop_normalized'), params)[0]
    for tree in (state.mu, state.nu, state.offdiag[0]):
        assert tree == [p.sharding for p in params]


def test_the_longest_path_is_the_parameters():
    mesh = make_mesh(AxisType.Auto)
    specs = {'kernel': P('x'), 'layer': {'kernel': P('y'), 'layer': {'kernel': P('x', 'y')}}}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = jax.tree.map(
        lambda sharding: jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding), shardings
    )
    state = state_sharding(sonew(1e-3), params)[0]
    assert state.mu == state.nu == state.offdiag[0] == shardings


def test_numbers_of_offdiagonals_are_not_mistaken_for_lists():
    """Of the tuple of trees (t0, t1) t1's first leaf ends as the parameter at 1, 0 does."""
    mesh = make_mesh(AxisType.Auto)
    specs = [P('x'), [P('y'), P('x', 'y')]]
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = jax.tree.map(
        lambda sharding: jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding), shardings
    )
    state = state_sharding(sonew(1e-3, band=2), params)[0]
    assert state.mu == state.nu == state.offdiag[0] == state.offdiag[1] == shardings


def test_leaves_without_offdiagonals_stay_masked():
    mesh = make_mesh(AxisType.Auto)
    params = place(checks.random_tree(0, shapes=SHAPES), mesh)
    state = state_sharding(sonew(1e-3), params)[0]
    assert state.offdiag[0]['vector'] == optax.MaskedNode()


def test_nothing_is_allocated():
    sharding = NamedSharding(make_mesh(AxisType.Auto), P('x', 'y'))
    huge = {'kernel': jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32, sharding=sharding)}
    for tx in (sonew(1e-3), optax.lbfgs()):
        shardings = jax.tree.leaves(state_sharding(tx, huge))
        assert sum(s.spec in (P('x', 'y'), P(None, 'x', 'y')) for s in shardings) >= 3


def test_one_device():
    device = jax.devices()[3]
    params = jax.device_put(checks.random_tree(0, shapes=SHAPES), device)
    tx = sonew(1e-3)
    shardings = state_sharding(tx, params)
    assert set(jax.tree.leaves(shardings)) == {SingleDeviceSharding(device)}
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert all(x.devices() == {device} for x in jax.tree.leaves(state))


def test_restored_by_orbax_onto_them(tmp_path):
    mesh, whole, tx = make_mesh(AxisType.Auto), checks.random_tree(0, shapes=SHAPES), sonew(1e-3)
    _, state = checks.run(tx, whole)
    params = place(whole, mesh)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, whole),
        state_sharding(tx, params),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'state', state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / 'state', like)
    checks.assert_equal(restored, state)
    assert bytes_by_device(restored) == dict.fromkeys(jax.devices(), share(state, mesh))
    assert jax.tree.map(lambda x: x.sharding, restored) == state_sharding(tx, params)


def test_errors_name_the_leaf():
    first = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    other = jax.make_mesh((8,), ('z',), axis_types=(AxisType.Auto,))
    good = jax.device_put(jnp.zeros((8, 8)), NamedSharding(first, P('x')))
    bad = {
        'another mesh': jax.device_put(jnp.zeros((8, 8)), NamedSharding(other, P('z'))),
        'on one device': jnp.zeros((8, 8)),
        'no sharding': jax.ShapeDtypeStruct((8, 8), jnp.float32),
        'no array': np.zeros((8, 8)),
    }
    for leaf in bad.values():
        with pytest.raises(ValueError, match='layer/k') as error:
            state_sharding(sonew(1e-3), {'a': good, 'layer': {'k': leaf}})
        assert 'must be in one mesh' in str(error.value) or 'is needed' in str(error.value)
    with pytest.raises(ValueError, match=r'layer/k: .*CpuDevice.*but a is on .*CpuDevice'):
        state_sharding(
            sonew(1e-3),
            {'a': jnp.zeros(3), 'layer': {'k': jax.device_put(jnp.zeros(3), jax.devices()[1])}},
        )
    with pytest.raises(ValueError, match='no leaves'):
        state_sharding(sonew(1e-3), {})
    with pytest.raises(ValueError, match=r'layer/k.*int32'):
        state_sharding(sonew(1e-3), {'layer': {'k': jnp.zeros((2, 2), jnp.int32)}})
