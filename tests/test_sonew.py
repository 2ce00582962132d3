"""SONew against the dense oracle, and what is its own; test_conformance.py has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from precond_optax import LeafRule
from tests import oracles


def directions(tx, grads, params=None):
    """The last of the updates for a list of gradients."""
    state = tx.init(jax.tree.map(jnp.zeros_like, grads[0]) if params is None else params)
    update = jax.jit(tx.update)
    for grad in grads:
        updates, state = update(grad, state)
    return updates, state


@st.composite
def runs(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    dtype = draw(st.sampled_from(['float32', 'bfloat16', 'float64']))
    return (
        shape,
        dtype,
        draw(st.integers(1, 6)),
        draw(st.sampled_from('FC')),
        draw(st.sampled_from([0, 1, 2, 4])),
        draw(st.integers(0, 2**16)),
    )


@given(runs())
def test_direction_is_the_dense_oracles(run):
    shape, dtype, steps, order, band, seed = run
    with jax.enable_x64(dtype == 'float64'):
        rng = np.random.default_rng(seed)
        grads = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(steps)]
        # eps well above rounding: then the two agree whatever the conditioning of H.
        keywords = dict(b1=0.8, b2=0.9, eps=1e-2, band=band, order=order)
        # The moments of a bfloat16 leaf are compared at their arithmetic's precision.
        tx = precond_optax.scale_by_sonew(
            **keywords, mu_dtype=None if dtype != 'bfloat16' else 'float32'
        )
        updates, _ = directions(tx, grads)
        expected = oracles.sonew_direction([np.asarray(g, np.float64) for g in grads], **keywords)
        rtol = {'float32': 1e-3, 'bfloat16': 1e-2, 'float64': 1e-9}[dtype]
        assert updates.dtype == dtype
        scale = abs(expected).max()
        np.testing.assert_allclose(
            np.asarray(updates, np.float64) / scale, expected / scale, rtol=rtol, atol=rtol
        )


@pytest.mark.parametrize('graft', [None, 'adam', 'momentum', 'sgd', 'rmsprop_normalized'])
@pytest.mark.parametrize('band', [0, 1, 3])
@pytest.mark.parametrize('nesterov', [False, True])
def test_graft_kinds(rng, graft, band, nesterov):
    grads = [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(5)]
    keywords = dict(eps=1e-2, band=band, graft=graft, nesterov=nesterov)
    tx = precond_optax.scale_by_sonew(**keywords)
    updates, _ = directions(tx, [jnp.asarray(g) for g in grads])
    expected = oracles.sonew_direction(grads, **keywords)
    np.testing.assert_allclose(updates, expected, rtol=2e-3, atol=1e-4)


def test_leaves_that_are_no_chain_have_nadam_s_direction(rng):
    grads = [jnp.asarray(rng.normal(size=7), 'float32') for _ in range(5)]
    for ours, theirs in ((True, optax.nadam), (False, optax.adam)):
        found, _ = directions(precond_optax.sonew(0.1, b2=0.99, nesterov=ours), grads)
        expected, _ = directions(theirs(0.1, b2=0.99), grads)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_graft_by_a_transformation_takes_its_norm(rng):
    grads = [jnp.asarray(rng.normal(size=(4, 3)), 'float32') for _ in range(4)]
    rule = optax.scale_by_lion()
    updates, state = directions(precond_optax.scale_by_sonew(graft=rule), grads)
    magnitudes, _ = directions(rule, grads)
    np.testing.assert_allclose(jnp.linalg.norm(updates), jnp.linalg.norm(magnitudes), rtol=1e-5)
    assert isinstance(state.graft.inner_state, optax.ScaleByLionState)


def test_graft_sees_the_parameters_and_extra_arguments():
    seen = {}

    def update(updates, state, params=None, *, value=None):
        seen.update(params=params, value=value)
        return updates, state

    rule = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = precond_optax.scale_by_sonew(graft=rule)
    params = jnp.ones((2, 2))
    tx.update(params, tx.init(params), params, value=3.0)
    assert seen['value'] == 3.0
    assert seen['params'] is params


def test_graft_has_no_state_for_leaves_that_it_does_not_serve():
    params = {'kernel': jnp.zeros((3, 2)), 'bias': jnp.zeros(2)}
    for graft in ('rmsprop_normalized', optax.scale_by_rms()):
        state = precond_optax.scale_by_sonew(graft=graft).init(params)
        nu = optax.tree.get(state.graft, 'nu')
        assert nu['kernel'].shape == (3, 2)
        assert nu['bias'] == optax.MaskedNode()


def test_relative_eps_and_edge_tolerance_reach_the_kernel(rng):
    grads = [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(3)]
    for keywords in (dict(relative_eps=0.5), dict(edge_tolerance=0.9), dict(edge_tolerance=0.3)):
        tx = precond_optax.scale_by_sonew(eps=1e-2, **keywords)
        updates, _ = directions(tx, [jnp.asarray(g) for g in grads])
        expected = oracles.sonew_direction(grads, eps=1e-2, **keywords)
        np.testing.assert_allclose(updates, expected, rtol=2e-3, atol=1e-4)
        assert not np.allclose(updates, oracles.sonew_direction(grads, eps=1e-2), rtol=1e-2)


def test_mean_eps_is_in_units_of_the_mean(rng):
    grads = [rng.normal(size=(4, 3)) * np.geomspace(0.1, 10, 12).reshape(4, 3) for _ in range(5)]
    arrays = [jnp.asarray(g, 'float32') for g in grads]
    directions_of = {}
    for mean_eps in (None, 0.01, 0.5):
        tx = precond_optax.scale_by_sonew(eps=1e-2, mean_eps=mean_eps, b2=0.8)
        updates, _ = directions(tx, arrays)
        expected = oracles.sonew_direction(grads, eps=1e-2, mean_eps=mean_eps or 0.0, b2=0.8)
        np.testing.assert_allclose(updates, expected, rtol=2e-3, atol=1e-4)
        directions_of[mean_eps] = updates
    assert not np.allclose(directions_of[None], directions_of[0.5], rtol=0.1)
    assert not np.allclose(directions_of[0.01], directions_of[0.5], rtol=0.1)


@pytest.mark.parametrize('scale', [1e-3, 1e5])
def test_the_default_damping_has_no_scale(rng, scale):
    grads = [jnp.asarray(rng.normal(size=(6, 5)), 'float32') for _ in range(6)]
    tx = precond_optax.scale_by_sonew()
    expected, _ = directions(tx, grads)
    got, _ = directions(tx, [scale * g for g in grads])
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('graft', ['adam', 'momentum', 'sgd', 'rmsprop_normalized'])
def test_a_delayed_graft_has_the_last_step_s_ratio(graft, rng):
    """The same directions, each layer's with the ratio of norms that it had the step before."""
    layout = {'layers': LeafRule(batch_axes=1)}
    shapes = {'layers': (3, 5, 4), 'kernel': (6, 5), 'bias': (4,)}
    exact, late, bare = (
        precond_optax.scale_by_sonew(eps=0.1, graft=g, delayed_graft=d, layout=layout)
        for g, d in ((graft, False), (graft, True), (None, False))
    )
    states = [tx.init({k: jnp.zeros(s) for k, s in shapes.items()}) for tx in (exact, late, bare)]
    assert states[1].graft_scale['layers'].shape == (3,)
    assert states[1].graft_scale['bias'] == states[0].graft_scale['kernel'] == optax.MaskedNode()
    ratio = {'layers': np.zeros((3, 1, 1)), 'kernel': np.zeros((1, 1))}
    for _ in range(4):
        grads = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        updates = []
        for i, tx in enumerate((exact, late, bare)):
            own, states[i] = jax.jit(tx.update)(grads, states[i])
            updates.append(own)
        sized, got, direction = updates
        np.testing.assert_array_equal(got['bias'], sized['bias'])
        for name in ratio:
            np.testing.assert_allclose(got[name], direction[name] * ratio[name], rtol=1e-4)
            axes = (-2, -1)
            norms = [np.linalg.norm(x[name], axis=axes, keepdims=True) for x in (sized, direction)]
            ratio[name] = norms[0] / norms[1]


