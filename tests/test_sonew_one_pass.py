"""SONew with `impl='pallas'`, interpreted: as XLA's, for the leaves that the kernel takes."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from precond_optax import LeafRule, placement
from precond_optax.kernels import cuts, fused, tiles
from tests import oracles, quick
from tests.compiled import border, collectives

SHAPES = {'kernel': (64, 256), 'layers': (2, 40, 128), 'heads': (24, 8, 128), 'bias': (7,)}
LAYOUT = {'layers': LeafRule(batch_axes=1)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def sonew(impl, **keywords):
    return precond_optax.sonew(0.1, **{'layout': LAYOUT, 'eps': 1e-2, 'impl': impl} | keywords)


def gradients(rng, like=PARAMS):
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), like)


def taken(tx, params=PARAMS):
    return {e.path for e in precond_optax.plan(tx, params).leaves if 'one pass' in e.treatment}


def assert_same(got, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=3e-5 * jnp.max(jnp.abs(b), initial=1e-6)
        ),
        got,
        expected,
    )


@pytest.mark.parametrize(
    'keywords',
    quick.every(
        3,
        [
            {},
            {'nesterov': True},
            {'band': 0},
            {'band': 3, 'graft': 'momentum'},
            {'graft': None},
            {'graft': 'sgd'},
            {'graft': 'rmsprop_normalized'},
            {'graft': optax.scale_by_rms(0.9)},
            {'relative_eps': 1e-1},
            {'relative_eps': 1e-1, 'band': 3, 'eps': 0.0},
            {'relative_eps': 1e-1, 'band': 0},
            {'order': 'C', 'nesterov': True},
            {'order': 'C', 'band': 3, 'relative_eps': 1e-1},
            {'order': 'C', 'band': 0},
        ],
    ),
)
def test_one_pass_is_xlas(keywords, rng):
    ours, theirs = sonew('pallas', **keywords), sonew('xla', **keywords)
    assert taken(ours) == {'kernel', 'layers', 'heads'}
    assert not taken(theirs)
    states = [ours.init(PARAMS), theirs.init(PARAMS)]
    update = [jax.jit(tx.update) for tx in (ours, theirs)]
    for _ in range(3):
        grads = gradients(rng)
        (got, states[0]), (expected, states[1]) = (
            step(grads, state) for step, state in zip(update, states, strict=True)
        )
        assert_same(got, expected)
    assert_same(states[0], states[1])


def trained(tx, grads, params, step):
    state, step = tx.init(params), jax.jit(functools.partial(step, tx))
    for grad in grads:
        params, state = step(grad, state, params)
    return params, state


def by_updates(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


MOVES = [
    ({'delayed_graft': True, 'weight_decay': 0.1}, 'float32'),
    ({'delayed_graft': True, 'graft': 'rmsprop_normalized', 'nesterov': True}, 'float32'),
    ({'graft': None, 'band': 0}, 'float32'),
    ({'graft': None, 'order': 'C', 'band': 3}, 'float32'),
    ({'delayed_graft': True, 'relative_eps': 0.1, 'order': 'C'}, 'float32'),
    ({'delayed_graft': True, 'mu_dtype': 'bfloat16', 'stats_dtype': 'bfloat16'}, 'float32'),
    ({'delayed_graft': True, 'band': 2, 'mu_dtype': 'float32'}, 'bfloat16'),
]


@pytest.mark.parametrize(('keywords', 'dtype'), quick.every(2, MOVES))
def test_parameters_moved_by_the_kernel_are_xlas(keywords, dtype, rng, moving):
    """By `update_and_apply`; XLA's take their updates, and sum them up."""
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), PARAMS)
    grads = [gradients(rng, params) for _ in range(3)]
    ours, theirs = sonew('pallas', **keywords), sonew('xla', **keywords)
    got, state = trained(ours, grads, params, precond_optax.update_and_apply)
    assert sorted(moving) == sorted(SHAPES[name] for name in ('kernel', 'layers', 'heads'))
    expected, held = trained(theirs, grads, params, by_updates)
    if dtype == 'bfloat16' or 'stats_dtype' in keywords:
        # Of the reference each update is rounded before the sum.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.float32(a), np.float32(b), rtol=2**-7, atol=2**-7
            ),
            got,
            expected,
        )
        return
    assert_same(got, expected)
    assert_same(state, held)


@pytest.mark.parametrize('keywords', [{}, {'diagnostics': True, 'graft': None}])
def test_where_it_is_not_known_how_far_parameters_move_after_the_kernel(keywords, rng, moving):
    params, grads = gradients(rng), [gradients(rng)]
    tx = sonew('pallas', **keywords)
    got, _ = trained(tx, grads, params, precond_optax.update_and_apply)
    assert not moving
    assert_same(got, trained(tx, grads, params, by_updates)[0])


