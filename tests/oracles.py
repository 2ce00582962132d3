"""Dense float64 NumPy forms of everything that the package computes.

Nothing of the package is imported here, and the forms are other ones than the kernels': the
inverse with a banded pattern is put together from inverses of dense blocks, not from factors.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def line(x: np.ndarray, order: str) -> np.ndarray:
    """The entries of one leaf along its chain."""
    return np.asarray(x, np.float64).ravel(order=order)


def band_of(matrix: np.ndarray, band: int) -> np.ndarray:
    """The matrix with zeros outside ``band`` diagonals on either side."""
    i, j = np.indices(matrix.shape)
    return np.where(abs(i - j) <= band, matrix, 0)


def banded_inverse(h: np.ndarray, band: int) -> np.ndarray:
    """The positive definite X, zero outside the band, with band(inv(X)) = band(h).

    By the clique formula of decomposable models: the inverses of h on the cliques
    {j..j+band}, less those on what neighbouring cliques share.
    """
    n = len(h)
    x = np.zeros((n, n))
    last = max(n - band, 1)
    for j in range(last):
        clique = slice(j, min(j + band + 1, n))
        x[clique, clique] += np.linalg.inv(h[clique, clique])
        if j + 1 < last and band:
            shared = slice(j + 1, j + band + 1)
            x[shared, shared] -= np.linalg.inv(h[shared, shared])
    return x


def damped(h: np.ndarray, eps: float, relative_eps: float = 0.0) -> np.ndarray:
    """H plus eps and a share of its largest absolute row sum on the diagonal."""
    return h + np.eye(len(h)) * (eps + relative_eps * np.abs(h).sum(axis=1).max(initial=0))


def banded_inverse_with_drops(h: np.ndarray, band: int, tolerance: float) -> np.ndarray:
    """X column by column, with the edges dropped that the tolerance asks for.

    For each entry, those of the next ``band`` entries that the ones before them do not determine
    take part, as Schur complements tell; then the entry's own Schur complement decides whether
    it has any edges.
    """
    n = len(h)
    x = np.zeros((n, n))
    for j in range(n):
        used: list[int] = []
        for i in range(j + 1, min(j + band + 1, n)):
            if schur_complement(h, i, used) > tolerance * h[i, i]:
                used.append(i)
        if schur_complement(h, j, used) <= tolerance * h[j, j]:
            used = []
        column = np.zeros(n)
        column[j] = 1
        column[used] = -np.linalg.solve(h[np.ix_(used, used)], h[used, j])
        x += np.outer(column, column) / schur_complement(h, j, used)
    return x


def schur_complement(h: np.ndarray, i: int, given: list[int]) -> float:
    """What is left of h[i, i] once the entries ``given`` are known."""
    rest = np.linalg.solve(h[np.ix_(given, given)], h[given, i])
    return h[i, i] - h[i, given] @ rest


def moments(
    grads: Sequence[np.ndarray], b1: float, b2: float, order: str = 'F'
) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected means of g and of g g^T along the chain."""
    n = np.asarray(grads[0]).size
    mean, second = np.zeros(n), np.zeros((n, n))
    for grad in grads:
        g = line(grad, order)
        mean = b1 * mean + (1 - b1) * g
        second = b2 * second + (1 - b2) * np.outer(g, g)
    t = len(grads)
    return mean / (1 - b1**t), second / (1 - b2**t)


def adam_direction(grads: Sequence[np.ndarray], b1: float, b2: float) -> np.ndarray:
    """Adam's direction after the gradients."""
    mean, second = moments(grads, b1, b2)
    direction = mean / (np.sqrt(np.diag(second)) + 1e-8)
    return direction.reshape(np.shape(grads[0]), order='F')


def normalized_rms_direction(grads: Sequence[np.ndarray], b2: float) -> np.ndarray:
    """RMSProp on normalized gradients, without bias correction."""
    s = np.zeros(np.shape(grads[0]))
    for grad in grads:
        unit = np.asarray(grad, np.float64) / (np.linalg.norm(grad) + 1e-25)
        s = b2 * s + (1 - b2) * unit**2
    return unit / (np.sqrt(s) + 1e-10)


