r"""Eigenvalues and inverse roots of many small symmetric matrices at once.

The matrices are the last two axes; the other axes are a batch. Two ways to the inverse root: the
eigendecomposition, and the coupled Newton iteration (Newton-Schulz's for the square root), which
is matrix products alone. `experiments/matrix_roots.py` compares them. Everything is elementwise in
the batch, so a batch that is sharded stays so.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precond_optax import placement
from precond_optax.kernels import calls, cuts

# Of the power iteration for the smallest eigenvalue by Newton-Schulz.
EIGENVALUE_STEPS, SQUARINGS = 8, 3
_LEAST_RATIO = 0.3  # of `scaled_steps`
_LARGEST_IN_FRONT = (
    64  # matrices of which a TPU's vector units make products as fast as its others
)
_NEWTON_SCHULZ_TOLERANCE = 0.1  # of its error, above which a root has failed


def product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``jnp.einsum`` in full precision, of all products here and of the batched ones elsewhere.

    TPUs and GPUs multiply float32 matrices in a lower precision unless told otherwise; a root of
    a matrix of condition 1e6 has no digits to give away.
    """
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)


class _Form(NamedTuple):
    """How a batch of matrices is held: in the last two axes, or in the first two.

    In the first two on TPUs where the batch fills the lanes: a product is then a loop over small
    matrices' entries, in one pass. Of the batch's own form XLA makes a product of its matrix
    units, for which a 32 x 32 matrix is padded to 32 x 128 and turned round.
    """

    front: bool
    ndim: int

    @property
    def axes(self) -> tuple[int, int]:
        """Those of a matrix."""
        return (0, 1) if self.front else (-2, -1)

    def to(self, x: jax.Array) -> jax.Array:
        """From the last two axes."""
        return jnp.moveaxis(x, (-2, -1), self.axes)

    def back(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        return jnp.moveaxis(x, self.axes, (-2, -1))

    def eye(self, size: int, dtype: jnp.dtype) -> jax.Array:
        """The identity, for all of the batch."""
        eye = jnp.eye(size, dtype=dtype)
        return eye.reshape(size, size, *(1 for _ in range(self.ndim - 2))) if self.front else eye

    def times(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """A product."""
        if self.front:
            return jnp.sum(a[:, :, None] * b[None], axis=1)
        return product('...ij,...jk->...ik', a, b)

    def on_vector(self, a: jax.Array, x: jax.Array) -> jax.Array:
        """A product with vectors, in the last axis or the first."""
        return jnp.sum(a * x, axis=1) if self.front else product('...ij,...j->...i', a, x)

    def norm(self, x: jax.Array) -> jax.Array:
        """Frobenius', its axes of size 1."""
        return jnp.sqrt(jnp.sum(x * x, axis=self.axes, keepdims=True))


def _form_of(matrices: jax.Array) -> _Form:
    """In front where the batch is known to fill the lanes: a chip's small part is padded."""
    front = (
        placement.platform() == 'tpu'
        and matrices.shape[-1] <= _LARGEST_IN_FRONT
        and matrices.ndim > 2
        and matrices.shape[-3] >= cuts.LANES
        and calls.is_alone('auto', matrices)
    )
    return _Form(front, matrices.ndim)


def batches_can_deadlock() -> bool:
    """Whether two batched decompositions at the same time can wait for each other for ever.

    In jaxlib 0.10 the LAPACK kernels of the CPU hand their batch to the pool of threads on which
    they run themselves, and wait: as many of them at once as there are threads never end. Later
    versions do the batch in the thread they are in.
    """
    return jax.__version_info__ < (0, 11) and placement.platform() == 'cpu'


def trace(matrices: jax.Array) -> jax.Array:
    """The sum of each matrix's diagonal: (..., k, k) -> (...)."""
    return jnp.trace(matrices, axis1=-2, axis2=-1)


def _unit(matrices: jax.Array, axes: tuple[int, int] = (-2, -1)) -> tuple[jax.Array, jax.Array]:
    """The matrices divided by their largest absolute entry, and that entry, 1 for zero."""
    size = jnp.max(jnp.abs(matrices), axis=axes, keepdims=True)
    size = jnp.where(size > 0, size, 1)
    return matrices / size, size


def once(count: jax.Array, x: jax.Array) -> jax.Array:
    """``x``, after ``count``, which is not negative, is known.

    Keeps two batched decompositions apart where they can deadlock: the second one's operand waits
    for what is counted in the first one's results. XLA drops optimization barriers too early.
    """
    return jnp.where(count >= 0, x, jnp.nan) if batches_can_deadlock() else x


def clipped(values: jax.Array, shift: jax.Array) -> jax.Array:
    """Eigenvalues (..., k) plus a shift (...), at least their rounding: no noise is blown up."""
    raised = jnp.maximum(values, 0) + shift[..., None]
    rounding = jnp.finfo(values.dtype).eps * jnp.max(raised, axis=-1, keepdims=True)
    return jnp.maximum(raised, rounding)


def inverse_square_root(x: jax.Array) -> jax.Array:
    """``1 / sqrt(x)``, and 0 where x <= 0: the pseudo-inverse's, for statistics without entries.

    NaN stays NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> inverse_square_root(jnp.array([4.0, 0.0])).tolist()
      [0.5, 0.0]
    """
    none = x <= 0
    return jnp.where(none, 0, lax.rsqrt(jnp.where(none, 1, x)))


def inverse_power(x: jax.Array, p: int) -> jax.Array:
    """``x^(-1/p)``, and 0 where x <= 0, as `inverse_square_root`, which it is for p = 2.

    Example:
      >>> import jax.numpy as jnp
      >>> inverse_power(jnp.array([16.0, 0.0]), 4).tolist()
      [0.5, 0.0]
    """
    if p == 2:
        return inverse_square_root(x)
    none = x <= 0
    return jnp.where(none, 0, jnp.where(none, 1, x) ** (-1 / p))


def decompose(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Eigenvalues and eigenvectors, :math:`R = V \mathrm{diag}(\lambda) V^T`.

    Args:
      matrices: R (..., k, k), symmetric; of any size that is finite.

    Returns:
      The eigenvalues (..., k), ascending, and the eigenvectors (..., k, k), in columns.

    Example:
      >>> import jax.numpy as jnp
      >>> values, _ = decompose(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> values.round(5).tolist()
      [1.0, 3.0]
    """
    unit, size = _unit(matrices)
    # LAPACK and its like give up, or worse, on what is not finite; the caller sees NaN.
    finite = jnp.all(jnp.isfinite(unit), axis=(-2, -1), keepdims=True)
    vectors, values = lax.linalg.eigh(jnp.where(finite, unit, 0), sort_eigenvalues=True)
    values = jnp.where(finite[..., 0], values * size[..., 0], jnp.nan)
    return values, vectors


def from_decomposition(
    values: jax.Array, vectors: jax.Array, shift: jax.Array, p: int = 2
) -> jax.Array:
    r"""The inverse root :math:`(V \mathrm{diag}(\lambda) V^T + s I)^{-1/p}`.

    Args:
      values: eigenvalues (..., k); negative ones, which rounding makes, count as zero.
      vectors: eigenvectors (..., k, k), in columns.
      shift: s (...), >= 0, in the units of the eigenvalues.
      p: of the root.

    Returns:
      Symmetric matrices (..., k, k). Eigenvalues below the rounding of the largest are raised to
      it; the root of the zero matrix is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from_decomposition(jnp.array([0.0, 3.0]), jnp.eye(2), jnp.array(1.0)).tolist()
      [[1.0, 0.0], [0.0, 0.5]]
    """
    scaled = vectors * inverse_power(clipped(values, shift), p)[..., None, :]
    return product('...ij,...lj->...il', scaled, vectors)


def scaled_steps(least: float, p: int, rounding: float) -> np.ndarray:
    r"""The coefficients of a coupled iteration that converges in the fewest steps.

    A step takes an eigenvalue x of M to :math:`x (a - b x)^p`. Newton's, :math:`a = (p + 1) / p, b
    = 1 / p`, multiplies small ones by :math:`a^p`, 9/4 for p = 2. Of those that map [l, 1] to
    [l', 1] these have the largest l': with :math:`r = l^{1/p}` and :math:`w = (1 - r^{p+1}) / (1 -
    r)`

    .. math::
      b = \left(\frac{p + 1}{w}\right)^{1/p} \frac{p + 1}{p w}, \quad a = w b, \quad
      l' = (a - b)^p

    and Newton's are the limit. But eigenvalues near 1 go to l' too, and lose as many digits as
    that is small. So r is 0.3 at least, which costs a step or two: small ones then grow by 4.9
    for p = 2 and by 8.6 for p = 4, where Newton's steps have 2.25 and 2.44.

    Args:
      least: l, the least eigenvalue there is, in (0, 1); none is above 1.
      p: of the root, >= 1.
      rounding: of the dtype, where l' is near enough to 1.

    Returns:
      a and b of each step, (steps, 2).

    Example:
      >>> scaled_steps(0.5, p=2, rounding=1e-7).round(2).tolist()
      [[1.75, 0.79], [1.53, 0.53], [1.5, 0.5], [1.5, 0.5], [1.5, 0.5]]
      >>> len(scaled_steps(1e-6, p=2, rounding=1e-7))
      13

    References:
      Chen and Chow, A Stable Scaling of Newton-Schulz for Improving the Sign Function Computation
      of a Hermitian Matrix (2014), for p = 2.
    """
    found, before = [], 0.0
    while before < 1 - rounding and least > before:  # one more than it takes, as Newton's are
        r = max(least ** (1 / p), _LEAST_RATIO)
        w = sum(r**k for k in range(p + 1))
        b = ((p + 1) / w) ** (1 / p) * (p + 1) / (p * w)
        found.append((w * b, b))
        before, least = least, min(least * (w * b - b * least) ** p, (w * b - b) ** p)
    return np.array(found)


def _newton(p: int, count: Any) -> Callable[[jax.Array], tuple[Any, Any]]:
    """The coefficients of each step: Newton's, for a number of them; or those that are given."""
    if not isinstance(count, np.ndarray):
        return lambda _: ((p + 1) / p, 1 / p)
    table = jnp.asarray(count)
    return lambda step: (table[step, 0], table[step, 1])


def _number(steps: Any) -> Any:
    return len(steps) if isinstance(steps, np.ndarray) else steps


def newton_schulz(
    matrices: jax.Array, steps: int | np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Square roots and inverse square roots by the coupled Newton-Schulz iteration.

    .. math::
      A = R / \|R\|_F, \quad X_0 = A, \; Y_0 = I, \quad
      T = (3 I - Y X) / 2, \; X \leftarrow X T, \; Y \leftarrow T Y

    with :math:`R^{1/2} = \|R\|_F^{1/2} X` and :math:`R^{-1/2} = \|R\|_F^{-1/2} Y`. An eigenvalue
    of A that is small gains a factor of 9/4 in each step, so a matrix of condition c wants
    about :math:`\log c / \log(9/4) + 5` of them. With `scaled_steps` T is :math:`a I - b Y X`.

    Args:
      matrices: R (..., k, k), symmetric, positive definite.
      steps: of the iteration, how many, or `scaled_steps`; fixed, so that no matrix waits for
        another and no shard for another.

    Returns:
      The roots and the inverse roots (..., k, k), in the units of R to the powers 1/2 and -1/2,
      and the errors (...): the Frobenius norm of :math:`I - Y X`, 0 for a perfect root. It bounds
      the relative error of the inverse root but for rounding; the largest entry would not: a
      direction that has not converged may have but a small share in each. The zero matrix has
      the roots zero and zero, and error 0. Of a singular or indefinite one what is negative grows
      without bound, to an error that is large or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> _, root, error = newton_schulz(jnp.diag(jnp.array([1.0, 4.0])), steps=10)
      >>> root.round(4).tolist(), bool(error < 1e-5)
      ([[1.0, 0.0], [0.0, 0.5]], True)

    References:
      Higham, Functions of Matrices (2008), equation (6.35); Lee, MBAG, for its use here.
    """
    form = _form_of(matrices)
    eye = form.eye(matrices.shape[-1], matrices.dtype)
    matrices = form.to(matrices)
    unit, size = _unit(matrices, form.axes)  # before the norm, whose squares could overflow
    norm = form.norm(unit)
    norm = jnp.where(norm > 0, norm, 1)

    def step(n: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (x, y), (a, b) = pair, coefficients(n)
        change = (a * eye - b * form.times(y, x)).astype(x.dtype)
        return form.times(x, change), form.times(change, y)

    coefficients = _newton(2, steps)
    start = (unit / norm, jnp.zeros_like(matrices) + eye)
    x, y = lax.fori_loop(0, _number(steps), step, start)
    error = jnp.squeeze(form.norm(eye - form.times(y, x)), form.axes)
    scale = jnp.sqrt(norm * size)
    nonzero = jnp.any(matrices != 0, axis=form.axes, keepdims=True)
    inverse = jnp.where(nonzero, y / scale, 0)
    error = jnp.where(jnp.squeeze(nonzero, form.axes), error, 0)
    return form.back(x * scale), form.back(inverse), error


def coupled_newton(
    matrices: jax.Array, p: int, steps: int | np.ndarray
) -> tuple[jax.Array, jax.Array]:
    r"""Inverse p-th roots by the coupled Newton iteration; for p = 2 it is Newton-Schulz's.

    .. math::
      M_0 = z R, \; X_0 = z^{1/p} I, \; z = 1 / \|R\|_F, \quad
      T = ((p + 1) I - M) / p, \; X \leftarrow X T, \; M \leftarrow T^p M

    with X to :math:`R^{-1/p}`. A small eigenvalue of M gains a factor of :math:`(1 + 1/p)^p`, 9/4
    or more, in each step. With `scaled_steps` T is :math:`a I - b M`.

    Args:
      matrices: R (..., k, k), symmetric, positive definite.
      p: of the root, >= 1.
      steps: of the iteration, how many, or `scaled_steps`.

    Returns:
      The inverse roots (..., k, k), in the units of R to the power -1/p, and the errors (...): the
      Frobenius norm of :math:`I - M`, 0 for a perfect root. Zero for the zero matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> root, error = coupled_newton(jnp.diag(jnp.array([1.0, 16.0])), p=4, steps=12)
      >>> root.round(4).tolist(), bool(error < 1e-5)
      ([[1.0, 0.0], [0.0, 0.5]], True)

    References:
      Guo and Higham, `A Schur-Newton Method for the Matrix pth Root and its Inverse
      <https://doi.org/10.1137/050643374>`_, SIAM J. Matrix Anal. Appl. 28 (2006), equation (3.9).
    """
    form = _form_of(matrices)
    eye, times = form.eye(matrices.shape[-1], matrices.dtype), form.times
    matrices = form.to(matrices)
    unit, size = _unit(matrices, form.axes)
    norm = form.norm(unit)
    z = 1 / jnp.where(norm > 0, norm, 1)
    coefficients = _newton(p, steps)

    def step(n: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (x, m), (a, b) = pair, coefficients(n)
        change = (a * eye - b * m).astype(x.dtype)
        moved, square, rest = m, change, p  # T^p M by repeated squares
        while rest:
            if rest % 2:
                moved = times(square, moved)
            rest //= 2
            square = times(square, square) if rest else square
        return times(x, change), moved

    start = (z ** (1 / p) * eye, z * unit)
    x, m = lax.fori_loop(0, _number(steps), step, start)
    error = jnp.squeeze(form.norm(eye - m), form.axes)
    nonzero = jnp.any(matrices != 0, axis=form.axes, keepdims=True)
    inverse = jnp.where(nonzero, x * size ** (-1 / p), 0)
    return form.back(inverse), jnp.where(jnp.squeeze(nonzero, form.axes), error, 0)


def polar_root(factors: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    r"""The square roots of :math:`H = S S^T` from the factors S, by the Newton-Schulz iteration.

    .. math::
      X_0 = S / \|H\|_F^{1/2}, \quad X \leftarrow X (3 I - X^T X) / 2, \quad
      H^{1/2} \leftarrow S X^T

    In exact arithmetic these are the iterates of `newton_schulz` for H; but H is never formed, so
    a condition of c costs the digits of its root only, there is nothing indefinite that could
    grow, and a step is two products in place of three. X goes to the orthogonal polar factor.

    Args:
      factors: S (..., k, k), any matrices.
      steps: of the iteration. Too few make the root too small along the small eigenvalues.

    Returns:
      The roots (..., k, k), symmetric, in the units of S, and the errors (...): the Frobenius norm
      of :math:`I - X^T X`, 0 for perfect roots of positive definite H.

    Example:
      >>> import jax.numpy as jnp
      >>> root, error = polar_root(jnp.array([[0.0, 2.0], [-1.0, 0.0]]), steps=10)
      >>> root.round(4).tolist(), bool(error < 1e-5)
      ([[2.0, 0.0], [0.0, 1.0]], True)

    References:
      Higham, Functions of Matrices (2008), equation (8.20); Lee, MBAG, equation (5).
    """
    eye = jnp.eye(factors.shape[-1], dtype=factors.dtype)
    unit, size = _unit(factors)
    gram = product('...ji,...jk->...ik', unit, unit)  # its norm is that of H
    norm = jnp.sqrt(jnp.sqrt(jnp.sum(gram * gram, axis=(-2, -1), keepdims=True)))
    norm = jnp.where(norm > 0, norm, 1)

    def step(_: int, x: jax.Array) -> jax.Array:
        change = 1.5 * eye - 0.5 * product('...ji,...jk->...ik', x, x)
        return product('...ij,...jk->...ik', x, change)

    x = lax.fori_loop(0, steps, step, unit / norm)
    left = eye - product('...ji,...jk->...ik', x, x)
    root = size * product('...ij,...kj->...ik', unit, x)
    symmetric = (root + jnp.swapaxes(root, -1, -2)) / 2
    return symmetric, jnp.sqrt(jnp.sum(left * left, axis=(-2, -1)))


def generic_unit_vector(size: int, dtype: jnp.dtype) -> np.ndarray:
    """A start for power iterations, to which no eigenvector is likely to be orthogonal.

    Example:
      >>> import jax.numpy as jnp
      >>> generic_unit_vector(3, jnp.float32).shape
      (3,)
    """
    vector = np.random.default_rng(0).normal(size=size)
    return (vector / np.linalg.norm(vector)).astype(dtype)


def largest_eigenvalue(matrices: jax.Array, steps: int, squarings: int = 0) -> jax.Array:
    """The largest eigenvalue of positive semidefinite matrices by power iteration, from below.

    Args:
      matrices: (..., k, k), symmetric, positive semidefinite, finite.
      steps: of the iteration, >= 0.
      squarings: of the matrix before it: each makes a step as good as two.

    Returns:
      (...), at most the largest eigenvalue, in the matrices' units.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(largest_eigenvalue(jnp.diag(jnp.array([1.0, 9.0])), steps=8)), 4)
      9.0
    """
    form = _form_of(matrices)
    unit, size = _unit(form.to(matrices), form.axes)
    power, axis = unit, form.axes[0] if form.front else -1
    for _ in range(squarings):
        power, _ = _unit(form.times(power, power), form.axes)

    def norm(x: jax.Array) -> jax.Array:
        return jnp.linalg.norm(x, axis=axis, keepdims=True)

    def step(_: int, x: jax.Array) -> jax.Array:
        y = form.on_vector(power, x)
        size = norm(y)
        return y / jnp.where(size > 0, size, 1)

    start = generic_unit_vector(matrices.shape[-1], matrices.dtype)
    zeros = jnp.zeros_like(unit[:, 0] if form.front else unit[..., 0])
    start = start.reshape(-1, *(1 for _ in zeros.shape[1:])) if form.front else start
    x = lax.fori_loop(0, steps, step, zeros + start)
    return jnp.squeeze(norm(form.on_vector(unit, x)), axis) * jnp.squeeze(size, form.axes)


def _least(dtype: jnp.dtype, rounding: float) -> float:
    """Of `with_shift`, in units of the trace, which no norm is above."""
    return max(10 * float(jnp.finfo(dtype).eps), rounding)


def _steps(dtype: jnp.dtype, rounding: float, p: int = 2) -> np.ndarray:
    """For what `with_shift` gives: 13 in float32 and 27 in float64 for p = 2."""
    eps = float(jnp.finfo(dtype).eps)
    return scaled_steps(_least(dtype, rounding), p, eps)


def with_shift(matrices: jax.Array, shift: jax.Array, rounding: float) -> jax.Array:
    """R + s I with at least so much shift that the iteration comes to its end."""
    least = _least(matrices.dtype, rounding)
    eye = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    shift = jnp.maximum(shift, least * trace(matrices))
    return matrices + shift[..., None, None] * eye


# For each method two functions, with the residual's norm, which the second needs, between them:
# from R~, a shift that is there anyway and `rounding`, the smallest eigenvalues and two arrays;
# from those, the new shift and `rounding`, the roots and which of them failed.


def _spectrum_by_eigh(
    matrices: jax.Array, shift: jax.Array, rounding: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del shift, rounding
    values, vectors = decompose(matrices)
    return jnp.maximum(values[..., 0], 0), values, vectors


def _root_by_eigh(
    smallest: jax.Array, values: jax.Array, vectors: jax.Array, shift: jax.Array, rounding: float
) -> tuple[jax.Array, jax.Array]:
    # What is below the rounding is noise, which a root of next to nothing would blow up.
    shift = jnp.maximum(shift, rounding * jnp.sum(jnp.maximum(values, 0), axis=-1))
    root = from_decomposition(values - smallest[..., None], vectors, shift)
    return root, jnp.zeros(smallest.shape, bool)


def _spectrum_by_newton_schulz(
    matrices: jax.Array, shift: jax.Array, rounding: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    shifted = with_shift(matrices, shift, rounding)
    added = trace(shifted - matrices) / matrices.shape[-1]
    steps = _steps(matrices.dtype, rounding)
    _, inverse, _ = newton_schulz(shifted, steps)
    # The smallest eigenvalue is the largest one of the inverse root, to the power of -2; from
    # below there is from above here, so that it takes more than a rough one.
    largest = largest_eigenvalue(inverse, EIGENVALUE_STEPS, SQUARINGS)
    smallest = jnp.maximum(inverse_square_root(largest) ** 4 - added, 0)
    return smallest, jnp.zeros_like(matrices[..., 0]), matrices


def _root_by_newton_schulz(
    smallest: jax.Array, unused: jax.Array, matrices: jax.Array, shift: jax.Array, rounding: float
) -> tuple[jax.Array, jax.Array]:
    del unused
    steps = _steps(matrices.dtype, rounding)
    shifted = with_shift(matrices, shift - smallest, rounding)
    _, inverse, error = newton_schulz(shifted, steps)
    return inverse, error > _NEWTON_SCHULZ_TOLERANCE


def _by_platform(on_tpu: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """One function on TPUs and another elsewhere, chosen when the program is lowered."""

    def chosen(*args: Any) -> Any:
        *arrays, static = args
        return lax.platform_dependent(
            *arrays,
            tpu=functools.partial(_last, on_tpu, static),
            default=functools.partial(_last, elsewhere, static),
        )

    return chosen


def _last(function: Callable[..., Any], static: Any, *arrays: jax.Array) -> Any:
    return function(*arrays, static)


# 'auto' is Newton-Schulz on TPUs, whose compiler gathers the operand of a sharded
# eigendecomposition, and the eigendecomposition elsewhere.
METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    'eigh': (_spectrum_by_eigh, _root_by_eigh),
    'newton_schulz': (_spectrum_by_newton_schulz, _root_by_newton_schulz),
    'auto': (
        _by_platform(_spectrum_by_newton_schulz, _spectrum_by_eigh),
        _by_platform(_root_by_newton_schulz, _root_by_eigh),
    ),
}


def inverse_root(
    matrices: jax.Array, shift: jax.Array, method: str, rounding: float
) -> tuple[jax.Array, jax.Array]:
    r"""Inverse square roots :math:`(R + s I)^{-1/2}`, by one of ``METHODS``.

    Args:
      matrices: R (..., k, k), symmetric, positive semidefinite but for rounding.
      shift: s (...), >= 0, in the units of R.
      method: of ``METHODS``.
      rounding: relative error with which R is stored, if larger than its dtype's; below it are no
        eigenvalues.

    Returns:
      The roots (..., k, k), and which of them failed (...).

    Example:
      >>> import jax.numpy as jnp
      >>> root, failed = inverse_root(jnp.diag(jnp.array([0.0, 3.0])), 1.0, 'eigh', 0.0)
      >>> root.tolist(), bool(failed)
      ([[1.0, 0.0], [0.0, 0.5]], False)
    """
    spectrum, root = METHODS[method]
    shift = jnp.zeros(matrices.shape[:-2], matrices.dtype) + shift
    _, values, more = spectrum(matrices, shift, rounding)
    roots, failed = root(jnp.zeros_like(shift), values, more, shift, rounding)
    return roots, failed | ~jnp.all(jnp.isfinite(roots), axis=(-2, -1))


def _pth_root_by_eigh(
    matrices: jax.Array, eps: jax.Array, static: tuple[int, float]
) -> tuple[jax.Array, jax.Array]:
    p, rounding = static
    values, vectors = decompose(matrices)
    known = jnp.maximum(values, 0)
    shift = jnp.maximum(eps * known[..., -1], rounding * jnp.sum(known, axis=-1))
    return from_decomposition(values, vectors, shift, p), jnp.zeros(shift.shape, bool)


def _pth_root_by_newton(
    matrices: jax.Array, eps: jax.Array, static: tuple[int, float]
) -> tuple[jax.Array, jax.Array]:
    p, rounding = static
    shift = eps * largest_eigenvalue(matrices, EIGENVALUE_STEPS, SQUARINGS)
    steps = _steps(matrices.dtype, rounding, p)
    root, error = coupled_newton(with_shift(matrices, shift, rounding), p, steps)
    return root, error > _NEWTON_SCHULZ_TOLERANCE


# By the names of ``METHODS``.
_PTH_ROOTS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    'eigh': _pth_root_by_eigh,
    'newton_schulz': _pth_root_by_newton,
    'auto': _by_platform(_pth_root_by_newton, _pth_root_by_eigh),
}


def inverse_pth_root(
    matrices: jax.Array, p: int, eps: jax.Array | float, method: str, rounding: float
) -> tuple[jax.Array, jax.Array]:
    r"""Inverse roots :math:`(R + \epsilon \lambda_{\max}(R) I)^{-1/p}`, by one of ``METHODS``.

    Args:
      matrices: R (..., k, k), symmetric, positive semidefinite but for rounding.
      p: of the root, >= 1.
      eps: the shift in units of the largest eigenvalue, >= 0, a number. By matrix products that
        eigenvalue is a power iteration's, and the shift 10 rounding units of the trace at least.
      method: of ``METHODS``; 'newton_schulz' is `coupled_newton` here.
      rounding: relative error with which R is stored, if larger than its dtype's; below it are no
        eigenvalues.

    Returns:
      The roots (..., k, k), zero for the zero matrix, and which of them failed (...).

    Example:
      >>> import jax.numpy as jnp
      >>> matrix = jnp.diag(jnp.array([0.0, 16.0]))
      >>> root, failed = inverse_pth_root(matrix, 4, 1 / 256, 'eigh', 0.0)
      >>> root.round(3).tolist(), bool(failed)
      ([[2.0, 0.0], [0.0, 0.5]], False)
    """
    eps = jnp.asarray(eps, matrices.dtype)
    roots, failed = _PTH_ROOTS[method](matrices, eps, (p, rounding))
    return roots, failed | ~jnp.all(jnp.isfinite(roots), axis=(-2, -1))
