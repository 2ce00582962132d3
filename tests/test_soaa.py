"""SOAA against the oracle, and what is its own; test_conformance.py has the rest."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from tests import oracles, quick

scale_by = precond_optax.scale_by_soaa
FISHERS = ('uncentered', 'centered')
SCALARS = ('trust_region', 'predicted_reduction', 'loss_average')
SHAPES = {'bias': (4,), 'empty': (0, 3), 'kernel': (5, 4), 'scale': ()}


def scalars(state):
    return tuple(optax.tree.get(state, name) for name in SCALARS)


def random_run(rng, steps, size=1.0):
    """Gradients of a tree with something in common, and losses that fall, but not always."""
    mean = {k: rng.normal(size=s) for k, s in SHAPES.items()}
    grads = [
        {k: size * (mean[k] + rng.normal(size=s)) for k, s in SHAPES.items()} for _ in range(steps)
    ]
    return grads, list(5 - 0.3 * np.arange(steps) + 0.4 * rng.normal(size=steps))


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def take(tx, grads, losses):
    """All updates, the scalars after each step, the state; a loss that is None is not given."""
    state = tx.init(grads[0])
    with_loss = jax.jit(lambda g, s, loss: tx.update(g, s, value=loss))
    without = jax.jit(tx.update)
    updates, told = [], []
    for grad, loss in zip(grads, losses, strict=True):
        given = () if loss is None else (loss,)
        update, state = (with_loss if given else without)(grad, state, *given)
        updates.append(update)
        told.append(tuple(float(x) for x in scalars(state)))
    return updates, told, state


def assert_close(actual, expected, rtol, atol=None):
    atol = rtol if atol is None else atol
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol, atol),
        actual,
        expected,
    )


# Gradients below 1 / 2 are under sqrt(s), large ones under F: in between there are both.
@pytest.mark.parametrize(
    ('size', 'fisher', 'dtype', 'given'),
    quick.every(
        5,
        itertools.product(
            [0.1, 1.0, 30.0], FISHERS, ['float32', 'float64'], ['always', 'never', 'sometimes']
        ),
    ),
)
def test_ten_steps_by_hand(rng, size, fisher, dtype, given):
    grads, losses = random_run(rng, 10, size)
    known = {'always': range(10), 'never': (), 'sometimes': (0, 1, 2, 5, 6, 9)}[given]
    losses = [loss if i in known else None for i, loss in enumerate(losses)]
    keywords = dict(b1=0.8, b2=0.95, gamma=0.3, eps=1e-6, total_steps=12, fisher=fisher)
    rate = lambda taken: 0.02 * (1 + taken)  # noqa: E731
    expected, told = oracles.soaa_updates(grads, losses, learning_rate=rate, **keywords)
    with jax.enable_x64(dtype == 'float64'):
        tx = scale_by(**keywords, learning_rate_for_prediction=rate)
        updates, actual, state = take(tx, [cast(g, dtype) for g in grads], losses)
        assert {x.dtype.name for x in jax.tree.leaves(state._replace(count=None))} == {dtype}
    rtol = 1e-10 if dtype == 'float64' else 2e-4
    assert_close(updates, expected, rtol)
    assert_close(actual, told, rtol)
    if given == 'always':
        assert any(dt < 1 for dt, *_ in told)
        assert any(dt > 1 for dt, *_ in told)


@pytest.mark.parametrize('fisher', FISHERS)
def test_ten_steps_at_the_defaults(rng, fisher):
    grads, losses = random_run(rng, 10)
    expected, told = oracles.soaa_updates(grads, losses, total_steps=10, fisher=fisher)
    tx = scale_by(total_steps=10, fisher=fisher)
    updates, actual, _ = take(tx, [cast(g, 'float32') for g in grads], losses)
    assert_close(updates, expected, 2e-4)
    assert_close(actual, told, 2e-4)


@pytest.mark.parametrize('fisher', FISHERS)
def test_bfloat16_is_finite_and_near(rng, fisher):
    grads, losses = random_run(rng, 10)
    grads = [cast(g, 'bfloat16') for g in grads]
    tx = scale_by(total_steps=10, fisher=fisher, mu_dtype='float32')
    losses = [jnp.asarray(x, 'bfloat16') for x in losses]
    updates, told, state = take(tx, grads, losses)
    losses = [float(x) for x in losses]
    exact, expected = oracles.soaa_updates(grads, losses, total_steps=10, fisher=fisher)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {'bfloat16'}
    assert {x.dtype.name for x in scalars(state)} == {'float32'}
    assert_close(updates, exact, 1e-2)
    assert_close(told, expected, 1e-2)
    small = scale_by(total_steps=10, fisher=fisher, mu_dtype='bfloat16', stats_dtype='bfloat16')
    updates, told, state = take(small, grads, losses)
    assert {x.dtype.name for x in jax.tree.leaves((state.mu, state.nu))} == {'bfloat16'}
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, told)))


def test_mixed_tree_has_scalars_of_its_widest_dtype():
    with jax.enable_x64(True):
        params = {'half': jnp.ones(3, 'bfloat16'), 'double': jnp.ones(2, 'float64')}
        tx = scale_by(total_steps=10)
        _, state = tx.update(params, tx.init(params), value=jnp.float32(2.0))
        assert {x.dtype.name for x in scalars(state)} == {'float64'}
        assert state.nu['half'].dtype == 'float32'


def test_numbers_keep_their_dtype_beside_wider_hyperparameters():
    with jax.enable_x64(True):
        params = jnp.ones(3, 'float32')
        tx = optax.inject_hyperparams(precond_optax.soaa, hyperparam_dtype=jnp.float64)(
            learning_rate=0.1, total_steps=10
        )
        state = tx.init(params)
        _, after = jax.jit(tx.update)(params, state, params, value=np.float64(2.0))
        assert after.hyperparams['b1'].dtype == 'float64'
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert {x.dtype.name for x in scalars(after)} == {'float32'}


@pytest.mark.parametrize('fisher', FISHERS)
def test_loss_in_a_data_parallel_shard_map_and_under_vmap(rng, fisher):
    """A loss and gradients that all devices have in common; and one loss for each model."""
    grads, losses = random_run(rng, 4)
    grads = [cast(g, 'float32') for g in grads]
    tx = scale_by(total_steps=4, fisher=fisher)
    expected, told, _ = take(tx, grads, losses)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))

    def update(share, state, loss):
        mean = jax.tree.map(lambda x: jax.lax.pmean(x[0], 'data'), share)
        return tx.update(mean, state, value=jax.lax.pmean(loss[0], 'data'))

    specs = dict(in_specs=(P('data'), P(), P('data')), out_specs=(P(), P()))
    update = jax.jit(jax.shard_map(update, mesh=mesh, **specs))
    state = tx.init(grads[0])
    for grad, loss in zip(grads, losses, strict=True):
        shares = jax.tree.map(lambda g: g * jnp.arange(8).reshape(8, *(1,) * g.ndim) / 3.5, grad)
        updates, state = update(shares, state, loss * jnp.arange(8) / 3.5)
    assert_close(updates, expected[-1], 1e-4)
    np.testing.assert_allclose(scalars(state), told[-1], rtol=1e-4)

    pairs = [jax.tree.map(lambda g: jnp.stack([g, -2 * g]), grad) for grad in grads]
    state = jax.vmap(tx.init)(pairs[0])
    many = jax.jit(jax.vmap(lambda g, s, loss: tx.update(g, s, value=loss)))
    for pair, loss in zip(pairs, losses, strict=True):
        _, state = many(pair, state, jnp.stack([loss, 3 * loss]))
    others = [jax.tree.map(lambda g: -2 * g, grad) for grad in grads]
    _, other, _ = take(tx, others, [3 * loss for loss in losses])
    for i, one in enumerate((told, other)):
        np.testing.assert_allclose([x[i] for x in scalars(state)], one[-1], rtol=1e-4)


@pytest.mark.parametrize('fisher', FISHERS)
def test_without_a_loss_the_trust_region_is_one(rng, fisher):
    """And the updates are those of the formula with dt = 1; None, NaN and inf are no losses."""
    grads, _ = random_run(rng, 6)
    grads = [cast(g, 'float32') for g in grads]
    tx = scale_by(total_steps=6, fisher=fisher)
    updates, told, _ = take(tx, grads, [None] * 6)
    assert set(told) == {(1.0, 0.0, 0.0)}
    expected, _ = oracles.soaa_updates(grads, [None] * 6, total_steps=6, fisher=fisher)
    assert_close(updates, expected, 2e-4)
    state = tx.init(grads[0])
    for grad, loss, same in zip(
        grads, (None, jnp.nan, jnp.inf, np.float32('-inf'), None, jnp.nan), updates, strict=True
    ):
        update, state = tx.update(grad, state, value=loss)
        assert scalars(state) == (1.0, 0.0, 0.0)
        assert_close(update, same, 1e-4)


def quadratic(x):
    return 0.5 * jnp.sum(jnp.linspace(1, 3, 20) * x * x)


def descend(tx, steps=30):
    """Losses and trust regions on a convex quadratic."""

    def step(carry, _):
        x, state = carry
        loss, grad = jax.value_and_grad(quadratic)(x)
        updates, state = tx.update(grad, state, value=loss)
        dt = optax.tree.get(state, 'trust_region')
        return (optax.apply_updates(x, updates), state), (loss, dt)

    x = jnp.ones(20)
    return jax.lax.scan(step, (x, tx.init(x)), length=steps)[1]


@pytest.mark.parametrize('fisher', FISHERS)
def test_trust_region_opens_when_steps_do_well_and_closes_when_they_are_too_long(fisher):
    # b1 = 0.5: the mean of the losses is one step behind, so its lead is what one step gained.
    soaa = functools.partial(precond_optax.soaa, total_steps=30, b1=0.5, fisher=fisher)
    losses, opened = descend(soaa(1.0))
    assert losses[-1] < 0.01 * losses[0]
    assert np.mean(opened[5:] > 1) > 0.9
    assert np.mean(opened[5:]) > 1.2
    losses, closed = descend(soaa(10.0))
    assert losses[-1] > 0.1 * losses[0]
    assert np.mean(closed[5:] < 1) > 0.75
    assert np.mean(closed[5:]) < 1
    # The bounds: 1 to 2 at first, 0.75 to 1.25 at the end.
    done = np.arange(30) / 30
    for dt in (opened, closed):
        assert dt[0] == 1
        assert np.all(dt >= 0.75**done - 1e-6)
        assert np.all(dt <= 1 + 0.25**done + 1e-6)


@pytest.mark.parametrize('fisher', FISHERS)
def test_trust_region_at_the_default_b1(fisher):
    """The mean is nine steps behind: wide open while the loss falls, shut while it rises."""
    soaa = functools.partial(precond_optax.soaa, total_steps=30, fisher=fisher)
    losses, dt = descend(soaa(0.1))
    assert np.all(np.diff(losses[:15]) < 0)
    np.testing.assert_allclose(dt[4:15], 1 + 0.25 ** (np.arange(4, 15) / 30), rtol=1e-5)
    losses, dt = descend(soaa(1.0))
    assert np.all(np.diff(losses[3:7]) > 0)
    np.testing.assert_allclose(dt[5:7], 0.75 ** (np.arange(5, 7) / 30), rtol=1e-5)


def test_rounding_of_a_large_loss_opens_nothing():
    """The first loss is its own mean, whatever it is; eps is far below its rounding."""
    for loss in (0.1, 123.456, 9.87654e6, -3e9):
        tx = scale_by(total_steps=10)
        grads = jnp.ones(3)
        _, state = jax.jit(tx.update)(grads, tx.init(grads), value=loss)
        assert state.trust_region == 1


def test_schedule_enters_the_prediction(rng):
    """As the chain's own learning rate does: that of the steps taken before this one."""
    grads, losses = random_run(rng, 5)
    grads = [cast(g, 'float32') for g in grads]
    schedule = optax.piecewise_constant_schedule(0.1, {2: 0.5, 3: 0.0})
    tx = precond_optax.soaa(schedule, total_steps=5)
    updates, told, _ = take(tx, grads, losses)
    expected, _ = oracles.soaa_updates(
        grads, losses, total_steps=5, learning_rate=lambda taken: float(schedule(taken))
    )
    _, wanted = oracles.soaa_updates(grads, losses, total_steps=5, learning_rate=schedule)
    assert_close(told, wanted, 2e-4)
    assert told[3][1] == told[4][1] == 0
    for taken, (ours, theirs) in enumerate(zip(updates, expected, strict=True)):
        rate = float(schedule(taken))
        assert_close(ours, {k: -rate * u for k, u in theirs.items()}, 2e-4, 1e-6)


