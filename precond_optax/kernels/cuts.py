"""How a TPU's kernel sees a leaf: cut into tiles, with what is beside each of them.

A tile's last two axes are rows (sublanes) and columns (lanes). The chain goes down the rows, a
column a stretch of it (`Down`), or across the columns, along a row (`Across`). The columns are the
axis that a TPU holds last, so that arrays are padded least: a leaf that it does not hold in the
order of its axes is seen in the order in which it does, and nothing is turned round.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from precond_optax.kernels import chain

SUBLANES, LANES = 8, 128  # of a TPU's tile: of the last two axes
MAX_BAND = SUBLANES
# Of all 3 + band arrays of a tile. The kernel holds each twice, and temporaries, in 16 MB.
_TILE_ENTRIES = 2**18
PARALLEL: Final = 'parallel'  # no step of a grid waits for another
_FEWEST = 4 * LANES  # columns of a part of a row: what is beside it moves too
_FEWEST_ROWS = 4 * SUBLANES  # likewise


class Fold(NamedTuple):
    """How many numbers become one.

    Attributes:
      pair: of two arrays.
      along: along the axes of one.
    """

    pair: Callable[[jax.Array, jax.Array], jax.Array]
    along: Callable[..., jax.Array]


SUM, LARGEST = Fold(jnp.add, jnp.sum), Fold(jnp.maximum, jnp.max)


class Blocks(NamedTuple):
    """What a Pallas call is told of tiles.

    Attributes:
      grid: how many there are along each axis, the chains first.
      own: of a tile.
      borders: of what is beside it, of each operand that holds some.
      sums: of the numbers that the kernel makes of a tile.
      shape: of the array of these, whose axis ``axis`` is theirs.
      axis: see there.
    """

    grid: tuple[int, ...]
    own: Any
    borders: list[Any]
    sums: Any
    shape: tuple[int, ...]
    axis: int


class Down(NamedTuple):
    """A leaf whose chain goes down the rows of its tiles: static.

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

    @property
    def tiles(self) -> int:
        return self.rows // self.tile

    def operands(
        self, arrays: Sequence[jax.Array], names: Sequence[tuple[str, ...]], interpret: Any
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The arrays as the kernel sees them, and what is beside their tiles.

        Of each array that is each tile's last and first rows, (batch, tiles, halo, rest...),
        twice; and what stands before the first tile, the last one's last rows in the column
        before, and so after the last tile: (batch, halo, rest...), twice.

        Args:
          arrays: of the leaf's shape.
          names: in a manual region, the axes of the mesh that share out each of the leaf's own.
          interpret: as in `tiles.step`.

        Returns:
          Arrays (batch, rows, rest...), and borders, none for a diagonal.
        """
        borders: list[jax.Array] = []
        if self.band:
            rows = [x.reshape(self.batch, self.rows, *self.rest) for x in arrays]
            borders = [self._seen(x) for x in self._borders(rows, names)]
        return [self.seen(x) for x in arrays], borders

    def seen(self, x: jax.Array) -> jax.Array:
        """One of the leaf's arrays as the kernel sees it."""
        return self._seen(x.reshape(self.batch, self.rows, *self.rest))

    def _seen(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[: x.ndim - len(self.rest)], *self.tiled)

    def _borders(
        self, arrays: Sequence[jax.Array], names: Sequence[tuple[str, ...]]
    ) -> list[jax.Array]:
        spare = self.halo - self.band
        axes = (1, *(axis + 2 for axis in self.slower))
        before, after = chain.ends(arrays, self.band, axes, ((), *names) if names else ())

        def whole(x: jax.Array, ahead: int) -> jax.Array:
            """With rows that no one looks at, for whole tiles of a TPU."""
            return jnp.pad(x, [(0, 0), (ahead, spare - ahead), *[(0, 0)] * len(self.rest)])

        borders = []
        for i, x in enumerate(arrays):
            ends = whole(before[i], spare), whole(after[i], 0)
            if self.tile == self.rows:  # a single tile has no others beside it
                inner = (ends[0][:, None], ends[1][:, None])
            else:
                tiles = x.reshape(self.batch, -1, self.tile, *self.rest)
                last, first = slice(self.tile - self.halo, None), slice(self.halo)
                wide = jnp.float32
                inner = tiles[:, :, last].astype(wide), tiles[:, :, first].astype(wide)
            borders += [*inner, *ends]
        return borders

    def result(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        """An array of the kernel's as the leaf's."""
        return x.reshape(shape)

    def blocks(self, borders: int, sums: int) -> Blocks:
        """For so many operands with borders, and so many numbers of each column of a tile."""
        from jax.experimental import pallas as pl

        tiles, halo = self.tiles, self.halo
        block = (*(SUBLANES for _ in self.tiled[1:]), LANES)
        columns = (pl.cdiv(n, k) for n, k in zip(self.tiled, block, strict=True))

        def beside(step: int) -> pl.BlockSpec:
            """The border of the tile before or after, of the last or first one at the ends."""
            return pl.BlockSpec(
                (1, 1, halo, *block),
                lambda b, i, *j: (b, jnp.clip(i + step, 0, tiles - 1), 0, *j),
            )

        def end(place: int) -> pl.BlockSpec:
            """What is beyond this tile; the others do not look, so no other block is fetched."""
            return pl.BlockSpec(
                (1, halo, *block),
                lambda b, i, *j: (b, 0, *(jnp.where(i == place, at, 0) for at in j)),
            )

        return Blocks(
            grid=(self.batch, tiles, *columns),
            own=pl.BlockSpec((1, self.tile, *block), lambda b, i, *j: (b, i, *j)),
            borders=[beside(-1), beside(1), end(0), end(tiles - 1)] * (borders // 4),
            sums=pl.BlockSpec((1, 1, sums, *block), lambda b, i, *j: (b, i, 0, *j)),
            shape=(self.batch, tiles, sums, *self.tiled),
            axis=2,
        )

    def widened(self, owns: Sequence[Any], borders: Sequence[Any]) -> list[jax.Array]:
        """In the kernel: each array's tile with the rows before and after it, in float32."""
        from jax.experimental import pallas as pl

        place = pl.program_id(1)

        def widened(i: int) -> jax.Array:
            tile = owns[i][0].astype(jnp.float32)
            if not borders:
                return tile
            last, first, before, after = borders[4 * i : 4 * i + 4]
            return jnp.concatenate(
                [
                    jnp.where(place == 0, before[0], last[0, 0]),
                    tile,
                    jnp.where(place == self.tiles - 1, after[0], first[0, 0]),
                ],
                axis=0,
            )

        return [widened(i) for i in range(len(owns))]

    def roll(self, x: jax.Array, by: int) -> jax.Array:
        """In the kernel: a widened tile moved on along the chain."""
        from jax.experimental.pallas import tpu as pltpu

        if x.ndim > 2:  # rows are whole tiles then, and moved for nothing
            return jnp.roll(x, by, 0)
        return pltpu.roll(x, by % x.shape[0], 0)

    def own(self, x: jax.Array) -> jax.Array:
        """In the kernel: the tile, of what it was widened to."""
        return x[self.halo : self.halo + self.tile] if self.band else x

    def put(self, sums: Any, i: int, x: jax.Array, fold: Fold) -> None:
        """In the kernel: a number of each column of a tile; those past the array are cut off."""
        sums[0, 0, i] = fold.along(x, axis=0)

    def strides(self, every: Sequence[int]) -> tuple[int, ...]:
        """Between neighbours in the whole leaf along each of a tile's axes, from its own axes'."""
        return every[0], *every[-len(self.tiled) :]


class Across(NamedTuple):
    """A leaf whose chain goes across the columns of its tiles: static.

    Rows lie in planes; a tile has some whole planes, or rows of one. It has whole rows, or a part
    of each: beside it are the last entries of the part before, or of the row before in the chain's
    order, and the first ones after. A tile is rolled together with them: those after it follow it,
    those before it are the last and so precede its first column.

    Attributes:
      batch: separate chains.
      order: the leaf's own axes as they are seen: in the order in which a TPU holds them.
      sizes: theirs, in that order.
      axes: the chain's, fastest first, counted in that order; the first is the last one.
      planes: of rows.
      rows: of a plane.
      tile: planes, rows and columns of a tile.
      band: its off-diagonals.
    """

    batch: int
    order: tuple[int, ...]
    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    planes: int
    rows: int
    tile: tuple[int, int, int]
    band: int

    @property
    def parts(self) -> int:
        """Of a row: tiles along it."""
        return self.sizes[-1] // self.tile[2]

    def operands(
        self, arrays: Sequence[jax.Array], names: Sequence[tuple[str, ...]], interpret: Any
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """As `Down.operands`: arrays (batch, planes, rows, columns), and ends of all together.

        These are the last entries of each part of a row, and the first ones, of one array after
        another, (batch, planes, rows, LANES parts), if there are parts; and what stands before the
        first part, and after the last one, (batch, planes, rows, LANES).
        """
        arrays = [self.seen(x) for x in arrays]
        if not self.band:
            return arrays, []
        last, first = self._ends(arrays, interpret)
        own = [names[axis] for axis in self.order] if names else [()] * len(self.order)
        shards = chain.Shards(tuple(axis + 1 for axis in self.axes), ((), *own))

        def beyond(ends: jax.Array, step: int) -> jax.Array:
            edge = ends.reshape(self.batch, *self.sizes[:-1], LANES)
            if not shards.cuts:
                return self._seen(chain.beyond(edge, shards, step))
            edge = edge[..., : len(arrays) * self.band]  # of what is sent nothing is empty
            spare = [(0, 0)] * (edge.ndim - 1) + [(0, LANES - edge.shape[-1])]
            return self._seen(jnp.pad(chain.beyond(edge, shards, step), spare))

        inner = [last, first] if self.parts > 1 else []
        ends = beyond(last[..., -LANES:], -1), beyond(first[..., :LANES], 1)
        return arrays, [*inner, *ends]

    def seen(self, x: jax.Array) -> jax.Array:
        """As `Down.seen`."""
        placed = sorted(range(len(self.order)), key=self.order.__getitem__)
        turned = (0, *(axis + 1 for axis in self.order))
        own = x.reshape(self.batch, *(self.sizes[i] for i in placed))
        return self._seen(own.transpose(turned))

    def _seen(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.batch, self.planes, self.rows, x.shape[-1])

    def _ends(self, arrays: Sequence[jax.Array], interpret: Any) -> list[jax.Array]:
        """The last and the first entries of all parts of rows, as in `operands`.

        By a kernel: XLA would turn whole arrays round to cut a few columns out of them.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        planes, rows, columns = self.tile
        each = columns // LANES
        block = (1, planes, rows, LANES)
        places = [
            lambda b, i, j, k: (b, i, j, (k + 1) * each - 1),
            lambda b, i, j, k: (b, i, j, k * each),
        ]

        def gather(*refs: Any) -> None:
            for side, start in enumerate((LANES - self.band, 0)):
                ours = refs[side * len(arrays) :]
                together = jnp.zeros((planes * rows, LANES), jnp.float32)
                lane = jax.lax.broadcasted_iota(jnp.int32, together.shape, 1)
                for i in range(len(arrays)):
                    x = self._flat(ours[i][0]).astype(jnp.float32)
                    at = i * self.band
                    here = (lane >= at) & (lane < at + self.band)
                    together = jnp.where(here, self.roll(x, at - start), together)
                refs[2 * len(arrays) + side][0] = together.reshape(planes, rows, LANES)

        shape = (*arrays[0].shape[:-1], self.parts * LANES)
        return pl.pallas_call(
            gather,
            grid=self._grid(),
            in_specs=[pl.BlockSpec(block, place) for place in places for _ in arrays],
            out_specs=[pl.BlockSpec(block, lambda *at: at)] * 2,
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2,
            # Of the arrays blocks are read, which XLA and who reads its programs cannot know.
            cost_estimate=pl.CostEstimate(
                flops=0,
                transcendentals=0,
                bytes_accessed=2 * math.prod(shape) * (4 + sum(x.dtype.itemsize for x in arrays)),
            ),
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(dimension_semantics=[PARALLEL] * 4),
        )(*arrays, *arrays)

    def _grid(self) -> tuple[int, int, int, int]:
        planes, rows, _ = self.tile
        return self.batch, self.planes // planes, -(-self.rows // rows), self.parts

    def result(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        """As `Down.result`."""
        placed = (0, *(1 + self.order.index(axis) for axis in range(len(self.order))))
        return x.reshape(self.batch, *self.sizes).transpose(placed).reshape(shape)

    def blocks(self, borders: int, sums: int) -> Blocks:
        """As `Down.blocks`; the numbers are of columns that are a multiple of `LANES` apart."""
        from jax.experimental import pallas as pl

        planes, rows, columns = self.tile
        grid = self._grid()

        def beside(step: int) -> pl.BlockSpec:
            """The ends of the part before or after."""
            return pl.BlockSpec(
                (1, planes, rows, LANES),
                lambda *at: (*at[:-1], jnp.clip(at[-1] + step, 0, self.parts - 1)),
            )

        end = pl.BlockSpec((1, planes, rows, LANES), lambda *at: (*at[:-1], 0))
        inner = [beside(-1), beside(1)] if borders == 4 else []
        return Blocks(
            grid=grid,
            own=pl.BlockSpec((1, planes, rows, columns), lambda *at: at),
            borders=[*inner, end, end] if borders else [],
            sums=pl.BlockSpec((1, 1, 1, 1, sums, LANES), lambda *at: (*at, 0, 0)),
            shape=(*grid, sums, LANES),
            axis=4,
        )

    def widened(self, owns: Sequence[Any], borders: Sequence[Any]) -> list[jax.Array]:
        """As `Down.widened`: the rows of all planes, followed by what is beside them."""
        from jax.experimental import pallas as pl

        tiles = [self._flat(x[0]).astype(jnp.float32) for x in owns]
        if not borders:
            return tiles
        *inner, before, after = (self._flat(x[0]) for x in borders)
        if inner:
            part = pl.program_id(3)
            before = jnp.where(part == 0, before, inner[0])
            after = jnp.where(part == self.parts - 1, after, inner[1])
        lane = jax.lax.broadcasted_iota(jnp.int32, before.shape, 1)

        def beside(i: int) -> jax.Array:
            """What follows a row, and then, last, what precedes it, as a roll will have it."""
            following = self.roll(after, -i * self.band)
            return jnp.where(lane < LANES // 2, following, self.roll(before, -(i + 1) * self.band))

        return [jnp.concatenate([tile, beside(i)], axis=1) for i, tile in enumerate(tiles)]

    def _flat(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])

    def roll(self, x: jax.Array, by: int) -> jax.Array:
        """As `Down.roll`."""
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.roll(x, by % x.shape[1], 1)

    def own(self, x: jax.Array) -> jax.Array:
        """As `Down.own`."""
        return x[:, : self.tile[2]].reshape(self.tile)

    def put(self, sums: Any, i: int, x: jax.Array, fold: Fold) -> None:
        """As `Down.put`, of positive numbers; rows past the array do not count."""
        from jax.experimental import pallas as pl

        _, rows, columns = self.tile
        if self.rows % rows:
            row = pl.program_id(2) * rows + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            x = jnp.where(row < self.rows, x, 0)
        x = self._flat(x)
        parts = [x[:, at : at + LANES] for at in range(0, columns, LANES)]
        sums[0, 0, 0, 0, i] = fold.along(functools.reduce(fold.pair, parts), axis=0)

    def strides(self, every: Sequence[int]) -> tuple[int, ...]:
        """As `Down.strides`."""
        seen = [every[axis] for axis in self.order]
        return tuple(seen) if len(seen) == 3 else (0, *seen)  # of matrices there is one plane


Cut: TypeAlias = Down | Across


def cut(shape: Sequence[int], batch_axes: int, axes: Sequence[int], band: int) -> Cut | None:
    """How the kernel would cut a leaf; None if it cannot.

    It can where the leaf has two or three axes, of which the chain runs along the first one first
    or along the one that a TPU holds last; where tiles of 32 rows or more, or of a multiple of 128
    columns, 512 or more, divide that axis, or it is one of eight rows or more; and where a TPU
    holds the others without much padding.

    Args:
      shape: of the leaf.
      batch_axes: how many of its axes, from the first, stack separate chains.
      axes: the chain's, fastest first.
      band: its off-diagonals.

    Returns:
      The leaf's cut.

    Example:
      >>> cut((4096, 512), 0, axes=(0, 1), band=1)
      Down(batch=1, rows=4096, rest=(512,), tiled=(512,), slower=(0,), tile=512, halo=8, band=1)
      >>> cut((4096, 512), 0, axes=(1, 0), band=1).tile
      (1, 128, 512)
      >>> cut((12, 65), 0, axes=(1, 0), band=1)
    """
    own = tuple(shape[batch_axes:])
    if band > MAX_BAND or len(own) not in (2, 3) or 0 in shape:
        return None
    # The more arrays there are, the less room has each.
    most = _TILE_ENTRIES // (3 + max(1, band))
    batch, ours = math.prod(shape[:batch_axes]), [axis - batch_axes for axis in axes]
    order = held(own)
    across = _across(batch, own, order, ours, band, most) if ours[0] == order[-1] else None
    # A diagonal has no chain for which to turn a leaf round.
    if across is not None or ours[0] != 0 or (band == 0 and order[-1] == 0):
        return across
    return _down(batch, own, ours, band, most)


def held(sizes: Sequence[int]) -> tuple[int, ...]:
    """The order in which a TPU holds axes, the last in lanes: the first that pads them least.

    Example:
      >>> held((1024, 512)), held((1024, 50257)), held((1024, 16, 64))
      ((0, 1), (1, 0), (1, 2, 0))
    """

    def padded(order: tuple[int, ...]) -> int:
        *major, rows, columns = (sizes[axis] for axis in order)
        return math.prod(major) * -(-rows // SUBLANES) * -(-columns // LANES)

    return min(itertools.permutations(range(len(sizes))), key=padded)


def _down(
    batch: int, own: Sequence[int], axes: Sequence[int], band: int, most: int
) -> Down | None:
    rows, *rest = own
    tiled = rest[-1:] if rest[0] == 1 else rest  # one device may have one head
    flat = len(tiled) == 1  # then rows are a tile's second axis
    if rest[-1] < LANES or not (flat or rest[0] % SUBLANES == 0):
        return None
    # Single rows cut out of many tiles take XLA more than two do.
    unit, halo = (SUBLANES, SUBLANES) if flat else (1, max(2, band))
    most //= LANES * SUBLANES ** (len(tiled) - 1)
    fewest = min(rows, _FEWEST_ROWS) if flat else SUBLANES
    sizes = (rows, *range(most // unit * unit, fewest - 1, -unit))
    tile = next((size for size in sizes if SUBLANES <= size <= most and rows % size == 0), None)
    if tile is None:
        return None
    slower = tuple(axis - 1 for axis in axes[1:])
    return Down(batch, rows, tuple(rest), tuple(tiled), slower, tile, halo, band)


def _across(
    batch: int,
    own: Sequence[int],
    order: Sequence[int],
    axes: Sequence[int],
    band: int,
    most: int,
) -> Across | None:
    sizes = tuple(own[axis] for axis in order)
    *major, length = sizes
    planes, rows = major if len(major) == 2 else (1, *major)
    if rows < SUBLANES or (planes > 1 and rows % SUBLANES) or length % LANES:
        return None
    widths = (length // n for n in range(1, length // LANES + 1) if length % (n * LANES) == 0)
    columns = next(width for width in widths if width * SUBLANES <= most or width == LANES)
    if columns < min(length, _FEWEST):
        return None
    room, whole = most // columns, -(-rows // SUBLANES) * SUBLANES
    if whole > room:
        tile = (1, room // SUBLANES * SUBLANES, columns)
    else:
        fits = (n for n in range(room // whole, 0, -1) if planes % n == 0)
        tile = (next(fits), whole, columns)
    seen = tuple(tuple(order).index(axis) for axis in axes)
    return Across(batch, tuple(order), sizes, seen, planes, rows, tile, band)
