"""The shared basis as a transformation; tests/kernels/test_shared_basis.py has its mathematics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import precond_optax
from precond_optax import LeafRule
from precond_optax.kernels import matrix_root
from tests import oracles, quick

scale_by = precond_optax.scale_by_shared_basis
PLAIN = dict(b1=0.0, b2=1.0, eps=1e-2, graft=None)  # Algorithm 1 and nothing else


def directions(tx, grads):
    """All updates for a list of gradients, and the last state."""
    state = tx.init(jax.tree.map(jnp.zeros_like, grads[0]))
    update, outputs = jax.jit(tx.update), []
    for grad in grads:
        updates, state = update(grad, state)
        outputs.append(updates)
    return outputs, state


def random_grads(rng, shape, count, dtype='float32'):
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(count)]


def assert_close(actual, expected, rtol=1e-3):
    scale = np.abs(expected).max()
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual / scale, np.asarray(expected) / scale, atol=rtol, rtol=0)


# Shape, rule, the axes of the outputs, the block's size: as methods.md sees each.
SEEN = {
    'dense': ((6, 5), LeafRule(), (1,), 6),
    'convolution': ((2, 2, 3, 4), LeafRule(), (3,), 12),
    'query': ((6, 2, 3), LeafRule(merge_axes=((-2, -1),)), (1, 2), 6),
    'attention_out': ((2, 3, 5), LeafRule(), (2,), 6),
    'by_inputs': ((6, 5), LeafRule(output_axes=(0,)), (0,), 5),
    'middle': ((3, 4, 2), LeafRule(output_axes=(-2,)), (1,), 6),
    'row': ((1, 5), LeafRule(), (1,), 1),
    'column': ((5, 1), LeafRule(), (1,), 5),
    'forced': ((5,), LeafRule(precondition=True), (0,), 1),
}


@pytest.mark.parametrize(('rank', 'kind'), quick.every(2, itertools.product([2, 12], SEEN)))
def test_leaves_are_seen_as_blocks_of_outputs(rng, kind, rank):
    shape, rule, output_axes, size = SEEN[kind]
    grads = random_grads(rng, shape, 4)
    layout = {'': rule}
    tx = scale_by(**PLAIN, rank=rank, layout=layout, residual_norm='frobenius')
    updates, _ = directions(tx, grads)
    blocks = [oracles.blocks(g, output_axes) for g in grads]
    assert blocks[0].shape[0] == size
    start = np.asarray(tx.init(grads[0]).basis, np.float64)
    start = start.reshape(min(rank, size), size).T
    np.testing.assert_allclose(start.T @ start, np.eye(min(rank, size)), atol=1e-6)
    expected = oracles.shared_basis_direction(blocks, start, eps=1e-2, norm='fro')
    assert_close(oracles.blocks(updates[-1], output_axes), expected)
    if rank >= size:  # full AdaGrad of each block
        exact = oracles.block_adagrad_direction(blocks, eps=1e-2)
        assert_close(oracles.blocks(updates[-1], output_axes), exact)


def test_graft_momentum_and_nesterov(rng):
    grads = random_grads(rng, (6, 5), 5)
    keywords = dict(b2=0.9, eps=1e-2, rank=3)
    plain, _ = directions(scale_by(**keywords, b1=0.0, graft=None), grads)
    arrays = [np.asarray(g) for g in grads]
    mean, grafted = np.zeros((6, 5)), []
    for step, direction in enumerate(plain, start=1):
        w = oracles.normalized_rms_direction(arrays[:step], 0.9)
        grafted.append(np.asarray(direction) * np.linalg.norm(w) / np.linalg.norm(direction))
        mean = 0.8 * mean + 0.2 * grafted[-1]
    for nesterov in (False, True):
        updates, state = directions(scale_by(**keywords, b1=0.8, nesterov=nesterov), grads)
        expected = mean / (1 - 0.8**5)
        if nesterov:
            expected = 0.8 * mean / (1 - 0.8**6) + 0.2 * grafted[-1] / (1 - 0.8**5)
        assert_close(updates[-1], expected, 1e-5)
        assert_close(state.mu, mean, 1e-5)


@pytest.mark.parametrize('b2', [0.9, 1.0])
@pytest.mark.parametrize('graft', ['adam', 'momentum', 'sgd', 'rmsprop_normalized'])
def test_graft_kinds_alone_on_leaves_with_one_axis(rng, graft, b2):
    grads = random_grads(rng, (7,), 4)
    updates, _ = directions(scale_by(b1=0.5, b2=b2, graft=graft), grads)
    arrays = [np.asarray(g, np.float64) for g in grads]

    def rule(step):
        given = arrays[:step]
        if graft == 'sgd':
            return given[-1]
        if graft == 'rmsprop_normalized':
            units = [g / np.linalg.norm(g) for g in given]
            weights = [(1 - b2) * b2 ** (step - 1 - i) if b2 < 1 else 1 for i in range(step)]
            return units[-1] / np.sqrt(sum(w * n**2 for w, n in zip(weights, units, strict=True)))
        mean, _ = oracles.moments(given, 0.5, 0.5)
        square = np.average(
            np.square(given), axis=0, weights=[b2 ** (step - 1 - i) for i in range(step)]
        )
        return mean if graft == 'momentum' else mean / np.sqrt(square)

    mean = np.zeros(7)
    for step in range(1, 5):
        mean = 0.5 * mean + 0.5 * rule(step)
    assert_close(updates[-1], mean / (1 - 0.5**4), 1e-5)


def test_embeddings_and_long_blocks_get_grafted_sgd(rng):
    grads = random_grads(rng, (9, 4), 3)
    keywords = dict(b2=0.9, b1=0.0, fallback='sgd')
    routed = scale_by(layout={'': LeafRule(precondition=False)}, **keywords)
    long = scale_by(max_block_dim=8, **keywords)
    w = oracles.normalized_rms_direction([np.asarray(g) for g in grads], 0.9)
    g = np.asarray(grads[-1])
    for tx in (routed, long):
        updates, state = directions(tx, grads)
        assert_close(updates[-1], g * np.linalg.norm(w) / np.linalg.norm(g), 1e-5)
        assert state.basis == optax.MaskedNode()
    table = precond_optax.plan(long, grads[0])
    assert table.leaves[0].treatment == 'SGD direction, blocks of 9 > max_block_dim=8'


def test_embeddings_and_long_blocks_get_the_grafting_rule_s_update(rng):
    grads = random_grads(rng, (9, 4), 3)
    keywords = dict(b2=0.9, b1=0.0)
    routed = scale_by(layout={'': LeafRule(precondition=False)}, **keywords)
    long = scale_by(max_block_dim=8, **keywords)
    w = oracles.normalized_rms_direction([np.asarray(g) for g in grads], 0.9)
    for tx, why in ((routed, ''), (long, ', blocks of 9 > max_block_dim=8')):
        updates, _ = directions(tx, grads)
        assert_close(updates[-1], w, 1e-5)
        table = precond_optax.plan(tx, grads[0])
        assert table.leaves[0].treatment == f'grafting direction{why}'
    taken = [directions(scale_by(**keywords, fallback=f), grads)[0] for f in ('sgd', 'graft')]
    np.testing.assert_array_equal(*taken)  # what is preconditioned hangs not on it


def test_plan_says_what_each_leaf_gets():
    shapes = {'kernel': (3, 8, 6), 'bias': (6,), 'embed': (10, 4), 'small': (8, 2)}
    params = {k: jnp.zeros(s) for k, s in shapes.items()}
    layout = {
        'kernel': LeafRule(batch_axes=1),
        'embed': LeafRule(precondition=False),
        'small': LeafRule(rank=2),
    }
    tx = precond_optax.shared_basis(1e-3, rank=4, layout=layout)
    leaves = {leaf.path: leaf for leaf in precond_optax.plan(tx, params).leaves}
    assert leaves['kernel'].treatment == 'shared basis, 18 blocks of 8, rank 4'
    assert leaves['bias'].treatment == 'grafting direction'
    assert leaves['embed'].treatment == 'grafting direction'
    assert leaves['small'].treatment == 'shared basis, 2 blocks of 8, rank 2'
    # mu, the graft's nu; the basis; R and its root; rho.
    held = 3 * (2 * 8 * 6 + 4 * 8 + 6 * 2 * 16 + 6)
    assert leaves['kernel'].state_bytes == 4 * held


def test_start_step_is_the_grafting_direction_before(rng):
    grads = random_grads(rng, (6, 5), 4)
    keywords = dict(b1=0.0, b2=0.9, rank=3)
    late, _ = directions(scale_by(**keywords, start_step=2), grads)
    now, _ = directions(scale_by(**keywords), grads)
    arrays = [np.asarray(g) for g in grads]
    for step in (1, 2):
        expected = oracles.normalized_rms_direction(arrays[:step], 0.9)
        assert_close(late[step - 1], expected, 1e-5)
    # The statistics were gathered all the time.
    for step in (3, 4):
        np.testing.assert_allclose(late[step - 1], now[step - 1], rtol=1e-6)


def test_refreshes_take_turns_and_statistics_miss_nothing(rng):
    shapes = {'a': (6, 9), 'b': (6, 5), 'c': (6, 4)}
    grads = [{k: random_grads(rng, s, 1)[0] for k, s in shapes.items()} for _ in range(9)]
    tx = scale_by(**PLAIN, rank=3, update_every=3)
    state, bases = tx.init(grads[0]), []
    update = jax.jit(tx.update)
    for grad in grads:
        _, new = update(grad, state)
        bases.append({k: bool(np.any(new.basis[k] != state.basis[k])) for k in shapes})
        state = new
    # All at first, then one in each step, the dearest first.
    assert [''.join(k for k in shapes if moved[k]) for moved in bases] == [
        'abc',
        *'bcabcabc',
    ]
    # With a basis for everything nothing is lost in between: R is the sum of all.
    tx = scale_by(**PLAIN, rank=6, update_every=4)
    _, state = directions(tx, [g['a'] for g in grads])
    rows, flat = np.asarray(state.basis), np.asarray(state.coefficients).reshape(9, 6, 6)
    held = rows.T @ (flat + np.asarray(state.residual)[:, None, None] * np.eye(6)) @ rows
    total = sum(np.einsum('ai,bi->iab', g['a'], g['a']) for g in grads)
    np.testing.assert_allclose(held, total, rtol=1e-3, atol=1e-3)


def test_oversampling_and_more_iterations_hold_more(rng):
    """On one gradient the best subspace is known: of the leading left singular vectors."""
    grad = jnp.asarray(rng.normal(size=(30, 20)) * 1.2 ** -np.arange(30)[:, None], 'float32')
    dense = sum(np.outer(g, g) @ np.outer(g, g) for g in np.asarray(grad, np.float64).T)
    best = np.linalg.eigvalsh(dense)[-4:].sum()

    def held(**keywords):
        _, state = directions(scale_by(**PLAIN, rank=4, **keywords), [grad])
        rows = np.asarray(state.basis, np.float64)
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-5)
        return np.trace(rows @ dense @ rows.T) / best

    assert held() < held(oversampling=8) <= 1.00001
    assert held() < held(power_iterations=3) <= 1.00001
    assert held(oversampling=26, power_iterations=2) > 0.9999


def test_scale_law_and_permuted_outputs(rng):
    grads = random_grads(rng, (6, 5), 4)
    order = rng.permutation(5)
    for keywords in (PLAIN, dict(b2=0.9, eps=1e-2)):
        tx = scale_by(**keywords, rank=3)
        updates, _ = directions(tx, grads)
        permuted, _ = directions(tx, [g[:, order] for g in grads])
        np.testing.assert_allclose(permuted[-1], updates[-1][:, order], rtol=1e-3, atol=1e-4)
    # Powers of two: exactly the same numbers, so that nothing hides in a tolerance.
    plain, _ = directions(scale_by(**PLAIN | {'eps': 0.0}, rank=3), grads)
    scaled, _ = directions(scale_by(**PLAIN | {'eps': 0.0}, rank=3), [64 * g for g in grads])
    np.testing.assert_array_equal(scaled[-1], plain[-1])


def test_failed_roots_are_counted(rng, monkeypatch):
    decompose = matrix_root.decompose

    def gives_up_on_the_first(matrices):
        values, vectors = decompose(matrices)
        return (values.at[0].set(jnp.nan), vectors) if matrices.ndim > 2 else (values, vectors)

    grads = [{'bias': jnp.ones(3), 'kernel': g} for g in random_grads(rng, (7, 3), 3)]
    monkeypatch.setattr(matrix_root, 'decompose', gives_up_on_the_first)
    jax.clear_caches()
    updates, state = directions(scale_by(rank=2), grads)
    jax.clear_caches()
    assert np.asarray(state.failed_roots).tolist() == [0, 3]
    assert np.all(np.isfinite(updates[-1]['kernel']))


@pytest.mark.parametrize(
    ('update_every', 'root'), [(1, 'auto'), (3, 'auto'), (1, 'newton_schulz')]
)
def test_statistics_in_bfloat16(rng, update_every, root):
    grads = random_grads(rng, (6, 5), 20)
    keywords = dict(b2=0.9, eps=1e-2, rank=3, update_every=update_every, root=root)
    exact, _ = directions(scale_by(**keywords), grads)
    rounded, state = directions(scale_by(**keywords, stats_dtype='bfloat16'), grads)
    assert state.coefficients.dtype == state.root.dtype == jnp.bfloat16
    assert state.basis.dtype == state.residual.dtype == jnp.float32
    assert not np.any(state.failed_roots)
    assert 0 < np.linalg.norm(rounded[-1] - exact[-1]) < 0.05 * np.linalg.norm(exact[-1])


@pytest.mark.parametrize('root', ['eigh', 'newton_schulz'])
def test_coefficients_that_rounding_makes_indefinite(rng, root):
    """Fewer gradients than the block has entries, in full rank: half of R is rounding."""
    grads = random_grads(rng, (24, 6), 12)
    keywords = PLAIN | {'eps': 1e-8, 'rank': 24, 'root': root}
    exact, _ = directions(scale_by(**keywords), grads)
    rounded, state = directions(scale_by(**keywords, stats_dtype='bfloat16'), grads)
    assert not np.any(state.failed_roots)
    pair = [np.ravel(x[-1]) / np.linalg.norm(x[-1]) for x in (exact, rounded)]
    assert pair[0] @ pair[1] > 0.95


def test_all_options_under_scan_jit_and_injection(rng):
    grads = jnp.asarray(rng.normal(size=(7, 2, 6, 5)), 'float32')  # steps, layers, leaf
    options = dict(
        rank=2,
        b2=0.9,
        oversampling=2,
        power_iterations=2,
        update_every=2,
        start_step=1,
        nesterov=True,
        graft='adam',
        root='newton_schulz',
        residual_norm='frobenius',
        mu_dtype='bfloat16',
        layout={'': LeafRule(batch_axes=1)},
    )
    static = (*(k for k, v in options.items() if not isinstance(v, float)), 'max_block_dim')
    injected = optax.inject_hyperparams(
        precond_optax.shared_basis, static_args=(*static, 'seed', 'stats_dtype', 'mask')
    )
    outputs = []
    for factory in (precond_optax.shared_basis, injected):
        tx = factory(learning_rate=0.1, **options)

        def step(state, grad, tx=tx):
            updates, state = tx.update(grad, state, grad)
            return state, updates

        _, updates = jax.lax.scan(step, tx.init(grads[0]), grads)
        assert np.all(np.isfinite(updates))
        outputs.append(updates)
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)


def test_seeds_and_paths_give_other_bases_and_layers_the_same():
    params = {'a': jnp.zeros((2, 6, 5)), 'b': jnp.zeros((2, 6, 5))}
    layout = {'': LeafRule(batch_axes=1)}
    state = scale_by(rank=2, layout=layout).init(params)
    np.testing.assert_array_equal(state.basis['a'][0], state.basis['a'][1])
    assert np.any(state.basis['a'] != state.basis['b'])
    other = scale_by(rank=2, layout=layout, seed=1).init(params)
    assert np.any(state.basis['a'] != other.basis['a'])


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        ({'b1': 1.0}, r'b1 must be in \[0, 1\), got 1.0'),
        ({'b2': 1.1}, r'b2 must be in \[0, 1\], got 1.1'),
        ({'eps': -1.0}, r'eps must be in \[0, inf\), got -1.0'),
        ({'rank': 0}, 'rank must be an integer >= 1, got 0'),
        ({'power_iterations': 0}, 'power_iterations must be an integer >= 1, got 0'),
        ({'oversampling': -1}, 'oversampling must be an integer >= 0, got -1'),
        ({'update_every': 0}, 'update_every must be an integer >= 1, got 0'),
        ({'max_block_dim': 0}, 'max_block_dim must be an integer >= 1, got 0'),
        ({'fallback': 'adam'}, "fallback must be one of 'sgd', 'graft', got 'adam'"),
        ({'start_step': -1}, r'start_step must be in \[0, inf\), got -1'),
        (
            {'root': 'cholesky'},
            "root must be one of 'eigh', 'newton_schulz', 'auto', got 'cholesky'",
        ),
        ({'residual_norm': 'max'}, "residual_norm must be one of 'spectral', 'frobenius'"),
        ({'graft': 'adamw'}, 'graft must be one of'),
        ({'nesterov': 1}, 'nesterov must be True or False, got 1'),
        ({'stats_dtype': 'int8'}, 'stats_dtype must be None or a floating dtype'),
    ],
)
def test_wrong_arguments_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        scale_by(**keywords)


def test_wrong_rules_are_named():
    for rule, message in (
        (dict(output_axes=()), 'output_axes must be None or a tuple of one or more axes'),
        (dict(output_axes=-1), 'output_axes must be None or a tuple of one or more axes'),
        (dict(rank=0), 'rank must be an integer >= 1'),
    ):
        with pytest.raises(ValueError, match=message):
            LeafRule(**rule)
    for axes, batch in (((0,), 1), ((2,), 0), ((0, 0), 0)):
        tx = scale_by(layout={'k': LeafRule(output_axes=axes, batch_axes=batch)})
        with pytest.raises(ValueError, match=r"kernel: rule 'k' asks for output_axes="):
            tx.init({'kernel': jnp.zeros((4, 3))})


def test_theorem_2_holds_on_a_run(rng):
    """sum_i sqrt(rho_i) <= (3 m^3)^(1/4) (sum_i Tr H_i)^(1/2), on a network's own gradients."""
    inputs, hidden, outputs = 12, 10, 6
    x = jnp.asarray(rng.normal(size=(50, 20, inputs)) / np.arange(1, inputs + 1), 'float32')
    target = jnp.asarray(rng.normal(size=(inputs, outputs)), 'float32')
    params = {
        'one': jnp.asarray(rng.normal(size=(inputs, hidden)) / 3, 'float32'),
        'two': jnp.asarray(rng.normal(size=(hidden, outputs)) / 3, 'float32'),
    }
    for norm in ('spectral', 'frobenius'):
        tx = precond_optax.shared_basis(1e-2, b2=1.0, rank=3, residual_norm=norm)

        @jax.jit
        def step(params, state, x, tx=tx):
            def loss(p):
                return jnp.mean((jnp.tanh(x @ p['one']) @ p['two'] - x @ target) ** 2)

            grads = jax.grad(loss)(params)
            updates, state = tx.update(grads, state)
            return optax.apply_updates(params, updates), state, grads

        moved, state, traces = params, tx.init(params), dict.fromkeys(params, 0.0)
        for batch in x:
            moved, state, grads = step(moved, state, batch)
            traces = {k: traces[k] + float(jnp.sum(grads[k] ** 2)) for k in params}
        for name, trace in traces.items():
            rho = np.asarray(state[0].residual[name])
            assert rho.min() > 0
            assert np.sqrt(rho).sum() <= (3 * len(rho) ** 3) ** 0.25 * np.sqrt(trace)