@pytest.fixture
def moving(monkeypatch):
    """The leaves whose parameters a kernel moves."""
    names, real = [], fused.one_pass

    def noted(leaf, *args):
        if leaf.moves:
            names.append(args[0].shape)
        return real(leaf, *args)

    monkeypatch.setattr(fused, 'one_pass', noted)
    return names


@pytest.mark.parametrize(
    'keywords',
    [
        {'band': cuts.MAX_BAND + 1},
        {'diagnostics': True},
        {'mu_dtype': 'float16'},
        {'stats_dtype': 'float16'},
    ],
)
def test_what_the_kernel_does_not_take_is_xlas(keywords, rng):
    tx = sonew('pallas', **keywords)
    assert not taken(tx)
    got, _ = tx.update(gradients(rng), tx.init(PARAMS))
    assert jnp.isfinite(optax.tree.norm(got))


@pytest.mark.parametrize('dtype', ['float16', 'float64'])
def test_other_dtypes_are_xlas(dtype):
    with jax.enable_x64(dtype == 'float64'):
        assert not taken(sonew('pallas'), optax.tree.cast(PARAMS, jnp.dtype(dtype)))


LOW = [
    ({'mu_dtype': 'bfloat16'}, 'float32'),
    ({'stats_dtype': 'bfloat16'}, 'float32'),
    ({'stats_dtype': 'bfloat16', 'stochastic_rounding': False, 'band': 2}, 'float32'),
    ({'stats_dtype': 'bfloat16', 'mu_dtype': 'bfloat16', 'band': 4}, 'float32'),
    ({}, 'bfloat16'),
    ({'stats_dtype': 'bfloat16', 'mu_dtype': 'float32', 'band': 0}, 'bfloat16'),
    ({'stats_dtype': 'bfloat16', 'order': 'C', 'band': 2}, 'bfloat16'),
]


def assert_bits(got, expected):
    """The same arrays; of those in bfloat16 a few entries, rounded from other sides, excepted."""
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        if a.size > 100:
            # 0.9 m + 0.1 g of two bfloat16 numbers is often half way between two others.
            assert np.mean(np.abs(a - b) > 1e-4 * np.abs(b).max()) < 2e-2
        np.testing.assert_allclose(a, b, rtol=2**-6, atol=1e-3 * np.abs(b).max(initial=1e-6))


@pytest.mark.parametrize(('keywords', 'dtype'), quick.every(3, LOW))
def test_bfloat16_in_one_pass_is_xlas_bit_by_bit(keywords, dtype, rng):
    """Each entry is rounded by the same noise: of its key and place alone."""
    ours, theirs = sonew('pallas', **keywords), sonew('xla', **keywords)
    params = optax.tree.cast(PARAMS, jnp.dtype(dtype))
    assert taken(ours, params) == {'kernel', 'layers', 'heads'}
    state = theirs.init(params)
    for _ in range(2):
        _, state = jax.jit(theirs.update)(gradients(rng, params), state)
    grads = gradients(rng, params)
    got, expected = (jax.jit(tx.update)(grads, state) for tx in (ours, theirs))
    assert_bits(got, expected)


@pytest.mark.parametrize('order', ['F', 'C'])
def test_the_mean_keeps_its_dtype_under_gradients_of_another(order, rng):
    """Of float32 parameters and bfloat16 gradients it is float32, and so goes into the kernel."""
    ours, theirs = sonew('pallas', order=order), sonew('xla', order=order)
    states = [tx.init(PARAMS) for tx in (ours, theirs)]
    like = optax.tree.cast(PARAMS, jnp.bfloat16)
    for _ in range(4):
        grads = gradients(rng, like)
        got, states[0] = jax.jit(ours.update)(grads, states[0])
        expected, states[1] = jax.jit(theirs.update)(grads, states[1])
    assert_same(states[0], states[1])
    # In bfloat16 a rounding to another side is 2**-8 of a number.
    wide = [optax.tree.cast(x, jnp.float32) for x in (got, expected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-6, atol=1e-4), *wide)


def test_wide_statistics_under_narrow_gradients_are_xlas(rng):
    with jax.enable_x64(True):
        params = optax.tree.cast(PARAMS, jnp.float64)
        ours, theirs = sonew('pallas'), sonew('xla')
        grads = gradients(rng)
        got, state = ours.update(grads, ours.init(params))
        expected, _ = theirs.update(grads, theirs.init(params))
        assert state[0].nu['kernel'].dtype == jnp.float64
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_what_the_kernel_cannot_do_is_said(rng):
    params = jnp.zeros((64, 256))
    tx = precond_optax.sonew(0.1, impl='pallas')
    state = tx.init(params)
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated .*impl='xla'"):
        jax.grad(lambda g: jnp.sum(tx.update(g, state)[0]))(params)
    mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        grads = jax.device_put(gradients(rng, jnp.zeros((2, 64, 256))), P('x'))
        with pytest.raises(NotImplementedError, match='vmap whose axis the mesh shares out'):
            jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(params))[0]))(grads)


