r"""SONew's step of one leaf in one pass over memory: a Pallas kernel for TPUs.

The verbs of a sparsity pattern (`kernels/banded.py`), one after another, read and write the leaf's
arrays many times. Here a tile of rows is read once, with a few rows of the chain before and after
it; the same verbs are run on it, and its new statistics, its direction and the squares that the
grafting needs are written. Beside those few rows a step reads g, m, d, e and writes m, d, e, u,
the state in place: 32 bytes for each float32 parameter where the pattern is tridiagonal. What is
kept in bfloat16 is read and written so, rounded in the kernel.

Where it is known beforehand how far the parameters go along the direction, these are read and
written too, in place of the direction: 36 bytes in all, what is else 44.

How a leaf is cut into tiles is in `kernels/cuts.py`. What is beside a tile is cut out before the
kernel runs, as it overwrites what it has read.
"""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precond_optax.kernels import chain, cuts, diagonal, rounding, verbs

cut = cuts.cut  # a kernel's module says what it takes


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
      move: of each chain, (batch,) twice. None: the parameters are not moved.
    """

    scalars: verbs.Scalars
    eps: jax.Array
    noise: Noise | None = None
    move: verbs.Move | None = None

    @property
    def arrays(self) -> list[jax.Array]:
        """As a kernel takes them; `of_chain` has the inverse."""
        given = [jnp.stack([jnp.asarray(x, jnp.float32) for x in self.scalars]), self.eps]
        if self.noise is not None:
            given += [self.noise.seeds, self.noise.starts]
        return given if self.move is None else [*given, *self.move]


class Given(NamedTuple):
    """In a kernel: the numbers of one chain.

    Attributes:
      scalars: with the chain's eps.
      seeds: a reference; None: no noise.
      start: of the chain's noise.
      move: None: the parameters are not moved.
      refs: how many references they took.
    """

    scalars: verbs.Scalars
    seeds: Any
    start: Any
    move: verbs.Move | None
    refs: int


def of_chain(refs: Sequence[Any], chain: Any, noisy: bool, moves: bool) -> Given:
    """What `Numbers.arrays` say of a chain; ``refs`` are theirs, and whatever follows."""
    (numbers, eps), rest = refs[:2], refs[2:]
    s = verbs.Scalars(*(numbers[i] for i in range(len(verbs.Scalars._fields))))
    seeds, start = (rest[0], rest[1][chain]) if noisy else (None, None)
    own = rest[2:4] if noisy else rest[:2]
    move = verbs.Move(own[0][chain], own[1][chain]) if moves else None
    s = s._replace(eps=eps[chain], relative_eps=0.0)
    return Given(s, seeds, start, move, 2 + 2 * noisy + 2 * moves)


def step(
    pattern: ModuleType,
    leaf: cuts.Cut,
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
      param: p, which ``numbers.move`` moves along the direction; None: it is not moved.
      names: in a manual region, the axes of the mesh that share out each axis of the leaf but
        batch axes.
      interpret: True: JAX runs the kernel step by step, on any backend; also ``pallas_call``'s
        ``InterpretParams``, with a TPU's memory.

    Returns:
      The new m, d and e, of their dtypes; the direction u, float32, or the new p, of its dtype;
      and the sums of the squares of u and of w over each chain, (batch, 2), float32.
    """
    strides: tuple[int, ...] | None = None
    if numbers.noise is not None:
        strides = leaf.strides(numbers.noise.strides)
    arrays = grad, mu, nu, *offdiag
    last = jnp.float32 if param is None else param.dtype
    *new, moved, squares = _in_tiles(
        functools.partial(_step, pattern, leaf, adam_eps, nesterov, strides, param is not None),
        leaf,
        numbers,
        arrays,
        names,
        alone=() if param is None else (param,),
        written=(*(x.dtype for x in arrays[1:]), last),
        sums=2,
        fold=cuts.SUM,
        interpret=interpret,
    )
    new_mu, new_nu, *edges = new
    return new_mu, new_nu, tuple(edges), moved, squares


