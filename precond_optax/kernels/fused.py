r"""SONew's step of one leaf in one pass over memory: a Pallas kernel for TPUs.

The verbs of a sparsity pattern (`kernels/banded.py`), one after another, read and write the leaf's
arrays many times. Here a tile of rows is read once, with a few rows of the chain before and after
it; the same verbs are run on it, and its new statistics, its direction and the squares that the
grafting needs are written. Beside those few rows a step reads g, m, d, e and writes m, d, e, u,
the state in place: 32 bytes for each float32 parameter where the pattern is tridiagonal.

Rows are along the chain's fastest axis, the first of a leaf, batch axes aside. The rows at the
tiles' borders are neighbours along a chain, of tiles, too. They are cut out before the kernel
runs, as it overwrites what it has read.
"""

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from precond_optax.checks import Scalar
from precond_optax.kernels import chain

SUBLANES, LANES = 8, 128  # of a TPU's tile: of the last two axes
MAX_BAND = SUBLANES
# Of one array. The kernel holds each of some ten twice, and temporaries, in 16 MB.
_TILE_BYTES = 2**18
PARALLEL: Final = 'parallel'  # no step of the grid waits for another


class Scalars(NamedTuple):
    """What the verbs take beside arrays; each may be traced."""

    b1: Scalar
    b2: Scalar
    mu_correction: Scalar  # 1 / (1 - b1^t)
    nu_correction: Scalar
    eps: Scalar
    edge_tolerance: Scalar


class Cut(NamedTuple):
    """How a leaf is seen and cut: static.

    Attributes:
      batch: separate chains.
      rows: along the chain's fastest axis.
      rest: the sizes of the other axes.
      slower: these axes in the chain's order, from 0.
      tile: rows of a tile.
      halo: rows before and after it: a band of b looks b rows back and b ahead.
      arrays: read of each tile, and written: g m d e, and m d e u.
    """

    batch: int
    rows: int
    rest: tuple[int, ...]
    slower: tuple[int, ...]
    tile: int
    halo: int
    arrays: int


