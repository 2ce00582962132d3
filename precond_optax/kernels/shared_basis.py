r"""The second moment of each output's gradient, of low rank in a basis that all outputs share.

A leaf of shape (\*block, \*outputs) is m blocks (one for each output) of b entries (its inputs):
gradients :math:`g_i`. Each block's second moment is held as

.. math::
  M_i \approx B^T R_i B + \rho_i I

with B (k, b), k orthonormal rows shared by all blocks; R (m, k, k), the coefficients; and
:math:`\rho` (m), the mass that the rest has. (The paper's B is this one's transpose.) No array
is larger than the leaf or than the coefficients: neither an M nor their sum of squares

.. math:: A = \sum_i M_i M_i^T

is formed. Nothing is reshaped but the basis for its QR, so that a leaf may be sharded along any
axis: the coefficients lie where their outputs do, the basis where the inputs do, and what is
summed over the outputs is (k, b) or smaller.

Shapes below: block and outputs stand for one axis or more each.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from precond_optax.kernels import matrix_root

Basis = jax.Array

RESIDUAL_NORMS = ('spectral', 'frobenius')
# Power iterations for the residual's norm, which is so found from below: 0.95 of it or more in 19
# of 20 blocks, 0.6 at worst; see `experiments/matrix_roots.py`.
_NORM_STEPS = 8


def _dot(a: jax.Array, b: jax.Array, axes: tuple[Sequence[int], Sequence[int]]) -> jax.Array:
    """``jnp.tensordot`` in full precision: TPUs and GPUs multiply in a lower one by default."""
    first, second = axes
    return jnp.tensordot(a, b, (tuple(first), tuple(second)), precision=lax.Precision.HIGHEST)


def _over_block(a: jax.Array, b: jax.Array, ndim: int) -> jax.Array:
    """(p, \\*block), (q, \\*block) -> (p, q)."""
    axes = range(1, ndim + 1)
    return _dot(a, b, (axes, axes))


def _matvec(matrices: jax.Array, vectors: jax.Array) -> jax.Array:
    """(\\*outputs, k, k), (\\*outputs, k) -> (\\*outputs, k)."""
    return matrix_root.product('...ij,...j->...i', matrices, vectors)


def _turned(matrices: jax.Array, turn: jax.Array) -> jax.Array:
    """W R W^T for each symmetric R: (\\*outputs, k, k), W (k, k)."""
    half = _dot(matrices, turn, ((-1,), (1,)))
    return _dot(half, turn, ((-2,), (1,)))


def _outer(x: jax.Array) -> jax.Array:
    return x[..., :, None] * x[..., None, :]


def project(basis: jax.Array, x: jax.Array) -> jax.Array:
    """The coordinates of each block: (k, \\*block), (\\*block, \\*outputs) -> (\\*outputs, k).

    Example:
      >>> import jax.numpy as jnp
      >>> project(jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist()
      [[4.0], [5.0], [6.0]]
    """
    axes = range(basis.ndim - 1)
    return _dot(x, basis, (axes, [axis + 1 for axis in axes]))


def lift(basis: jax.Array, coordinates: jax.Array) -> jax.Array:
    """The blocks of given coordinates: (k, \\*block), (\\*outputs, k) -> (\\*block, \\*outputs).

    Example:
      >>> import jax.numpy as jnp
      >>> lift(jnp.array([[0.0, 1.0]]), jnp.array([[4.0], [5.0]])).tolist()
      [[0.0, 0.0], [4.0, 5.0]]
    """
    return _dot(basis, coordinates, ((0,), (-1,)))


def random_basis(key: jax.Array, rank: int, block: Sequence[int], dtype: jnp.dtype) -> Basis:
    """A random orthonormal basis (rank, \\*block), the start of the power iteration.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> basis = random_basis(jax.random.key(0), 2, (3,), jnp.float32)
      >>> jnp.allclose(basis @ basis.T, jnp.eye(2), atol=1e-6)
      Array(True, dtype=bool)
    """
    return orthonormal(jax.random.normal(key, (rank, *block), dtype))


def orthonormal(rows: jax.Array) -> jax.Array:
    """Orthonormal rows that span the given ones: (q, \\*block) -> (q, \\*block).

    By Householder's QR: orthonormal to rounding whatever the rows' rank and condition, which is
    the square of the gradients' second moment's. The one place that reshapes, and that gathers
    (q, b) where the block is sharded.
    """
    flat = rows.reshape(rows.shape[0], -1)
    return jnp.linalg.qr(flat.T)[0].T.reshape(rows.shape)


def _masked(
    grad: jax.Array, ndim: int, weight: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What enters the statistics: the scaled gradient, its squared norms, and which are left out.

    Left out are blocks whose squared norm is not finite. The update shows a NaN all the same: it
    is made from the gradient itself.
    """
    scaled = grad * jnp.sqrt(weight)
    squares = jnp.sum(scaled * scaled, axis=tuple(range(ndim)))
    left_out = ~jnp.isfinite(squares)
    return jnp.where(left_out, 0, scaled), jnp.where(left_out, 0, squares), left_out


def accumulate(
    grad: jax.Array,
    basis: Basis,
    coefficients: jax.Array,
    residual: jax.Array,
    *,
    b2: jax.Array | float,
    weight: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    r"""Adds a gradient to the statistics while the basis stays.

    .. math::
      R_i \leftarrow b_2 R_i + w\, c_i c_i^T, \quad
      \rho_i \leftarrow b_2 \rho_i + w\, (e^2 + \sqrt{e^4 + 4 |c_i|^2 e^2}) / 2

    with :math:`c_i = B g_i` and :math:`e^2 = |g_i|^2 - |c_i|^2`; the last term is the spectral
    norm of what :math:`B^T R_i B` lacks of :math:`g_i g_i^T`.

    Args:
      grad: g (\*block, \*outputs).
      basis: B (k, \*block).
      coefficients: R (\*outputs, k, k).
      residual: rho (\*outputs).
      b2: decay, in [0, 1].
      weight: w of the new gradient.

    Returns:
      The new coefficients and the new residual.
    """
    scaled, squares, _ = _masked(grad, basis.ndim - 1, weight)
    coordinates = project(basis, scaled)
    held = jnp.sum(coordinates * coordinates, axis=-1)
    rest = jnp.maximum(squares - held, 0) * (basis.shape[0] < basis[0].size)
    # As e (e + sqrt(e^2 + 4 c^2)) / 2: squares of squares would overflow.
    missed = jnp.sqrt(rest) * (jnp.sqrt(rest) + jnp.sqrt(rest + 4 * held)) / 2
    return b2 * coefficients + _outer(coordinates), b2 * residual + missed


def refresh(
    grad: jax.Array,
    basis: Basis,
    coefficients: jax.Array,
    residual: jax.Array,
    root: jax.Array,
    *,
    b2: jax.Array | float,
    weight: jax.Array | float,
    eps: jax.Array | float,
    power_iterations: int = 1,
    extra_rows: jax.Array | None = None,
    method: str = 'eigh',
    residual_norm: str = 'spectral',
    norm_steps: int = _NORM_STEPS,
    rounding: float = 0.0,
) -> tuple[Basis, jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Adds a gradient to the statistics, turns the basis to them and takes the roots.

    .. math::
      M_i &= b_2 B^T R_i B + w\, g_i g_i^T \\
      Y &\leftarrow \mathrm{QR}(A Y), \quad A = \sum_i M_i M_i^T, \quad B' = Y \\
      \tilde R_i &= B' M_i B'^T, \quad R'_i = \tilde R_i - \sigma_{\min}(\tilde R_i) I \\
      \rho'_i &= b_2 \rho_i + \| M_i - B'^T R'_i B' \|_2 \\
      P_i &= (R'_i + (\rho'_i + \epsilon) I)^{-1/2}

    Each block is in units of its own size and A in units of the largest, so that squares of
    squares neither overflow nor vanish.

    Args:
      grad: g (\*block, \*outputs).
      basis: B (k, \*block).
      coefficients: R (\*outputs, k, k).
      residual: rho (\*outputs).
      root: P (\*outputs, k, k) of the last refresh, kept where the new one fails.
      b2: decay, in [0, 1].
      weight: w of the new gradient.
      eps: in units of squared gradients, >= 0.
      power_iterations: how often A is applied, >= 1.
      extra_rows: (p, \*block), rows to iterate beside the basis (oversampling); the best k of all
        are kept.
      method: 'eigh' or 'newton_schulz', for the roots; 'auto' is the second on TPUs, whose
        compiler gathers what is sharded for the first, and the first elsewhere.
      residual_norm: 'spectral', by power iteration, or 'frobenius', the upper bound.
      norm_steps: of the power iteration for the spectral norm.
      rounding: the relative one with which the coefficients were stored, if not in their dtype: R
        may be indefinite by as much.

    Returns:
      The new basis, coefficients, residual and roots, and which blocks (\*outputs) failed: those
      whose gradient's square or whose root is not finite. A failed block's statistics are the
      decayed ones, its root the last one.

    References:
      Yen et al. (2023), Algorithm 1, equations (5) and (6).
    """
    ndim, rank = basis.ndim - 1, basis.shape[0]
    scaled, squares, left_out = _masked(grad, ndim, weight)
    old = b2 * coefficients
    size = squares + matrix_root.trace(old)
    size = jnp.where(size > 0, size, 1)
    old, squares = old / size[..., None, None], squares / size
    scaled = scaled * lax.rsqrt(size)
    coordinates = project(basis, scaled)
    share = (size / jnp.max(size)) ** 2

    new_basis = _iterate(
        basis, old, scaled, squares, coordinates, share, power_iterations, extra_rows
    )
    turn = _over_block(new_basis, basis, ndim)  # W = B' B^T
    new = project(new_basis, scaled)
    projected = _turned(old, turn) + _outer(new)

    spectrum, inverse_root = matrix_root.METHODS[method]
    known = (b2 * residual + eps) / size
    smallest, *parts = spectrum(projected, known, rounding)
    smallest = jnp.where(jnp.isfinite(smallest), smallest, 0)

    if rank == basis[0].size:  # nothing but what was subtracted
        missed = smallest
    else:
        # From the vectors themselves: differences of squares would leave the root of the rounding.
        left = basis - _dot(turn, new_basis, ((0,), (0,)))  # D = B - W^T B'
        rest = scaled - lift(new_basis, new)  # r
        pieces = _Residual(
            old,
            turn,
            _over_block(left, left, ndim),
            smallest,
            new,
            project(left, rest),
            jnp.sum(rest * rest, axis=tuple(range(ndim))),
        )
        missed = pieces.spectral(norm_steps) if residual_norm == 'spectral' else pieces.frobenius()

    new_residual = b2 * residual + missed * size
    shift = (new_residual + eps) / size
    new_root, diverged = inverse_root(smallest, *parts, shift, rounding)
    failed = left_out | diverged
    eye = jnp.eye(rank, dtype=old.dtype)
    new_coefficients = (projected - smallest[..., None, None] * eye) * size[..., None, None]
    new_root = new_root * lax.rsqrt(size)[..., None, None]
    failed = failed | ~jnp.all(jnp.isfinite(new_root), axis=(-2, -1))
    new_root = lax.cond(
        jnp.any(failed),
        lambda: jnp.where(failed[..., None, None], _turned(root, turn), new_root),
        lambda: new_root,
    )
    return new_basis, new_coefficients, new_residual, new_root, failed


def _iterate(
    basis: Basis,
    coefficients: jax.Array,
    grad: jax.Array,
    squares: jax.Array,
    coordinates: jax.Array,
    share: jax.Array,
    power_iterations: int,
    extra_rows: jax.Array | None,
) -> Basis:
    """The basis after some applications of A = sum share (B^T R B + g g^T)^2, and QR."""
    ndim, outputs = basis.ndim - 1, range(grad.ndim - basis.ndim + 1)
    behind = range(ndim, grad.ndim)  # the outputs' axes in the gradient
    weighted = share[..., None] * _matvec(coefficients, coordinates)
    over = (*outputs, len(outputs) + 1)
    second = _dot(share[..., None, None] * coefficients, coefficients, (over, over))

    def apply(rows: jax.Array) -> jax.Array:
        inside = _over_block(rows, basis, ndim)  # (q, k)
        along = coordinates if rows is basis else project(rows, grad)  # (*outputs, q)
        in_basis = _dot(inside, second, ((1,), (0,))) + _dot(along, weighted, (outputs, outputs))
        of_grads = _dot(weighted, inside, ((-1,), (1,))) + (share * squares)[..., None] * along
        return _dot(in_basis, basis, ((1,), (0,))) + _dot(of_grads, grad, (outputs, behind))

    rows = basis if extra_rows is None else jnp.concatenate([basis, extra_rows])
    for _ in range(power_iterations):
        moved = apply(rows)
        # Where A knows nothing of a row, it stays: QR would put a coordinate axis in its place,
        # which may be one along which no gradient ever has an entry.
        largest = jnp.max(jnp.sqrt(jnp.sum(moved * moved, axis=tuple(range(1, ndim + 1)))))
        unit = jnp.finfo(moved.dtype).eps * jnp.where(largest > 0, largest, 1)
        rows = orthonormal(moved + unit * rows)
    if extra_rows is not None:
        _, vectors = matrix_root.decompose(_over_block(apply(rows), rows, ndim))
        rows = _dot(vectors[:, -basis.shape[0] :], rows, ((0,), (0,)))
    # A basis that is not finite stays so. And what depends on the old basis entry by entry is
    # sharded as it is; the QR alone would leave a whole copy on each device.
    return jnp.where(jnp.isfinite(basis), rows, basis)


class _Residual:
    r"""The residual :math:`E_i = M_i - B'^T R'_i B'` in coordinates, never as a matrix.

    The columns of E are combinations of the rows of B', of D = B - W^T B', what the old basis has
    outside the new one, and of r_i, what the gradient has. A vector
    :math:`x = B'^T x_1 + D^T x_2 + r x_3` costs 2k + 1 numbers.

    Within B' the residual is :math:`\sigma I` by construction, so no difference of large numbers
    is taken there.
    """

    def __init__(
        self,
        coefficients: jax.Array,  # b2 R (*outputs, k, k)
        turn: jax.Array,  # W = B' B^T (k, k)
        gram: jax.Array,  # D D^T (k, k)
        smallest: jax.Array,  # sigma (*outputs)
        inside: jax.Array,  # B' g (*outputs, k)
        beside: jax.Array,  # D g = D r (*outputs, k)
        rest: jax.Array,  # |r|^2 (*outputs)
    ) -> None:
        self.coefficients, self.turn, self.gram = coefficients, turn, gram
        self.smallest, self.inside, self.beside, self.rest = smallest, inside, beside, rest

    def _norm(self, x1: jax.Array, x2: jax.Array, x3: jax.Array) -> jax.Array:
        squares = (
            jnp.sum(x1 * x1 + x2 * _dot(x2, self.gram, ((-1,), (0,))), axis=-1)
            + 2 * x3 * jnp.sum(self.beside * x2, axis=-1)
            + self.rest * x3 * x3
        )
        return jnp.sqrt(jnp.maximum(squares, 0))

    def _apply(
        self, x1: jax.Array, x2: jax.Array, x3: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        inner = _dot(x1, self.turn, ((-1,), (0,)))
        outer = _dot(x2, self.gram, ((-1,), (0,))) + self.beside * x3[..., None]
        both = matrix_root.product(
            '...ij,...jk->...ik', self.coefficients, jnp.stack([inner, outer], axis=-1)
        )
        along = jnp.sum(self.beside * x2, axis=-1) + self.rest * x3
        y1 = (
            self.smallest[..., None] * x1
            + _dot(both[..., 1], self.turn, ((-1,), (1,)))
            + self.inside * along[..., None]
        )
        return y1, both[..., 0] + both[..., 1], jnp.sum(self.inside * x1, axis=-1) + along

    def spectral(self, steps: int) -> jax.Array:
        """The spectral norms (\\*outputs) by power iteration, from below."""
        pattern = matrix_root.generic_unit_vector(self.inside.shape[-1], self.inside.dtype)
        # The gradient, which is most of what is new, and something of every row of the basis.
        x = (self.inside + pattern, jnp.zeros_like(self.inside), jnp.ones_like(self.rest))

        def step(_: int, state: tuple) -> tuple:
            x, _ = state
            y = self._apply(*x)
            norm = self._norm(*y)
            scale = 1 / jnp.where(norm > 0, norm, 1)
            return (y[0] * scale[..., None], y[1] * scale[..., None], y[2] * scale), norm

        _, norm = lax.fori_loop(0, steps, step, (x, jnp.zeros_like(self.rest)))
        return norm

    def frobenius(self) -> jax.Array:
        """The Frobenius norms (\\*outputs): upper bounds of the spectral norms."""
        half = _dot(self.coefficients, self.gram, ((-1,), (0,)))  # R N
        once = jnp.sum(half * self.coefficients, axis=(-2, -1))  # tr(R N R)
        twice = jnp.sum(half * jnp.swapaxes(half, -1, -2), axis=(-2, -1))  # tr(R N R N)
        moved = _matvec(self.coefficients, self.beside)  # R h
        within = self.smallest**2 * self.inside.shape[-1]
        across = (
            once
            - twice
            + 2 * jnp.sum(self.inside * _dot(moved, self.turn, ((-1,), (1,))), axis=-1)
            + self.rest * jnp.sum(self.inside**2, axis=-1)
        )
        outside = twice + 2 * jnp.sum(self.beside * moved, axis=-1) + self.rest**2
        return jnp.sqrt(within + 2 * jnp.maximum(across, 0) + jnp.maximum(outside, 0))


def apply(
    grad: jax.Array,
    basis: Basis,
    coefficients: jax.Array,
    residual: jax.Array,
    root: jax.Array,
    *,
    eps: jax.Array | float,
) -> jax.Array:
    r"""The preconditioned gradient, equation (6).

    .. math::
      u_i = B^T P_i B g_i + (\rho_i + \epsilon)^{-1/2} (g_i - B^T B g_i)

    Args:
      grad: g (\*block, \*outputs).
      basis: B (k, \*block).
      coefficients: R (\*outputs, k, k), for their size alone.
      residual: rho (\*outputs).
      root: P (\*outputs, k, k).
      eps: in units of squared gradients, >= 0.

    Returns:
      u (\*block, \*outputs); without unit. Zero where all statistics are.
    """
    coordinates = project(basis, grad)
    inside = _matvec(root, coordinates)
    if basis.shape[0] == basis[0].size:
        return lift(basis, inside)
    shift = residual + eps
    # What lies outside the basis carries the rounding of what lies inside.
    rounding = jnp.finfo(grad.dtype).eps * (matrix_root.trace(coefficients) + shift)
    outside = matrix_root.inverse_square_root(jnp.maximum(shift, rounding))
    return lift(basis, inside - outside[..., None] * coordinates) + outside * grad


def to_dense(basis: Basis, coefficients: jax.Array, residual: jax.Array) -> jax.Array:
    r"""The second moments :math:`B^T R_i B + \rho_i I` as matrices, for tests and plots.

    Args:
      basis: B (k, \*block).
      coefficients: R (\*outputs, k, k).
      residual: rho (\*outputs).

    Returns:
      (\*outputs, b, b), b being the size of the block.

    Example:
      >>> import jax.numpy as jnp
      >>> to_dense(jnp.array([[0.0, 1.0]]), jnp.full((1, 1, 1), 3.0), jnp.ones(1)).tolist()
      [[[1.0, 0.0], [0.0, 4.0]]]
    """
    rows = basis.reshape(basis.shape[0], -1)
    inside = _turned(coefficients, rows.T)
    return inside + residual[..., None, None] * jnp.eye(rows.shape[1], dtype=rows.dtype)