def test_theorem_1_bounds_the_regret(rng):
    """Online least squares, convex: the regret stays below the bound of the actual run."""
    inputs, outputs, steps = 8, 4, 300
    x = rng.normal(size=(steps, inputs)) / np.arange(1, inputs + 1)
    y = x @ rng.normal(size=(inputs, outputs)) + 0.3 * rng.normal(size=(steps, outputs))
    best, *_ = np.linalg.lstsq(x, y, rcond=None)
    diameter = 2 * np.linalg.norm(best)
    tx = optax.chain(scale_by(**PLAIN | {'eps': 1e-8}, rank=3), optax.scale(-diameter / 2**0.5))

    def loss(params, x, y):
        return jnp.sum((x @ params - y) ** 2) / 2

    @jax.jit
    def step(carry, example):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params, *example)
        updates, state = tx.update(grad, state)
        params = optax.apply_updates(params, updates)
        # K is a ball; the proof's projection is one in another norm, which the iterates that
        # stay inside do not need.
        return (params, state), (value, grad, jnp.linalg.norm(params))

    start = jnp.zeros((inputs, outputs))
    examples = (jnp.asarray(x, 'float32'), jnp.asarray(y, 'float32'))
    (_, state), (losses, grads, sizes) = jax.lax.scan(step, (start, tx.init(start)), examples)
    regret = float(losses.sum()) - float(((x @ best - y) ** 2).sum() / 2)
    second = np.einsum('tai,tbi->iab', grads, grads)
    traces = np.sqrt(np.linalg.eigvalsh(second).clip(min=0)).sum()
    reached = max(float(np.linalg.norm(best)) + float(sizes.max()), diameter)
    bound = 2**0.5 * (reached * traces + inputs * np.sqrt(state[0].residual).sum())
    assert 0 < regret <= bound
    # And it is sublinear: the second half adds less than the first.
    half = np.asarray(losses) - ((x @ best - y) ** 2).sum(axis=1) / 2
    assert half[steps // 2 :].sum() < half[: steps // 2].sum()
