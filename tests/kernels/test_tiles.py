"""The kernels against the verbs that they fuse, interpreted; `cut` says what they take."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from precond_optax.kernels import chain, cuts, tiles, tridiagonal
from tests import quick
from tests.kernels.steps import (
    arrays,
    assert_near,
    by_verbs,
    largest_row_sums,
    moved,
    numbers,
    pattern_of,
    scalars,
)

# Shape, batch axes, the chain's axes, bands.
CASES = [
    ((64, 128), 0, (0, 1), 1),  # one tile
    ((96, 300), 0, (0, 1), 1),  # several, and columns that do not fill the last one
    ((22, 129), 0, (0, 1), 2),  # rows that are no multiple of eight
    ((96, 256), 0, (0, 1), 4),
    ((96, 128), 0, (0, 1), 8),
    ((96, 200), 0, (0, 1), 0),
    ((2, 96, 130), 1, (1, 2), 1),
    ((2, 3, 48, 128), 2, (2, 3), 3),
    ((160, 16, 130), 0, (0, 1, 2), 1),  # heads
    ((48, 8, 128), 0, (0, 2, 1), 2),  # heads merged with what follows them
    ((2, 96, 16, 128), 1, (1, 2, 3), 4),
]
# The same, of chains that go across a tile's columns; those of a leaf's last axis, where no other
# is said to be.
ACROSS = [
    ((48, 256), 0, (1, 0), 1),  # whole rows
    ((20, 1536), 0, (1, 0), 1),  # parts of rows, and rows that do not fill the last tile
    ((9, 128), 0, (1, 0), 2),
    ((40, 1024), 0, (1, 0), 4),
    ((24, 1536), 0, (1, 0), 8),  # what is beside a tile takes two of a TPU's
    ((24, 128), 0, (1, 0), 0),
    ((2, 36, 256), 1, (2, 1), 1),
    ((2, 3, 16, 128), 2, (3, 2), 3),
    ((6, 8, 128), 0, (2, 1, 0), 1),  # planes
    ((6, 16, 256), 0, (2, 0, 1), 2),  # rows one after another are of one plane each
    ((3, 40, 1024), 0, (2, 1, 0), 4),  # parts of planes
    ((1, 24, 128), 0, (2, 1, 0), 1),
    ((24, 1, 128), 0, (2, 1, 0), 1),
    ((128, 90), 0, (0, 1), 1),  # held by columns
    ((1024, 37), 0, (0, 1), 4),
    ((2, 256, 65), 1, (1, 2), 2),
    ((128, 16, 64), 0, (0, 1, 2), 1),  # held as (16, 64, 128)
    ((128, 8, 64), 0, (0, 2, 1), 2),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Of 8 to 32 rows, or of few columns, so that small leaves have several."""
    real = tiles.cut
    monkeypatch.setattr(cuts, '_FEWEST', 128)
    monkeypatch.setattr(cuts, '_FEWEST_ROWS', 8)

    def cut(shape, batch_axes, axes, band):
        heads = len(shape) - batch_axes == 3
        monkeypatch.setattr(cuts, '_TILE_ENTRIES', 2**17 if heads else 2**14)
        return real(shape, batch_axes, axes, band)

    monkeypatch.setattr(tiles, 'cut', cut)


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'axes', 'band', 'adam_eps'),
    [
        *quick.every(3, [(*case, 1e-8) for case in CASES + ACROSS]),
        *quick.every(3, [(*case, None) for case in CASES + ACROSS], first=1),
    ],
)
def test_one_pass_is_the_verbs(shape, batch_axes, axes, band, adam_eps, rng):
    leaf = tiles.cut(shape, batch_axes, axes, band)
    pattern = pattern_of(band)
    given = arrays(rng, shape, axes, band)
    how = dict(adam_eps=adam_eps, nesterov=adam_eps is None)
    got = tiles.step(pattern, leaf, *given, numbers(leaf.batch), **how, interpret=True)
    s = scalars(shape, batch_axes)
    assert_near(got, by_verbs(pattern, axes, batch_axes, *given, s, **how))


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'axes', 'band', 'dtype'),
    quick.every(
        2,
        [
            (*case, 'bfloat16' if i % 3 else 'float32')
            for i, case in enumerate([*CASES[1:3], *CASES[5:10], *ACROSS[1:9:2], *ACROSS[-3:]])
        ],
    ),
)
def test_parameters_are_moved(shape, batch_axes, axes, band, dtype, rng):
    """Each chain by its own numbers; all else is as without."""
    leaf, pattern = tiles.cut(shape, batch_axes, axes, band), pattern_of(band)
    given = arrays(rng, shape, axes, band)
    param = jnp.asarray(rng.normal(size=shape), dtype)
    how = dict(adam_eps=1e-8, nesterov=False)
    both = numbers(leaf.batch, moves=True)
    got = tiles.step(pattern, leaf, *given, both, **how, param=param, interpret=True)
    *held, direction, squares = by_verbs(
        pattern, axes, batch_axes, *given, scalars(shape, batch_axes), **how
    )
    expected = moved(param.astype(jnp.float32), direction, batch_axes)
    assert got[3].dtype == dtype
    assert_near((*got[:3], got[4]), (*held, squares))
    rtol = 2e-5 if dtype == 'float32' else 2**-7
    atol = 1e-5 * float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(np.float32(got[3]), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize('rows', [8, 9, 13, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize('band', [0, 1, 4, 8])
def test_tiles_have_room(rows, band):
    """Padded to what a TPU holds them in."""
    for shape, axes in (
        ((rows, 5120), (1, 0)),
        ((5120, rows), (0, 1)),
        ((4, rows, 1024), (2, 1, 0)),
        ((1024, rows, 256), (0, 1, 2)),
    ):
        leaf = cuts.cut(shape, 0, axes, band)
        if leaf is not None:
            down = isinstance(leaf, cuts.Down)
            heads = cuts.SUBLANES if down and len(leaf.tiled) == 2 else 1
            tile = (leaf.tile, heads, cuts.LANES) if down else leaf.tile
            assert math.prod(tile) * (3 + max(1, band)) <= 2**18, (shape, leaf)


@pytest.mark.parametrize(('shape', 'batch_axes', 'axes', 'band'), quick.every(5, CASES + ACROSS))
def test_largest_row_sums_are_those_of_the_whole(shape, batch_axes, axes, band, rng):
    leaf = tiles.cut(shape, batch_axes, axes, band)
    pattern = pattern_of(band)
    grad, _, nu, edges = arrays(rng, shape, axes, band)
    # The largest one is in a corner, of a tile too, so that what is beside it counts.
    tile = leaf.tile if isinstance(leaf, cuts.Down) else leaf.tile[2]
    for place in (0, -1, tile - 1):
        corner = [*[0] * batch_axes, *[-1] * len(axes)]
        corner[axes[0]] = place
        large = grad.at[tuple(corner)].set(30.0)
        got = tiles.largest_row_sums(
            pattern, leaf, large, nu, edges, numbers(leaf.batch), interpret=True
        )
        sums = largest_row_sums(pattern, axes, large, nu, edges)
        np.testing.assert_allclose(got, sums, rtol=1e-5)


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'axes', 'band', 'moves'),
    [
        pytest.param((96, 256), 0, (0, 1), 1, False, marks=pytest.mark.slow),
        pytest.param((96, 256), 0, (0, 1), 1, True, marks=pytest.mark.slow),
        ((2, 48, 128), 1, (1, 2), 4, True),
        pytest.param((160, 16, 128), 0, (0, 1, 2), 1, False, marks=pytest.mark.slow),
        ((24, 512), 0, (1, 0), 1, True),
        pytest.param((3, 16, 256), 0, (2, 1, 0), 4, False, marks=pytest.mark.slow),
        pytest.param((128, 16, 64), 0, (0, 1, 2), 2, True, marks=pytest.mark.slow),
    ],
)
def test_in_a_tpu_s_memory(shape, batch_axes, axes, band, moves, rng):
    """Tiles in any order, results where arguments are, copies that wait, memory full of NaN."""
    leaf = tiles.cut(shape, batch_axes, axes, band)
    pattern = pattern_of(band)
    given = arrays(rng, shape, axes, band)
    memory = pltpu.InterpretParams(uninitialized_memory='nan', random_seed=1)
    both, param = numbers(leaf.batch, moves=True), given[0] - 1
    how = dict(adam_eps=1e-8, param=param if moves else None, interpret=memory)
    got = tiles.step(pattern, leaf, *given, both if moves else numbers(leaf.batch), **how)
    s = scalars(shape, batch_axes)
    expected = list(by_verbs(pattern, axes, batch_axes, *given, s, 1e-8))
    if moves:
        expected[3] = moved(param, expected[3], batch_axes)
    assert_near(got, tuple(expected))
    grad, _, nu, edges = given
    largest = tiles.largest_row_sums(
        pattern, leaf, grad, nu, edges, numbers(leaf.batch), interpret=memory
    )
    expected = largest_row_sums(pattern, axes, grad, nu, edges)
    np.testing.assert_allclose(largest, expected, rtol=1e-5)


def test_the_cases_have_several_tiles():
    counts = [tiles.cut(*case).tiles for case in CASES]
    assert sum(count > 2 for count in counts) >= 5
    assert min(counts) == 1
    across = [tiles.cut(*case) for case in ACROSS]
    assert all(isinstance(leaf, cuts.Across) for leaf in across)
    assert {leaf.parts > 1 for leaf in across} == {True, False}
    assert {leaf.tile[0] > 1 for leaf in across} == {True, False}
    assert any(leaf.rows % leaf.tile[1] for leaf in across)


@pytest.mark.parametrize('band', [1, 4])
def test_a_tile_s_border_is_no_end_of_the_chain(band, rng):
    """A gradient in one row alone moves the rows beside it, in other tiles too."""
    shape, axes = (192, 128), (0, 1)
    leaf = tiles.cut(shape, 0, axes, band)
    assert 2 * leaf.tile < shape[0]
    _, mu, nu, edges = arrays(rng, shape, axes, band)
    pattern = pattern_of(band)
    for row in (leaf.tile - 1, leaf.tile, 0, shape[0] - 1):
        one = jnp.zeros(shape).at[row].set(1e3)
        direction = tiles.step(
            pattern, leaf, one, 0 * mu, nu, edges, numbers(), adam_eps=None, interpret=True
        )[3]
        line = np.asarray(chain.to_line(direction, axes)).reshape(shape[1], shape[0])
        middle = line[64]
        near = {(row + k) % shape[0] for k in range(-band, band + 1)}
        across = {r for r in near if abs(r - row) > band}  # in the column beside
        assert set(np.flatnonzero(middle)) == near - across | {
            r for r in across if np.any(line[[63, 65]][:, r])
        }
        assert all(middle[r] != 0 for r in near - across)


@pytest.mark.parametrize('band', [1, 4])
def test_a_part_s_border_is_no_end_of_the_chain(band, rng):
    """A gradient in one entry moves those beside it, across tiles and from row to row."""
    shape, axes = (24, 1024), (1, 0)
    leaf = tiles.cut(shape, 0, axes, band)
    assert leaf.parts > 1
    _, mu, nu, edges = arrays(rng, shape, axes, band)
    for place in (leaf.tile[2] - 1, leaf.tile[2], 10 * 1024 - 1, 8 * 1024, 0, 24 * 1024 - 1):
        one = jnp.zeros(shape).at[place // 1024, place % 1024].set(1e3)
        direction = tiles.step(
            pattern_of(band),
            leaf,
            one,
            0 * mu,
            nu,
            edges,
            numbers(),
            adam_eps=None,
            interpret=True,
        )[3]
        moved = {place + k for k in range(-band, band + 1)} & set(range(24 * 1024))
        assert set(np.flatnonzero(np.asarray(direction).ravel())) == moved


@pytest.mark.parametrize(('shape', 'axes'), [((64, 129), (0, 1)), ((20, 1024), (1, 0))])
def test_what_is_past_the_array_does_not_count(shape, axes, rng):
    """What a tile reads there is anything; its squares are no part of the norms."""
    leaf = tiles.cut(shape, 0, axes, 1)
    given = arrays(rng, shape, axes, 1, scale=1e3)
    got = tiles.step(tridiagonal, leaf, *given, numbers(), adam_eps=1e-8, interpret=True)
    np.testing.assert_allclose(got[4][0, 0], jnp.sum(got[3] ** 2), rtol=1e-5)


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'axes', 'band'),
    [
        ((64, 100), 0, (1, 0), 1),  # a part of a TPU's tile
        ((100, 64), 0, (1, 0), 1),  # held by columns
        ((7, 128), 0, (1, 0), 1),
        ((2, 12, 128), 0, (2, 1, 0), 1),
        ((8, 16, 128), 0, (1, 0, 2), 1),  # first along one that is neither
        ((64, 100), 0, (0, 1), 1),  # less than a TPU's tile
        ((4, 128), 0, (0, 1), 1),  # fewer rows than one
        ((64, 128), 0, (0, 1), 9),
        ((64, 12, 128), 0, (0, 1, 2), 1),  # a TPU would hold 16 for 12
        ((2, 2, 2, 128), 0, (0, 1, 2, 3), 1),
        ((128,), 0, (0,), 1),
        ((0, 128), 0, (0, 1), 1),
        ((10_007, 128), 0, (0, 1), 1),  # prime
    ],
)
def test_what_is_not_taken(shape, batch_axes, axes, band):
    assert tiles.cut(shape, batch_axes, axes, band) is None