@pytest.mark.parametrize('fisher', FISHERS)
@pytest.mark.parametrize('size', [1e-30, 1e-15, 1e8, 1e15, 1e18, 1e25])
def test_any_scale_is_finite(rng, fisher, size):
    grads, losses = random_run(rng, 5, size)
    tx = scale_by(total_steps=5, fisher=fisher)
    updates, told, state = take(tx, [cast(g, 'float32') for g in grads], losses)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, told, state)))
    if size < 1e18:  # whose squares are near float32's end
        expected, wanted = oracles.soaa_updates(grads, losses, total_steps=5, fisher=fisher)
        scale = max(np.abs(u).max(initial=0) for u in jax.tree.leaves(expected))
        assert_close(
            jax.tree.map(lambda u: np.asarray(u, np.float64) / scale, updates),
            jax.tree.map(lambda u: u / scale, expected),
            2e-3,
        )
        assert_close(told, wanted, 2e-3)


def test_sum_of_many_large_squares_does_not_overflow():
    """Each square is finite, their sum is not: the ratio must be one all the same."""
    grads = jnp.full(4000, 1e18)
    tx = scale_by(total_steps=10)
    updates, _ = tx.update(grads, tx.init(grads), value=1.0)
    np.testing.assert_allclose(updates, 0.5e-18, rtol=1e-4)


