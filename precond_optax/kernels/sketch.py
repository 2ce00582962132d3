r"""Frequent directions: a second moment as its leading eigenvectors and the mass that they miss.

.. math:: M \approx U \Lambda U^T + \rho I

with U (s, k), columns that are orthonormal or zero, k eigenvalues and one number. A new gradient's
columns are added, the k leading eigenpairs kept, the largest eigenvalue left out taken off them
and added to :math:`\rho`: never less than what was added up, and exactly that for k = s. Axes
before these are a batch.
"""

import jax
import jax.numpy as jnp

from precond_optax.kernels import matrix_root
from precond_optax.kernels.matrix_root import product

_NOISE = 4  # rounding units of the largest eigenvalue, below which others are noise


def update(
    columns: jax.Array,
    vectors: jax.Array,
    values: jax.Array,
    escaped: jax.Array,
    *,
    b2: jax.Array | float,
    weight: jax.Array | float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Adds a gradient to a sketch.

    .. math::
      M = b_2 U \Lambda U^T + w\, G G^T = \sum_i \lambda_i v_i v_i^T, \quad
      U' = (v_1 .. v_k), \; \Lambda' = \Lambda_k - \lambda_{k+1} I, \;
      \rho' = b_2 \rho + \lambda_{k+1}

    M is formed, (s, s), where the gradient has at least s - k columns; with fewer the eigenproblem
    is that of a QR's triangle, of n + k rows. Eigenvectors whose value is lost in the rounding of
    the largest are zero, the others orthonormal to rounding.

    Args:
      columns: G (..., s, n).
      vectors: U (..., s, k), k <= s.
      values: of :math:`\Lambda` (..., k), ascending, >= 0.
      escaped: rho (...).
      b2: decay, in [0, 1].
      weight: w of the new gradient.

    Returns:
      The new vectors, values and escaped mass, and which sketches failed (...) and are as they
      were: those whose gradient's square or whose eigenvectors are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> start = jnp.zeros((3, 1)), jnp.zeros(1), jnp.zeros(())
      >>> grad = jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
      >>> vectors, values, escaped, _ = update(grad, *start, b2=1.0, weight=1.0)
      >>> abs(vectors[:, 0]).tolist(), values.tolist(), float(escaped)
      ([1.0, 0.0, 0.0], [8.0], 1.0)

    References:
      Feinberg et al., Sketchy (2023), Algorithm 1 for a sketch of k + 1 directions, whose last is
      always zero and not kept here; section 5.2 for the decay.
    """
    size, rank = vectors.shape[-2:]
    finite = jnp.isfinite(jnp.sum(columns * columns, axis=(-2, -1)))
    new = jnp.where(finite[..., None, None], columns, 0) * jnp.sqrt(weight)
    old = vectors * jnp.sqrt(b2 * values)[..., None, :]
    if rank + columns.shape[-1] < size:
        basis, triangle = jnp.linalg.qr(jnp.concatenate([old, new], axis=-1))
        spectrum, turn = matrix_root.decompose(_gram(triangle))
        kept = product('...ij,...jl->...il', basis, turn[..., -rank:])
    else:
        spectrum, turn = matrix_root.decompose(_gram(old) + _gram(new))
        kept = turn[..., -rank:]
    left_out = spectrum[..., : spectrum.shape[-1] - rank][..., -1:]
    cut = jnp.sum(jnp.maximum(left_out, 0), axis=-1)  # of one or of none
    new_values = spectrum[..., -rank:] - cut[..., None]
    noise = _NOISE * jnp.finfo(columns.dtype).eps * jnp.abs(spectrum[..., -1:])
    held = ~(new_values <= noise)  # a NaN is
    new_values, kept = jnp.where(held, new_values, 0), jnp.where(held[..., None, :], kept, 0)
    new_escaped = b2 * escaped + cut
    whole = jnp.isfinite(jnp.sum(kept, axis=(-2, -1)) + jnp.sum(new_values, axis=-1) + new_escaped)
    failed = ~(finite & whole)
    return (
        jnp.where(failed[..., None, None], vectors, kept),
        jnp.where(failed[..., None], values, new_values),
        jnp.where(failed, escaped, new_escaped),
        failed,
    )


def _gram(x: jax.Array) -> jax.Array:
    return product('...ij,...lj->...il', x, x)


def apply(
    columns: jax.Array,
    vectors: jax.Array,
    values: jax.Array,
    escaped: jax.Array,
    *,
    p: int,
    eps: jax.Array | float,
) -> jax.Array:
    r"""Columns times the inverse root of a sketch, without its matrix.

    .. math::
      (U \Lambda U^T + \sigma I)^{-1/p} G = U D U^T G + \sigma^{-1/p} G, \quad
      D = (\Lambda + \sigma I)^{-1/p} - \sigma^{-1/p} I, \quad
      \sigma = \rho + \epsilon (\lambda_{\max} + \rho)

    Args:
      columns: G (..., s, n).
      vectors: U (..., s, k).
      values: of :math:`\Lambda` (..., k), ascending.
      escaped: rho (...).
      p: of the root.
      eps: the shift in units of the largest eigenvalue, >= 0.

    Returns:
      (..., s, n). Eigenvalues below the rounding of the largest are raised to it; zero where the
      sketch is.

    Example:
      >>> import jax.numpy as jnp
      >>> sketch = jnp.array([[1.0], [0.0]]), jnp.array([15.0]), jnp.array(1.0)
      >>> apply(jnp.ones((2, 1)), *sketch, p=4, eps=0.0).tolist()
      [[0.5], [1.0]]
    """
    shift = escaped + eps * (values[..., -1] + escaped)
    spectrum = jnp.concatenate([jnp.zeros_like(values[..., :1]), values], axis=-1)
    powers = matrix_root.inverse_power(matrix_root.clipped(spectrum, shift), p)
    outside, inside = powers[..., :1, None], powers[..., 1:, None]
    coordinates = product('...ij,...il->...jl', vectors, columns)
    difference = product('...ij,...jl->...il', vectors, (inside - outside) * coordinates)
    return difference + outside * columns