def test_a_delayed_graft_wants_one():
    with pytest.raises(ValueError, match='delayed_graft=True wants a grafting rule'):
        precond_optax.sonew(0.1, graft=None, delayed_graft=True)


def test_dropped_edges_are_counted(rng):
    one = jnp.asarray(rng.normal(size=(4, 3)), 'float32')
    params = {'bias': jnp.zeros(3), 'copies': one, 'random': one}
    undamped = dict(eps=0.0, mean_eps=None, edge_tolerance=1e-5)
    tx = precond_optax.scale_by_sonew(band=2, **undamped, diagnostics=True)
    state = tx.init(params)
    assert state.dropped_edges.tolist() == [0, 0, 0]
    for _ in range(10):
        noise = jnp.asarray(rng.normal(size=(4, 3)), 'float32')
        grads = {'bias': jnp.ones(3), 'copies': one, 'random': noise}
        _, state = jax.jit(tx.update)(grads, state)
    # A gradient that never changes has rank one: all of the 11 + 10 edges go.
    assert state.dropped_edges.tolist() == [0, 21, 0]
    off = precond_optax.scale_by_sonew(band=2).init(params)
    assert off.dropped_edges == optax.MaskedNode()
    none = optax.masked(tx, jax.tree.map(lambda p: False, params))
    assert none.update(params, none.init(params))[1].inner_state.dropped_edges.shape == (0,)


