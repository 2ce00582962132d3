"""The generic checks: what every transformation must do. Each takes a row of `tests/cases.py`
and raises ``AssertionError`` if the row does not pass; `test_conformance.py` runs them all, and
shows that each rejects a transformation broken on purpose.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from tests.cases import Case

SHAPES = {
    'matrix': (6, 4),
    '3d': (2, 5, 3),
    '4d': (3, 2, 4, 2),
    'row': (1, 5),
    'column': (5, 1),
    'vector': (4,),
    'scalar': (),
    'empty': (0, 3),
}
# For what does not hang on the shape: compiling is most of the time.
FEW = {name: SHAPES[name] for name in ('matrix', '3d', 'vector', 'scalar')}
DTYPES = ('float32', 'bfloat16', 'float64')


def random_tree(seed, dtype='float32', shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def types(tree):
    """Shapes, dtypes and shardings, for a readable difference."""
    return {
        jax.tree_util.keystr(path): str(jax.typeof(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=rtol, atol=atol
        ),
        actual,
        expected,
    )
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


def run(tx, params, steps=3, seed=0, jit=True):
    """The updates and the state after some steps with random gradients, params as they are."""
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for step in range(steps):
        dtypes = jax.tree.map(lambda p: p.dtype, params)
        grads = random_tree(seed + step, shapes={k: v.shape for k, v in params.items()})
        grads = jax.tree.map(lambda g, d: g.astype(d), grads, dtypes)
        updates, state = update(grads, state, params)
    return updates, state


def extra_arguments_are_ignored(case: Case):
    tx, params = case.make(), random_tree(0)
    update = functools.partial(tx.update, value=1.0, no_such_argument=2)
    jax.eval_shape(update, params, tx.init(params), params)


def no_recompilation_on_the_second_update(case: Case):
    tx, params = case.make(), random_tree(0)
    traces = []

    @jax.jit
    def update(grads, state, params):
        traces.append(0)
        return tx.update(grads, state, params)

    state = jax.jit(tx.init)(params)
    for _ in range(3):
        _, state = update(params, state, params)
    assert len(traces) == 1, f'traced {len(traces)} times'


def state_is_a_scan_carry(case: Case):
    for dtype in DTYPES:
        with jax.enable_x64(dtype == 'float64'):
            tx, params = case.make(), random_tree(0, dtype)
            state = tx.init(params)
            _, new = jax.eval_shape(tx.update, params, state, params)
            assert jax.tree.structure(state) == jax.tree.structure(new)
            before = types(state)
            assert types(new) == before

            def step(carry, _, tx=tx):
                params, state = carry
                updates, state = tx.update(params, state, params)
                return (optax.apply_updates(params, updates), state), None

            scan = functools.partial(jax.lax.scan, step, length=3)
            (_, scanned), _ = jax.eval_shape(scan, (params, state))
            assert types(scanned) == before


def update_dtypes_are_the_gradients(case: Case):
    for dtype in (*DTYPES, 'float16'):
        with jax.enable_x64(dtype == 'float64'):
            params, tx = random_tree(0, dtype), case.make()
            updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
            assert types(updates) == types(params)


def mixed_dtypes_stay_apart(case: Case):
    with jax.enable_x64(True):
        params = {
            'single': random_tree(0, 'float32')['matrix'],
            'double': random_tree(0, 'float64')['matrix'],
            'half': random_tree(0, 'bfloat16')['matrix'],
        }
        tx = case.make()
        state = tx.init(params)
        updates, new = jax.jit(tx.update)(params, state, params)
        assert types(updates) == types(params)
        assert types(new) == types(state)


def everything_is_finite(case: Case):
    for dtype in DTYPES:
        with jax.enable_x64(dtype == 'float64'):
            updates, state = run(case.make(), random_tree(0, dtype), steps=5)
            for leaf in jax.tree.leaves((updates, state)):
                assert np.all(np.isfinite(np.asarray(leaf, np.float64)))


def eager_equals_jitted(case: Case):
    params = random_tree(0)
    eager, jitted = (run(case.make(), params, jit=jit) for jit in (False, True))
    assert types(eager) == types(jitted)
    assert_close(eager, jitted, rtol=1e-4, atol=1e-5)


def init_takes_shapes_alone(case: Case):
    tx, params = case.make(), random_tree(0)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    expected = types(tx.init(params))
    assert types(tx.init(shapes)) == expected
    abstract = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(abstract) == jax.tree.structure(tx.init(params))


def map_params_reaches_the_state(case: Case):
    tx, params = case.make(), random_tree(0)
    state = tx.init(params)
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    ones = optax.tree.map_params(tx, lambda x: x if masked(x) else x + 1, state, is_leaf=masked)
    alone = ((), (len(params),))  # counts, of steps or for each leaf, are no parameter's
    changed = jax.tree.map(lambda a, b: a.shape in alone or bool(jnp.all(a == b + 1)), ones, state)
    assert all(jax.tree.leaves(changed))
    assert any(jnp.any(x != 0) for x in jax.tree.leaves(ones))
    with_params = optax.tree.map_params(
        tx, lambda x, p: x if masked(x) else p, state, params, is_leaf=masked
    )
    assert jax.tree.structure(with_params) == jax.tree.structure(state)


def injected_hyperparameters_give_the_same(case: Case):
    params = random_tree(0, shapes=FEW)
    plain = run(case.make(), params)
    injected = optax.inject_hyperparams(case.factory, static_args=case.static_args)
    updates, state = run(injected(learning_rate=case.learning_rate, **case.keywords), params)
    assert_close(updates, plain[0], rtol=1e-3, atol=1e-6)
    assert_close(state.inner_state, plain[1], rtol=1e-3, atol=1e-6)
    for name in case.floats:
        assert name in state.hyperparams, f'{name} is not traced'


def injected_hyperparameters_may_be_wider_than_parameters(case: Case):
    """Optax casts them to the parameters' dtype unless told otherwise: b2=0.999 would be 1."""
    params = random_tree(0, 'bfloat16', shapes=FEW)
    plain, _ = run(case.make(), params)
    wide = optax.inject_hyperparams(
        case.factory, static_args=case.static_args, hyperparam_dtype=jnp.float32
    )
    updates, _ = run(wide(learning_rate=case.learning_rate, **case.keywords), params)
    scale = max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(plain))
    assert_close(updates, plain, rtol=2**-5, atol=scale * 2**-6)


