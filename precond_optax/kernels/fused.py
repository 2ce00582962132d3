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

XLA cannot share out a kernel. Where the mesh tells which part of a leaf each device has,
`one_pass` runs it on that part, with the rows beyond from the devices that have them.
"""

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from precond_optax import placement
from precond_optax.checks import Scalar
from precond_optax.kernels import chain, rounding

SUBLANES, LANES = 8, 128  # of a TPU's tile: of the last two axes
MAX_BAND = SUBLANES
# Of one array. The kernel holds each of some ten twice, and temporaries, in 16 MB.
_TILE_BYTES = 2**18
PARALLEL: Final = 'parallel'  # no step of the grid waits for another


class Scalars(NamedTuple):
    """What the verbs take beside arrays; each may be traced."""

    b1: Scalar
    b2: Scalar
    mu_correction: Scalar  # 1 / (1 - b1^t); of the mean that looks ahead b1 / (1 - b1^(t+1))
    nu_correction: Scalar
    eps: Scalar
    edge_tolerance: Scalar
    grad_correction: Scalar = 0.0  # (1 - b1) / (1 - b1^t) where the mean looks one step ahead

    def mu_hat(self, mu: jax.Array, grad: jax.Array, nesterov: bool) -> jax.Array:
        """The bias-corrected mean; with ``nesterov`` of the step ahead, g in for its gradient."""
        corrected = mu * self.mu_correction
        return corrected + grad * self.grad_correction if nesterov else corrected


def is_wanted(impl: str) -> bool:
    """Whether leaves that can are to go through the kernel, by what a trace is for."""
    return impl == 'pallas' or (impl == 'auto' and placement.platform() == 'tpu')


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
      arrays: read of each tile, and written: g m d e, and m d e u.
    """

    batch: int
    rows: int
    rest: tuple[int, ...]
    tiled: tuple[int, ...]
    slower: tuple[int, ...]
    tile: int
    halo: int
    arrays: int


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
      Cut(batch=1, rows=4096, rest=(512,), tiled=(512,), slower=(0,), tile=512, halo=8, arrays=4)
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
    return Cut(batch, rows, tuple(rest), tuple(tiled), slower, tile, halo, 3 + band)


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


class Stepped(NamedTuple):
    """What the verbs make of a gradient: arrays of its shape."""

    mu: jax.Array
    nu: jax.Array
    offdiag: tuple[jax.Array, ...]
    psi: tuple[jax.Array, ...]
    direction: jax.Array
    mu_hat: jax.Array
    nu_hat: jax.Array

    def magnitude(self, eps: float | None) -> jax.Array:
        """w: Adam's direction with this epsilon, or the bias-corrected mean if it is None."""
        return self.mu_hat if eps is None else self.mu_hat / (jnp.sqrt(self.nu_hat) + eps)