@pytest.fixture
def for_gpus(monkeypatch):
    """Traces are for GPUs, whose kernel this machine interprets."""
    monkeypatch.setattr(placement, 'platform', lambda: 'gpu')
    compiled = fused.one_pass
    compiled.clear_cache()
    yield
    compiled.clear_cache()


@pytest.mark.parametrize(
    'keywords',
    quick.every(
        2,
        [
            {'nesterov': True, 'graft': 'momentum'},
            {'band': 3, 'graft': None},
            {'relative_eps': 1e-1, 'band': 0},
            {'relative_eps': 1e-1, 'eps': 0.0},
        ],
        first=1,
    ),
)
def test_on_gpus_one_pass_is_xlas(keywords, rng, for_gpus):
    test_one_pass_is_xlas(keywords, rng)


@pytest.mark.parametrize(('keywords', 'dtype'), quick.every(3, [LOW[5], LOW[1], LOW[2]]))
def test_on_gpus_bfloat16_in_one_pass_is_xlas(keywords, dtype, rng, for_gpus):
    test_bfloat16_in_one_pass_is_xlas_bit_by_bit(keywords, dtype, rng)


def test_gpus_take_any_matrix(rng, for_gpus):
    """One row, one column, no multiple of anything; and so do their meshes."""
    tx = sonew('pallas')
    params = {'row': jnp.zeros((1, 5)), 'column': jnp.zeros((5, 1)), 'odd': jnp.zeros((3, 5, 7))}
    assert taken(tx, params) == set(params)
    whole = sonew('xla')
    states = [tx.init(params), whole.init(params)]
    grads = gradients(rng, params)
    assert_same(tx.update(grads, states[0]), whole.update(grads, states[1]))


def test_auto_is_xla_here():
    assert not taken(sonew('auto'))
    assert not taken(precond_optax.sonew(0.1))


