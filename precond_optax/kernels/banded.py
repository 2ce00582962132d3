r"""Banded SONew: the inverse of the second moment with b off-diagonals along a chain.

Among all positive definite X that are zero outside b diagonals on either side, X is the one of
least LogDet divergence to the inverse of H, the damped running mean of g g^T, of which only the
diagonal ``d`` and the off-diagonals ``e^1 .. e^b`` are kept. With a = d + damping, the entries
I_j = {j+1 .. j+b} that follow j along the chain (`kernels/chain.py`), and tol the edge tolerance:

    psi_j = H[I_j, I_j]^-1 H[I_j, j]
    S_j   = a_j - H[j, I_j] psi_j             the Schur complement; 1/S_j is D_jj
    psi_j = 0, S_j = a_j   where S_j <= tol a_j                   (drop all edges of j)
    X     = L diag(1/S) L^T,   L_jj = 1,   L[I_j, j] = -psi_j

The band of inv(X) is the band of H (the optimality condition), edges dropped aside. An entry of
I_j that the entries before it in I_j determine, up to tol, tells nothing of its own: its pivot
is skipped and its edge to j dropped, so that identical neighbours leave the solve well posed.

X is positive definite for any H whatever, as L is unit triangular and S > 0.

All is done on whole arrays of the leaf's shape, each j's small system in the same place of each.
Up to `MAX_UNROLLED` bands the solve is a Cholesky (LDL^T) factorisation written out; above, a
Gauss-Jordan elimination in a compiled loop, whose workspace is (b+1)(b+1) arrays.

References:
  Devvrit et al., `A Computationally Efficient Sparsified Online Newton Method
  <https://arxiv.org/abs/2311.10085>`_, 2023: Theorem 3.2 (the factors), Algorithm 3 (dropped
  edges). Their ``L_{I_j j}`` is ``-psi_j`` here, ``D_jj`` is ``1 / S_j``.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from precond_optax.checks import Scalar
from precond_optax.kernels import chain, diagonal

MAX_UNROLLED = 12  # 16 are compiled three times as long, and gain less


def accumulate(
    grad: jax.Array,
    diag: jax.Array,
    offdiag: tuple[jax.Array, ...],
    *,
    b2: Scalar,
    axes: Sequence[int],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Moves the kept entries of the running mean of g g^T one step on.

    Args:
      grad: the gradient, of any shape.
      diag: the diagonal, of the gradient's shape.
      offdiag: b arrays of the gradient's shape: ``offdiag[k-1]`` holds at entry j the product
        with entry j+k, zero where the chain ends before.
      b2: decay of the mean, in [0, 1).
      axes: the chain's axes, fastest first.

    Returns:
      The new ``diag`` and ``offdiag``.

    Example:
      >>> import jax.numpy as jnp
      >>> grad, zeros = jnp.array([1.0, 2, 4]), jnp.zeros(3)
      >>> diag, (first, second) = accumulate(grad, zeros, (zeros, zeros), b2=0.5, axes=(0,))
      >>> diag.tolist(), first.tolist(), second.tolist()
      ([0.5, 2.0, 8.0], [1.0, 4.0, 0.0], [2.0, 0.0, 0.0])
    """
    diag = b2 * diag + (1 - b2) * grad * grad
    later = chain.successors(grad, len(offdiag), axes)
    pairs = zip(offdiag, later, strict=True)
    return diag, tuple(b2 * edge + (1 - b2) * grad * x for edge, x in pairs)


