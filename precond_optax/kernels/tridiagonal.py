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
All but ``factor``, which needs no solve here, are those of `kernels/banded.py`.

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
from precond_optax.kernels.banded import accumulate, apply, to_dense

__all__ = ['accumulate', 'apply', 'factor', 'to_dense']


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