def test_auto_is_the_kernel_on_tpus(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    assert taken(sonew('auto')) == {'kernel', 'layers', 'heads'}
    assert not taken(sonew('xla'))


def test_several_in_one_program(rng):
    """As sweeps have it: over hyperparameters, which the kernel has as scalars."""
    params = PARAMS['kernel']
    grads = jnp.asarray(rng.normal(size=(3, *params.shape)), jnp.float32)

    def step(impl, grad, b2):
        tx = precond_optax.sonew(0.1, b2=b2, eps=1e-2, impl=impl)
        return tx.update(grad, tx.init(params))[0]

    decays = jnp.array([0.9, 0.8, 0.7])
    got, expected = (
        jax.jit(jax.vmap(lambda *x, impl=impl: step(impl, *x)))(grads, decays)
        for impl in ('pallas', 'xla')
    )
    assert_same(got, expected)


# Shape, batch axes, how it is shared out by a mesh (4, 2), bands, whether parts fill a tile.
PARTS = [
    ((64, 512), 0, P('x', 'y'), 1, True),
    ((64, 512), 0, P('y', 'x'), 4, True),
    ((64, 512), 0, P(('x', 'y')), 1, True),
    ((64, 1024), 0, P(None, ('y', 'x')), 2, True),
    ((64, 512), 0, P(None, ('y', 'x')), 2, False),
    ((64, 512), 0, P('x'), 0, True),
    ((4, 64, 256), 1, P('y', 'x'), 1, True),
    ((64, 8, 128), 0, P(None, ('x', 'y')), 2, True),  # one head for each
    ((64, 16, 128), 0, P('x', 'y'), 1, True),
    ((32, 256), 0, P(('x', 'y')), 1, False),  # four rows for each
    ((64, 256), 0, P(None, 'x'), 4, False),
    ((64, 512), 0, P(), 1, True),
]


# The same of chains that go across the columns of tiles: along the last axis first, or along the
# first one of a leaf that a TPU holds by columns.
ACROSS = [
    ((64, 1024), 0, P('x', 'y'), 1, 'C'),
    ((64, 1024), 0, P('y', 'x'), 4, 'C'),
    ((64, 512), 0, P(('x', 'y')), 2, 'C'),
    ((16, 1024), 0, P(None, ('y', 'x')), 1, 'C'),
    ((4, 64, 256), 1, P('y', 'x'), 1, 'C'),
    ((8, 16, 256), 0, P('x', None, 'y'), 2, 'C'),
    ((64, 8, 128), 0, P('y', 'x'), 1, 'C'),
    ((64, 512), 0, P(), 1, 'C'),
    ((1024, 90), 0, P('x', 'y'), 1, 'F'),
    ((512, 8, 64), 0, P('x', 'y'), 1, 'F'),
    ((64, 8, 128), 0, P(None, ('x', 'y')), 1, 'C'),  # one head for each
]


def in_a_mesh(kind, spec, tx, grads):
    """Some steps of a leaf, and what the compiled one moves between devices."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind,) * 2)
    grads = jax.device_put(grads, NamedSharding(mesh, spec))
    tx = precond_optax.explicit_sharding(tx, grads[0])
    places = precond_optax.state_sharding(tx, grads[0])
    state = jax.jit(tx.init, out_shardings=places)(grads[0])
    step = jax.jit(tx.update).lower(grads[0], state).compile()
    for grad in grads:
        updates, state = step(grad, state)
    return updates, state, collectives(step.as_text()), border(grads[0])


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'spec', 'band', 'fills', 'order', 'kind'),
    [
        *quick.every(4, [(*case, 'F', AxisType.Explicit) for case in PARTS]),
        *quick.every(4, [(*case, 'F', AxisType.Auto) for case in PARTS], first=2),
        *quick.every(4, [(*case[:-1], True, case[-1], AxisType.Explicit) for case in ACROSS]),
        *quick.every(4, [(*case[:-1], True, case[-1], AxisType.Auto) for case in ACROSS], first=2),
    ],
)
def test_each_device_steps_its_part(kind, shape, batch_axes, spec, band, fills, order, rng):
    """In explicit axes by themselves, in others by `explicit_sharding`."""
    layout = {'': LeafRule(batch_axes=batch_axes)}
    keywords = dict(band=band, layout=layout, eps=0.1, order=order)
    ours, theirs = (sonew(impl, **keywords) for impl in ('pallas', 'xla'))
    grads = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)]
    state = theirs.init(grads[0])
    for grad in grads:
        expected, state = theirs.update(grad, state)
    updates, held, found, edge = in_a_mesh(kind, spec, ours, grads)
    assert_same(jax.device_get((updates, held)), (expected, state))
    assert {kind for kind, _ in found} <= {'collective-permute', 'all-reduce'}
    permutes = [size for kind, size in found if kind == 'collective-permute']
    assert sum(size for kind, size in found if kind == 'all-reduce') <= 8 * 4
    if fills:
        # Of all arrays at once, each way along each axis that is cut: as many rows along the
        # fastest axis as the band is wide, and of the faster axes but the ends.
        axes, sizes = chain_axes(shape, batch_axes, order), part(shape, spec)
        cut = [k for k, axis in enumerate(axes) if sizes[axis] < shape[axis]]
        rows = sum(math.prod(sizes[axis] for axis in axes[k + 1 :]) for k in cut)
        rows *= math.prod(sizes[:batch_axes])
        assert len(permutes) == 2 * len(cut) * bool(band)
        assert sum(permutes) == 2 * 4 * (3 + band) * band * rows
    else:
        assert sum(permutes) <= (2 + band) * band * edge


def chain_axes(shape, batch_axes, order):
    """Fastest first."""
    return tuple(range(batch_axes, len(shape)))[:: 1 if order == 'F' else -1]


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'spec', 'band', 'fills', 'order'),
    [
        *quick.every(3, [(*PARTS[i], 'F') for i in (0, 2, 6, 8, 9, 10, 11)]),
        *quick.every(2, [(*ACROSS[i][:-1], True, ACROSS[i][-1]) for i in (0, 4, 8)]),
    ],
)
def test_relative_damping_is_the_leaf_s(shape, batch_axes, spec, band, fills, order, rng):
    """By the largest row of all devices' parts; beside what is moved anyway one number a chain."""
    layout = {'': LeafRule(batch_axes=batch_axes)}
    keywords = dict(band=band, layout=layout, eps=0.0, relative_eps=0.1, order=order)
    ours, theirs = (sonew(impl, **keywords) for impl in ('pallas', 'xla'))
    grads = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)]
    grads = [grad.at[..., 3, 5].set(20.0) for grad in grads]  # on one device alone
    state = theirs.init(grads[0])
    for grad in grads:
        expected, state = theirs.update(grad, state)
    updates, held, found, _ = in_a_mesh(AxisType.Explicit, spec, ours, grads)
    assert_same(jax.device_get((updates, held)), (expected, state))
    assert {kind for kind, _ in found} <= {'collective-permute', 'all-reduce'}
    assert sum(size for kind, size in found if kind == 'all-reduce') <= 3 * 4 * 4


