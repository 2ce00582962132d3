r"""Tridiagonal SONew: the sparsest inverse of the second moment along a chain.

Among all positive definite X that are zero outside the three diagonals, X is the one of least
LogDet divergence to the inverse of H, the (eps-damped) running mean of g g^T of which only the
diagonal ``d`` and the off-diagonal ``e`` are kept. With a = d + damping, entry j's successor
j+1 along the chain (`kernels/chain.py`), and tol the edge tolerance:

    psi_j = e_j / a_{j+1}
    S_j   = a_j - e_j psi_j                   the Schur complement; 1/S_j is D_jj
    psi_j = 0, S_j = a_j   where S_j <= tol a_j                            (drop the edge)
    X     = L diag(1/S) L^T,   L_jj = 1,   L_{j+1,j} = -psi_j

The band of inv(X) is the band of H (the optimality condition), edges dropped aside.

The verbs are those of every sparsity pattern: ``accumulate``, ``factor``, ``apply``,
``to_dense``. ``offdiag`` and ``psi`` are tuples with one array for each off-diagonal: here one.

References:
  Devvrit et al., `A Computationally Efficient Sparsified Online Newton Method
  <https://arxiv.org/abs/2311.10085>`_, 2023: Theorem 3.1 (the factors), Algorithm 3 (dropped
  edges). Their H_jj is ``a_j`` here, H_{j,j+1} is ``e_j``, L_{j+1,j} is ``-psi_j``, D_jj is
  ``1 / S_j``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from precond_optax.checks import Scalar
from precond_optax.kernels import chain, diagonal


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
      offdiag: one array of the gradient's shape: at entry j the product with entry j+1, zero at
        the last entry of a chain.
      b2: decay of the mean, in [0, 1).
      axes: the chain's axes, fastest first.

    Returns:
      The new ``diag`` and ``offdiag``.

    Example:
      >>> import jax.numpy as jnp
      >>> zeros = jnp.zeros(3)
      >>> diag, (edge,) = accumulate(jnp.array([1.0, 2, 4]), zeros, (zeros,), b2=0.5, axes=(0,))
      >>> diag.tolist(), edge.tolist()
      ([0.5, 2.0, 8.0], [1.0, 4.0, 0.0])
    """
    (edge,) = offdiag
    diag = b2 * diag + (1 - b2) * grad * grad
    edge = b2 * edge + (1 - b2) * grad * chain.successor(grad, axes)
    return diag, (edge,)


def factor(
    diag: jax.Array,
    offdiag: tuple[jax.Array, ...],
    *,
    eps: Scalar,
    relative_eps: Scalar,
    edge_tolerance: Scalar,
    axes: Sequence[int],
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The factors of X: ``psi_j = e_j / a_{j+1}`` and ``S_j = a_j - e_j psi_j``.

    Args:
      diag: the diagonal of the (bias-corrected) mean, d, of the leaf's shape, float32 or float64.
      offdiag: its off-diagonal, (e,).
      eps: added to the diagonal, in units of squared gradients.
      relative_eps: added to the diagonal, in units of the largest absolute row sum of the chain.
      edge_tolerance: edges whose Schur complement is not above this share of a_j are dropped.
      axes: the chain's axes, fastest first.

    Returns:
      ``((psi,), schur)``, of the shape of ``diag``; ``schur`` is positive.

    Example:
      >>> import jax.numpy as jnp
      >>> damping = dict(eps=0.0, relative_eps=0.0, edge_tolerance=0.0)
      >>> diag, edge = jnp.array([2.0, 2, 2]), jnp.array([1.0, 1, 0])
      >>> (psi,), schur = factor(diag, (edge,), **damping, axes=(0,))
      >>> psi.tolist(), schur.tolist()
      ([0.5, 0.5, 0.0], [1.5, 1.5, 2.0])
    """
    (edge,) = offdiag
    damped = diagonal.damp(diag, offdiag, eps=eps, relative_eps=relative_eps, axes=axes)
    following = chain.successor(damped, axes)
    psi = edge / jnp.where(following > 0, following, 1)  # zero past the end of the chain
    schur = damped - edge * psi
    # Written so that a NaN (inf/inf, after an overflow) drops the edge as well.
    keep = schur > edge_tolerance * damped
    return (jnp.where(keep, psi, 0),), jnp.where(keep, schur, damped)


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
    (ratio,) = psi
    z = (x - ratio * chain.successor(x, axes)) / schur
    return z - chain.predecessor(ratio * z, axes)


def to_dense(psi: tuple[jax.Array, ...], schur: jax.Array, *, axes: Sequence[int]) -> jax.Array:
    """X as a matrix. For tests and small n.

    Args:
      psi: from ``factor``.
      schur: from ``factor``.
      axes: the chain's axes, fastest first.

    Returns:
      An array of shape (batch axes..., n, n), in chain order.
    """
    (ratio,) = psi
    inverse_schur = 1 / chain.to_line(schur, axes)
    line = chain.to_line(ratio, axes)
    n = line.shape[-1]
    below = jnp.eye(n, k=-1, dtype=line.dtype)
    # Column j of `lower` holds -psi_j in row j+1.
    lower = jnp.eye(n, dtype=line.dtype) - below * line[..., None, :]
    return jnp.einsum(
        '...ij,...j,...kj->...ik', lower, inverse_schur, lower, precision=jax.lax.Precision.HIGHEST
    )