def largest_row_sums(
    pattern: ModuleType,
    leaf: cuts.Cut,
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
    numbers = numbers._replace(noise=None, move=None)
    (largest,) = _in_tiles(
        kernel,
        leaf,
        numbers,
        arrays,
        names,
        written=(),
        sums=1,
        fold=cuts.LARGEST,
        interpret=interpret,
    )
    return largest[:, 0]


def _in_tiles(
    kernel: Callable[..., None],
    leaf: cuts.Cut,
    numbers: Numbers,
    arrays: Sequence[jax.Array],
    names: Sequence[tuple[str, ...]],
    *,
    alone: Sequence[jax.Array] = (),
    written: Sequence[Any],
    sums: int,
    fold: cuts.Fold,
    interpret: Any,
) -> list[jax.Array]:
    """Runs a kernel on each tile, with what is beside it.

    Args:
      kernel: of references to the numbers; to a tile of each array, then of those alone; to what
        is beside it; to a tile of each result, and to its numbers.
      leaf: how the arrays are cut.
      numbers: see there.
      arrays: of the leaf's shape.
      names: as in `step`.
      alone: further arrays, of which the kernel does not see what is beside a tile.
      written: the results' dtypes; they are written where the arrays after the first were, and
        those alone, as far as there are such.
      sums: how many numbers the kernel makes of a tile.
      fold: how those of all tiles become one.
      interpret: as in `step`.

    Returns:
      The results, and the numbers, (batch, sums).
    """
    # Here, because it is a large part of the package's own import, and few need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    shape = arrays[0].shape
    # Mosaic's rotations and index maps want 32 bits.
    with jax.enable_x64(False):
        seen, borders = leaf.operands(arrays, names, interpret)
        seen += [leaf.seen(x) for x in alone]
        blocks = leaf.blocks(len(borders), sums)
        given = numbers.arrays
        in_place = min(len(written), len(seen) - 1)
        *results, parts = pl.pallas_call(
            kernel,
            grid=blocks.grid,
            in_specs=[
                *[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(given),
                *[blocks.own] * len(seen),
                *blocks.borders,
            ],
            out_specs=[*[blocks.own] * len(written), blocks.sums],
            out_shape=[
                *(jax.ShapeDtypeStruct(seen[0].shape, dtype) for dtype in written),
                jax.ShapeDtypeStruct(blocks.shape, jnp.float32),
            ],
            input_output_aliases={len(given) + 1 + i: i for i in range(in_place)},
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=[cuts.PARALLEL] * len(blocks.grid)
            ),
        )(*given, *seen, *borders)
    others = [axis for axis in range(1, parts.ndim) if axis != blocks.axis]
    folded = fold.along(parts, axis=tuple(others))
    return [*(leaf.result(x, shape) for x in results), folded]


def _row_sums(pattern: ModuleType, leaf: cuts.Cut, *refs: Any) -> None:
    """Of a tile: ``refs`` are scalars and eps; g d e; what is beside it; the largest sums."""
    numbers, arrays, largest = refs[0], refs[2:-1], refs[-1]
    s = verbs.Scalars(*(numbers[i] for i in range(len(verbs.Scalars._fields))))
    owns, borders = arrays[: 2 + leaf.band], arrays[2 + leaf.band :]
    grad, nu, *offdiag = leaf.widened(owns, borders)
    axes = chain.Tile(leaf.roll)
    diag, edges = pattern.accumulate(grad, nu, tuple(offdiag), b2=s.b2, axes=axes)
    leaf.put(largest, 0, leaf.own(diagonal.row_sums(diag, edges, axes)), cuts.LARGEST)


def _step(
    pattern: ModuleType,
    leaf: cuts.Cut,
    adam_eps: float | None,
    nesterov: bool,
    strides: tuple[int, ...] | None,
    moves: bool,
    *refs: Any,
) -> None:
    """Of a tile.

    ``refs`` are `Numbers.arrays`; g m d e, and p if it moves; what is beside it; the results.
    """
    from jax.experimental import pallas as pl

    given = of_chain(refs, pl.program_id(0), strides is not None, moves)
    read, write = 3 + leaf.band, 3 + leaf.band
    arrays = refs[given.refs :]
    owns, borders = arrays[:read], arrays[read + moves : -write - 1]
    results, squares = arrays[-write - 1 : -1], arrays[-1]
    axes, own = chain.Tile(leaf.roll), leaf.own
    grad, mu, nu, *offdiag = leaf.widened(owns, borders)
    new = verbs.step(
        pattern, grad, mu, nu, tuple(offdiag), given.scalars, nesterov=nesterov, axes=axes
    )
    magnitude = new.magnitude(adam_eps)
    results[0][0] = own(new.mu).astype(results[0].dtype)
    moved = own(new.direction)
    if given.move is not None:
        moved = given.move(arrays[read][0].astype(jnp.float32), moved)
    results[-1][0] = moved.astype(results[-1].dtype)
    if strides is not None:
        sizes = owns[0].shape[1:]
        at = [pl.program_id(1 + axis) * size for axis, size in enumerate(sizes)]
        start = given.start + sum(
            n.astype(jnp.uint32) * jnp.uint32(by % 2**32)
            for n, by in zip(at, strides, strict=True)
        )
        index = rounding.positions(sizes, strides, start)
    for i, (result, x) in enumerate(zip(results[1:-1], (new.nu, *new.offdiag), strict=True)):
        if strides is None or result.dtype == jnp.float32:
            result[0] = own(x).astype(result.dtype)
        else:
            drawn_bits = rounding.bits([given.seeds[i, 0], given.seeds[i, 1]], index)
            result[0] = rounding.round_by(drawn_bits, own(x))
    for i, x in enumerate((own(new.direction), own(magnitude))):
        leaf.put(squares, i, x * x, cuts.SUM)