def part(shape, spec):
    """The sizes of a device's part in the mesh (4, 2)."""
    names = [n if isinstance(n, tuple) else (n,) for n in (*spec, *[None] * len(shape))]
    counts = {'x': 4, 'y': 2}
    return [
        size // math.prod(counts.get(name, 1) for name in own)
        for size, own in zip(shape, names, strict=False)
    ]


def test_the_parts_are_as_said():
    """Of those that fill a tile and those that do not."""
    for shape, batch_axes, spec, band, fills in PARTS:
        axes = chain_axes(shape, batch_axes, 'F')
        leaf = tiles.cut(part(shape, spec), batch_axes, axes, band)
        assert isinstance(leaf, cuts.Down) if fills else leaf is None
    for shape, batch_axes, spec, band, order in ACROSS:
        axes = chain_axes(shape, batch_axes, order)
        assert isinstance(tiles.cut(part(shape, spec), batch_axes, axes, band), cuts.Across)


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'spec', 'band', 'fills', 'order'),
    [
        *quick.every(3, [(*PARTS[i], 'F') for i in (0, 4, 6, 8, 9)]),
        *quick.every(3, [(*ACROSS[i][:-1], True, ACROSS[i][-1]) for i in (0, 4, 5, 6, 8, 9, 10)]),
    ],
)
def test_a_part_s_noise_is_the_leaf_s(shape, batch_axes, spec, band, fills, order, rng):
    """One device or eight, a kernel or not: each entry is rounded by what its place draws."""
    keywords = dict(band=band, eps=0.1, stats_dtype='bfloat16', mu_dtype='bfloat16', order=order)
    layout = {'': LeafRule(batch_axes=batch_axes)}
    ours, theirs = (sonew(impl, layout=layout, **keywords) for impl in ('pallas', 'xla'))
    grads = [jnp.asarray(rng.normal(size=shape), jnp.float32)]
    expected = theirs.update(grads[0], theirs.init(grads[0]))
    updates, held, _, _ = in_a_mesh(AxisType.Explicit, spec, ours, grads)
    assert_bits(jax.device_get((updates, held)), expected)


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'spec', 'band', 'fills'),
    quick.every(2, [PARTS[i] for i in (0, 1, 4, 6, 8, 9)]),
)
def test_on_gpus_each_steps_its_part(shape, batch_axes, spec, band, fills, rng, for_gpus):
    """Whatever the part: there are no tiles to fill."""
    del fills
    kind = AxisType.Explicit
    test_each_device_steps_its_part(kind, shape, batch_axes, spec, band, True, 'F', rng)


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'spec', 'band', 'fills'), [PARTS[4], PARTS[6], PARTS[8]]
)
def test_on_gpus_a_part_s_noise_is_the_leaf_s(shape, batch_axes, spec, band, fills, rng, for_gpus):
    test_a_part_s_noise_is_the_leaf_s(shape, batch_axes, spec, band, fills, 'F', rng)


def test_on_gpus_relative_damping_is_the_leaf_s(rng, for_gpus):
    test_relative_damping_is_the_leaf_s(*PARTS[6], 'F', rng)


@pytest.mark.parametrize('kind', [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'spec', 'order'),
    [
        (*PARTS[0][:3], 'F'),
        (*PARTS[6][:3], 'F'),
        (*PARTS[9][:3], 'F'),  # parts that fill no tile
        (*ACROSS[4][:3], 'C'),
    ],
)
def test_each_device_moves_its_part(kind, shape, batch_axes, spec, order, rng, moving):
    layout = {'': LeafRule(batch_axes=batch_axes)}
    keywords = dict(layout=layout, eps=0.1, order=order, delayed_graft=True, weight_decay=0.1)
    ours, theirs = (sonew(impl, **keywords) for impl in ('pallas', 'xla'))
    grads = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4)]
    start = grads.pop()
    expected = trained(theirs, grads, start, by_updates)
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind,) * 2)
    params, *grads = jax.device_put([start, *grads], NamedSharding(mesh, spec))
    tx = precond_optax.explicit_sharding(ours, params)
    state = jax.jit(tx.init, out_shardings=precond_optax.state_sharding(tx, params))(params)
    step = jax.jit(functools.partial(precond_optax.update_and_apply, tx))
    for grad in grads:
        params, state = step(grad, state, params)
    assert moving
    assert params.sharding.is_equivalent_to(grads[0].sharding, params.ndim)
    assert_same(jax.device_get((params, state)), expected)


@pytest.mark.parametrize(('keywords', 'dtype'), MOVES[:3:2])
def test_on_gpus_parameters_moved_by_the_kernel_are_xlas(keywords, dtype, rng, for_gpus, moving):
    test_parameters_moved_by_the_kernel_are_xlas(keywords, dtype, rng, moving)


