r"""What mini-blocks do in one pass over their matrices: Pallas kernels for TPUs.

`Passes` has functions of `kernels/mini_block.py`, by name and by what they compute. XLA turns a
batch of small products with vectors into one of its large matrix products, for which it moves the
matrices to another layout; here they are read as they are stored, and written there.

A tile has one group in each row. Its matrix is flat, in lanes: of each 128 of them, the c-th,
lane l holds entry (i, j) = (c q + l // tau, l mod tau), with q = 128 / tau. So a vector that goes
along j is tiled, q times, one that goes along i is spread, each entry over tau lanes; sums over i
are those of the lanes with one j, sums over j those of neighbours. What spreads, tiles and adds up
is the product with a matrix of zeros and ones, in full precision.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precond_optax import placement
from precond_optax.kernels import calls, cuts, mini_block
from precond_optax.kernels.cuts import LANES

_TILE_ENTRIES = 2**18  # of a tile's matrices, which a kernel holds four times in 16 MB


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _ones(rows: int, columns: int, alike: Callable[[Any, Any], Any]) -> jax.Array:
    """A matrix of ones where a row and a column are alike, and of zeros."""
    row, column = (lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in range(2))
    return alike(row, column).astype(jnp.float32)


def _stands_for(first: int, size: int) -> Callable[[Any, Any], Any]:
    """Whether a lane has an entry of the i-th row, where the 128 begin with row ``first``."""
    return lambda lane, i: i == first + lane // size


def _spread(x: jax.Array, c: int) -> jax.Array:
    """(rows, tau) -> (rows, 128): of the c-th lanes, for each the x_i of its i."""
    size = x.shape[1]
    first = c * LANES // size
    stands_for = _stands_for(first, size)
    return _dot(x, _ones(size, LANES, lambda i, lane: stands_for(lane, i)))


def _tiled(x: jax.Array) -> jax.Array:
    """(rows, tau) -> (rows, 128): for each lane the x_j of its j."""
    size = x.shape[1]
    return _dot(x, _ones(size, LANES, lambda j, lane: j == lane % size))


def _times(parts: Sequence[jax.Array], tiled: jax.Array, size: int) -> jax.Array:
    """The products with vectors along j: (rows, tau)."""
    total = jnp.zeros((tiled.shape[0], size), jnp.float32)
    for c, part in enumerate(parts):
        first = c * LANES // size
        total += _dot(part * tiled, _ones(LANES, size, _stands_for(first, size)))
    return total


def _transposed_times(parts: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """The transposes' products with vectors (rows, tau), tiled: (rows, 128)."""
    size = x.shape[1]
    total = jnp.zeros((x.shape[0], LANES), jnp.float32)
    for c, part in enumerate(parts):
        total += part * _spread(x, c)
    return _dot(total, _ones(LANES, LANES, lambda a, b: a % size == b % size))


