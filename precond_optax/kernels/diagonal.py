"""Diagonal SONew: ``X = diag(1/a)``, a = d + damping, d the running mean of g^2.

The pattern without edges, by the verbs of `kernels/tridiagonal.py`, where the arguments are
described; ``offdiag`` and ``psi`` are empty tuples.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from precond_optax import checks
from precond_optax.checks import Scalar
from precond_optax.kernels import chain


def accumulate(
    grad: jax.Array,
    diag: jax.Array,
    offdiag: tuple[jax.Array, ...],
    *,
    b2: Scalar,
    axes: Sequence[int],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Moves the running mean of g^2 one step on."""
    del axes
    return b2 * diag + (1 - b2) * grad * grad, offdiag


def factor(
    diag: jax.Array,
    offdiag: tuple[jax.Array, ...],
    *,
    eps: Scalar,
    relative_eps: Scalar,
    edge_tolerance: Scalar,
    axes: Sequence[int],
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """``((), a)``: no edges, and the damped diagonal in place of the Schur complements."""
    del edge_tolerance
    damped = damp(diag, offdiag, eps=eps, relative_eps=relative_eps, axes=axes)
    return offdiag, damped


def damp(
    diag: jax.Array,
    offdiag: tuple[jax.Array, ...],
    *,
    eps: Scalar,
    relative_eps: Scalar,
    axes: Sequence[int],
) -> jax.Array:
    """The damped diagonal that all patterns share.

        a = d + eps + relative_eps * max_i sum_k |H_ik|

    The maximum is taken over each chain. ``a`` is positive even where ``eps`` is zero.
    """
    # A zero eps would leave 0/0 at an entry that has seen no gradient.
    damped = diag + jnp.maximum(eps, jnp.finfo(diag.dtype).tiny)
    if checks.is_static_zero(relative_eps):
        return damped
    largest = jnp.max(row_sums(diag, offdiag, axes), axis=tuple(axes), keepdims=True)
    return damped + relative_eps * largest


def row_sums(diag: jax.Array, offdiag: tuple[jax.Array, ...], axes: chain.ChainAxes) -> jax.Array:
    """``sum_k |H_ik|`` in place of each entry i, of H with this diagonal and these others."""
    sums = diag
    for edge in offdiag:
        sums = sums + jnp.abs(edge)
    if offdiag:
        sums = sums + chain.sum_of_predecessors([jnp.abs(e) for e in offdiag], axes)
    return sums


def apply(
    psi: tuple[jax.Array, ...], schur: jax.Array, x: jax.Array, *, axes: Sequence[int]
) -> jax.Array:
    """X x = x / a."""
    del psi, axes
    return x / schur


def to_dense(psi: tuple[jax.Array, ...], schur: jax.Array, *, axes: Sequence[int]) -> jax.Array:
    """X as a matrix, of shape (batch axes..., n, n) in chain order. For tests and small n."""
    del psi
    line = chain.to_line(schur, axes)
    return jnp.eye(line.shape[-1], dtype=line.dtype) / line[..., None, :]