def sonew_direction(
    grads: Sequence[np.ndarray],
    *,
    b1: float = 0.9,
    b2: float = 0.9,
    eps: float = 1e-16,
    mean_eps: float = 0.1,
    band: int = 1,
    order: str = 'F',
    edge_tolerance: float = 1e-7,
    relative_eps: float = 0.0,
    graft: str | Callable[[Sequence[np.ndarray]], np.ndarray] | None = 'adam',
    nesterov: bool = False,
) -> np.ndarray:
    """SONew's direction after the gradients of one leaf (no batch axes)."""
    mean, second = moments(grads, b1, b2, order)
    if nesterov:
        t, grad = len(grads), line(grads[-1], order)
        mean = b1 * mean * (1 - b1**t) / (1 - b1 ** (t + 1)) + (1 - b1) / (1 - b1**t) * grad
    eps = eps + mean_eps * np.mean(np.diag(second))
    h = damped(band_of(second, band), eps, relative_eps)
    u = (banded_inverse_with_drops(h, band, edge_tolerance) @ mean).reshape(
        np.shape(grads[0]), order=order
    )
    if graft is None:
        return u
    w = {
        'adam': lambda: mean / (np.sqrt(np.diag(second)) + 1e-8),
        'momentum': lambda: mean,
        'sgd': lambda: grads[-1],
        'rmsprop_normalized': lambda: normalized_rms_direction(grads, b2),
    }.get(graft, graft)()
    return u * np.linalg.norm(w) / np.linalg.norm(u) if u.any() else u


def blocks(x: np.ndarray, output_axes: Sequence[int]) -> np.ndarray:
    """A leaf as (b, m): the entries of one output in each column."""
    x = np.asarray(x, np.float64)
    outputs = [axis % x.ndim for axis in output_axes]
    block = [axis for axis in range(x.ndim) if axis not in outputs]
    return x.transpose(*block, *outputs).reshape(math.prod(x.shape[a] for a in block), -1)


def block_adagrad_direction(
    grads: Sequence[np.ndarray], *, b2: float = 1.0, eps: float = 1e-8
) -> np.ndarray:
    """(sum g g^T + eps I)^(-1/2) g for each column of gradients (b, m); b2 < 1: the mean."""
    weight = 1 - b2 if b2 < 1 else 1.0
    second = np.zeros((grads[0].shape[1], *(grads[0].shape[0],) * 2))
    for grad in grads:
        columns = np.asarray(grad, np.float64).T
        second = b2 * second + weight * columns[:, :, None] * columns[:, None, :]
    return np.einsum('iab,ib->ai', inverse_square_root(second, eps), columns)


