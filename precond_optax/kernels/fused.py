r"""SONew's step of one leaf in one pass over memory: a Pallas kernel for TPUs.

The verbs of a sparsity pattern (`kernels/banded.py`), one after another, read and write the leaf's
arrays many times. Here a tile of rows is read once, with a few rows of the chain before and after
it; the same verbs are run on it, and its new statistics, its direction and the squares that the
grafting needs are written. Beside those few rows a step reads g, m, d, e and writes m, d, e, u,
the state in place: 32 bytes for each float32 parameter where the pattern is tridiagonal.

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
    tile = next((size for size in sizes if halo <= size <= most and rows % size == 0), None)
    if tile is None:
        return None
    slower = tuple(axis - batch_axes - 1 for axis in axes[1:])
    batch = math.prod(shape[:batch_axes])
    return Cut(batch, rows, tuple(rest), tuple(tiled), slower, tile, halo, 3 + band)


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
    names: Sequence[tuple[str, ...]] = (),
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array]:
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
      names: in a manual region, the axes of the mesh that share out the rows, and each axis of
        the rest.
      interpret: True: JAX runs the kernel step by step, on any backend; also ``pallas_call``'s
        ``InterpretParams``, with a TPU's memory.

    Returns:
      The new m, d and e, the direction u, and the sums of the squares of u and of w over each
      chain, (batch, 2).
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

    wrapped = pl.BlockSpec((1, leaf.halo, *block), lambda b, i, *j: (b, 0, *j))
    like = jax.ShapeDtypeStruct(arrays[0].shape, grad.dtype)
    squares = jax.ShapeDtypeStruct((leaf.batch, tiles, 2, *leaf.tiled), grad.dtype)
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
    sums = jnp.sum(parts, axis=(1, *range(3, parts.ndim)))
    return new_mu, new_nu, tuple(edges), direction, sums


def _borders(
    arrays: Sequence[jax.Array], leaf: Cut, names: Sequence[tuple[str, ...]]
) -> list[jax.Array]:
    """Of each array, one after another, its tiles' borders and what is at the ends.

    That is each tile's last and first rows, (batch, tiles, halo, rest...), twice; and what stands
    before the first tile, the last one's last rows in the column before, and so after the last
    tile: (batch, halo, rest...), twice. Other devices may have these: as many as the band is wide
    are sent, of all arrays at once.
    """
    band, spare = leaf.arrays - 3, leaf.halo - (leaf.arrays - 3)
    axes = (2, *(axis + 3 for axis in leaf.slower))
    shards = chain.Shards(axes, ((), (), *(names or [()] * (1 + len(leaf.rest)))))
    before = chain.beyond(jnp.stack([x[:, leaf.rows - band :] for x in arrays]), shards, -1)
    after = chain.beyond(jnp.stack([x[:, :band] for x in arrays]), shards, 1)

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
            inner = tiles[:, :, leaf.tile - leaf.halo :], tiles[:, :, : leaf.halo]
        borders += [*inner, *ends]
    return borders


class Static(NamedTuple):
    """What `one_pass` knows of a leaf beside its arrays.

    Attributes:
      pattern: the module of its verbs.
      batch_axes: how many of its axes, from the first, stack separate chains.
      axes: the chain's, fastest first, of all of the leaf's.
      adam_eps: as in `step`.
    """

    pattern: ModuleType
    batch_axes: int
    axes: tuple[int, ...]
    adam_eps: float | None


def _on_a_device(
    leaf: Static, names: Sequence[tuple[str, ...]], *args: jax.Array
) -> tuple[jax.Array, ...]:
    """A device's part of a step: ``names`` are the axes of the mesh that share out each axis."""
    *arrays, scalars = args
    grad, mu, nu, *offdiag = arrays
    held, batch = tuple(offdiag), grad.shape[: leaf.batch_axes]
    s = Scalars(*(scalars[i] for i in range(len(Scalars._fields))))
    shards = chain.Shards(leaf.axes, tuple(names))
    part = cut(grad.shape, leaf.batch_axes, leaf.axes, len(held))
    if part is None:
        new = verbs(leaf.pattern, grad, mu, nu, held, s, axes=shards)
        both = jnp.stack([new.direction, new.magnitude(leaf.adam_eps)], leaf.batch_axes)
        squares = jnp.sum(both * both, axis=tuple(range(leaf.batch_axes + 1, both.ndim)))
        mu, nu, held, direction = new.mu, new.nu, new.offdiag, new.direction
    else:
        own_names = shards.names[leaf.batch_axes :]
        run = functools.partial(step, leaf.pattern, part, adam_eps=leaf.adam_eps, names=own_names)
        mu, nu, held, direction, squares = lax.platform_dependent(
            *(grad, mu, nu, held, s),
            tpu=run,
            default=functools.partial(run, interpret=True),
        )
    squares = squares.reshape(*batch, 2)
    if shards.cuts:
        squares = lax.psum(squares, shards.cuts)
    return mu, nu, *held, direction, squares


@functools.partial(jax.jit, static_argnums=0)
def one_pass(
    leaf: Static,
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    offdiag: tuple[jax.Array, ...],
    scalars: Scalars,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array]:
    """A step of a leaf, of which `placement.has_known_parts`.

    Args:
      leaf: its static facts.
      grad: g, float32, of a shape that `cut` takes.
      mu: m, likewise.
      nu: d.
      offdiag: e, one array for each off-diagonal.
      scalars: decays, corrections, damping.

    Returns:
      The new m, d and e, the direction u, and the sums of the squares of u and of w over each
      chain, (batch axes..., 2).
    """
    stacked = jnp.stack([jnp.asarray(x, grad.dtype) for x in scalars])
    arrays, ahead = [grad, mu, nu, *offdiag], leaf.batch_axes
    squares = placement.Follower((*grad.shape[:ahead], 2), (*range(ahead), None))
    mu, nu, *held, direction, sums = placement.on_each_part(
        functools.partial(_on_a_device, leaf),
        grad,
        [*[placement.like(grad)] * len(arrays), squares],
        *[(x, placement.like(grad)) for x in arrays],
        (stacked, placement.Follower(stacked.shape, (None,))),
    )
    return mu, nu, tuple(held), direction, sums


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
    magnitude = new.magnitude(adam_eps)
    inside = slice(leaf.halo, leaf.halo + leaf.tile) if borders else slice(None)
    for result, x in zip(results, (new.mu, new.nu, *new.offdiag, new.direction), strict=True):
        result[0] = x[inside]
    for i, x in enumerate((new.direction[inside], magnitude[inside])):
        squares[0, 0, i] = jnp.sum(x * x, axis=0)