def schedule_equals_constant(case: Case):
    params = random_tree(0, shapes=FEW)
    schedule = optax.constant_schedule(case.learning_rate)
    assert_close(run(case.make(schedule), params)[0], run(case.make(), params)[0])


def multi_steps_is_one_step_on_the_mean(case: Case):
    params = random_tree(0, shapes=FEW)
    grads = [random_tree(i, shapes=FEW) for i in range(4)]
    tx = case.make()
    multi = optax.MultiSteps(tx, every_k_schedule=4)
    state = multi.init(params)
    for i, grad in enumerate(grads):
        updates, state = jax.jit(multi.update)(grad, state, params)
        if i < 3:
            assert all(not np.any(u) for u in jax.tree.leaves(updates))
    mean = jax.tree.map(lambda *g: sum(g) / 4, *grads)
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    assert_close(updates, expected, rtol=1e-4, atol=1e-5)


def masked_and_partitioned_leaves_are_left_alone(case: Case):
    params = {
        'ours': random_tree(0, shapes=FEW),
        'others': {**random_tree(1, shapes=FEW), 'none': None},
    }
    tx, alone = case.make(), {'ours': params['ours']}  # the paths are the same
    expected = jax.jit(tx.update)(alone, tx.init(alone), alone)[0]['ours']
    mask = {'ours': True, 'others': False}
    masked = optax.masked(case.make(), mask)
    split = optax.partition(
        {'a': case.make(), 'b': optax.set_to_zero()}, {'ours': 'a', 'others': 'b'}
    )
    for tx in (masked, split):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert_close(updates['ours'], expected, rtol=1e-4, atol=1e-5)
        if tx is masked:
            assert_equal(updates['others'], params['others'])


