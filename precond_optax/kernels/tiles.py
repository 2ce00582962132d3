r"""SONew's step of one leaf in one pass over memory: a Pallas kernel for TPUs.

The verbs of a sparsity pattern (`kernels/banded.py`), one after another, read and write the leaf's
arrays many times. Here a tile of rows is read once, with a few rows of the chain before and after
it; the same verbs are run on it, and its new statistics, its direction and the squares that the
grafting needs are written. Beside those few rows a step reads g, m, d, e and writes m, d, e, u,
the state in place: 32 bytes for each float32 parameter where the pattern is tridiagonal. What is
kept in bfloat16 is read and written so, rounded in the kernel.

Rows are along the chain's fastest axis, the first of a leaf, batch axes aside. The rows at the
tiles' borders are neighbours along a chain, of tiles, too. They are cut out before the kernel
runs, as it overwrites what it has read.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from precond_optax.kernels import chain, diagonal, rounding, verbs

SUBLANES, LANES = 8, 128  # of a TPU's tile: of the last two axes
MAX_BAND = SUBLANES
# Of one array. The kernel holds each of some ten twice, and temporaries, in 16 MB.
_TILE_BYTES = 2**18
PARALLEL: Final = 'parallel'  # no step of the grid waits for another


class Cut(NamedTuple):
    """How a leaf is seen and cut: static.

    Attributes:
      batch: separate chains.
      rows: along the chain's fastest axis.
      rest: the sizes of the other axes.
      tiled: likewise, as the kernel sees them: without a first one of size 1.
      slower: the other axes in the chain's order, from 0.
      tile: rows of a tile.
      halo: rows before and after it: a band of b looks b rows back and b ahead.
      band: its off-diagonals.
    """

    batch: int
    rows: int
    rest: tuple[int, ...]
    tiled: tuple[int, ...]
    slower: tuple[int, ...]
    tile: int
    halo: int
    band: int


def cut(shape: Sequence[int], batch_axes: int, axes: Sequence[int], band: int) -> Cut | None:
    """How the kernel would cut a leaf; None if it cannot.

    It can where the chain runs along the first of two or three axes first, where this one has
    rows that tiles of eight or more divide, and where a TPU holds the others without much padding.

    Args:
      shape: of the leaf.
      batch_axes: how many of its axes, from the first, stack separate chains.
      axes: the chain's, fastest first.
      band: its off-diagonals.

    Returns:
      The leaf's cut.

    Example:
      >>> cut((4096, 512), 0, axes=(0, 1), band=1)
      Cut(batch=1, rows=4096, rest=(512,), tiled=(512,), slower=(0,), tile=512, halo=8, band=1)
      >>> cut((4096, 512), 0, axes=(1, 0), band=1)  # along the last axis first
    """
    own = tuple(shape[batch_axes:])
    if band > MAX_BAND or len(own) not in (2, 3) or axes[0] != batch_axes or 0 in shape:
        return None
    rows, *rest = own
    tiled = rest[-1:] if rest[0] == 1 else rest  # one device may have one head
    flat = len(tiled) == 1  # then rows are a tile's second axis
    if rest[-1] < LANES or not (flat or rest[0] % SUBLANES == 0):
        return None
    # Single rows cut out of many tiles take XLA more than two do.
    unit, halo = (SUBLANES, SUBLANES) if flat else (1, max(2, band))
    # The more arrays there are, the less room has each.
    most = _TILE_BYTES * 4 // (3 + max(1, band)) // (4 * LANES * SUBLANES ** (len(tiled) - 1))
    sizes = (rows, *range(most // unit * unit, SUBLANES - 1, -unit))
    tile = next((size for size in sizes if SUBLANES <= size <= most and rows % size == 0), None)
    if tile is None:
        return None
    slower = tuple(axis - batch_axes - 1 for axis in axes[1:])
    batch = math.prod(shape[:batch_axes])
    return Cut(batch, rows, tuple(rest), tuple(tiled), slower, tile, halo, band)


class Noise(NamedTuple):
    """What stochastic rounding takes: of a part of a leaf, the bits of the leaf's own entries.

    Attributes:
      seeds: of d and of each e, (1 + band, 2), see `rounding.seeds`.
      starts: the number of the first entry of each chain, (batch,), see `rounding.positions`.
      strides: between neighbours along each axis, batch axes aside.
    """

    seeds: jax.Array
    starts: jax.Array
    strides: tuple[int, ...]


class Numbers(NamedTuple):
    """What a kernel takes beside arrays: each an array of numbers.

    Attributes:
      scalars: those of the verbs.
      eps: of each chain, (batch,), in place of theirs.
      noise: None: bfloat16 is rounded to nearest.
    """

    scalars: verbs.Scalars
    eps: jax.Array
    noise: Noise | None = None


def step(
    pattern: ModuleType,
    leaf: Cut,
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    offdiag: tuple[jax.Array, ...],
    numbers: Numbers,
    *,
    adam_eps: float | None,
    nesterov: bool = False,
    names: Sequence[tuple[str, ...]] = (),
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The verbs of a pattern, and the squares of what is grafted.

    Args:
      pattern: the module of its verbs.
      leaf: how the arrays are cut.
      grad: g, of the leaf's shape, float32 or bfloat16, as each of the arrays may be.
      mu: m, likewise.
      nu: d.
      offdiag: e, one array for each off-diagonal.
      numbers: decays, corrections, damping; how d and e are rounded.
      adam_eps: w is Adam's direction with this epsilon; None: the bias-corrected m.
      nesterov: as in `verbs.step`.
      names: in a manual region, the axes of the mesh that share out the rows, and each axis of
        the rest.
      interpret: True: JAX runs the kernel step by step, on any backend; also ``pallas_call``'s
        ``InterpretParams``, with a TPU's memory.

    Returns:
      The new m, d and e, of their dtypes, the direction u, and the sums of the squares of u and
      of w over each chain, (batch, 2), both float32.
    """
    strides: tuple[int, ...] | None = None
    if numbers.noise is not None:
        every = numbers.noise.strides
        strides = every[0], *every[-len(leaf.tiled) :]
    arrays = grad, mu, nu, *offdiag
    wide = jnp.float32
    *new, direction, parts = _in_tiles(
        functools.partial(_step, pattern, leaf, adam_eps, nesterov, strides),
        leaf,
        numbers,
        arrays,
        names,
        written=(*(x.dtype for x in arrays[1:]), wide),
        sums=2,
        interpret=interpret,
    )
    new_mu, new_nu, *edges, direction = (x.reshape(grad.shape) for x in (*new, direction))
    sums = jnp.sum(parts, axis=(1, *range(3, parts.ndim)))
    return new_mu, new_nu, tuple(edges), direction, sums