def cut(shape: Sequence[int], batch_axes: int, axes: Sequence[int], band: int) -> Cut | None:
    """How the kernel would cut a leaf; None if it cannot.

    It can where the chain runs along the first of two or three axes first, where this one has
    eight rows or more that tiles divide, and where a TPU holds the others without much padding.

    Args:
      shape: of the leaf.
      batch_axes: how many of its axes, from the first, stack separate chains.
      axes: the chain's, fastest first.
      band: its off-diagonals.

    Returns:
      The leaf's cut.

    Example:
      >>> cut((4096, 512), 0, axes=(0, 1), band=1)
      Cut(batch=1, rows=4096, rest=(512,), slower=(0,), tile=512, halo=8, arrays=4)
      >>> cut((4096, 512), 0, axes=(1, 0), band=1)  # along the last axis first
    """
    own = tuple(shape[batch_axes:])
    if band > MAX_BAND or len(own) not in (2, 3) or axes[0] != batch_axes or 0 in shape:
        return None
    rows, *rest = own
    flat = len(rest) == 1  # then rows are a tile's second axis
    if rest[-1] < LANES or not (flat or rest[0] % SUBLANES == 0):
        return None
    # Single rows cut out of many tiles take XLA more than two do.
    unit, halo = (SUBLANES, SUBLANES) if flat else (1, max(2, band))
    # The more arrays there are, the less room has each.
    most = _TILE_BYTES * 4 // (3 + max(1, band)) // (4 * LANES * SUBLANES ** (len(rest) - 1))
    sizes = (rows, *range(most // unit * unit, SUBLANES - 1, -unit))
    tile = next((size for size in sizes if halo <= size <= most and rows % size == 0), None)
    if tile is None:
        return None
    slower = tuple(axis - batch_axes - 1 for axis in axes[1:])
    batch = math.prod(shape[:batch_axes])
    return Cut(batch, rows, tuple(rest), slower, tile, halo, 3 + band)


class Stepped(NamedTuple):
    """What the verbs make of a gradient: arrays of its shape."""

    mu: jax.Array
    nu: jax.Array
    offdiag: tuple[jax.Array, ...]
    psi: tuple[jax.Array, ...]
    direction: jax.Array
    mu_hat: jax.Array
    nu_hat: jax.Array


def verbs(
    pattern: ModuleType,
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    offdiag: tuple[jax.Array, ...],
    scalars: Scalars,
    *,
    relative_eps: Scalar = 0.0,
    axes: chain.ChainAxes,
) -> Stepped:
    """The verbs of a pattern one after another, on a whole leaf or on a tile.

    Args:
      pattern: the module of its verbs.
      grad: g.
      mu: m.
      nu: d.
      offdiag: e, one array for each off-diagonal.
      scalars: decays, corrections, damping.
      relative_eps: as in the verb ``factor``.
      axes: the chain's, fastest first.

    Returns:
      The new statistics, the factors, the direction, and the bias-corrected means.
    """
    s = scalars
    mu = s.b1 * mu + (1 - s.b1) * grad
    mu_hat = mu * s.mu_correction
    nu, edges = pattern.accumulate(grad, nu, offdiag, b2=s.b2, axes=axes)
    nu_hat = nu * s.nu_correction
    psi, schur = pattern.factor(
        nu_hat,
        tuple(edge * s.nu_correction for edge in edges),
        eps=s.eps,
        relative_eps=relative_eps,
        edge_tolerance=s.edge_tolerance,
        axes=axes,
    )
    direction = pattern.apply(psi, schur, mu_hat, axes=axes)
    return Stepped(mu, nu, edges, psi, direction, mu_hat, nu_hat)


def step(
    pattern: ModuleType,
    leaf: Cut,
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    offdiag: tuple[jax.Array, ...],
    scalars: Scalars,
    *,
    adam_eps: float | None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array, jax.Array]:
    """The verbs of a pattern, and the squares of what is grafted.

    Args:
      pattern: the module of its verbs.
      leaf: how the arrays are cut.
      grad: g, float32, of the leaf's shape.
      mu: m, likewise.
      nu: d.
      offdiag: e, one array for each off-diagonal.
      scalars: decays, corrections, damping.
      adam_eps: w is Adam's direction with this epsilon; None: the bias-corrected m.
      interpret: True: JAX runs the kernel step by step, on any backend; also ``pallas_call``'s
        ``InterpretParams``, with a TPU's memory.

    Returns:
      The new m, d and e, the direction u, and the sums of the squares of u and of w, (batch,).
    """
    # Here, because it is a large part of the package's own import, and few need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    arrays = [x.reshape(leaf.batch, leaf.rows, *leaf.rest) for x in (grad, mu, nu, *offdiag)]
    tiles, count = leaf.rows // leaf.tile, len(arrays)
    borders = [border for x in arrays for border in _borders(x, leaf)] if offdiag else []
    block = (*(SUBLANES for _ in leaf.rest[1:]), LANES)
    grid = (leaf.batch, tiles, *(pl.cdiv(n, k) for n, k in zip(leaf.rest, block, strict=True)))
    own = pl.BlockSpec((1, leaf.tile, *block), lambda b, i, *j: (b, i, *j))

    def beside(step: int) -> pl.BlockSpec:
        """The border of the tile before or after, of the last or first one at the ends."""
        return pl.BlockSpec(
            (1, 1, leaf.halo, *block),
            lambda b, i, *j: (b, jnp.clip(i + step, 0, tiles - 1), 0, *j),
        )

    wrapped = pl.BlockSpec((1, leaf.halo, *block), lambda b, i, *j: (b, 0, *j))
    like = jax.ShapeDtypeStruct(arrays[0].shape, grad.dtype)
    squares = jax.ShapeDtypeStruct((leaf.batch, tiles, 2, *leaf.rest), grad.dtype)
    *new, direction, parts = pl.pallas_call(
        functools.partial(_kernel, pattern, leaf, adam_eps),
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *[own] * count,
            *[beside(-1), beside(1), wrapped, wrapped] * (len(borders) // 4),
        ],
        out_specs=[
            *[own] * count,
            pl.BlockSpec((1, 1, 2, *block), lambda b, i, *j: (b, i, 0, *j)),
        ],
        out_shape=[*[like] * count, squares],
        input_output_aliases={2 + i: i for i in range(count - 1)},  # the statistics
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=[PARALLEL] * len(grid)),
    )(jnp.stack([jnp.asarray(x, grad.dtype) for x in scalars]), *arrays, *borders)
    new_mu, new_nu, *edges, direction = (x.reshape(grad.shape) for x in (*new, direction))
    of_u, of_w = jnp.moveaxis(jnp.sum(parts, axis=(1, *range(3, parts.ndim))), 1, 0)
    return new_mu, new_nu, tuple(edges), direction, of_u, of_w


def _borders(x: jax.Array, leaf: Cut) -> tuple[jax.Array, ...]:
    """Each tile's last and first rows, (batch, tiles, halo, rest...), and what is at the ends.

    Before the first tile stand the last one's last rows in the column before, and so after the
    last tile: (batch, halo, rest...), twice.
    """
    tiles = x.reshape(leaf.batch, -1, leaf.tile, *leaf.rest)
    last, first = tiles[:, :, leaf.tile - leaf.halo :], tiles[:, :, : leaf.halo]
    axes = tuple(axis + 2 for axis in leaf.slower)
    return last, first, chain.predecessor(last[:, -1], axes), chain.successor(first[:, 0], axes)


def _kernel(pattern: ModuleType, leaf: Cut, adam_eps: float | None, *refs: Any) -> None:
    """Of a tile: ``refs`` are the scalars; g m d e; of each of these its borders; the results."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    numbers, *arrays = refs
    results, squares = arrays[-leaf.arrays - 1 : -1], arrays[-1]
    owns, borders = arrays[: leaf.arrays], arrays[leaf.arrays : -leaf.arrays - 1]
    s = Scalars(*(numbers[i] for i in range(len(Scalars._fields))))
    place, tiles = pl.program_id(1), leaf.rows // leaf.tile

    def roll(x: jax.Array, by: int) -> jax.Array:
        if x.ndim > 2:  # rows are whole tiles then, and moved for nothing
            return jnp.roll(x, by, 0)
        return pltpu.roll(x, by % x.shape[0], 0)

    def widened(i: int) -> jax.Array:
        """An array's rows, with those before and after."""
        if not borders:
            return owns[i][0]
        last, first, before, after = borders[4 * i : 4 * i + 4]
        return jnp.concatenate(
            [
                jnp.where(place == 0, before[0], last[0, 0]),
                owns[i][0],
                jnp.where(place == tiles - 1, after[0], first[0, 0]),
            ],
            axis=0,
        )

    axes = chain.Tile(roll)
    grad, mu, nu, *offdiag = (widened(i) for i in range(leaf.arrays))
    new = verbs(pattern, grad, mu, nu, tuple(offdiag), s, axes=axes)
    magnitude = new.mu_hat
    if adam_eps is not None:
        magnitude = magnitude / (jnp.sqrt(new.nu_hat) + adam_eps)
    inside = slice(leaf.halo, leaf.halo + leaf.tile) if borders else slice(None)
    for result, x in zip(results, (new.mu, new.nu, *new.offdiag, new.direction), strict=True):
        result[0] = x[inside]
    for i, x in enumerate((new.direction[inside], magnitude[inside])):
        squares[0, 0, i] = jnp.sum(x * x, axis=0)