def chained_with_clipping(case: Case):
    params, tx, clip = random_tree(0, shapes=FEW), case.make(), optax.clip_by_global_norm(1e-1)
    chained = optax.chain(clip, tx, optax.scale(2.0))
    update = jax.jit(chained.update)
    state, alone = chained.init(params), tx.init(params)
    for step in range(3):
        grads = random_tree(step, shapes=FEW)
        updates, state = update(grads, state, params)
        clipped, _ = clip.update(grads, clip.init(params))
        expected, alone = jax.jit(tx.update)(clipped, alone, params)
    assert_close(updates, jax.tree.map(lambda u: 2 * u, expected), rtol=1e-4, atol=1e-5)


def nan_is_left_to_apply_if_finite(case: Case):
    params = random_tree(0, shapes=FEW)
    tx = optax.apply_if_finite(case.make(), max_consecutive_errors=3)
    _, state = run(tx, params)
    poisoned = {**params, 'matrix': params['matrix'].at[1, 2].set(jnp.nan)}
    updates, after = jax.jit(tx.update)(poisoned, state, params)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert_equal(after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == 1
    # And without the wrapper it shows: a NaN in is a NaN out, in that leaf, or in all.
    bare = case.make()
    updates, _ = jax.jit(bare.update)(poisoned, bare.init(params), params)
    assert not np.all(np.isfinite(updates['matrix']))
    shown = np.isnan if case.spreads_nan else np.isfinite
    assert np.all(shown(updates['vector']))


def zero_gradients_give_zero_updates(case: Case):
    params = jax.tree.map(jnp.zeros_like, random_tree(0))
    tx = case.make()
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
        assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def one_huge_entry_is_finite(case: Case):
    params = random_tree(0, shapes=FEW)
    grads = {**params, 'matrix': params['matrix'].at[2, 1].set(1e15)}
    tx = case.make()
    update = jax.jit(tx.update)
    first, state = update(grads, tx.init(params), params)
    second, state = update(params, state, params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((first, second, state)))


def updates_do_not_depend_on_the_gradients_scale(case: Case):
    if not case.scale_free:
        return
    keywords = {'eps': 1e-30} if case.name != 'adam' else {}
    params, tx = random_tree(0, shapes=FEW), case.make(**keywords)
    outputs = []
    for scale in (1.0, 64.0):
        state = tx.init(params)
        for i in range(3):
            grads = jax.tree.map(lambda g, scale=scale: scale * g, random_tree(i, shapes=FEW))
            updates, state = tx.update(grads, state, params)
        outputs.append(updates)
    assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-6)


def mu_dtype_is_honoured(case: Case):
    params = random_tree(0, shapes=FEW)
    for dtype in ('bfloat16', 'float32'):
        updates, state = run(case.make(mu_dtype=dtype), params)
        mu = optax.tree.get(state, 'mu')
        assert {x.dtype.name for x in jax.tree.leaves(mu)} == {dtype}
        assert types(updates) == types(params)


def state_bytes_are_as_documented(case: Case):
    params = {'matrix': jnp.zeros((6, 4))}
    arrays = [x for x in jax.tree.leaves(case.make().init(params)) if x.size > 1]
    held = sum(x.nbytes for x in arrays) / 24
    assert held == case.state_bytes, f'{held} bytes for each entry'
    assert all(x.shape == (6, 4) for x in arrays) or case.compressed


