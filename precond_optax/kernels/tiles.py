r"""SONew's step of one leaf in one pass over memory: a Pallas kernel for TPUs.

The verbs of a sparsity pattern (`kernels/banded.py`), one after another, read and write the leaf's
arrays many times. Here a tile of rows is read once, with a few rows of the chain before and after
it; the same verbs are run on it, and its new statistics, its direction and the squares that the
grafting needs are written. Beside those few rows a step reads g, m, d, e and writes m, d, e, u,
the state in place: 32 bytes for each float32 parameter where the pattern is tridiagonal. What is
kept in bfloat16 is read and written so, rounded in the kernel.

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
    """

    scalars: verbs.Scalars
    eps: jax.Array
    noise: Noise | None = None


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
      names: in a manual region, the axes of the mesh that share out each axis of the leaf but
        batch axes.
      interpret: True: JAX runs the kernel step by step, on any backend; also ``pallas_call``'s
        ``InterpretParams``, with a TPU's memory.

    Returns:
      The new m, d and e, of their dtypes, the direction u, and the sums of the squares of u and
      of w over each chain, (batch, 2), both float32.
    """
    strides: tuple[int, ...] | None = None
    if numbers.noise is not None:
        strides = leaf.strides(numbers.noise.strides)
    arrays = grad, mu, nu, *offdiag
    wide = jnp.float32
    *new, direction, squares = _in_tiles(
        functools.partial(_step, pattern, leaf, adam_eps, nesterov, strides),
        leaf,
        numbers,
        arrays,
        names,
        written=(*(x.dtype for x in arrays[1:]), wide),
        sums=2,
        fold=cuts.SUM,
        interpret=interpret,
    )
    new_mu, new_nu, *edges = new
    return new_mu, new_nu, tuple(edges), direction, squares


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
    numbers = numbers._replace(noise=None)
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
    written: Sequence[Any],
    sums: int,
    fold: cuts.Fold,
    interpret: Any,
) -> list[jax.Array]:
    """Runs a kernel on each tile, with what is beside it.

    Args:
      kernel: of references to the numbers; to a tile of each array; to what is beside it; to a
        tile of each result, and to its numbers.
      leaf: how the arrays are cut.
      numbers: see there.
      arrays: of the leaf's shape.
      names: as in `step`.
      written: the results' dtypes; all but the last are written where the arrays after the first
        were.
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
        blocks = leaf.blocks(len(borders), sums)
        wide = jnp.float32
        given = [jnp.stack([jnp.asarray(x, wide) for x in numbers.scalars]), numbers.eps]
        if numbers.noise is not None:
            given += [numbers.noise.seeds, numbers.noise.starts]
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
                jax.ShapeDtypeStruct(blocks.shape, wide),
            ],
            input_output_aliases={len(given) + 1 + i: i for i in range(len(written) - 1)},
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
    *refs: Any,
) -> None:
    """Of a tile: ``refs`` are numbers; g m d e; what is beside it; the results.

    The numbers are the scalars, eps and, with strides, seeds and starts of the noise.
    """
    from jax.experimental import pallas as pl

    count, read = (2 if strides is None else 4), 3 + leaf.band
    (numbers, eps, *drawn), arrays = refs[:count], refs[count:]
    results, squares = arrays[-read - 1 : -1], arrays[-1]
    owns, borders = arrays[:read], arrays[read : -read - 1]
    s = verbs.Scalars(*(numbers[i] for i in range(len(verbs.Scalars._fields))))
    s = s._replace(eps=eps[pl.program_id(0)], relative_eps=0.0)
    axes, own = chain.Tile(leaf.roll), leaf.own
    grad, mu, nu, *offdiag = leaf.widened(owns, borders)
    new = verbs.step(pattern, grad, mu, nu, tuple(offdiag), s, nesterov=nesterov, axes=axes)
    magnitude = new.magnitude(adam_eps)
    results[0][0] = own(new.mu).astype(results[0].dtype)
    results[-1][0] = own(new.direction)
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
            result[0] = own(x).astype(result.dtype)
        else:
            drawn_bits = rounding.bits([seeds[i, 0], seeds[i, 1]], index)
            result[0] = rounding.round_by(drawn_bits, own(x))
    for i, x in enumerate((own(new.direction), own(magnitude))):
        leaf.put(squares, i, x * x, cuts.SUM)