def test_huge_entry_is_forgotten(rng):
    """Squares beyond float32 leave no infinity behind, in no leaf and no number."""
    tx = scale_by(b2=0.5, total_steps=1000)
    grads, losses = random_run(rng, 400)
    # One leaf has no gradient, so v is 0 where the ratio of the sums is infinite.
    grads = [{**cast(g, 'float32'), 'bias': jnp.zeros(4)} for g in grads]
    for i, size in ((0, 1e25), (3, 1e30), (9, -3e38)):
        grads[i] = {**grads[i], 'kernel': grads[i]['kernel'].at[1, 2].set(size)}
    updates, told, state = take(tx, grads, losses)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, told, state)))
    _, _, clean = take(tx, grads[100:], losses[100:])
    assert_close(state.nu, clean.nu, 1e-4)


@pytest.mark.parametrize('fisher', FISHERS)
@pytest.mark.parametrize('eps', [0.0, 1e-8])
def test_zero_gradients_give_zero_updates(fisher, eps):
    grads = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    tx = scale_by(eps=eps, total_steps=3, fisher=fisher)
    updates, told, state = take(tx, [grads] * 3, [1.0, 0.5, 0.7])
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((told, state)))


def test_nan_shows_in_all_leaves(rng):
    grads, losses = random_run(rng, 2)
    grads = [cast(g, 'float32') for g in grads]
    poisoned = {**grads[1], 'bias': grads[1]['bias'].at[0].set(jnp.nan)}
    tx = scale_by(total_steps=3)
    updates, _, _ = take(tx, [grads[0], poisoned], losses)
    assert all(np.all(np.isnan(u)) for u in jax.tree.leaves(updates[1]))