def resumed_run_is_the_same_bit_for_bit(case: Case):
    params = random_tree(0, shapes=FEW)
    tx = case.make()
    _, state = run(tx, params)
    grads = random_tree(9, shapes=FEW)
    expected = jax.jit(tx.update)(grads, state, params)
    # As in a new process: another transformation, a state from plain arrays.
    tx = case.make()
    leaves = [jnp.asarray(np.array(x)) for x in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(jax.tree.structure(tx.init(params)), leaves)
    assert_equal(jax.jit(tx.update)(grads, restored, params), expected)


def stacked_leaves_equal_their_layers(case: Case):
    if not case.layout:
        return
    from precond_optax import LeafRule

    layers = [random_tree(i) for i in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    stacked, _ = run(case.make(layout={'': LeafRule(batch_axes=1)}), stack)
    # The same gradients, layer by layer.
    tx = case.make()
    for i in range(3):
        state = tx.init(layers[i])
        for step in range(3):
            grads = random_tree(step, shapes={k: v.shape for k, v in stack.items()})
            layer = jax.tree.map(lambda g, i=i: g[i], grads)
            updates, state = jax.jit(tx.update)(layer, state, layers[i])
        assert_close(jax.tree.map(lambda u, i=i: u[i], stacked), updates, rtol=1e-4, atol=1e-6)


def vmap_over_models_equals_the_loop(case: Case):
    models = [random_tree(i, shapes=FEW) for i in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *models)
    tx = case.make()
    states = jax.vmap(tx.init)(stack)
    updates, _ = jax.jit(jax.vmap(tx.update))(stack, states, stack)
    for i, model in enumerate(models):
        expected, _ = jax.jit(tx.update)(model, tx.init(model), model)
        assert_close(jax.tree.map(lambda u, i=i: u[i], updates), expected, rtol=1e-4, atol=1e-6)


def pmap_equals_one_device(case: Case):
    params = random_tree(0, shapes={'matrix': (6, 4), 'vector': (4,)})
    tx = case.make()

    @functools.partial(jax.pmap, axis_name='batch')
    def step(grads, state, params):
        return tx.update(jax.lax.pmean(grads, 'batch'), state, params)

    count = jax.local_device_count()
    assert count == 8
    shapes = {k: v.shape for k, v in params.items()}
    grads = [random_tree(i, shapes=shapes) for i in range(count)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    replicate = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * count))
    updates, _ = step(stack, replicate(tx.init(params)), replicate(params))
    mean = jax.tree.map(lambda x: x.mean(0), stack)
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    assert_close(jax.tree.map(lambda u: u[3], updates), expected, rtol=1e-4, atol=1e-5)


def donated_state_is_not_needed_again(case: Case):
    params = random_tree(0, shapes={'matrix': (6, 4), 'vector': (4,)})
    tx = case.make()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    expected, _ = run(tx, params, steps=1)
    expected = optax.apply_updates(params, expected)
    held = jax.tree.map(jnp.copy, params)
    new, _ = step(held, tx.init(params), random_tree(0, shapes={'matrix': (6, 4), 'vector': (4,)}))
    assert_close(new, expected)


def update_and_apply_is_both(case: Case):
    """With a schedule; whatever a transformation has for it, jitted, and one step eager."""
    shapes = {'matrix': (6, 4), '3d': (2, 3, 4), 'vector': (4,)}
    start = random_tree(7, shapes=shapes) | {'low': jnp.ones((3, 4), jnp.bfloat16)}
    tx = case.make(optax.linear_schedule(case.learning_rate, 2 * case.learning_rate, 3))
    apply = functools.partial(precond_optax.update_and_apply, tx)
    for step, count in ((jax.jit(apply), 3), (apply, 1)):
        params, state, expected, held = start, tx.init(start), start, tx.init(start)
        for seed in range(count):
            grads = random_tree(seed, shapes=shapes) | {'low': jnp.full((3, 4), 0.5, jnp.bfloat16)}
            params, state = step(grads, state, params, value=1.0)
            updates, held = jax.jit(tx.update)(grads, held, expected)
            expected = optax.apply_updates(expected, updates)
        assert types(params) == types(start)
        assert types(state) == types(held)
        assert_close(params, expected, rtol=1e-2, atol=1e-5)  # bfloat16's
        wide = [{k: x for k, x in tree.items() if k != 'low'} for tree in (params, expected)]
        assert_close(*wide, rtol=1e-4, atol=1e-5)


def schedule_free_wraps_it(case: Case):
    target = random_tree(3, shapes={'matrix': (3, 4), 'vector': (3,)})

    def loss(params, shift):
        return sum(jnp.sum((params[k] - target[k] - shift[k]) ** 2) for k in target)

    # Its interpolation takes the place of the momentum.
    inner = case.make(5 * case.learning_rate, **{case.momentum: 0.0})
    tx = optax.contrib.schedule_free(inner, learning_rate=5 * case.learning_rate, b1=0.9)

    def step(carry, key):
        # Noise, as of minibatches: without it the second moment has rank one.
        params, state = carry
        noise = optax.tree.random_like(key, target)
        updates, state = tx.update(jax.grad(loss)(params, noise), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jax.tree.map(jnp.zeros_like, target)
    keys = jax.random.split(jax.random.key(0), 1000)
    (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), keys)
    params = optax.contrib.schedule_free_eval_params(state, params)
    assert types(params) == types(target)
    assert loss(params, start) < 0.1 * loss(start, start)


def sharded_leaves_keep_their_sharding(case: Case):
    """Explicit meshes: the state has the parameter's type from `init` on; results are the same."""
    shapes = {'matrix': (16, 8), '3d': (8, 2, 8), 'vector': (8,)}
    specs = (
        {'matrix': P('x', None), '3d': P('x', None, 'y'), 'vector': P('x')},
        {'matrix': P(None, 'x'), '3d': P(None, None, 'x'), 'vector': P()},
        {'matrix': P('x', 'y'), '3d': P('y', None, 'x'), 'vector': P(('x', 'y'))},
    )
    tx, whole = case.make(), random_tree(0, shapes=shapes)
    expected, _ = run(tx, whole)
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Explicit,) * 2)
    for spec in specs:
        shardings = {k: NamedSharding(mesh, s) for k, s in spec.items()}
        with jax.set_mesh(mesh):
            params = jax.device_put(whole, shardings)
            for init in (tx.init, jax.jit(tx.init)):
                state = init(params)
                for step in range(3):
                    grads = jax.device_put(random_tree(step, shapes=shapes), shardings)
                    before = types(state)
                    updates, state = jax.jit(tx.update)(grads, state, params)
                    assert types(state) == before
                    assert types(updates) == types(params)
            for leaf in (x for x in jax.tree.leaves(state) if x.shape == (16, 8)):
                assert leaf.sharding.spec == spec['matrix']
        assert_close(jax.device_get(updates), expected, rtol=1e-4, atol=1e-5)


