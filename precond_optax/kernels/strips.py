r"""SONew's step of one leaf in one pass over memory: a Pallas kernel for GPUs, by Triton.

As `kernels/tiles.py`, which is the TPU's, but no tile is held: a thread has a column or a few, and
goes down them row by row with the rows around the present one in registers. So each entry is read
once and written once, in place, by the one thread that needs it, and no thread waits for another:
32 bytes for each float32 parameter where the pattern is tridiagonal. A strip of rows is a program
of its own; the rows at its ends, which others overwrite, are cut out before the kernel runs.

The verbs shift whole arrays. Here a shift is not carried out: the verbs are traced once, and of
what they make a row is computed when it is asked for, from the neighbours' rows that it shifts to.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from precond_optax.kernels import chain, diagonal, rounding, verbs
from precond_optax.kernels.tiles import Numbers, of_chain

MAX_BAND = 8
_ROWS = (128, 64, 32)  # of a strip: the rows at its ends move three times more
_PROGRAMS = 512  # where there are fewer, some of a GPU's processors have none: shorter strips
_WARPS = 4  # of a program, of 32 threads each; a thread has two columns, or one of a wide band,
# as what follows a row is held in registers, of which more would go to memory.

# What an array has some rows on from the present one, computed when it is asked for.
Row: TypeAlias = Callable[[int], Any]


class Cut(NamedTuple):
    """How a leaf is seen and cut: static.

    Attributes:
      batch: separate chains.
      rows: along the chain's fastest axis.
      rest: the sizes of the other axes.
      slower: these axes in the chain's order, from 0.
      strip: rows of a strip; the last one may have fewer.
      band: its off-diagonals.
    """

    batch: int
    rows: int
    rest: tuple[int, ...]
    slower: tuple[int, ...]
    strip: int
    band: int


def cut(shape: Sequence[int], batch_axes: int, axes: Sequence[int], band: int) -> Cut | None:
    """How the kernel would cut a leaf; None if it cannot.

    It can where the chain runs along the first of two or more axes first, and where this one has
    as many rows as the band is wide.

    Args:
      shape: of the leaf.
      batch_axes: how many of its axes, from the first, stack separate chains.
      axes: the chain's, fastest first.
      band: its off-diagonals.

    Returns:
      The leaf's cut.

    Example:
      >>> cut((1000, 3, 5), 0, axes=(0, 1, 2), band=1)
      Cut(batch=1, rows=1000, rest=(3, 5), slower=(0, 1), strip=32, band=1)
      >>> cut((4096, 512), 0, axes=(1, 0), band=1)  # along the last axis first
    """
    rows, *rest = shape[batch_axes:]
    if band > MAX_BAND or not rest or axes[0] != batch_axes or 0 in shape or rows < band:
        return None
    batch, slower = (
        math.prod(shape[:batch_axes]),
        tuple(axis - batch_axes - 1 for axis in axes[1:]),
    )
    beside = batch * math.prod(rest) // _columns(rest, band)
    most = next((size for size in _ROWS if beside * rows // size >= _PROGRAMS), _ROWS[-1])
    # So that the last one has as many rows as the one before it has to see.
    strip = next(size for size in range(min(rows, most), 0, -1) if not 0 < rows % size < band)
    return Cut(batch, rows, tuple(rest), slower, strip, band)


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
    param: jax.Array | None = None,
    names: Sequence[tuple[str, ...]] = (),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The verbs of a pattern, and the squares of what is grafted: as `tiles.step`."""
    arrays, last = [grad, mu, nu, *offdiag], jnp.dtype(jnp.float32)
    written = [*(x.dtype for x in arrays[1:]), last if param is None else param.dtype]
    if param is not None:
        arrays.append(param)

    def made(
        s: verbs.Scalars, move: verbs.Move | None, grad: Any, mu: Any, nu: Any, *rest: Any
    ) -> tuple[Any, ...]:
        edges = rest[: leaf.band]
        axes = chain.Tile(_shifted)
        new = verbs.step(pattern, grad, mu, nu, edges, s, nesterov=nesterov, axes=axes)
        sized = new.direction, new.magnitude(adam_eps)
        kept = new.mu, new.nu, *new.offdiag
        return *kept, *(sized if move is None else (move(rest[leaf.band], new.direction), *sized))

    *new, sums = _in_strips(
        made, leaf, numbers, arrays, names, written=written, interpret=interpret
    )
    new_mu, new_nu, *edges, moved = (x.reshape(grad.shape) for x in new)
    return new_mu, new_nu, tuple(edges), moved, jnp.sum(sums, axis=(1, 3))