def test_trees_without_leaves(rng):
    tx = scale_by(total_steps=3)
    for params in ({}, {'a': None}):
        updates, state = tx.update(params, tx.init(params), value=1.0)
        assert updates == params
        assert {x.dtype.name for x in scalars(state)} == {'float32'}
    none = optax.masked(tx, {'a': False})
    params = {'a': jnp.ones(2)}
    _, state = none.update(params, none.init(params), value=1.0)
    assert scalars(state) == (1.0, 0.0, 0.0)
    empty = {'a': jnp.ones((0, 2))}
    _, state = tx.update(empty, tx.init(empty), value=2.0)
    np.testing.assert_allclose(scalars(state), (1.0, 0.0, 0.2), rtol=1e-6)


def test_wrapped_and_scanned_it_sees_the_loss(rng):
    """In chain, apply_if_finite, masked and inject_hyperparams, within one scan."""
    grads, losses = random_run(rng, 8)
    grads = [cast(g, 'float32') for g in grads]
    plain = functools.partial(precond_optax.soaa, total_steps=8)
    expected, told, _ = take(plain(0.1), grads, losses)
    assert told[-1][0] != 1
    wrapped = {
        'chain': optax.chain(optax.identity(), plain(0.1)),
        'apply_if_finite': optax.apply_if_finite(plain(0.1), 3),
        'masked': optax.masked(plain(0.1), lambda tree: jax.tree.map(lambda x: True, tree)),
        'injected': optax.inject_hyperparams(plain)(learning_rate=0.1, total_steps=8),
    }
    stack = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    for name, tx in wrapped.items():

        def step(state, scanned, tx=tx):
            updates, state = tx.update(scanned[0], state, grads[0], value=scanned[1])
            return state, (updates, scalars(state))

        state = tx.init(grads[0])
        _, (updates, seen) = jax.lax.scan(step, state, (stack, jnp.asarray(losses)))
        last = jax.tree.map(lambda x: x[-1], (updates, seen))
        np.testing.assert_allclose(last[1], told[-1], rtol=1e-4, err_msg=name)
        assert_close(last[0], expected[-1], 1e-4, 1e-6)