def test_diagnostics_belong_to_no_parameter_and_keep_their_type():
    """In an explicit mesh, where a change of sharding would be one of type."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Explicit,) * 2)
    tx = precond_optax.sonew(1e-3, band=2, diagnostics=True)
    with jax.set_mesh(mesh):
        params = jax.device_put({'a': jnp.ones((8, 4))}, NamedSharding(mesh, P('x', 'y')))
        shardings = precond_optax.state_sharding(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        _, after = jax.jit(tx.update)(params, state, params)
    assert shardings[0].dropped_edges.spec == P()
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    moved = optax.tree.map_params(tx, lambda x: x + 1, state)
    np.testing.assert_array_equal(moved[0].dropped_edges, state[0].dropped_edges)
    np.testing.assert_array_equal(moved[0].offdiag[1]['a'], 1)


def test_diagnostics_cost_nothing_when_off():
    """The compiled step is the one without them: as many operations."""
    grads = jnp.ones((4, 3))

    def operations(tx):
        return str(jax.make_jaxpr(tx.update)(grads, tx.init(grads))).count('\n')

    off, on = (operations(precond_optax.scale_by_sonew(diagnostics=d)) for d in (False, True))
    assert off == operations(precond_optax.scale_by_sonew())
    assert off < on


def test_bfloat16_statistics_keep_moving(rng):
    """Increments far below bfloat16's precision: lost to nearest, not when rounded at random."""
    grad = jnp.ones((64, 64))
    held = {}
    for stochastic in (True, False):
        tx = precond_optax.scale_by_sonew(
            b2=0.999, stats_dtype='bfloat16', stochastic_rounding=stochastic
        )
        state = tx.init(grad)

        def step(state, _, tx=tx):
            return tx.update(grad, state)[1], None

        state, _ = jax.lax.scan(step, state, length=3000)
        held[stochastic] = [np.asarray(x, np.float64).mean() for x in (state.nu, *state.offdiag)]
    exact = 1 - 0.999**3000
    for now in held[True]:  # the last entry of a chain has no edge
        np.testing.assert_allclose(now, exact, rtol=1e-2)
    assert all(now < 0.5 * exact for now in held[False])


def test_stochastic_rounding_differs_by_leaf_and_step_but_not_by_run(rng):
    grad = jnp.asarray(rng.normal(size=(16, 16)), 'float32')
    grads = {'a': grad, 'b': grad}
    tx = precond_optax.scale_by_sonew(b2=0.999, stats_dtype='bfloat16')
    first = tx.update(grads, tx.init(grads))[1]
    again = tx.update(grads, tx.init(grads))[1]
    np.testing.assert_array_equal(first.nu['a'], again.nu['a'])
    assert np.any(first.nu['a'] != first.nu['b'])
    late = tx.update(grads, tx.init(grads)._replace(count=jnp.int32(7)))[1]
    assert np.any(first.nu['a'] != late.nu['a'])
    nearest = (1e-3 * grad * grad).astype('bfloat16').astype('float32')
    assert np.all(abs(first.nu['a'].astype('float32') - nearest) <= nearest / 64)


