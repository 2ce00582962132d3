"""SONew's step of one leaf through a kernel, on one device or on many.

That of `kernels/tiles.py` on TPUs, that of `kernels/strips.py` on GPUs.

XLA cannot share out a kernel. Where the mesh tells which part of a leaf each device has,
`one_pass` runs it on that part, with the rows beyond from the devices that have them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from precond_optax import placement
from precond_optax.kernels import chain, diagonal, rounding, strips, tiles, verbs

_GPUS = ('cuda', 'rocm')


def _kernel() -> ModuleType:
    """What a leaf goes through, by what a trace is for; interpreted elsewhere, the TPU's."""
    return strips if placement.platform() in (*_GPUS, 'gpu') else tiles


def is_taken(shape: Sequence[int], batch_axes: int, axes: Sequence[int], band: int) -> bool:
    """Whether a kernel takes such a leaf; the arguments are those of `tiles.cut`."""
    return _kernel().cut(shape, batch_axes, axes, band) is not None


class Static(NamedTuple):
    """What `one_pass` knows of a leaf beside its arrays.

    Attributes:
      pattern: the module of its verbs.
      batch_axes: how many of its axes, from the first, stack separate chains.
      axes: the chain's, fastest first, of all of the leaf's.
      adam_eps: as in `tiles.step`.
      nesterov: likewise.
      relative: whether some damping is relative to the second moment, which is a pass of its own.
      interpreted: whether other backends than those interpret a kernel; else they have the verbs.
      moves: whether the parameters are moved along the direction.
    """

    pattern: ModuleType
    batch_axes: int
    axes: tuple[int, ...]
    adam_eps: float | None
    nesterov: bool = False
    relative: bool = False
    interpreted: bool = True
    moves: bool = False


def _noise(
    leaf: Static, whole: Sequence[int], names: Sequence[tuple[str, ...]], part: Any, seeds: Any
) -> tiles.Noise:
    """The noise of a device's part of a leaf of shape ``whole``."""
    strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    start = jnp.uint32(0)
    for size, own, stride in zip(part, names, strides, strict=True):
        if own:
            ahead = lax.axis_index(own).astype(jnp.uint32) * jnp.uint32(size)
            start = start + ahead * jnp.uint32(stride % 2**32)
    batch = leaf.batch_axes
    starts = rounding.positions(part[:batch], strides[:batch], start)
    return tiles.Noise(seeds, starts.ravel(), tuple(strides[batch:]))