def test_apply_if_finite_skips_a_step_and_its_loss(rng):
    grads, losses = random_run(rng, 4)
    grads = [cast(g, 'float32') for g in grads]
    tx = optax.apply_if_finite(precond_optax.soaa(0.1, total_steps=4), 3)
    _, told, state = take(tx, grads, losses)
    assert told[-1][2] > 0
    poisoned = jax.tree.map(lambda x: x * jnp.nan, grads[0])
    _, seen, skipped = take(
        tx, [*grads[:2], poisoned, *grads[2:]], [*losses[:2], 7.0, *losses[2:]]
    )
    assert seen[4] == told[3]
    assert seen[2] == seen[1]
    jax.tree.map(np.testing.assert_array_equal, skipped.inner_state, state.inner_state)


def test_multi_steps_takes_the_last_loss(rng):
    grads, losses = random_run(rng, 6)
    grads = [cast(g, 'float32') for g in grads]
    soaa = precond_optax.soaa(0.1, total_steps=3)
    multi = optax.MultiSteps(soaa, every_k_schedule=2)
    updates, told, _ = take(multi, grads, losses)
    assert told[-1][2] > 0
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *grads[i : i + 2]) for i in (0, 2, 4)]
    expected, wanted, _ = take(soaa, means, losses[1::2])
    for i in range(3):
        assert not any(np.any(u) for u in jax.tree.leaves(updates[2 * i]))
        assert_close(updates[2 * i + 1], expected[i], 1e-4, 1e-6)
        np.testing.assert_allclose(told[2 * i + 1], wanted[i], rtol=1e-4)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_sharded_trust_region_is_one_device_s(rng, kind):
    """The sums are over all shards, and what is made of them keeps its type."""
    shapes = {'kernel': (16, 8), 'bias': (8,)}
    grads = [{k: jnp.asarray(rng.normal(size=s), 'float32') for k, s in shapes.items()}] * 5
    losses = [5.0, 4.0, 4.5, 2.0, 1.0]
    tx = precond_optax.soaa(0.1, total_steps=5)
    expected, told, _ = take(tx, grads, losses)
    assert told[-1][0] != 1
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind,) * 2)
    specs = {'kernel': P('x', 'y'), 'bias': P('x')}
    with jax.set_mesh(mesh):
        place = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
        grads = jax.device_put(grads, [place] * 5)
        state = jax.jit(tx.init, out_shardings=precond_optax.state_sharding(tx, grads[0]))(
            grads[0]
        )
        before = jax.tree.map(jax.typeof, state)
        for grad, loss in zip(grads, losses, strict=True):
            updates, state = jax.jit(tx.update)(grad, state, value=jnp.float32(loss))
        assert jax.tree.map(jax.typeof, state) == before
    np.testing.assert_allclose(scalars(state), told[-1], rtol=1e-4)
    assert_close(jax.device_get(updates), jax.device_get(expected[-1]), 1e-4, 1e-6)
    assert all(x.sharding.is_fully_replicated for x in scalars(state))