def _potter(parts: Sequence[jax.Array], grad: jax.Array) -> list[jax.Array]:
    """`mini_block.add_to_inverse` of a tile."""
    size = grad.shape[1]
    f = _transposed_times(parts, grad)
    largest = jnp.max(jnp.abs(f), axis=1, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)  # whose squares could overflow
    ratio = f / largest
    norm = largest * jnp.sqrt(jnp.sum(ratio * ratio, axis=1, keepdims=True) * (size / LANES))
    unit = f / jnp.where(norm > 0, norm, 1)
    low, high = jnp.minimum(norm, 1), jnp.maximum(norm, 1)
    q = high * jnp.sqrt(1 + (low / high) ** 2)  # of 1 and the norm
    share = (norm / q) * (norm / (q + 1))
    neighbours = _ones(LANES, LANES, lambda a, b: a // size == b // size)
    finite = norm <= jnp.finfo(jnp.float32).max  # of no NaN
    return [
        jnp.where(finite, part - share * _dot(part * unit, neighbours) * unit, part)
        for part in parts
    ]


def _mean(parts: Sequence[jax.Array], grad: jax.Array, decay: jax.Array) -> list[jax.Array]:
    """`mini_block.accumulate` of a tile."""
    squares = jnp.sum(grad * grad, axis=1, keepdims=True)
    finite = squares <= jnp.finfo(jnp.float32).max
    tiled = (1 - decay) * _tiled(grad)
    return [
        jnp.where(finite, decay * part + _spread(grad, c) * tiled, part)
        for c, part in enumerate(parts)
    ]


def _in_tiles(
    make: Callable[..., tuple[Sequence[jax.Array] | None, jax.Array | None]],
    matrices: jax.Array,
    vectors: jax.Array,
    number: jax.Array | None,
    *,
    new_matrices: bool,
    new_vectors: bool,
    interpret: Any,
) -> list[jax.Array]:
    """Runs what makes matrices and vectors of a tile's, the matrices in place.

    Args:
      make: of the matrices, 128 lanes after 128, the vectors and the number: new matrices, or
        None, and new vectors, or None.
      matrices: (..., tau * tau).
      vectors: (..., tau).
      number: one, or None.
      new_matrices: whether there are.
      new_vectors: likewise.
      interpret: as ``pallas_call`` has it.

    Returns:
      What is new.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    flat, size = matrices.shape[-1], vectors.shape[-1]
    *order, lanes = cuts.held(matrices.shape)
    if lanes != matrices.ndim - 1:  # as it may be where there are few
        order = list(range(matrices.ndim - 1))
    batch = [matrices.shape[axis] for axis in order]
    # Of whole rows of eight a TPU makes one batch without a copy.
    whole = len(batch) == 1 or batch[-1] % cuts.SUBLANES == 0
    lead, rows = (1, math.prod(batch)) if whole else (math.prod(batch[:-1]), batch[-1])
    most = max(_TILE_ENTRIES // flat // cuts.SUBLANES, 1) * cuts.SUBLANES
    tile = rows if rows <= most else most

    def seen(x: jax.Array) -> jax.Array:
        return x.transpose(*order, len(order)).reshape(lead, rows, x.shape[-1])

    def back(x: jax.Array) -> jax.Array:
        turned = x.reshape(*batch, x.shape[-1])
        return turned.transpose(*np.argsort(order), len(order))

    def kernel(*refs: Any) -> None:
        given, results = refs[: 3 if number is not None else 2], list(refs)
        results = results[len(given) :]
        held, x = given[-2][0], given[-1][0]
        parts = [held[:, at : at + LANES] for at in range(0, flat, LANES)]
        own, moved = make(parts, x, given[0][0] if number is not None else None)
        if new_matrices:
            for c, part in enumerate(own or ()):
                results[0][0, :, c * LANES : (c + 1) * LANES] = part
        if new_vectors:
            results[-1][0] = moved

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tile, width), lambda b, i: (b, i, 0))

    widths = [flat] * new_matrices + [size] * new_vectors
    numbers = [] if number is None else [jnp.reshape(number, 1).astype(jnp.float32)]
    with jax.enable_x64(False):
        results = pl.pallas_call(
            kernel,
            grid=(lead, pl.cdiv(rows, tile)),
            in_specs=[
                *[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(numbers),
                block(flat),
                block(size),
            ],
            out_specs=[block(width) for width in widths],
            out_shape=[jax.ShapeDtypeStruct((lead, rows, w), jnp.float32) for w in widths],
            input_output_aliases={len(numbers): 0} if new_matrices else {},
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(dimension_semantics=['parallel'] * 2),
        )(*numbers, seen(matrices), seen(vectors))
    return [back(x) for x in results]


def _add_to_inverse(interpret: Any, grad: jax.Array, factor: jax.Array) -> jax.Array:
    (new,) = _in_tiles(
        lambda parts, x, _: (_potter(parts, x), None),
        *(factor, grad, None),
        new_matrices=True,
        new_vectors=False,
        interpret=interpret,
    )
    return new


def _accumulate(interpret: Any, grad: jax.Array, moment: jax.Array, decay: jax.Array) -> jax.Array:
    (new,) = _in_tiles(
        lambda parts, x, decay: (_mean(parts, x, decay), None),
        *(moment, grad, decay),
        new_matrices=True,
        new_vectors=False,
        interpret=interpret,
    )
    return new


def _apply(interpret: Any, matrices: jax.Array, x: jax.Array, times: int) -> jax.Array:
    def make(parts: Sequence[jax.Array], x: jax.Array, _: Any) -> tuple[None, jax.Array]:
        for _ in range(times):
            x = _times(parts, _tiled(x), x.shape[1])
        return None, x

    (new,) = _in_tiles(
        make, matrices, x, None, new_matrices=False, new_vectors=True, interpret=interpret
    )
    return new


def _step_by_inverse(
    interpret: Any, grad: jax.Array, factor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def make(
        parts: Sequence[jax.Array], x: jax.Array, _: Any
    ) -> tuple[Sequence[jax.Array], jax.Array]:
        new = _potter(parts, x)
        return new, _times(new, _transposed_times(new, x), x.shape[1])

    held, direction = _in_tiles(
        make, factor, grad, None, new_matrices=True, new_vectors=True, interpret=interpret
    )
    return held, direction


class Passes(NamedTuple):
    """The functions of `mini_block` with these names, each of which reads its matrices once.

    Attributes:
      method: whose they are, for errors.
      interpreted: whether CPUs interpret the kernels; else they have `mini_block`'s functions, as
        GPUs do.
    """

    method: str
    interpreted: bool

    def _run(
        self, kernel: Callable[..., Any], plain: Callable[..., Any], *arrays: jax.Array
    ) -> Any:
        elsewhere = functools.partial(kernel, True) if self.interpreted else plain
        compiled = functools.partial(kernel, False)

        def chosen(*arrays: jax.Array) -> Any:
            return lax.platform_dependent(*arrays, tpu=compiled, cpu=elsewhere, default=plain)

        return calls.guarded(chosen, self.method)(*arrays)

    def add_to_inverse(self, grad: jax.Array, factor: jax.Array) -> jax.Array:
        """The factor is read and written."""
        return self._run(_add_to_inverse, mini_block.add_to_inverse, grad, factor)

    def accumulate(self, grad: jax.Array, moment: jax.Array, *, decay: jax.Array) -> jax.Array:
        """The moments are read and written."""

        def plain(grad: jax.Array, moment: jax.Array, decay: jax.Array) -> jax.Array:
            return mini_block.accumulate(grad, moment, decay=decay)

        return self._run(_accumulate, plain, grad, moment, decay)

    def apply(self, matrices: jax.Array, x: jax.Array, *, times: int = 1) -> jax.Array:
        """The matrices are read."""
        plain = functools.partial(mini_block.apply, times=times)
        return self._run(functools.partial(_apply, times=times), plain, matrices, x)

    def step_by_inverse(self, grad: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The factor is read and written, once for both."""
        return self._run(_step_by_inverse, mini_block.step_by_inverse, grad, factor)


def passes(
    method: str, impl: str, leaf: jax.Array, size: int, dtypes: Sequence[Any]
) -> Passes | None:
    """The kernels, if a leaf goes through them; else None.

    Args:
      method: for errors.
      impl: of `calls.IMPLS`.
      leaf: its gradient.
      size: entries of a group.
      dtypes: in which its arrays are stored.
    """
    fits = size <= LANES and LANES % size == 0 and size * size >= LANES
    plain = all(dtype == jnp.float32 for dtype in dtypes)
    has_some = placement.platform() in ('tpu', 'cpu')
    if fits and plain and has_some and calls.is_wanted(impl) and calls.is_alone(impl, leaf):
        return Passes(method, interpreted=impl == 'pallas')
    return None