def factor(
    diag: jax.Array,
    offdiag: tuple[jax.Array, ...],
    *,
    eps: Scalar,
    relative_eps: Scalar,
    edge_tolerance: Scalar,
    axes: Sequence[int],
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The factors of X: ``psi_j = H[I_j, I_j]^-1 H[I_j, j]`` and ``S_j = a_j - H[j, I_j] psi_j``.

    Args:
      diag: the diagonal of the (bias-corrected) mean, d, of the leaf's shape, float32 or float64.
      offdiag: its off-diagonals, b arrays of that shape.
      eps: added to the diagonal, in units of squared gradients.
      relative_eps: added to the diagonal, in units of the largest absolute row sum of the chain.
      edge_tolerance: edges whose Schur complement or pivot is not above this share of its
        diagonal entry are dropped.
      axes: the chain's axes, fastest first.

    Returns:
      ``(psi, schur)``, b arrays and one array of the shape of ``diag``; ``schur`` is positive.

    Example:
      >>> import jax.numpy as jnp
      >>> damping = dict(eps=0.0, relative_eps=0.0, edge_tolerance=0.0)
      >>> diag, edge = jnp.array([2.0, 2, 2]), jnp.array([1.0, 1, 0])
      >>> offdiag = edge, jnp.array([0.5, 0, 0])  # what a tridiagonal X would imply
      >>> psi, schur = factor(diag, offdiag, **damping, axes=(0,))
      >>> [p.tolist() for p in psi], schur.tolist()
      ([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], [1.5, 1.5, 2.0])
    """
    a = diagonal.damp(diag, offdiag, eps=eps, relative_eps=relative_eps, axes=axes)
    if not offdiag:
        return (), a
    solve = _solve_unrolled if len(offdiag) <= MAX_UNROLLED else _solve_looped
    psi, schur = solve(a, offdiag, edge_tolerance, axes)
    # Written so that a NaN (inf/inf, after an overflow) drops the edges as well.
    keep = schur > edge_tolerance * a
    return tuple(jnp.where(keep, p, 0) for p in psi), jnp.where(keep, schur, a)


def _reciprocal(pivot: jax.Array, diag: jax.Array, tolerance: Scalar) -> jax.Array:
    """1 / pivot; zero, which skips the pivot, where it is not above a share of its diagonal.

    Past the end of a chain both are zero, and so the missing edges drop out by themselves.
    """
    keep = pivot > tolerance * diag
    return jnp.where(keep, 1 / jnp.where(keep, pivot, 1), 0)


def _later(
    a: jax.Array, offdiag: tuple[jax.Array, ...], axes: Sequence[int]
) -> list[Iterator[jax.Array]]:
    """By lag, what H holds at entry j+p+1 for p from 0 on: the rows p of H[I_j, I_j]."""
    held = (a, *offdiag[:-1])
    return [chain.successors(x, len(held) - lag, axes) for lag, x in enumerate(held)]


def _solve_unrolled(
    a: jax.Array, offdiag: tuple[jax.Array, ...], tolerance: Scalar, axes: Sequence[int]
) -> tuple[list[jax.Array], jax.Array]:
    """``H[I_j, I_j] psi_j = H[I_j, j]`` and S_j for all j at once, by LDL^T written out."""
    size = len(offdiag)
    inverse: list[jax.Array] = []  # 1 / D_pp
    scaled: dict[tuple[int, int], jax.Array] = {}  # L_qp D_pp, below the diagonal
    rhs: list[jax.Array] = []  # y = L^-1 H[I_j, j]
    schur = a
    later = _later(a, offdiag, axes)
    for p in range(size):
        diag, *right = (next(x) for x in later[: size - p])
        column = dict(enumerate(right, p + 1))
        pivot, y = diag, offdiag[p]
        for i in range(p):
            lower = scaled[p, i] * inverse[i]
            pivot = pivot - lower * scaled[p, i]
            column = {q: value - lower * scaled[q, i] for q, value in column.items()}
            y = y - lower * rhs[i]
        inverse.append(_reciprocal(pivot, diag, tolerance))
        rhs.append(y)
        scaled.update({(q, p): value for q, value in column.items()})
        schur = schur - y * (y * inverse[p])
    psi = rhs.copy()
    for p in reversed(range(size)):
        for q in range(p + 1, size):
            psi[p] = psi[p] - scaled[q, p] * psi[q]
        psi[p] = psi[p] * inverse[p]
    return psi, schur


def _solve_looped(
    a: jax.Array, offdiag: tuple[jax.Array, ...], tolerance: Scalar, axes: Sequence[int]
) -> tuple[list[jax.Array], jax.Array]:
    """The same by Gauss-Jordan elimination of H on I_j and j, j last, in a compiled loop."""
    size = len(offdiag)
    rows: list[list[Any]] = [[None] * size + [edge] for edge in offdiag]
    for lag, shifted in enumerate(_later(a, offdiag, axes)):
        for p, x in enumerate(shifted):
            rows[p][p + lag] = rows[p + lag][p] = x
    matrix = jnp.stack([jnp.stack(row) for row in [*rows, [*offdiag, a]]])
    diags = jnp.stack([rows[p][p] for p in range(size)])

    def eliminate(p: jax.Array, matrix: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(matrix, p, 0, keepdims=False)
        column = jax.lax.dynamic_index_in_dim(matrix, p, 1)
        pivot = jax.lax.dynamic_index_in_dim(row, p, 0, keepdims=False)
        diag = jax.lax.dynamic_index_in_dim(diags, p, 0, keepdims=False)
        row = row * _reciprocal(pivot, diag, tolerance)
        return jax.lax.dynamic_update_index_in_dim(matrix - column * row, row, p, 0)

    matrix = jax.lax.fori_loop(0, size, eliminate, matrix)
    return [matrix[p, size] for p in range(size)], matrix[size, size]


def apply(
    psi: tuple[jax.Array, ...], schur: jax.Array, x: jax.Array, *, axes: Sequence[int]
) -> jax.Array:
    """X x, by the factors: ``y = L^T x``, ``z = y / S``, ``L z``.

    Args:
      psi: from ``factor``.
      schur: from ``factor``.
      x: array of the same shape, as a rule the bias-corrected momentum.
      axes: the chain's axes, fastest first.

    Returns:
      X x, of the shape of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> psi, schur = (jnp.array([0.5, 0]),), jnp.array([1.5, 2])
      >>> apply(psi, schur, jnp.array([3.0, 3]), axes=(0,)).tolist()  # inv([[2, 1], [1, 2]]) @ x
      [1.0, 1.0]
    """
    y = x
    for ratio, later in zip(psi, chain.successors(x, len(psi), axes), strict=True):
        y = y - ratio * later
    z = y / schur
    return z - chain.sum_of_predecessors([ratio * z for ratio in psi], axes) if psi else z


def to_dense(psi: tuple[jax.Array, ...], schur: jax.Array, *, axes: Sequence[int]) -> jax.Array:
    """X as a matrix. For tests and small n.

    Args:
      psi: from ``factor``.
      schur: from ``factor``.
      axes: the chain's axes, fastest first.

    Returns:
      An array of shape (batch axes..., n, n), in chain order.
    """
    inverse_schur = 1 / chain.to_line(schur, axes)
    n = inverse_schur.shape[-1]
    lower = jnp.eye(n, dtype=inverse_schur.dtype)
    for k, ratio in enumerate(psi, 1):
        # Column j holds -psi_j[k] in row j+k.
        below = jnp.eye(n, k=-k, dtype=lower.dtype)
        lower = lower - below * chain.to_line(ratio, axes)[..., None, :]
    return jnp.einsum(
        '...ij,...j,...kj->...ik', lower, inverse_schur, lower, precision=jax.lax.Precision.HIGHEST
    )