def largest_row_sums(
    pattern: ModuleType,
    leaf: Cut,
    grad: jax.Array,
    nu: jax.Array,
    offdiag: tuple[jax.Array, ...],
    numbers: Numbers,
    *,
    names: Sequence[tuple[str, ...]] = (),
    interpret: Any = False,
) -> jax.Array:
    """The largest absolute row sums of the second moments as they will be after the step.

    A pass of its own, which reads g, d and e: what is relative to them must be known before.

    Args:
      pattern: as in `step`, and the others.
      leaf: likewise.
      grad: g.
      nu: d.
      offdiag: e.
      numbers: of which the decay is looked at.
      names: as in `step`.
      interpret: likewise.

    Returns:
      Of each chain, or of the part of it that is here, (batch,), float32, not bias-corrected.
    """
    kernel = functools.partial(_row_sums, pattern, leaf)
    arrays = grad, nu, *offdiag
    numbers = numbers._replace(noise=None)
    (parts,) = _in_tiles(
        kernel, leaf, numbers, arrays, names, written=(), sums=1, interpret=interpret
    )
    return jnp.max(parts, axis=tuple(range(1, parts.ndim)))


def _in_tiles(
    kernel: Callable[..., None],
    leaf: Cut,
    numbers: Numbers,
    arrays: Sequence[jax.Array],
    names: Sequence[tuple[str, ...]],
    *,
    written: Sequence[Any],
    sums: int,
    interpret: Any,
) -> list[jax.Array]:
    r"""Runs a kernel on each tile, with what is beside it.

    Args:
      kernel: of references to the numbers; to a tile of each array; to what is beside it, see
        `_borders`; to a tile of each result, and to its sums.
      leaf: how the arrays are cut.
      numbers: see there.
      arrays: of the leaf's shape.
      names: as in `step`.
      written: the results' dtypes; all but the last are written where the arrays after the first
        were.
      sums: how many numbers the kernel makes of each column of a tile.
      interpret: as in `step`.

    Returns:
      The results, and the sums (batch, tiles, sums, \*tiled).
    """
    # Here, because it is a large part of the package's own import, and few need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    arrays = [x.reshape(leaf.batch, leaf.rows, *leaf.rest) for x in arrays]
    tiles, count = leaf.rows // leaf.tile, len(arrays)
    borders = _borders(arrays, leaf, names) if leaf.band else []
    if leaf.tiled != leaf.rest:
        ahead = arrays[0].ndim - len(leaf.rest)
        arrays = [x.reshape(*x.shape[:ahead], *leaf.tiled) for x in arrays]
        borders = [x.reshape(*x.shape[: x.ndim - len(leaf.rest)], *leaf.tiled) for x in borders]
    block = (*(SUBLANES for _ in leaf.tiled[1:]), LANES)
    grid = (leaf.batch, tiles, *(pl.cdiv(n, k) for n, k in zip(leaf.tiled, block, strict=True)))
    own = pl.BlockSpec((1, leaf.tile, *block), lambda b, i, *j: (b, i, *j))

    def beside(step: int) -> pl.BlockSpec:
        """The border of the tile before or after, of the last or first one at the ends."""
        return pl.BlockSpec(
            (1, 1, leaf.halo, *block),
            lambda b, i, *j: (b, jnp.clip(i + step, 0, tiles - 1), 0, *j),
        )

    def end(place: int) -> pl.BlockSpec:
        """What is beyond this tile; the others do not look, so no other block is fetched."""
        return pl.BlockSpec(
            (1, leaf.halo, *block),
            lambda b, i, *j: (b, 0, *(jnp.where(i == place, at, 0) for at in j)),
        )

    wide = jnp.float32
    given = [jnp.stack([jnp.asarray(x, wide) for x in numbers.scalars]), numbers.eps]
    if numbers.noise is not None:
        given += [numbers.noise.seeds, numbers.noise.starts]
    shape = arrays[0].shape
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            *[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(given),
            *[own] * count,
            *[beside(-1), beside(1), end(0), end(tiles - 1)] * (len(borders) // 4),
        ],
        out_specs=[
            *[own] * len(written),
            pl.BlockSpec((1, 1, sums, *block), lambda b, i, *j: (b, i, 0, *j)),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct(shape, dtype) for dtype in written),
            jax.ShapeDtypeStruct((leaf.batch, tiles, sums, *leaf.tiled), wide),
        ],
        input_output_aliases={len(given) + 1 + i: i for i in range(len(written) - 1)},
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=[PARALLEL] * len(grid)),
    )(*given, *arrays, *borders)