def _on_a_device(
    leaf: Static, whole: Sequence[int], names: Sequence[tuple[str, ...]], *args: jax.Array
) -> tuple[jax.Array, ...]:
    """A device's part of a step.

    Args:
      leaf: its static facts.
      whole: the leaf's shape.
      names: the axes of the mesh that share out each of its axes.
      *args: of `one_pass`, without ``None``, the scalars as an array; p is the last of the arrays.

    Returns:
      As `one_pass`, in one tuple.
    """
    *arrays, scalars, eps, seeds = args[: len(args) - 2 * leaf.moves]
    moving = verbs.Move(*args[-2:]) if leaf.moves else None
    param = arrays.pop() if leaf.moves else None
    grad, batch = arrays[0], arrays[0].shape[: leaf.batch_axes]
    s = verbs.Scalars(*(scalars[i] for i in range(len(verbs.Scalars._fields))))
    shards = chain.Shards(leaf.axes, tuple(names))
    noise = _noise(leaf, whole, shards.names, grad.shape, seeds) if len(seeds) else None

    def damping(largest: jax.Array) -> jax.Array:
        """Of each chain, (batch,), by the largest row sums of its part here."""
        if shards.cuts:
            largest = lax.pmax(largest, shards.cuts)
        return eps + s.relative_eps * s.nu_correction * largest.reshape(eps.shape)

    def by_kernel(
        kernel: ModuleType, part: Any, interpret: bool, *arrays: jax.Array
    ) -> tuple[jax.Array, ...]:
        grad, mu, nu, *offdiag = arrays[: len(arrays) - leaf.moves]
        chains = None if moving is None else verbs.Move(*(x.ravel() for x in moving))
        numbers = tiles.Numbers(s, eps.ravel(), noise, chains)
        edges, inside = tuple(offdiag), shards.names[leaf.batch_axes :]
        if leaf.relative:
            largest = kernel.largest_row_sums(
                leaf.pattern, part, grad, nu, edges, numbers, names=inside, interpret=interpret
            )
            numbers = numbers._replace(eps=damping(largest).ravel())
        mu, nu, edges, *rest = kernel.step(
            leaf.pattern,
            part,
            *(grad, mu, nu, edges, numbers),
            adam_eps=leaf.adam_eps,
            nesterov=leaf.nesterov,
            param=arrays[-1] if leaf.moves else None,
            names=inside,
            interpret=interpret,
        )
        return mu, nu, *edges, *rest

    def by_verbs(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        held = arrays[: len(arrays) - leaf.moves]
        grad, mu, nu, *offdiag = (x.astype(jnp.float32) for x in held)
        own, damped = tuple(range(len(batch), grad.ndim)), eps
        if leaf.relative:
            diag, edges = leaf.pattern.accumulate(grad, nu, tuple(offdiag), b2=s.b2, axes=shards)
            largest = jnp.max(diagonal.row_sums(diag, edges, shards), axis=own)
            damped = damping(largest)
        numbers = s._replace(eps=jnp.expand_dims(damped, own), relative_eps=0.0)
        statistics = mu, nu, tuple(offdiag)
        new = verbs.step(
            leaf.pattern, grad, *statistics, numbers, nesterov=leaf.nesterov, axes=shards
        )
        both = new.direction, new.magnitude(leaf.adam_eps)
        squares = jnp.stack([jnp.sum(x * x, axis=own) for x in both], axis=-1)
        kept = _kept((new.nu, *new.offdiag), arrays[2].dtype, batch, noise)
        moved = new.direction
        if moving is not None:
            along = verbs.Move(*(jnp.expand_dims(x, own) for x in moving))
            moved = along(arrays[-1].astype(jnp.float32), moved).astype(arrays[-1].dtype)
        return new.mu.astype(arrays[1].dtype), *kept, moved, squares.reshape(-1, 2)

    def by(kernel: ModuleType, *, interpret: bool) -> Callable[..., tuple[jax.Array, ...]]:
        part = kernel.cut(grad.shape, leaf.batch_axes, leaf.axes, len(arrays) - 3)  # g m d
        return by_verbs if part is None else functools.partial(by_kernel, kernel, part, interpret)

    kernel = _kernel()
    platforms = _GPUS if kernel is strips else ('tpu',)
    compiled = dict.fromkeys(platforms, by(kernel, interpret=False))
    elsewhere = by(kernel, interpret=True) if leaf.interpreted else by_verbs
    given = arrays if param is None else [*arrays, param]
    results = lax.platform_dependent(*given, **compiled, default=elsewhere)
    *held, squares = results
    squares = squares.reshape(*batch, 2)
    if shards.cuts:
        squares = lax.psum(squares, shards.cuts)
    return *held, squares


def _kept(
    arrays: Sequence[jax.Array], dtype: Any, batch: Sequence[int], noise: tiles.Noise | None
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
    scalars: verbs.Scalars,
    eps: jax.Array,
    seeds: jax.Array,
    param: jax.Array | None = None,
    move: verbs.Move | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array]:
    """A step of a leaf, of which `placement.has_known_parts`.

    Args:
      leaf: its static facts.
      grad: g, of a shape `is_taken`, float32 or bfloat16, as each array may be.
      mu: m, likewise.
      nu: d.
      offdiag: e, one array for each off-diagonal.
      scalars: decays, corrections, damping.
      eps: of each chain, (batch axes...), in place of theirs.
      seeds: of the rounding of d and each e, (1 + band, 2); (0, 2): to nearest.
      param: p, where ``leaf.moves``, float32 or bfloat16; else None.
      move: then of each chain, (batch axes...) twice.

    Returns:
      The new m, d and e, of their dtypes; the direction u, float32, or the new p, of its dtype;
      and the sums of the squares of u and of w over each chain, (batch axes..., 2), float32.
    """
    stacked = jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])
    arrays, ahead = [grad, mu, nu, *offdiag], leaf.batch_axes
    results = len(arrays)
    if param is not None:
        arrays.append(param)
    chains = placement.Follower(grad.shape[:ahead], tuple(range(ahead)))
    pairs = placement.Follower((*grad.shape[:ahead], 2), (*range(ahead), None))
    mu, nu, *held, moved, sums = placement.on_each_part(
        functools.partial(_on_a_device, leaf, grad.shape),
        grad,
        [*[placement.like(grad)] * results, pairs],
        *[(x, placement.like(grad)) for x in arrays],
        (stacked, placement.Follower(stacked.shape, (None,))),
        (eps.astype(jnp.float32), chains),
        (seeds, placement.Follower(seeds.shape, (None, None))),
        *[(x.astype(jnp.float32), chains) for x in move or ()],
    )
    return mu, nu, tuple(held), moved, sums