def test_ill_conditioned_chain_beats_the_diagonal():
    """Neighbours that move together: off-diagonals see it, a diagonal cannot."""
    n = 16
    distance = abs(np.subtract.outer(np.arange(n), np.arange(n)))
    hessian = jnp.asarray(0.99**distance, 'float32')
    target = jnp.asarray(np.random.default_rng(1).normal(size=n), 'float32')

    def loss(x):
        error = x.reshape(-1) - target
        return 0.5 * error @ hessian @ error

    def final(tx):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.zeros((1, n))
        schedule_end, _ = jax.lax.scan(step, (x, tx.init(x)), length=400)
        return float(loss(schedule_end[0]))

    schedule = optax.linear_schedule(0.1, 0.0, 400)
    tridiagonal = final(precond_optax.sonew(schedule))
    assert tridiagonal < 0.5 * final(precond_optax.sonew(schedule, band=0))
    assert tridiagonal < 0.5 * final(optax.adam(schedule, b2=0.9))


def test_scale_law(rng):
    """Without eps, Adam's graft makes the update free of the gradients' scale."""
    grads = [jnp.asarray(rng.normal(size=(4, 3)), 'float32') for _ in range(4)]
    tx = precond_optax.scale_by_sonew(eps=0.0, edge_tolerance=1e-3)
    one, _ = directions(tx, grads)
    many, _ = directions(tx, [1e3 * g for g in grads])
    np.testing.assert_allclose(one, many, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('scale', [1e-30, 1e-15, 1e8, 1e15, 1e25])
def test_any_scale_is_finite(rng, scale):
    grads = [jnp.asarray(scale * rng.normal(size=(4, 3)), 'float32') for _ in range(3)]
    updates, _ = directions(precond_optax.scale_by_sonew(), grads)
    assert np.all(np.isfinite(updates))
    if scale != 1e25:  # whose squares overflow float32: zero, as Adam's update
        adam, _ = directions(optax.scale_by_adam(b2=0.9), grads)
        if scale != 1e-30:  # whose squares underflow in the norm
            np.testing.assert_allclose(np.linalg.norm(updates), np.linalg.norm(adam), rtol=1e-4)


@pytest.mark.parametrize('eps', [0.0, 1e-6])
def test_zero_gradients_give_zero_updates(eps):
    updates, state = directions(precond_optax.scale_by_sonew(eps=eps), [jnp.zeros((3, 4))] * 3)
    np.testing.assert_array_equal(updates, 0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_stored_dtypes():
    params = {'kernel': jnp.zeros((3, 2), 'bfloat16'), 'bias': jnp.zeros(2, 'bfloat16')}
    tx = precond_optax.scale_by_sonew()
    state = tx.init(params)
    assert state.mu['kernel'].dtype == 'bfloat16'
    assert state.nu['kernel'].dtype == state.offdiag[0]['kernel'].dtype == 'float32'
    tx = precond_optax.scale_by_sonew(mu_dtype='float32', stats_dtype='bfloat16')
    for state in (tx.init(params), tx.update(params, tx.init(params))[1]):
        assert state.mu['kernel'].dtype == 'float32'
        for stats in (state.nu['kernel'], state.nu['bias'], state.offdiag[0]['kernel']):
            assert stats.dtype == 'bfloat16'


def test_weight_decay_may_be_a_schedule():
    params = {'w': jnp.ones((3, 2))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = precond_optax.sonew(0.1, weight_decay=lambda step: 0.5 / (1 + step))
    state = tx.init(params)
    for expected in (-0.05, -0.025):
        updates, state = tx.update(zeros, state, params)
        np.testing.assert_allclose(updates['w'], expected, rtol=1e-6)


def test_weight_decay_is_decoupled_and_masked(rng):
    params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), 'float32'), params)
    mask = {'kernel': True, 'bias': False}
    plain = precond_optax.sonew(0.1)
    decayed = precond_optax.sonew(0.1, weight_decay=0.5, mask=mask)
    expected, _ = plain.update(grads, plain.init(params), params)
    updates, _ = decayed.update(grads, decayed.init(params), params)
    np.testing.assert_allclose(updates['kernel'], expected['kernel'] - 0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates['bias'], expected['bias'])