@pytest.mark.parametrize('kind', [AxisType.Explicit, AxisType.Auto])
def test_merged_heads_in_a_mesh(kind, rng):
    """Which the chain goes along from the last axis on, so the slower axes are not in order."""
    shape, layout = (64, 16, 128), {'': LeafRule(merge_axes=((-2, -1),))}
    ours, theirs = (sonew(impl, band=2, layout=layout, eps=0.1) for impl in ('pallas', 'xla'))
    grads = [jnp.asarray(rng.normal(size=shape), jnp.float32)]
    expected, _ = theirs.update(grads[0], theirs.init(grads[0]))
    updates, _, found, _ = in_a_mesh(kind, P('x', 'y'), ours, grads)
    assert_same(jax.device_get(updates), expected)
    assert len([kind for kind, _ in found if kind == 'collective-permute']) <= 6


def test_a_state_that_lies_otherwise_is_moved(rng, kernels):
    """As by a plain jit of `init`, which leaves it whole: XLA's arithmetic takes it, too."""
    grad = jnp.asarray(rng.normal(size=(64, 256)), jnp.float32)
    expected, _ = sonew('xla', eps=0.1).update(grad, sonew('xla').init(grad))
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Explicit,) * 2)
    tx = sonew('pallas', eps=0.1)
    state = jax.device_put(tx.init(grad), NamedSharding(mesh, P()))
    updates, _ = jax.jit(tx.update)(jax.device_put(grad, NamedSharding(mesh, P('x', 'y'))), state)
    assert_same(jax.device_get(updates), expected)
    assert len(kernels) == 1


@pytest.mark.parametrize(
    'wrap',
    [
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), tx), 3),
        lambda tx: optax.masked(tx, {'a': True, 'b': False}),
    ],
    ids=['MultiSteps', 'apply_if_finite', 'masked'],
)
def test_explicit_sharding_outside_of_wrappers(wrap, rng, kernels):
    grads = {k: jnp.asarray(rng.normal(size=(64, 256)), jnp.float32) for k in 'ab'}
    theirs = wrap(sonew('xla', eps=0.1, layout=None))
    state = theirs.init(grads)
    for _ in range(2):
        expected, state = theirs.update(grads, state, grads)
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    placed = jax.device_put(grads, NamedSharding(mesh, P('x', 'y')))
    ours = precond_optax.explicit_sharding(wrap(sonew('pallas', eps=0.1, layout=None)), placed)
    held = jax.jit(ours.init, out_shardings=precond_optax.state_sharding(ours, placed))(placed)
    for _ in range(2):
        updates, held = jax.jit(ours.update)(placed, held, placed)
    assert_same(jax.device_get(updates), expected)
    assert kernels


@pytest.fixture
def kernels(monkeypatch):
    """How many leaves went through the kernel."""
    calls, real = [], fused.one_pass
    monkeypatch.setattr(fused, 'one_pass', lambda *args: calls.append(args) or real(*args))
    return calls


def test_what_the_compiler_shares_out_is_xlas(rng, kernels):
    """An Auto mesh's leaf, of which a trace knows no place, inside jit and outside of it."""
    tx, grad = sonew('pallas', eps=0.1), gradients(rng)['kernel']
    whole, _ = tx.update(grad, tx.init(grad))
    assert len(kernels) == 1
    mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
    given = jax.device_put(grad, NamedSharding(mesh, P('x')))
    for update in (jax.jit(tx.update), tx.update):
        got, _ = update(given, tx.init(given))
        assert_same(jax.device_get(got), whole)
    assert len(kernels) == 1