def beyond(
    arrays: Sequence[jax.Array],
    band: int,
    slower: Sequence[int],
    names: Sequence[tuple[str, ...]],
) -> tuple[jax.Array, jax.Array]:
    """The rows before the first one of each column, and after the last one.

    They are the last rows of the column before, and the first of the one after. Other devices may
    have these: as many as the band is wide are sent, of all arrays at once.

    Args:
      arrays: of shape (batch, rows, rest...), all of one.
      band: how many rows.
      slower: the order of the axes behind the rows, see `Cut`.
      names: as in `step`.

    Returns:
      Two arrays (arrays, batch, band, rest...), float32; zero past the chains' ends.
    """
    axes = (2, *(axis + 3 for axis in slower))
    rows, rest = arrays[0].shape[1], arrays[0].ndim - 2
    shards = chain.Shards(axes, ((), (), *(names or [()] * (1 + rest))))
    last = jnp.stack([x[:, rows - band :].astype(jnp.float32) for x in arrays])
    first = jnp.stack([x[:, :band].astype(jnp.float32) for x in arrays])
    return chain.beyond(last, shards, -1), chain.beyond(first, shards, 1)


def _borders(
    arrays: Sequence[jax.Array], leaf: Cut, names: Sequence[tuple[str, ...]]
) -> list[jax.Array]:
    """Of each array, one after another, its tiles' borders and what is at the ends.

    That is each tile's last and first rows, (batch, tiles, halo, rest...), twice; and what stands
    before the first tile, the last one's last rows in the column before, and so after the last
    tile: (batch, halo, rest...), twice.
    """
    spare = leaf.halo - leaf.band
    before, after = beyond(arrays, leaf.band, leaf.slower, names)

    def whole(x: jax.Array, ahead: int) -> jax.Array:
        """With rows that no one looks at, for whole tiles of a TPU."""
        return jnp.pad(x, [(0, 0), (ahead, spare - ahead), *[(0, 0)] * len(leaf.rest)])

    borders = []
    for i, x in enumerate(arrays):
        ends = whole(before[i], spare), whole(after[i], 0)
        if leaf.tile == leaf.rows:  # a single tile has no others beside it
            inner = (ends[0][:, None], ends[1][:, None])
        else:
            tiles = x.reshape(leaf.batch, -1, leaf.tile, *leaf.rest)
            last, first = slice(leaf.tile - leaf.halo, None), slice(leaf.halo)
            inner = tiles[:, :, last].astype(jnp.float32), tiles[:, :, first].astype(jnp.float32)
        borders += [*inner, *ends]
    return borders