def test_plan_names_it_and_counts_its_numbers():
    params = {'kernel': jax.ShapeDtypeStruct((6, 4), jnp.float32)}
    for fisher, arrays in (('uncentered', 2), ('centered', 3)):
        tx = precond_optax.soaa(1e-3, total_steps=10, fisher=fisher)
        table = precond_optax.plan(tx, params)
        assert table.leaves[0].treatment == f'SOAA, diagonal, {fisher}'
        assert table.state_bytes == arrays * 4 * 24 + 4 + 3 * 4


BAD_ARGUMENTS = [
    (dict(total_steps=None), r'total_steps must be a number in \[1, inf\), got None'),
    (dict(total_steps=0), r'total_steps must be in \[1, inf\), got 0'),
    (dict(total_steps=-5), 'total_steps must be in'),
    (dict(total_steps='100'), "total_steps must be a number in .* got '100'"),
    (dict(b1=1.0), r'b1 must be in \[0, 1\), got 1.0'),
    (dict(b2=-0.1), 'b2 must be in'),
    (dict(gamma=1.0), r'gamma must be in \[0, 1\), got 1.0'),
    (dict(eps=-1e-8), 'eps must be in'),
    (dict(fisher='centred'), "fisher must be one of 'uncentered', 'centered', got 'centred'"),
    (dict(learning_rate=-1.0), r'^learning_rate must be in \[0, inf\), got -1.0'),
    (dict(learning_rate='1e-3'), '^learning_rate must be a number'),
    (dict(mu_dtype='int32'), 'mu_dtype must be None or a floating dtype'),
    (dict(stats_dtype='float33'), 'stats_dtype must be None or a floating dtype'),
    (dict(stochastic_rounding=1), 'stochastic_rounding must be True or False'),
    (dict(weight_decay=-1.0), 'weight_decay must be in'),
]


@pytest.mark.parametrize(('keywords', 'message'), BAD_ARGUMENTS)
def test_bad_argument(keywords, message):
    with pytest.raises(ValueError, match=message):
        precond_optax.soaa(**{'learning_rate': 1e-3, 'total_steps': 10, **keywords})


def test_total_steps_is_required():
    for make in (scale_by, functools.partial(precond_optax.soaa, 1e-3)):
        with pytest.raises(TypeError, match="required keyword-only argument: 'total_steps'"):
            make()


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        (jnp.ones(3), r'value must be a real scalar, got float32 of shape \(3,\)'),
        (jnp.ones((1, 1)), r'shape \(1, 1\)'),
        ([1.0], r'shape \(1,\)'),
        (1j, 'value must be a real scalar, got complex64'),
        ('1.0', "value must be a scalar, got '1.0'"),
    ],
)
def test_bad_value(value, message):
    tx = optax.chain(optax.clip_by_global_norm(1.0), precond_optax.soaa(1e-3, total_steps=10))
    params = {'a': jnp.ones(2)}
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, value=value)


def test_weight_decay_is_decoupled_and_masked(rng):
    params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), 'float32'), params)
    plain = precond_optax.soaa(0.1, total_steps=10)
    decayed = precond_optax.soaa(
        0.1, total_steps=10, weight_decay=0.5, mask={'kernel': True, 'bias': False}
    )
    expected, _ = plain.update(grads, plain.init(params), params)
    updates, _ = decayed.update(grads, decayed.init(params), params)
    np.testing.assert_allclose(updates['kernel'], expected['kernel'] - 0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates['bias'], expected['bias'])
