"""What `tiles` and `strips` are tested with: statistics, and the verbs on whole arrays."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from precond_optax.kernels import banded, chain, diagonal, tiles, tridiagonal, verbs

SCALARS = verbs.Scalars(0.9, 0.8, 1 / (1 - 0.9**3), 1 / (1 - 0.8**3), 0.1, 1e-7, 0.3)


def numbers(batch=1, moves=False):
    """With an eps for each chain, and how far it moves the parameters."""
    chains = 1 + jnp.arange(batch)
    move = verbs.Move(1 - 0.1 * chains, -0.2 * chains) if moves else None
    return tiles.Numbers(SCALARS, SCALARS.eps * chains, move=move)


def moved(param, direction, batch_axes):
    """The parameters after such a move."""
    shape = param.shape
    batch = shape[:batch_axes]
    keep, step = (
        x.reshape(*batch, *(1 for _ in shape[batch_axes:]))
        for x in numbers(math.prod(batch), moves=True).move
    )
    return keep * param + step * direction


def scalars(shape, batch_axes):
    """Those numbers for the verbs."""
    batch = shape[:batch_axes]
    eps = numbers(math.prod(batch)).eps.reshape(*batch, *(1 for _ in shape[batch_axes:]))
    return SCALARS._replace(eps=eps)


def pattern_of(band):
    return {0: diagonal, 1: tridiagonal}.get(band, banded)


def by_verbs(pattern, axes, batch_axes, grad, mu, nu, offdiag, s, adam_eps, nesterov=False):
    """What a kernel's `step` computes, on whole arrays."""
    new = verbs.step(pattern, grad, mu, nu, offdiag, s, nesterov=nesterov, axes=axes)
    w = new.mu_hat if adam_eps is None else new.mu_hat / (jnp.sqrt(new.nu_hat) + adam_eps)
    own = tuple(range(batch_axes, grad.ndim))
    squares = [jnp.sum(x * x, axis=own).ravel() for x in (new.direction, w)]
    return new.mu, new.nu, new.offdiag, new.direction, jnp.stack(squares, 1)


def arrays(rng, shape, axes, band, scale=1.0):
    """A gradient and statistics of some steps, with no edges past the chains' ends."""
    grads = [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for _ in range(4)]
    nu, edges = jnp.zeros(shape), tuple(jnp.zeros(shape) for _ in range(band))
    for grad in grads[1:]:
        nu, edges = banded.accumulate(grad, nu, edges, b2=0.7, axes=axes)
    return grads[0], sum(grads[1:]) / 3, nu, edges


def rows_of(diag, edges, axes):
    """What is not zero of each row of H: (batch axes..., n, 1 + 2 bands)."""
    lines = [np.asarray(chain.to_line(x, axes), np.float64) for x in (diag, *edges)]
    n = lines[0].shape[-1]
    rows = np.zeros((*lines[0].shape, 1 + 2 * len(edges)))
    rows[..., 0] = lines[0]
    for k, line in enumerate(lines[1:], 1):
        rows[..., 2 * k - 1] = line
        rows[..., k:, 2 * k] = line[..., : n - k]
    return rows


def assert_near(got, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5 * jnp.max(abs(b))),
        got,
        expected,
    )


def largest_row_sums(pattern, axes, grad, nu, edges):
    """What a kernel's `largest_row_sums` computes, in float64 but for the statistics."""
    diag, later = pattern.accumulate(grad, nu, edges, b2=SCALARS.b2, axes=axes)
    return np.abs(rows_of(diag, later, axes)).sum(-1).max(-1).ravel()