BAD_ARGUMENTS = [
    (dict(b1=-0.1), r'b1 must be in \[0, 1\), got -0.1'),
    (dict(b1=1.0), 'b1 must be in'),
    (dict(b2=1.5), 'b2 must be in'),
    (dict(b2='0.9'), "b2 must be a number in .*, got '0.9'"),
    (dict(eps=-1e-8), 'eps must be in'),
    (dict(eps=float('nan')), 'eps must be in'),
    (dict(relative_eps=-1.0), 'relative_eps must be in'),
    (dict(edge_tolerance=1.0), 'edge_tolerance must be in'),
    (dict(edge_tolerance=-0.1), 'edge_tolerance must be in'),
    (dict(weight_decay=-0.1), 'weight_decay must be in'),
    (dict(band=-1), 'band must be an integer >= 0, got -1'),
    (dict(band=True), 'band must be an integer >= 0'),
    (dict(band=1.0), 'band must be an integer >= 0'),
    (dict(stochastic_rounding=1), 'stochastic_rounding must be True or False, got 1'),
    (dict(nesterov=1), 'nesterov must be True or False, got 1'),
    (dict(diagnostics='yes'), "diagnostics must be True or False, got 'yes'"),
    (dict(order='K'), "order must be one of 'F', 'C', got 'K'"),
    (dict(graft='adamw'), "graft must be one of None, 'adam', .* got 'adamw'"),
    (dict(graft=3), 'graft must be one of'),
    (dict(mu_dtype='int32'), "mu_dtype must be None or a floating dtype, got 'int32'"),
    (dict(stats_dtype='complex64'), 'stats_dtype must be None or a floating dtype'),
    (dict(stats_dtype='float33'), 'stats_dtype must be None or a floating dtype'),
    (dict(layout='embed'), "layout must be None, a mapping .* got 'embed'"),
    (dict(layout={'embed': 'adam'}), r"layout\['embed'\] must be a LeafRule, got 'adam'"),
    (dict(layout={'(': LeafRule()}), r"'\(' is not a regular expression"),
]


@pytest.mark.parametrize(('keywords', 'message'), BAD_ARGUMENTS)
def test_bad_argument(keywords, message):
    with pytest.raises(ValueError, match=message):
        precond_optax.sonew(1e-3, **keywords)


@pytest.mark.parametrize('dtype', ['int32', 'bool', 'complex64'])
def test_bad_leaf_is_named(dtype):
    params = {'layer': [{'kernel': jnp.zeros((2, 2))}, {'index': jnp.zeros((2, 3), dtype)}]}
    with pytest.raises(ValueError, match=rf'layer/1/index: .* got {dtype} of shape \(2, 3\)'):
        precond_optax.sonew(1e-3).init(params)


@pytest.mark.parametrize('name', ['mu_dtype', 'stats_dtype'])
def test_injected_dtype_says_what_to_do(name):
    inject = optax.inject_hyperparams(precond_optax.sonew, static_args=('band',))
    with pytest.raises(ValueError, match=rf"pass static_args=\('{name}',\)"):
        inject(1e-3, **{name: jnp.bfloat16}).init(jnp.zeros((2, 2)))
    inject = optax.inject_hyperparams(precond_optax.sonew, static_args=('band', name))
    state = inject(1e-3, **{name: jnp.bfloat16}).init(jnp.zeros((2, 2)))
    assert 'bfloat16' in {x.dtype.name for x in jax.tree.leaves(state.inner_state)}


def test_traced_band_says_what_to_do():
    tx = optax.inject_hyperparams(precond_optax.sonew)(1e-3)
    with pytest.raises(ValueError, match=r"static_args=\('band',\)"):
        tx.init(jnp.zeros((2, 2)))