def largest_row_sums(
    pattern: ModuleType,
    leaf: Cut,
    grad: jax.Array,
    nu: jax.Array,
    offdiag: tuple[jax.Array, ...],
    numbers: Numbers,
    *,
    names: Sequence[tuple[str, ...]] = (),
    interpret: bool = False,
) -> jax.Array:
    """The largest absolute row sums of the new second moments: as `tiles.largest_row_sums`."""

    def made(s: verbs.Scalars, move: None, grad: Any, nu: Any, *edges: Any) -> tuple[Any]:
        del move
        axes = chain.Tile(_shifted)
        diag, new = pattern.accumulate(grad, nu, edges, b2=s.b2, axes=axes)
        return (diagonal.row_sums(diag, new, axes),)

    numbers = numbers._replace(noise=None, move=None)
    arrays = [grad, nu, *offdiag]
    (largest,) = _in_strips(made, leaf, numbers, arrays, names, written=[], interpret=interpret)
    return jnp.max(largest, axis=(1, 2, 3))


def _in_strips(
    made: Callable[..., Any],
    leaf: Cut,
    numbers: Numbers,
    arrays: Sequence[jax.Array],
    names: Sequence[tuple[str, ...]],
    *,
    written: Sequence[Any],
    interpret: bool,
) -> list[jax.Array]:
    """Runs what makes results of arrays on each strip, row by row.

    Args:
      made: of scalars, how the parameters move, and arrays: results.
      leaf: how the arrays are cut.
      numbers: see `tiles.Numbers`.
      arrays: of the leaf's shape.
      names: as in `tiles.step`.
      written: dtypes of the first results, which are written, where the arrays after the first
        were as far as there are such. None are: only one is made, and of it the largest of each
        column.
      interpret: whether JAX runs the kernel step by step, on any backend.

    Returns:
      The results, and of each column of each strip the sums of the squares of the last two made,
      or the one largest: (batch, strips, 2 or 1, columns).
    """
    # Here, because it is a large part of the package's own import, and few need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    whole = math.prod(leaf.rest)
    strips, columns = pl.cdiv(leaf.rows, leaf.strip), _columns(leaf.rest, leaf.band)
    borders = _borders(arrays, leaf, names).reshape(leaf.batch, strips, -1, whole)
    arrays = [x.reshape(leaf.batch, leaf.rows, whole) for x in arrays]
    given, ends = numbers.arrays, borders.shape[2]
    in_place = min(len(written), len(arrays) - 1)
    own = pl.BlockSpec((1, leaf.strip, columns), lambda j, i, b: (b, i, j))
    sums = 2 if written else 1

    def beside(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, count, columns), lambda j, i, b: (b, i, 0, j))

    return pl.pallas_call(
        functools.partial(_go_down, made, leaf, numbers, len(arrays), len(written)),
        grid=(pl.cdiv(whole, columns), strips, leaf.batch),
        in_specs=[
            *(pl.BlockSpec(x.shape, lambda *_, n=x.ndim: (0,) * n) for x in given),
            beside(ends),
            *[own] * len(arrays),
        ],
        out_specs=[*[own] * len(written), beside(sums)],
        out_shape=[
            *(jax.ShapeDtypeStruct(arrays[0].shape, dtype) for dtype in written),
            jax.ShapeDtypeStruct((leaf.batch, strips, sums, whole), jnp.float32),
        ],
        input_output_aliases={len(given) + 2 + i: i for i in range(in_place)},
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
    )(*given, borders, *arrays)


def _columns(rest: Sequence[int], band: int) -> int:
    """Of a program: a power of two, as Triton wants it."""
    own = 32 * _WARPS * (2 if band <= 2 else 1)
    return min(own, 2 ** (math.prod(rest) - 1).bit_length())