def auto_sharded_leaves_give_the_same(case: Case):
    shapes = {'matrix': (16, 8), '3d': (8, 3, 8), 'vector': (8,)}
    tx, whole = case.make(), random_tree(0, shapes=shapes)
    expected, _ = run(tx, whole)
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    for spec in ({'matrix': P('x', 'y'), '3d': P('x', None, 'y'), 'vector': P()},):
        shardings = {k: NamedSharding(mesh, s) for k, s in spec.items()}
        params = jax.device_put(whole, shardings)
        state = tx.init(params)
        for step in range(3):
            grads = jax.device_put(random_tree(step, shapes=shapes), shardings)
            updates, state = jax.jit(tx.update)(grads, state, params)
        assert_close(jax.device_get(updates), expected, rtol=1e-4, atol=1e-5)


def wrong_leaves_are_named(case: Case):
    if not case.real_only:
        return
    for dtype in ('int32', 'complex64'):
        message = ''
        try:
            case.make().init({'layer': {'kernel': jnp.zeros((2, 2), dtype)}})
        except ValueError as error:
            message = str(error)
        assert 'layer/kernel' in message, message or f'{dtype} was taken'
        assert dtype in message


def wrong_gradients_are_named(case: Case):
    if not case.real_only:
        return
    params = {'a': jnp.ones((3, 2)), 'b': {'c': jnp.ones(3)}}
    tx = case.make()
    state = tx.init(params)
    for wrong, named in (
        ({**params, 'a': jnp.ones((2, 3))}, r'a: .*\(2, 3\).*\(3, 2\)'),
        ({'a': params['a']}, 'b/c is missing'),
        ({**params, 'd': jnp.ones(2)}, 'd is not in the state'),
        ({**params, 'b': {'c': None}}, 'b/c is missing'),
    ):
        message = 'taken'
        try:
            jax.eval_shape(tx.update, wrong, state, params)
        except (ValueError, TypeError) as error:
            message = str(error)
        assert re.search(named, message), message


def it_converges_on_matrices(case: Case):
    target = random_tree(3, shapes={'matrix': (3, 4), '3d': (2, 2, 3), 'vector': (3,)})

    def loss(params):
        return sum(jnp.sum((params[k] - target[k]) ** 2) for k in target)

    tx = case.make(optax.linear_schedule(5 * case.learning_rate, 0.0, 2000))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.zeros_like, target)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=2000)
    assert_close(params, target, rtol=3e-2, atol=3e-2)


ALL = [
    check
    for name, check in list(globals().items())
    if callable(check) and getattr(check, '__annotations__', {}).get('case') is Case
]