def verbs(
    pattern: ModuleType,
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    offdiag: tuple[jax.Array, ...],
    scalars: Scalars,
    *,
    relative_eps: Scalar = 0.0,
    nesterov: bool = False,
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
      nesterov: whether the mean looks one step ahead.
      axes: the chain's, fastest first.

    Returns:
      The new statistics, the factors, the direction, and the bias-corrected means.
    """
    s = scalars
    mu = s.b1 * mu + (1 - s.b1) * grad
    mu_hat = s.mu_hat(mu, grad, nesterov)
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
    nesterov: bool = False,
    names: Sequence[tuple[str, ...]] = (),
    noise: Noise | None = None,
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
      scalars: decays, corrections, damping.
      adam_eps: w is Adam's direction with this epsilon; None: the bias-corrected m.
      nesterov: as in `verbs`.
      names: in a manual region, the axes of the mesh that share out the rows, and each axis of
        the rest.
      noise: how d and e are rounded where they are bfloat16. None: to nearest, as m is.
      interpret: True: JAX runs the kernel step by step, on any backend; also ``pallas_call``'s
        ``InterpretParams``, with a TPU's memory.

    Returns:
      The new m, d and e, of their dtypes, the direction u, and the sums of the squares of u and
      of w over each chain, (batch, 2), both float32.
    """
    # Here, because it is a large part of the package's own import, and few need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    arrays = [x.reshape(leaf.batch, leaf.rows, *leaf.rest) for x in (grad, mu, nu, *offdiag)]
    tiles, count = leaf.rows // leaf.tile, len(arrays)
    borders = _borders(arrays, leaf, names) if offdiag else []
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
    likes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[1:]]
    likes.append(jax.ShapeDtypeStruct(arrays[0].shape, wide))
    squares = jax.ShapeDtypeStruct((leaf.batch, tiles, 2, *leaf.tiled), wide)
    numbers = [jnp.stack([jnp.asarray(x, wide) for x in scalars])]
    strides: tuple[int, ...] | None = None
    if noise is not None:
        numbers += [noise.seeds, noise.starts]
        strides = noise.strides[0], *noise.strides[-len(leaf.tiled) :]
    *new, direction, parts = pl.pallas_call(
        functools.partial(_kernel, pattern, leaf, adam_eps, nesterov, strides),
        grid=grid,
        in_specs=[
            *[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(numbers),
            *[own] * count,
            *[beside(-1), beside(1), end(0), end(tiles - 1)] * (len(borders) // 4),
        ],
        out_specs=[
            *[own] * count,
            pl.BlockSpec((1, 1, 2, *block), lambda b, i, *j: (b, i, 0, *j)),
        ],
        out_shape=[*likes, squares],
        input_output_aliases={len(numbers) + 1 + i: i for i in range(count - 1)},  # statistics
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=[PARALLEL] * len(grid)),
    )(*numbers, *arrays, *borders)
    new_mu, new_nu, *edges, direction = (x.reshape(grad.shape) for x in (*new, direction))
    sums = jnp.sum(parts, axis=(1, *range(3, parts.ndim)))
    return new_mu, new_nu, tuple(edges), direction, sums


def _borders(
    arrays: Sequence[jax.Array], leaf: Cut, names: Sequence[tuple[str, ...]]
) -> list[jax.Array]:
    """Of each array, one after another, its tiles' borders and what is at the ends.

    That is each tile's last and first rows, (batch, tiles, halo, rest...), twice; and what stands
    before the first tile, the last one's last rows in the column before, and so after the last
    tile: (batch, halo, rest...), twice. Other devices may have these: as many as the band is wide
    are sent, of all arrays at once, in float32.
    """
    band, spare = leaf.arrays - 3, leaf.halo - (leaf.arrays - 3)
    axes = (2, *(axis + 3 for axis in leaf.slower))
    shards = chain.Shards(axes, ((), (), *(names or [()] * (1 + len(leaf.rest)))))

    def rows(x: jax.Array, *index: Any) -> jax.Array:
        return x[index].astype(jnp.float32)

    every = slice(None)
    last = jnp.stack([rows(x, every, slice(leaf.rows - band, None)) for x in arrays])
    first = jnp.stack([rows(x, every, slice(band)) for x in arrays])
    before, after = chain.beyond(last, shards, -1), chain.beyond(first, shards, 1)

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
            last_rows = rows(tiles, every, every, slice(leaf.tile - leaf.halo, None))
            inner = (last_rows, rows(tiles, every, every, slice(leaf.halo)))
        borders += [*inner, *ends]
    return borders


class Static(NamedTuple):
    """What `one_pass` knows of a leaf beside its arrays.

    Attributes:
      pattern: the module of its verbs.
      batch_axes: how many of its axes, from the first, stack separate chains.
      axes: the chain's, fastest first, of all of the leaf's.
      adam_eps: as in `step`.
      nesterov: likewise.
      interpreted: whether other backends than TPUs interpret the kernel; else they have the verbs.
    """

    pattern: ModuleType
    batch_axes: int
    axes: tuple[int, ...]
    adam_eps: float | None
    nesterov: bool = False
    interpreted: bool = True


def _noise(
    leaf: Static, whole: Sequence[int], names: Sequence[tuple[str, ...]], part: Any, seeds: Any
) -> Noise:
    """The noise of a device's part of a leaf of shape ``whole``."""
    strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    start = jnp.uint32(0)
    for size, own, stride in zip(part, names, strides, strict=True):
        if own:
            ahead = lax.axis_index(own).astype(jnp.uint32) * jnp.uint32(size)
            start = start + ahead * jnp.uint32(stride % 2**32)
    batch = leaf.batch_axes
    starts = rounding.positions(part[:batch], strides[:batch], start)
    return Noise(seeds, starts.ravel(), tuple(strides[batch:]))


def _on_a_device(
    leaf: Static, whole: Sequence[int], names: Sequence[tuple[str, ...]], *args: jax.Array
) -> tuple[jax.Array, ...]:
    """A device's part of a step.

    Args:
      leaf: its static facts.
      whole: the leaf's shape.
      names: the axes of the mesh that share out each of its axes.
      *args: of `one_pass`, the scalars as an array.

    Returns:
      As `one_pass`, in one tuple.
    """
    *arrays, scalars, seeds = args
    grad, batch = arrays[0], arrays[0].shape[: leaf.batch_axes]
    s = Scalars(*(scalars[i] for i in range(len(Scalars._fields))))
    shards = chain.Shards(leaf.axes, tuple(names))
    part = cut(grad.shape, leaf.batch_axes, leaf.axes, len(arrays) - 3)
    noise = _noise(leaf, whole, shards.names, grad.shape, seeds) if len(seeds) else None

    def by_kernel(part: Cut, interpret: bool, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        grad, mu, nu, *offdiag = arrays
        mu, nu, held, *rest = step(
            leaf.pattern,
            part,
            *(grad, mu, nu, tuple(offdiag), s),
            adam_eps=leaf.adam_eps,
            nesterov=leaf.nesterov,
            names=shards.names[leaf.batch_axes :],
            noise=noise,
            interpret=interpret,
        )
        return mu, nu, *held, *rest

    def by_verbs(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        grad, mu, nu, *offdiag = (x.astype(jnp.float32) for x in arrays)
        statistics = mu, nu, tuple(offdiag)
        new = verbs(leaf.pattern, grad, *statistics, s, nesterov=leaf.nesterov, axes=shards)
        both = new.direction, new.magnitude(leaf.adam_eps)
        squares = jnp.stack(
            [jnp.sum(x * x, axis=tuple(range(len(batch), x.ndim))) for x in both], axis=-1
        )
        kept = _kept((new.nu, *new.offdiag), arrays[2].dtype, batch, noise)
        return new.mu.astype(arrays[1].dtype), *kept, new.direction, squares.reshape(-1, 2)

    if part is None:
        results = by_verbs(*arrays)
    else:
        compiled, interpreted = (functools.partial(by_kernel, part, how) for how in (False, True))
        elsewhere = interpreted if leaf.interpreted else by_verbs
        results = lax.platform_dependent(*arrays, tpu=compiled, default=elsewhere)
    *held, squares = results
    squares = squares.reshape(*batch, 2)
    if shards.cuts:
        squares = lax.psum(squares, shards.cuts)
    return *held, squares


def _kept(
    arrays: Sequence[jax.Array], dtype: Any, batch: Sequence[int], noise: Noise | None
) -> list[jax.Array]:
    """Statistics as they are kept, of leaves with these batch axes."""
    if noise is None or dtype != jnp.bfloat16:
        return [x.astype(dtype) for x in arrays]
    own = arrays[0].shape[len(batch) :]
    starts = noise.starts.reshape(*batch, *(1 for _ in own))
    index = starts + rounding.positions(own, noise.strides)
    return [
        rounding.round_by(rounding.bits(seeds, index), x)
        for seeds, x in zip(noise.seeds, arrays, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def one_pass(
    leaf: Static,
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    offdiag: tuple[jax.Array, ...],
    scalars: Scalars,
    seeds: jax.Array,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array]:
    """A step of a leaf, of which `placement.has_known_parts`.

    Args:
      leaf: its static facts.
      grad: g, of a shape that `cut` takes, float32 or bfloat16, as each of the arrays may be.
      mu: m, likewise.
      nu: d.
      offdiag: e, one array for each off-diagonal.
      scalars: decays, corrections, damping.
      seeds: of the rounding of d and each e, (1 + band, 2); (0, 2): to nearest.

    Returns:
      The new m, d and e, of their dtypes, the direction u, and the sums of the squares of u and
      of w over each chain, (batch axes..., 2), both float32.
    """
    stacked = jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])
    arrays, ahead = [grad, mu, nu, *offdiag], leaf.batch_axes
    squares = placement.Follower((*grad.shape[:ahead], 2), (*range(ahead), None))
    mu, nu, *held, direction, sums = placement.on_each_part(
        functools.partial(_on_a_device, leaf, grad.shape),
        grad,
        [*[placement.like(grad)] * len(arrays), squares],
        *[(x, placement.like(grad)) for x in arrays],
        (stacked, placement.Follower(stacked.shape, (None,))),
        (seeds, placement.Follower(seeds.shape, (None, None))),
    )
    return mu, nu, tuple(held), direction, sums


def _kernel(
    pattern: ModuleType,
    leaf: Cut,
    adam_eps: float | None,
    nesterov: bool,
    strides: tuple[int, ...] | None,
    *refs: Any,
) -> None:
    """Of a tile: ``refs`` are numbers; g m d e; of each of these its borders; the results.

    The numbers are the scalars and, with strides, seeds and starts of the noise.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    count = 1 if strides is None else 3
    (numbers, *drawn), arrays = refs[:count], refs[count:]
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

    axes = chain.Tile(roll)
    grad, mu, nu, *offdiag = (widened(i) for i in range(leaf.arrays))
    new = verbs(pattern, grad, mu, nu, tuple(offdiag), s, nesterov=nesterov, axes=axes)
    magnitude = new.magnitude(adam_eps)
    inside = slice(leaf.halo, leaf.halo + leaf.tile) if borders else slice(None)
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