def _widened(
    leaf: Cut, place: jax.Array, owns: Sequence[Any], borders: Sequence[Any]
) -> list[jax.Array]:
    """Each array's rows in a tile, with those before and after, in float32."""
    tiles = leaf.rows // leaf.tile

    def widened(i: int) -> jax.Array:
        tile = owns[i][0].astype(jnp.float32)
        if not borders:
            return tile
        last, first, before, after = borders[4 * i : 4 * i + 4]
        return jnp.concatenate(
            [
                jnp.where(place == 0, before[0], last[0, 0]),
                tile,
                jnp.where(place == tiles - 1, after[0], first[0, 0]),
            ],
            axis=0,
        )

    return [widened(i) for i in range(len(owns))]


def _roll(x: jax.Array, by: int) -> jax.Array:
    from jax.experimental.pallas import tpu as pltpu

    if x.ndim > 2:  # rows are whole tiles then, and moved for nothing
        return jnp.roll(x, by, 0)
    return pltpu.roll(x, by % x.shape[0], 0)


def _inside(leaf: Cut) -> slice:
    """The tile's own rows, of those that it is widened to."""
    return slice(leaf.halo, leaf.halo + leaf.tile) if leaf.band else slice(None)


def _row_sums(pattern: ModuleType, leaf: Cut, *refs: Any) -> None:
    """Of a tile: ``refs`` are scalars and eps; g d e; of each its borders; the largest sums."""
    from jax.experimental import pallas as pl

    numbers, arrays, largest = refs[0], refs[2:-1], refs[-1]
    s = verbs.Scalars(*(numbers[i] for i in range(len(verbs.Scalars._fields))))
    owns, borders = arrays[: 2 + leaf.band], arrays[2 + leaf.band :]
    grad, nu, *offdiag = _widened(leaf, pl.program_id(1), owns, borders)
    axes = chain.Tile(_roll)
    diag, edges = pattern.accumulate(grad, nu, tuple(offdiag), b2=s.b2, axes=axes)
    largest[0, 0, 0] = jnp.max(diagonal.row_sums(diag, edges, axes)[_inside(leaf)], axis=0)


def _step(
    pattern: ModuleType,
    leaf: Cut,
    adam_eps: float | None,
    nesterov: bool,
    strides: tuple[int, ...] | None,
    *refs: Any,
) -> None:
    """Of a tile: ``refs`` are numbers; g m d e; of each of these its borders; the results.

    The numbers are the scalars, eps and, with strides, seeds and starts of the noise.
    """
    from jax.experimental import pallas as pl

    count, read = (2 if strides is None else 4), 3 + leaf.band
    (numbers, eps, *drawn), arrays = refs[:count], refs[count:]
    results, squares = arrays[-read - 1 : -1], arrays[-1]
    owns, borders = arrays[:read], arrays[read : -read - 1]
    s = verbs.Scalars(*(numbers[i] for i in range(len(verbs.Scalars._fields))))
    s = s._replace(eps=eps[pl.program_id(0)], relative_eps=0.0)
    axes, inside = chain.Tile(_roll), _inside(leaf)
    grad, mu, nu, *offdiag = _widened(leaf, pl.program_id(1), owns, borders)
    new = verbs.step(pattern, grad, mu, nu, tuple(offdiag), s, nesterov=nesterov, axes=axes)
    magnitude = new.magnitude(adam_eps)
    results[0][0] = new.mu[inside].astype(results[0].dtype)
    results[-1][0] = new.direction[inside]
    if strides is not None:
        seeds, starts = drawn
        sizes = owns[0].shape[1:]
        at = [pl.program_id(1 + axis) * size for axis, size in enumerate(sizes)]
        start = starts[pl.program_id(0)] + sum(
            n.astype(jnp.uint32) * jnp.uint32(by % 2**32)
            for n, by in zip(at, strides, strict=True)
        )
        index = rounding.positions(sizes, strides, start)
    for i, (result, x) in enumerate(zip(results[1:-1], (new.nu, *new.offdiag), strict=True)):
        if strides is None or result.dtype == jnp.float32:
            result[0] = x[inside].astype(result.dtype)
        else:
            drawn_bits = rounding.bits([seeds[i, 0], seeds[i, 1]], index)
            result[0] = rounding.round_by(drawn_bits, x[inside])
    for i, x in enumerate((new.direction[inside], magnitude[inside])):
        squares[0, 0, i] = jnp.sum(x * x, axis=0)