def _borders(
    arrays: Sequence[jax.Array], leaf: Cut, names: Sequence[tuple[str, ...]]
) -> jax.Array:
    """The rows before and after each strip: (batch, strips, 2, arrays, band, rest...)."""
    band = leaf.band
    strips = -(-leaf.rows // leaf.strip)
    if not band:  # the kernel takes one row, and does not look at it
        return jnp.zeros((leaf.batch, strips, 1, *leaf.rest), jnp.float32)
    arrays = [x.reshape(leaf.batch, leaf.rows, *leaf.rest) for x in arrays]
    axes = (1, *(axis + 2 for axis in leaf.slower))
    ends = chain.ends(arrays, band, axes, ((), *names) if names else ())
    before, after = (jnp.moveaxis(x, 0, 1)[:, None] for x in ends)
    starts = leaf.strip * np.arange(1, strips)[:, None] + np.arange(band)
    last, first = (
        jnp.stack([x[:, at].astype(jnp.float32) for x in arrays], 2)
        for at in (starts - band, starts)
    )
    ahead = jnp.concatenate([before, last], 1)
    behind = jnp.concatenate([first, after], 1)
    return jnp.stack([ahead, behind], 2)


def _go_down(
    made: Callable[..., Any],
    leaf: Cut,
    passed: Numbers,
    read: int,
    write: int,
    *refs: Any,
) -> None:
    """Of a strip: ``refs`` are the numbers, the rows beside it, the arrays, and the results."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    noise, band = passed.noise, leaf.band
    given = of_chain(refs, pl.program_id(2), noise is not None, passed.move is not None)
    beside, *arrays = refs[given.refs :]
    arrays, results, sums = arrays[:read], arrays[read:-1], arrays[-1]
    if write:  # read where it is written, so that what comes too late is seen if interpreted, too
        arrays = [arrays[0], *results[: read - 1]]
    columns = sums.shape[-1]
    column = pl.program_id(0) * columns + jnp.arange(columns, dtype=jnp.int32)
    here = column < math.prod(leaf.rest)
    first = pl.program_id(1) * leaf.strip
    last_is_shorter = leaf.rows % leaf.strip
    rows = jnp.minimum(leaf.strip, leaf.rows - first) if last_is_shorter else leaf.strip

    if noise is not None:
        of_columns = given.start + _positions(column, leaf.rest, noise.strides[1:])

    def row_of(ref: Any, *index: Any) -> Any:
        return ref.at[(*(jnp.int32(at) for at in (0, *index)), slice(None))]

    def load(ref: Any, *index: Any) -> jax.Array:
        return triton.load(row_of(ref, *index), mask=here, other=0).astype(jnp.float32)

    def store(ref: Any, x: jax.Array, *index: Any) -> None:
        triton.store(row_of(ref, *index), x.astype(ref.dtype), mask=here)

    def edge(i: int, k: int, *, behind: bool) -> jax.Array:
        """The k-th row of those before the strip, or behind it."""
        return load(beside, 0, (behind * read + i) * band + k)

    def rounded(i: int, x: jax.Array, r: Any) -> jax.Array:
        if noise is None or results[i].dtype == jnp.float32 or not 0 < i < write - 1:
            return x
        row = (first + r).astype(jnp.uint32) * jnp.uint32(noise.strides[0] % 2**32)
        seeds = [given.seeds[i - 1, k] for k in range(2)]
        return rounding.round_by(rounding.bits(seeds, of_columns + row), x)

    row = jax.ShapeDtypeStruct((columns,), jnp.float32)
    program = jax.make_jaxpr(functools.partial(made, given.scalars, given.move))(*[row] * read)

    def down(r: Any, ahead: Sequence[jax.Array], state: Any, is_own: bool) -> Any:
        """One row; ``ahead`` is the one ``band`` rows further on, of each array."""
        windows, delayed, totals = state
        windows = [(*rows, new) for rows, new in zip(windows, ahead, strict=True)]
        new, delayed = _one_row(program, windows, delayed)
        windows = [window[1:] for window in windows]
        if not is_own:
            return windows, delayed, totals
        for i, x in enumerate(new[:write]):
            store(results[i], rounded(i, x, r), r)
        if write:
            totals = [total + x * x for total, x in zip(totals, new[-2:], strict=True)]
        else:
            totals = [jnp.maximum(*totals, *new)]
        return windows, delayed, totals

    zeros = jnp.zeros(columns, jnp.float32)
    windows = [tuple(edge(i, k, behind=False) for k in range(band)) for i in range(read)]
    state = windows, [zeros] * _count_delays(program.jaxpr), [zeros] * sums.shape[2]
    # Three loops, in none of which anything depends on the place; the first for what the first
    # rows look back at.
    for begin, end, ahead, is_own in (
        (-band, 0, lambda i, r: load(arrays[i], r + band), False),
        (0, rows - band, lambda i, r: load(arrays[i], r + band), True),
        (rows - band, rows, lambda i, r: edge(i, r + band - rows, behind=True), True),
    ):

        def body(r: jax.Array, state: Any, ahead: Any = ahead, is_own: bool = is_own) -> Any:
            return down(r, [ahead(i, r) for i in range(read)], state, is_own)

        if band or is_own:
            state = jax.lax.fori_loop(begin, end, body, state)
    for i, total in enumerate(state[-1]):
        store(sums, total, 0, i)


def _positions(column: jax.Array, rest: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """`rounding.positions` of a row's columns, numbered from 0."""
    found, inner = jnp.zeros(column.shape, jnp.uint32), math.prod(rest)
    for size, stride in zip(rest, strides, strict=True):
        inner //= size
        steps = (column // inner) % size
        found = found + steps.astype(jnp.uint32) * jnp.uint32(stride % 2**32)
    return found


_shift_p = core.Primitive('shift_of_rows')
_shift_p.def_abstract_eval(lambda x, *, by: x)


def _shifted(x: jax.Array, by: int) -> jax.Array:
    """``jnp.roll`` along rows, of an array of which there is one row: for `_one_row` alone."""
    return _shift_p.bind(x, by=by)


def _inner(eqn: Any) -> Any:
    """The program that an equation calls, or None."""
    return eqn.params.get('jaxpr') or eqn.params.get('call_jaxpr')


def _count_delays(program: Any) -> int:
    """How many shifts look back."""
    return sum(
        eqn.primitive is _shift_p and eqn.params['by'] > 0 if (inner := _inner(eqn)) is None
        else _count_delays(inner.jaxpr)
        for eqn in program.eqns
    )  # fmt: skip


def _one_row(
    program: Any, windows: Sequence[Sequence[jax.Array]], delayed: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """A row of what a program makes of arrays, and what is to be told for the next one.

    Args:
      program: a closed jaxpr, row by row but for shifts, as many of them one after another as
        there are rows in a window besides the first.
      windows: of each array this row, and those that follow it.
      delayed: of each shift that looks back what it asks for; of the first row of all, anything:
        the results are right once as many rows have been done as shifts follow one another.

    Returns:
      The row of each result, and ``delayed`` for the next row.
    """
    told: list[Row] = []

    def rows_of(jaxpr: Any, consts: Sequence[Any], given: Sequence[Row]) -> list[Row]:
        rows: dict[Any, Row] = dict(zip(jaxpr.constvars, map(_same, consts), strict=True))
        rows.update(zip(jaxpr.invars, given, strict=True))

        def row_of(atom: Any) -> Row:
            return _same(atom.val) if isinstance(atom, core.Literal) else rows[atom]

        for eqn in jaxpr.eqns:
            args = [row_of(atom) for atom in eqn.invars]
            if eqn.primitive is _shift_p and eqn.params['by'] > 0:
                made: Sequence[Row] = [{0: delayed[len(told)]}.__getitem__]
                told.extend(args)
            elif eqn.primitive is _shift_p:
                made = [functools.partial(_further, args[0])]
            elif (inner := _inner(eqn)) is not None:
                made = rows_of(inner.jaxpr, inner.consts, args)
            else:
                at = functools.cache(functools.partial(_bound, eqn, args))
                made = [functools.partial(_one_of, at, i) for i in range(len(eqn.outvars))]
            rows.update(zip(eqn.outvars, made, strict=True))
        return [row_of(atom) for atom in jaxpr.outvars]

    results = rows_of(program.jaxpr, program.consts, [window.__getitem__ for window in windows])
    return [row(0) for row in results], [row(0) for row in told]


def _same(x: Any) -> Row:
    return lambda _: x


def _further(row: Row, k: int) -> Any:
    return row(k + 1)


def _bound(eqn: Any, args: Sequence[Row], k: int) -> Sequence[Any]:
    results = eqn.primitive.bind(*(row(k) for row in args), **eqn.params)
    return results if eqn.primitive.multiple_results else [results]


def _one_of(at: Callable[[int], Sequence[Any]], i: int, k: int) -> Any:
    return at(k)[i]
