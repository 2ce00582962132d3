"""SONew's step of one leaf: the verbs of a pattern, on a whole leaf, a part of it or a tile."""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precond_optax.checks import Scalar
from precond_optax.kernels import chain


class Scalars(NamedTuple):
    """What the verbs take beside arrays; each may be traced, eps an array of the leaf's axes."""

    b1: Scalar
    b2: Scalar
    mu_correction: Scalar  # 1 / (1 - b1^t); of the mean that looks ahead b1 / (1 - b1^(t+1))
    nu_correction: Scalar
    eps: Scalar
    edge_tolerance: Scalar
    grad_correction: Scalar = 0.0  # (1 - b1) / (1 - b1^t) where the mean looks one step ahead
    relative_eps: Scalar = 0.0

    def mu_hat(self, mu: jax.Array, grad: jax.Array, nesterov: bool) -> jax.Array:
        """The bias-corrected mean; with ``nesterov`` of the step ahead, g in for its gradient."""
        corrected = mu * self.mu_correction
        return corrected + grad * self.grad_correction if nesterov else corrected


class Move(NamedTuple):
    """A step of the parameters, ``p <- keep p + step u``: numbers, or one for each chain."""

    keep: Any
    step: Any

    def __call__(self, param: jax.Array, direction: jax.Array) -> jax.Array:
        """The parameters, moved."""
        return self.keep * param + self.step * direction


class Stepped(NamedTuple):
    """What the verbs make of a gradient: arrays of its shape."""

    mu: jax.Array
    nu: jax.Array
    offdiag: tuple[jax.Array, ...]
    psi: tuple[jax.Array, ...]
    direction: jax.Array
    mu_hat: jax.Array
    nu_hat: jax.Array

    def magnitude(self, eps: float | None) -> jax.Array:
        """w: Adam's direction with this epsilon, or the bias-corrected mean if it is None."""
        return self.mu_hat if eps is None else self.mu_hat / (jnp.sqrt(self.nu_hat) + eps)


def step(
    pattern: ModuleType,
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    offdiag: tuple[jax.Array, ...],
    scalars: Scalars,
    *,
    nesterov: bool = False,
    axes: chain.ChainAxes,
) -> Stepped:
    """The verbs of a pattern one after another.

    Args:
      pattern: the module of its verbs.
      grad: g.
      mu: m.
      nu: d.
      offdiag: e, one array for each off-diagonal.
      scalars: decays, corrections, damping.
      nesterov: whether the mean looks one step ahead.
      axes: the chain's, fastest first.

    Returns:
      The new statistics, the factors, the direction, and the bias-corrected means.
    """
    s = scalars
    mu = s.b1 * mu + (1 - s.b1) * grad
    mu_hat = s.mu_hat(mu, grad, nesterov)
    nu, edges = pattern.accumulate(grad, nu, offdiag, b2=s.b2, axes=axes)
    nu_hat = nu * s.nu_correction
    psi, schur = pattern.factor(
        nu_hat,
        tuple(edge * s.nu_correction for edge in edges),
        eps=s.eps,
        relative_eps=s.relative_eps,
        edge_tolerance=s.edge_tolerance,
        axes=axes,
    )
    direction = pattern.apply(psi, schur, mu_hat, axes=axes)
    return Stepped(mu, nu, edges, psi, direction, mu_hat, nu_hat)