def shared_basis_step(
    grad: np.ndarray,
    basis: np.ndarray,
    coefficients: np.ndarray,
    residual: np.ndarray,
    *,
    b2: float = 1.0,
    power_iterations: int = 1,
    norm: int | str = 2,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of Algorithm 1, all matrices formed: g (b, m), B (b, k), R (m, k, k), rho (m)."""
    weight = 1 - b2 if b2 < 1 else 1.0
    columns = np.asarray(grad, np.float64).T
    moments = b2 * (basis @ coefficients @ basis.T)
    moments += weight * columns[:, :, None] * columns[:, None, :]
    for _ in range(power_iterations):
        basis, _ = np.linalg.qr(np.einsum('iab,icb,ck->ak', moments, moments, basis))
    coefficients = basis.T @ moments @ basis
    smallest = np.linalg.eigvalsh(coefficients)[:, :1, None].clip(min=0)
    coefficients = coefficients - smallest * np.eye(basis.shape[1])
    missed = np.linalg.norm(moments - basis @ coefficients @ basis.T, norm, axis=(1, 2))
    return basis, coefficients, b2 * residual + missed


def shared_basis_direction(
    grads: Sequence[np.ndarray], basis: np.ndarray, *, eps: float = 1e-8, **keywords: Any
) -> np.ndarray:
    """Algorithm 1's direction after the gradients (b, m), from a starting basis (b, k)."""
    rank, outputs = basis.shape[1], grads[0].shape[1]
    state = basis, np.zeros((outputs, rank, rank)), np.zeros(outputs)
    for grad in grads:
        state = shared_basis_step(grad, *state, **keywords)
    basis, coefficients, residual = state
    roots = inverse_square_root(basis @ coefficients @ basis.T, residual + eps)
    return np.einsum('iab,bi->ai', roots, np.asarray(grads[-1], np.float64))


def inverse_square_root(matrices: np.ndarray, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """(R + s I)^(-1/2) of positive definite R + s I (..., k, k), by the singular values."""
    matrices = np.asarray(matrices, np.float64)
    eye = np.eye(matrices.shape[-1])
    left, values, _ = np.linalg.svd(
        matrices + np.asarray(shift, np.float64)[..., None, None] * eye
    )
    return (left / np.sqrt(values)[..., None, :]) @ np.swapaxes(left, -1, -2)


def spectral_norm(matrices: np.ndarray) -> np.ndarray:
    """The largest singular values (...) of matrices (..., k, k)."""
    return np.linalg.norm(np.asarray(matrices, np.float64), 2, axis=(-2, -1))


def chain_groups(shape: Sequence[int], block_size: int, order: str = 'F') -> list[np.ndarray]:
    """The entries of each group of a chain, as indices into the raveled leaf."""
    chain = np.arange(math.prod(shape)).reshape(shape).ravel(order=order)
    return [chain[i : i + block_size] for i in range(0, len(chain), block_size)]


def output_groups(
    shape: Sequence[int], block_size: int, output_axes: Sequence[int] = (-1,)
) -> list[np.ndarray]:
    """Likewise, of each output's inputs by themselves, the first input axis running fastest."""
    index = np.arange(math.prod(shape)).reshape(shape)
    outputs = [axis % len(shape) for axis in output_axes]
    inputs = [axis for axis in range(len(shape)) if axis not in outputs]
    lines = index.transpose(*outputs, *inputs[::-1])
    lines = lines.reshape(math.prod(shape[axis] for axis in outputs), -1)
    starts = range(0, lines.shape[1], block_size)
    return [line[i : i + block_size] for line in lines for i in starts]


def newton_schulz_roots(matrix: np.ndarray, steps: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The root and the inverse root after so many steps, or the exact ones: on the eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    norm = np.linalg.norm(matrix)
    x, y = values / norm, np.ones(len(values))
    for _ in range(steps or 0):
        change = (3 - y * x) / 2
        x, y = x * change, y * change
    if steps is None:
        x, y = np.sqrt(values / norm), np.sqrt(norm / values)
    return (vectors * x * np.sqrt(norm)) @ vectors.T, (vectors * y / np.sqrt(norm)) @ vectors.T


def mbag_direction(
    grads: Sequence[np.ndarray],
    groups: Sequence[np.ndarray],
    *,
    momentum: float = 0.9,
    damping: float = 0.01,
    decay: float | None = None,
    root: bool = True,
    root_every: int = 1,
    steps: int | None = None,
    size: int | None = None,
) -> np.ndarray:
    """MBAG's sum of directions after the gradients of one leaf; ``size``: filled up to that."""
    result = np.zeros(np.size(grads[0]))
    for group in groups:
        n = max(len(group), size or 0)
        moment, sums = damping * np.eye(n), np.zeros(n)
        for t, grad in enumerate(grads):
            g = np.zeros(n)
            g[: len(group)] = np.asarray(grad, np.float64).ravel()[group]
            outer = np.outer(g, g)
            moment = moment + outer if decay is None else decay * moment + (1 - decay) * outer
            if t % root_every == 0:
                if decay is None:
                    matrix, _ = newton_schulz_roots(np.linalg.inv(moment), steps)
                else:
                    _, matrix = newton_schulz_roots(moment, steps)
            if root:
                direction = matrix @ g
            else:
                direction = np.linalg.solve(moment, g) if decay is None else matrix @ matrix @ g
            sums = momentum * sums + direction
        result[group] = sums[: len(group)]
    return result.reshape(np.shape(grads[0]))


def block_adam_direction(
    grads: Sequence[np.ndarray],
    groups: Sequence[np.ndarray],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    root_every: int = 1,
) -> np.ndarray:
    """(G_hat + eps I)^(-1/2) m_hat by groups, with G_hat of the last step that took roots."""
    last = (len(grads) - 1) // root_every * root_every + 1
    result = np.zeros(np.size(grads[0]))
    for group in groups:
        own = [np.asarray(grad, np.float64).ravel()[group] for grad in grads]
        mean, _ = moments(own, b1, b2)
        _, second = moments(own[:last], b1, b2)
        result[group] = inverse_square_root(second, eps) @ mean
    return result.reshape(np.shape(grads[0]))


def soaa_updates(
    grads: Sequence[Mapping[str, np.ndarray]],
    losses: Sequence[float | None],
    *,
    total_steps: float,
    b1: float = 0.9,
    b2: float = 0.999,
    gamma: float = 0.25,
    eps: float = 1e-8,
    fisher: str = 'uncentered',
    learning_rate: Callable[[int], float] = lambda taken: 1.0,
) -> tuple[list[dict[str, np.ndarray]], list[tuple[float, float, float]]]:
    """SOAA's directions on a whole tree, and (dt, pr, l_avg) after each step.

    A loss that is None was not given; the learning rate is a function of the steps taken before.
    """
    names = sorted(grads[0])
    shapes = [np.shape(grads[0][name]) for name in names]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    m = s = c = last_m_hat = np.zeros(ends[-1])
    dt, pr, l_avg = 1.0, 0.0, 0.0
    updates, scalars = [], []
    for t, (tree, loss) in enumerate(zip(grads, losses, strict=True), start=1):
        g = np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in names])
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * g**2
        c = b2 * c + (1 - b2) * (g - last_m_hat) ** 2
        m_hat, s_hat = m / (1 - b1**t), s / (1 - b2**t)
        v_hat = {'uncentered': s_hat, 'centered': c / (1 - b2**t)}[fisher]
        f = (1 + np.sum(m_hat**2) / np.sum(v_hat + eps)) * v_hat
        u = m_hat * dt / (np.maximum(dt * f, np.sqrt(s_hat)) + eps)
        if loss is not None:
            l_avg = b1 * l_avg + (1 - b1) * loss
            gained = l_avg / (1 - b1**t) - loss
            done = (t - 1) / total_steps
            dt = min(max(gained / max(pr, eps) * dt, (1 - gamma) ** done), 1 + gamma**done)
            pr = learning_rate(t - 1) * np.sum(m_hat * u - v_hat * u**2 / 2)
        parts = zip(names, np.split(u, ends[:-1]), shapes, strict=True)
        updates.append({name: part.reshape(shape) for name, part, shape in parts})
        scalars.append((dt, pr, l_avg))
        last_m_hat = m_hat
    return updates, scalars


def axis_blocks(shape: Sequence[int], block_size: int) -> list[tuple[slice, ...]]:
    """The blocks of at most ``block_size`` along each axis, the last ones shorter."""
    cuts = [[slice(i, i + block_size) for i in range(0, size, block_size)] for size in shape]
    return list(itertools.product(*cuts))


def unfolded(x: np.ndarray, axis: int) -> np.ndarray:
    """One axis in the rows, all others in the columns."""
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def along_axis(matrix: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """The matrix times x along one axis."""
    return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)


def relative_inverse_root(
    matrix: np.ndarray, p: float, eps: float, shift: float = 0
) -> np.ndarray:
    """(A + s I + eps lambda_max(A + s I) I)^(-1/p), exactly; zero where that is zero."""
    values, vectors = np.linalg.eigh(matrix)
    raised = values.clip(min=0) + shift
    raised = raised + eps * raised.max()
    powers = np.where(raised > 0, raised, 1) ** (-1 / p) * (raised > 0)
    return (vectors * powers) @ vectors.T


def kronecker_direction(
    grads: Sequence[np.ndarray],
    *,
    block_size: int,
    rank: int | None = None,
    b2: float = 0.99,
    eps: float = 1e-6,
    update_every: int = 1,
    taken: Sequence[int] | None = None,
) -> np.ndarray:
    """Shampoo's direction after the gradients of one leaf; Sketchy's if there is a rank.

    Shampoo's statistics take all gradients and its roots are those of the last step that took
    them; a sketch takes the gradients of those steps alone, or those whose numbers are given.
    """
    grads = [np.asarray(grad, np.float64) for grad in grads]
    weight = 1 - b2 if b2 < 1 else 1.0
    ndim, result = grads[0].ndim, np.zeros(grads[0].shape)
    last = (len(grads) - 1) // update_every * update_every + 1
    seen = grads[:last] if rank is None else grads[:last:update_every]
    seen = seen if taken is None else [grads[i] for i in taken]
    held = 1 - b2 ** len(seen) if b2 < 1 else 1.0
    for block in axis_blocks(grads[0].shape, block_size):
        direction = grads[-1][block]
        for axis in range(ndim):
            size = direction.shape[axis]
            matrix, escaped = np.zeros((size, size)), 0.0
            for grad in seen:
                rows = unfolded(grad[block], axis)
                matrix = b2 * matrix + weight * rows @ rows.T
                if rank is not None:
                    matrix, cut = frequent_directions(matrix, rank)
                    escaped = b2 * escaped + cut
            root = relative_inverse_root(matrix / held, 2 * ndim, eps, escaped / held)
            direction = along_axis(root, direction, axis)
        result[block] = direction
    return result


def frequent_directions(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The best matrix of that rank, less the largest eigenvalue left out, and that eigenvalue."""
    values, vectors = np.linalg.eigh(matrix)
    cut = max(values[-rank - 1], 0.0) if rank < len(values) else 0.0
    kept = (values[-rank:] - cut).clip(min=0)
    return (vectors[:, -rank:] * kept) @ vectors[:, -rank:].T, cut
