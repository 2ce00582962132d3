"""The GPU's kernel against the verbs that it fuses, interpreted; what Triton makes of it is in
`tests/test_gpu_compile.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precond_optax.kernels import banded, chain, strips, tridiagonal
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
    ((20, 130), 0, (0, 1), 1),  # one strip
    ((48, 300), 0, (0, 1), 1),  # several, and columns that do not fill the last program
    ((50, 5), 0, (0, 1), 1),  # the last strip has two rows
    ((49, 5), 0, (0, 1), 2),  # or would have one, fewer than the one before it has to see
    ((64, 40), 0, (0, 1), 4),
    ((40, 3), 0, (0, 1), 8),
    ((8, 3), 0, (0, 1), 8),  # as few rows as can be
    ((1, 7), 0, (0, 1), 1),
    ((40, 130), 0, (0, 1), 0),
    ((2, 40, 7), 1, (1, 2), 1),
    ((2, 3, 40, 7), 2, (2, 3), 3),
    ((40, 3, 5), 0, (0, 1, 2), 1),  # heads
    ((40, 3, 5), 0, (0, 2, 1), 2),  # heads merged with what follows them
    ((2, 40, 2, 3, 2), 1, (1, 2, 3, 4), 2),  # a convolution's, say
]


@pytest.fixture(autouse=True)
def short_strips(monkeypatch):
    monkeypatch.setattr(strips, '_ROWS', (16,))


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'axes', 'band', 'adam_eps'),
    [
        *quick.every(3, [(*case, 1e-8) for case in CASES]),
        *quick.every(3, [(*case, None) for case in CASES], first=1),
    ],
)
def test_one_pass_is_the_verbs(shape, batch_axes, axes, band, adam_eps, rng):
    leaf, pattern = strips.cut(shape, batch_axes, axes, band), pattern_of(band)
    given = arrays(rng, shape, axes, band)
    how = dict(adam_eps=adam_eps, nesterov=adam_eps is None)
    got = strips.step(pattern, leaf, *given, numbers(leaf.batch), **how, interpret=True)
    s = scalars(shape, batch_axes)
    assert_near(got, by_verbs(pattern, axes, batch_axes, *given, s, **how))


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'axes', 'band', 'dtype'),
    quick.every(
        2,
        [
            (*case, 'bfloat16' if i % 3 else 'float32')
            for i, case in enumerate([*CASES[:5], *CASES[7:11], CASES[-1]])
        ],
        first=1,
    ),
)
def test_parameters_are_moved(shape, batch_axes, axes, band, dtype, rng):
    """Each chain by its own numbers; all else is as without."""
    leaf, pattern = strips.cut(shape, batch_axes, axes, band), pattern_of(band)
    given = arrays(rng, shape, axes, band)
    param = jnp.asarray(rng.normal(size=shape), dtype)
    how = dict(adam_eps=1e-8, nesterov=False)
    both = numbers(leaf.batch, moves=True)
    got = strips.step(pattern, leaf, *given, both, **how, param=param, interpret=True)
    *held, direction, squares = by_verbs(
        pattern, axes, batch_axes, *given, scalars(shape, batch_axes), **how
    )
    expected = moved(param.astype(jnp.float32), direction, batch_axes)
    assert got[3].dtype == dtype
    assert_near((*got[:3], got[4]), (*held, squares))
    rtol = 2e-5 if dtype == 'float32' else 2**-7
    atol = 1e-5 * float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(np.float32(got[3]), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(('shape', 'batch_axes', 'axes', 'band'), quick.every(3, CASES))
def test_largest_row_sums_are_those_of_the_whole(shape, batch_axes, axes, band, rng):
    leaf, pattern = strips.cut(shape, batch_axes, axes, band), pattern_of(band)
    grad, _, nu, edges = arrays(rng, shape, axes, band)
    # The largest one is in a corner, of a strip too, so that what is beside it counts.
    for place in {0, shape[batch_axes] - 1, leaf.strip - 1}:
        corner = (*[0] * batch_axes, place, *[-1] * (len(axes) - 1))
        large = grad.at[corner].set(30.0)
        got = strips.largest_row_sums(
            pattern, leaf, large, nu, edges, numbers(leaf.batch), interpret=True
        )
        expected = largest_row_sums(pattern, axes, large, nu, edges)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_cases_have_several_strips():
    cuts = [strips.cut(*case) for case in CASES]
    assert sum(leaf.rows > 2 * leaf.strip for leaf in cuts) >= 5
    assert sum(leaf.rows % leaf.strip > 0 for leaf in cuts) >= 3
    assert all(leaf.rows % leaf.strip == 0 or leaf.rows % leaf.strip >= leaf.band for leaf in cuts)


def test_small_leaves_have_short_strips(monkeypatch):
    monkeypatch.undo()
    sizes = [strips.cut((n, n), 0, (0, 1), 1).strip for n in (20, 512, 2048, 4096, 16384)]
    assert sizes == [20, 32, 32, 128, 128]
    assert strips.cut((8, 2048, 2048), 1, (1, 2), 1).strip == 128


@pytest.mark.parametrize(('band', 'count'), [(1, 3), (4, 9)])
def test_a_strip_s_end_is_no_end_of_the_chain(band, count, rng):
    """A gradient in one row alone moves the rows beside it, in other strips too."""
    shape, axes = (48, 3), (0, 1)
    leaf = strips.cut(shape, 0, axes, band)
    _, mu, nu, edges = arrays(rng, shape, axes, band)
    for row in (leaf.strip - 1, leaf.strip):
        one = jnp.zeros(shape).at[row, 1].set(1e3)
        direction = strips.step(
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
        line = np.asarray(chain.to_line(direction, axes))
        assert np.flatnonzero(line).tolist() == [
            shape[0] + row + k for k in range(-(count // 2), count // 2 + 1)
        ]


def test_a_band_of_none_looks_at_no_other_row(rng):
    """So that what is not finite stays where it is."""
    shape, axes = (40, 3), (0, 1)
    leaf, given = strips.cut(shape, 0, axes, 0), arrays(rng, shape, axes, 0)
    bad = given[0].at[16, 1].set(jnp.nan)
    got = strips.step(
        pattern_of(0), leaf, bad, *given[1:], numbers(), adam_eps=None, interpret=True
    )
    assert np.argwhere(np.isnan(got[3])).tolist() == [[16, 1]]


@pytest.mark.parametrize(
    ('shape', 'batch_axes', 'axes', 'band'),
    [
        ((64, 128), 0, (1, 0), 1),  # along the last axis first
        ((3, 128), 0, (0, 1), 4),  # fewer rows than the band is wide
        ((64, 128), 0, (0, 1), 9),
        ((128,), 0, (0,), 1),
        ((0, 128), 0, (0, 1), 1),
    ],
)
def test_what_is_not_taken(shape, batch_axes, axes, band):
    assert strips.cut(shape, batch_axes, axes, band) is None


def test_a_row_is_the_program_s(rng):
    """Shifts on and back, one after another and within functions: row by row as on the whole."""
    x = jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)

    def program(x, axes):
        # Zero before the first row, as all is that the verbs look back at.
        on = x * jax.jit(lambda y: chain.successor(chain.successor(y, axes) * y, axes))(x)
        return chain.sum_of_predecessors([on, x, jnp.sin(on)], axes), on

    expected = program(x, (0,))
    closed = jax.make_jaxpr(lambda y: program(y, chain.Tile(strips._shifted)))(x[0])
    delayed = [jnp.full(4, 7.0)] * strips._count_delays(closed.jaxpr)  # to be forgotten
    padded = jnp.concatenate([jnp.zeros((3, 4)), x, jnp.zeros((3, 4))])
    for r in range(-3, 12):
        window = [padded[r + 3 + k] for k in range(3)]
        got, delayed = strips._one_row(closed, [window], delayed)
        if r >= 0:
            assert_near(got, [whole[r] for whole in expected])


def test_a_shift_that_looks_back_and_then_on_is_refused():
    """No verb has one: it would have to be computed twice."""
    closed = jax.make_jaxpr(
        lambda y: chain.successor(
            chain.predecessor(y, chain.Tile(strips._shifted)), chain.Tile(strips._shifted)
        )
    )(jnp.zeros(4))
    with pytest.raises(KeyError):
        strips._one_row(closed, [[jnp.zeros(4)] * 3], [jnp.zeros(4)])


def test_the_verbs_are_the_patterns(rng):
    """`tridiagonal` and `banded` with one off-diagonal, through the kernel."""
    shape, axes = (40, 3), (0, 1)
    leaf, given = strips.cut(shape, 0, axes, 1), arrays(rng, shape, axes, 1)
    one, other = (
        strips.step(pattern, leaf, *given, numbers(), adam_eps=1e-8, interpret=True)
        for pattern in (tridiagonal, banded)
    )
    assert_near(one, other)