@pytest.mark.parametrize('told', [False, True])
def test_what_is_manual_is_xlas(told, rng, kernels):
    """A kernel would have to say how its results vary over the mesh."""
    tx, grad = sonew('pallas', eps=0.1), gradients(rng)['kernel']
    whole, _ = tx.update(grad, tx.init(grad))
    mesh = jax.make_mesh((8,), ('data',), (AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P('data'), out_specs=P(), check_vma=False
    )
    def step(grads):
        mean = jax.lax.pmean(grads[0], 'data')
        return tx.update(mean, tx.init(mean))[0]

    # The same for all but two, which cancel.
    grads = jnp.stack([grad] * 8) + jnp.zeros((8, 1, 1)).at[:2, 0, 0].set(jnp.array([1.0, -1.0]))
    assert_same(jax.jit(step)(grads), whole)
    assert len(kernels) == 1


def test_partly_manual_is_xlas(rng, kernels):
    tx, grad = sonew('pallas', eps=0.1), gradients(rng)['kernel']
    whole, _ = tx.update(grad, tx.init(grad))
    mesh = jax.make_mesh((4, 2), ('data', 'x'), axis_types=(AxisType.Auto,) * 2)

    @functools.partial(
        jax.shard_map, mesh=mesh, axis_names={'data'}, in_specs=P(), out_specs=P(), check_vma=False
    )
    def step(grad):
        return tx.update(grad, tx.init(grad))[0]

    assert_same(jax.jit(step)(jax.device_put(grad, NamedSharding(mesh, P('x')))), whole)
    assert len(kernels) == 1


def test_where_nothing_is_known_auto_is_xla(rng, monkeypatch, kernels):
    """Several devices and no mesh in sight: the compiler may yet share a leaf out."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    tx, grad = sonew('auto', eps=0.1), gradients(rng)['kernel']
    tx.update(grad, tx.init(grad))
    assert not kernels
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    tx.update(grad, tx.init(grad))
    assert len(kernels) == 1


def test_explicit_sharding_passes_on_what_comes_beside_the_gradients():
    """The loss, trees of numbers, a function, and no parameters; in a mesh and on one device."""
    mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
    params = jax.device_put({'kernel': jnp.ones((8, 2))}, NamedSharding(mesh, P('x')))
    got = {}

    def update(updates, state, params=None, *, value, mixed, name):
        got.update(mixed=mixed, name=name, params=params)
        return jax.tree.map(lambda u: value * mixed['w'] * mixed['f'](u), updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    def extra(value):
        return dict(value=value, mixed={'w': 3.0, 'f': jnp.square, 'x': jnp.ones(3)}, name='a')

    def step(tx, grads, value):
        return tx.update(grads, tx.init(grads), **extra(value))[0]

    told = precond_optax.explicit_sharding(tx, params)
    updates = jax.jit(functools.partial(step, told))(params, jnp.float32(2))
    assert jnp.all(updates['kernel'] == 6)
    assert updates['kernel'].sharding.is_equivalent_to(params['kernel'].sharding, 2)
    assert got['params'] is None
    assert (got['name'], got['mixed']['w']) == ('a', 3.0)
    one = precond_optax.explicit_sharding(tx, jax.device_put(params, jax.devices()[0]))
    assert jnp.all(step(one, {'kernel': jnp.ones((8, 2))}, 2.0)['kernel'] == 6)


def test_injected_hyperparameters_leave_the_kernel(rng):
    """What traces all floats, defaults too, but band."""
    ours, theirs = (
        optax.inject_hyperparams(precond_optax.sonew, static_args=('band',))(
            0.1, eps=1e-2, layout=LAYOUT, impl=impl
        )
        for impl in ('pallas', 'xla')
    )
    assert taken(ours) == {'kernel', 'layers', 'heads'}
    grads = gradients(rng)
    got, expected = (jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS) for tx in (ours, theirs))
    assert_same(got, expected)


@pytest.mark.parametrize(('band', 'order'), [(1, 'F'), (3, 'F'), (1, 'C'), (3, 'C')])
def test_one_pass_is_the_oracle_s(band, order, rng):
    grads = [rng.normal(size=(8, 128)) for _ in range(3)]
    tx = precond_optax.sonew(1.0, eps=1e-2, band=band, order=order, impl='pallas')
    params = jnp.zeros((8, 128))
    assert taken(tx, params)
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        got, state = update(jnp.asarray(grad, jnp.float32), state)
    if order == 'C':  # of the transposed, order 'F'
        grads, got = [grad.T for grad in grads], got.T
    expected = oracles.sonew_direction(grads, eps=1e-2, band=band)
    np.testing.assert_allclose(-got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


HARD = {
    'zero': lambda x: 0 * x,
    'huge': lambda x: 1e15 * x,
    'tiny': lambda x: 1e-15 * x,
    'the same': jnp.ones_like,
    'a column of zeros': lambda x: x.at[:, 1].set(0),
    'large and small': lambda x: x * 10.0 ** jnp.arange(-8, 8)[:, None],
}


@pytest.mark.parametrize('kind', HARD)
def test_hard_gradients_in_one_pass(kind, rng):
    """Finite, and the same edges are dropped."""
    params = jnp.zeros((16, 128))
    ours, theirs = (precond_optax.sonew(0.1, eps=0.0, impl=impl) for impl in ('pallas', 'xla'))
    states = [ours.init(params), theirs.init(params)]
    update = [jax.jit(tx.update) for tx in (ours, theirs)]
    for _ in range(3):
        grads = HARD[kind](gradients(rng, params))
        (got, states[0]), (expected, states[1]) = (
            step(grads, state) for step, state in zip(update, states, strict=True)
        )
        assert jnp.all(jnp.isfinite(got))
        assert_same(states[0], states[1])
    # A pivot near the rounding of its row may be dropped by one and not by the other.
    assert np.mean(np.abs(got - expected) > 1e-2 * jnp.max(jnp.abs(expected))) < 0.01


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_in_one_pass_that_is_not_finite_is_skipped(bad, rng):
    """The kernel writes the state in place."""
    params = jnp.zeros((16, 128))
    tx = optax.apply_if_finite(precond_optax.sonew(0.1, impl='pallas'), 3)
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(gradients(rng, params), tx.init(params))
    held = jax.tree.map(np.array, state.inner_state)
    updates, state = update(gradients(rng, params).at[3, 5].set(bad), state)
    assert not np.any(updates)
    assert state.total_notfinite == 1
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, held)


@pytest.mark.parametrize('shape', [(4, 128), (4, 8, 128), (2, 8, 128), (6, 8, 128), (9, 127)])
def test_too_few_rows_or_columns_are_xlas(shape):
    assert not taken(precond_optax.sonew(0.1, impl='pallas'), jnp.zeros(shape))


def test_auto_on_another_backend_of_a_tpu_s_host_is_no_interpreter(monkeypatch, rng):
    """What a trace is for, and where it is compiled in the end, may differ."""
    grads, tx, whole = gradients(rng), sonew('auto'), sonew('xla')
    expected = jax.jit(whole.update)(grads, whole.init(PARAMS))
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    text = jax.jit(tx.update).lower(grads, tx.init(PARAMS)).as_text()
    assert len(text) < 1.5 * len(jax.jit(whole.update).lower(grads, whole.init(PARAMS)).as_text())
    assert_same(jax.jit(tx.update)(grads, tx.init(PARAMS)), expected)


@pytest.mark.parametrize(
    ('shape', 'band', 'order'),
    [
        ((256, 384), 1, 'F'),
        ((64, 16, 128), 4, 'F'),
        ((4096, 256), 2, 'F'),
        ((128, 8, 256), 1, 'F'),
        ((256, 512), 1, 'C'),
        ((64, 4096), 4, 'C'),
        ((64, 64, 128), 2, 'C'),
        ((512, 600), 1, 'F'),  # held by columns
    ],
)
def test_each_block_is_fetched_once(shape, band, order, monkeypatch):
    """As the counts of a kernel's traffic take for granted, or say: those that say what it is."""
    monkeypatch.setattr(cuts, '_TILE_ENTRIES', 2**16)  # several tiles
    monkeypatch.setattr(cuts, '_FEWEST_ROWS', 8)
    calls = []
    real = pallas.pallas_call

    def counting(*given, grid, in_specs, **keywords):
        def call(*operands):
            calls.append((grid, in_specs, operands, keywords))
            return real(*given, grid=grid, in_specs=in_specs, **keywords)(*operands)

        return call

    monkeypatch.setattr(pallas, 'pallas_call', counting)
    tx = precond_optax.sonew(0.1, band=band, relative_eps=0.1, impl='pallas', order=order)
    params = jnp.zeros(shape)
    fused.one_pass.clear_cache()
    jax.eval_shape(tx.update, params, tx.init(params))
    fused.one_pass.clear_cache()
    said = [call for call in calls if 'cost_estimate' in call[-1]]
    assert len(said) in (0, 4)
    assert len(calls) == 4 + len(said)  # two passes, compiled and interpreted
    for grid, specs, operands, keywords in calls:
        assert math.prod(grid) > 1
        fetched = 0
        for spec, operand in zip(specs, operands, strict=True):
            if spec.index_map is None:
                continue
            fetches = blocks_of(spec, grid)
            sizes = zip(operand.shape, spec.block_shape, strict=True)
            assert fetches <= math.prod(-(-size // block) for size, block in sizes) + 1
            fetched += fetches * math.prod(spec.block_shape) * operand.dtype.itemsize
        if 'cost_estimate' in keywords:
            for spec, result in zip(keywords['out_specs'], keywords['out_shape'], strict=True):
                fetched += blocks_of(spec, grid) * math.prod(spec.block_shape) * 4
                assert result.dtype == jnp.float32
            estimate = keywords['cost_estimate'].bytes_accessed
            assert estimate <= fetched <= 1.3 * estimate  # the last rows' blocks may be cut off


def blocks_of(spec, grid):
    """How often a call asks for another block than it has."""
    places = [
        tuple(int(x) for x in spec.index_map(*place))
        for place in itertools.product(*map(range, grid))
    ]
    return 1 + sum(a != b for a, b in itertools.pairwise(places))


def test_wrong_impl():
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'xla', 'pallas', got 'gpu'"):
        precond_optax.sonew(0.1, impl='gpu')
