"""How exact, and how fast, the inverse square roots are on which the shared basis rests.

python -m experiments.matrix_roots [--workdir=DIR]

All kernels in float32, all references dense in float64. The first tables compare the
eigendecomposition with the coupled Newton-Schulz iteration on batches of matrices: the root, the
smallest eigenvalue, and the time on this machine. The next compares
full-precision products with those of bfloat16 inputs and float32 sums, which TPUs take by
default; the CPU has no such mode, so the inputs are rounded. The last has the spectral norm of
the residual, which power iteration finds from below, and the Frobenius norm, which bounds it from
above, over the exact one. With --workdir, the numbers go to matrix_roots.json there, and the
tables to matrix_roots.md.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from experiments import accuracy, report, workdir
from experiments import main as main_lib
from precond_optax.kernels import matrix_root, shared_basis
from tests import oracles

# Sizes of the matrices, and how many of each.
BATCHES = {8: 400, 16: 200, 32: 100, 64: 40}
STEPS = (10, 15, 20, 25, 30)
# Condition numbers of full matrices; shifts of matrices of half the rank and norm 1.
CONDITIONS = (1e2, 1e4, 1e6)
SHIFTS = (1e-4, 1e-6)

BLOCK, OUTPUTS = 64, 32
EPS = 1e-4
PRODUCTS = ('full', 'bfloat16')
# The rank, the extra rows, and what the gradients are. In all but the last the shared basis is
# exact.
PRECISION_CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    'rank 64 of 64': (64, 0, {}),
    'rank 16, gradients in 8 directions': (16, 0, {'directions': 8}),
    'the same, 4 extra rows': (16, 4, {'directions': 8}),
    'rank 8, gradients of scale 1/j': (8, 0, {'decay': True}),
}
PRECISION_STEPS = 50

NORM_STEPS = (2, 4, 8, 16, 32)
NORM_TIMES = 30
NORM_RANK = 8
NORM_QUANTILES = {'smallest': 0.0, '5 % quantile': 0.05, 'median': 0.5, 'largest': 1.0}


def matrices(condition: float, shift: float, size: int, count: int) -> np.ndarray:
    """Random symmetric matrices of norm 1; half their eigenvalues are 0 where there is a shift."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(count, size, size)))[0]
    if shift:
        values = np.append(np.ones(1), rng.uniform(size=size - 1)) * (np.arange(size) < size // 2)
    else:
        values = np.geomspace(1, 1 / condition, size)
    found = (turn * values) @ np.swapaxes(turn, -1, -2)
    return ((found + np.swapaxes(found, -1, -2)) / 2).astype(np.float32)


@jax.jit
def _by_eigh(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    values, vectors = matrix_root.decompose(x)
    root = matrix_root.from_decomposition(values, vectors, shift)
    return root, values[:, 0] + shift, jnp.zeros(len(x))


@jax.jit
def _by_newton_schulz(
    x: jax.Array, shift: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    shifted = x + shift[:, None, None] * jnp.eye(x.shape[-1])
    _, root, error = matrix_root.newton_schulz(shifted, steps)
    power = matrix_root.EIGENVALUE_STEPS, matrix_root.SQUARINGS
    return root, matrix_root.largest_eigenvalue(root, *power) ** -2, error


def _methods() -> dict[str, Callable[..., tuple[jax.Array, jax.Array, jax.Array]]]:
    return {'eigh': _by_eigh} | {
        f'{steps} steps': functools.partial(_by_newton_schulz, steps=steps) for steps in STEPS
    }


def compare_roots() -> list[dict[str, Any]]:
    """For each kind of matrix, size and method: the errors, relative to the exact norms."""
    rows = []
    kinds = [(condition, 0.0) for condition in CONDITIONS] + [(0.0, shift) for shift in SHIFTS]
    for size, count in BATCHES.items():
        for condition, shift in kinds:
            x = matrices(condition, shift, size, count)
            shifts = np.full(count, shift, np.float32)
            exact = oracles.inverse_square_root(x, shifts)
            smallest = oracles.spectral_norm(exact) ** -2
            for method, compute in _methods().items():
                root, value, reported = (np.asarray(a, np.float64) for a in compute(x, shifts))
                errors = oracles.spectral_norm(root - exact) / oracles.spectral_norm(exact)
                value_errors = abs(value - smallest) / smallest
                rows.append(
                    {
                        'size': size,
                        'condition': condition,
                        'shift': shift,
                        'method': method,
                        'largest': errors.max(),
                        'median': np.median(errors),
                        'eigenvalue_largest': value_errors.max(),
                        'eigenvalue_median': np.median(value_errors),
                        'reported_largest': reported.max(),
                        'reported_smallest': reported.min(),
                    }
                )
    return rows


def time_roots(repeats: int = 3) -> list[dict[str, Any]]:
    """Milliseconds for a thousand matrices, the best of some batches."""
    rows = []
    for size, count in BATCHES.items():
        x = jnp.asarray(matrices(CONDITIONS[0], 0.0, size, count))
        shifts = jnp.zeros(count)
        for method, compute in _methods().items():
            jax.block_until_ready(compute(x, shifts))
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                jax.block_until_ready(compute(x, shifts))
                seconds.append(time.perf_counter() - start)
            rows.append({'size': size, 'method': method, 'ms': 1e6 * min(seconds) / count})
    return rows


def _rounded(x: jax.Array) -> jax.Array:
    """To bfloat16's digits; a cast and back XLA would leave out."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@contextlib.contextmanager
def products(kind: str) -> Iterator[None]:
    """Traces the kernels with inputs of products rounded to bfloat16, or as they are."""
    dot, product = shared_basis._dot, matrix_root.product
    with contextlib.ExitStack() as stack:
        if kind == 'bfloat16':
            for module, name, low in (
                (shared_basis, '_dot', lambda a, b, axes: dot(_rounded(a), _rounded(b), axes)),
                (matrix_root, 'product', lambda s, a, b: product(s, _rounded(a), _rounded(b))),
            ):
                stack.enter_context(mock.patch.object(module, name, low))
        yield


def random_gradients(count: int, directions: int = BLOCK, decay: bool = False) -> list[np.ndarray]:
    """Gradients of some blocks, of norm about 1, in some directions or with 1/j in the j-th."""
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(BLOCK, BLOCK)))[0]
    scale = 1 / np.arange(1, BLOCK + 1) if decay else (np.arange(BLOCK) < directions).astype(float)
    turn *= scale / np.linalg.norm(scale)
    return [(turn @ rng.normal(size=(BLOCK, OUTPUTS))).astype(np.float32) for _ in range(count)]


def start(rank: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Basis, coefficients, residual and root before the first gradient of (block, outputs)."""
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(shape[0], rank)))[0].T
    outputs = shape[1]
    square = jnp.zeros((outputs, rank, rank), dtype)
    return jnp.asarray(basis.astype(np.float32), dtype), square, jnp.zeros(outputs, dtype), square


def directions(
    grads: Sequence[np.ndarray], rank: int, extra: int, method: str, dtype: Any = jnp.float32
) -> tuple[list[np.ndarray], tuple[jax.Array, ...], int]:
    """The direction after each gradient, the state after all, and how many roots failed."""

    @jax.jit
    def step(rows: jax.Array | None, grad: jax.Array, *state: jax.Array) -> tuple[Any, ...]:
        *new, failed = shared_basis.refresh(
            grad, *state, b2=1.0, weight=1.0, eps=EPS, extra_rows=rows, method=method
        )
        return shared_basis.apply(grad, *new, eps=EPS), tuple(new), jnp.sum(failed)

    rng = np.random.default_rng(3)
    state, found, failures = start(rank, grads[0].shape, dtype), [], 0
    for grad in grads:
        rows = jnp.asarray(rng.normal(size=(extra, len(grad))), dtype) if extra else None
        direction, state, failed = step(rows, jnp.asarray(grad, dtype), *state)
        found.append(np.asarray(direction, np.float64))
        failures += int(failed)
    return found, state, failures


def compare_precisions() -> list[dict[str, Any]]:
    """For each case, method and kind of product: the direction's error, the basis, the residual.

    The reference is dense AdaGrad where the shared basis is exact, and the kernel in float64
    where it is not.
    """
    rows = []
    for case, (rank, extra, keywords) in PRECISION_CASES.items():
        grads = random_gradients(PRECISION_STEPS, **keywords)
        if keywords.get('decay'):
            with jax.enable_x64(True):
                exact = directions(grads, rank, extra, 'eigh', jnp.float64)[0]
        else:
            exact = [
                oracles.block_adagrad_direction(grads[:step], eps=EPS)
                for step in range(1, len(grads) + 1)
            ]
        for method in ('eigh', 'newton_schulz'):  # 'auto' is one of them
            for kind in PRODUCTS:
                with products(kind):
                    found, state, failures = directions(grads, rank, extra, method)
                errors = [
                    np.linalg.norm(u - v) / np.linalg.norm(v)
                    for u, v in zip(found, exact, strict=True)
                ]
                basis = np.asarray(state[0], np.float64)
                rows.append(
                    {
                        'case': case,
                        'method': method,
                        'products': kind,
                        'first': errors[0],
                        'last': errors[-1],
                        'largest': max(errors),
                        'orthonormality': abs(basis @ basis.T - np.eye(rank)).max(),
                        'residual': float(np.max(state[2])),
                        'failed': failures,
                    }
                )
    return rows


def norm_ratios(grads: Sequence[np.ndarray], b2: float) -> dict[str, np.ndarray]:
    """Of all blocks and steps: the residual's norm as the kernel finds it over the exact one."""

    @functools.partial(jax.jit, static_argnames='residual_norm')
    def refresh(grad: jax.Array, *state: jax.Array, norm_steps: Any, residual_norm: str) -> Any:
        return shared_basis.refresh(
            grad,
            *state,
            b2=b2,
            weight=1.0,
            eps=EPS,
            norm_steps=norm_steps,
            residual_norm=residual_norm,
        )

    ways = {f'spectral, {steps} steps': ('spectral', steps) for steps in NORM_STEPS}
    ways['frobenius'] = ('frobenius', 0)
    ratios: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    state = start(NORM_RANK, grads[0].shape)
    for grad in grads:
        g = np.asarray(grad, np.float64)
        moment = b2 * _inside(state) + np.einsum('am,bm->mab', g, g)
        # The residual before it counts for neither the basis nor the coefficients: without it,
        # what comes out is the norm.
        state = (*state[:2], jnp.zeros_like(state[2]), state[3])
        found = {
            way: refresh(grad, *state, norm_steps=steps, residual_norm=norm)
            for way, (norm, steps) in ways.items()
        }
        state = found['frobenius'][:4]
        exact = abs(np.linalg.eigvalsh(moment - _inside(state))).max(axis=-1)
        for way, new in found.items():
            ratios[way].append(np.asarray(new[2], np.float64) / exact)
    return {way: np.concatenate(values) for way, values in ratios.items()}


def _inside(state: Sequence[jax.Array]) -> np.ndarray:
    """B^T R B, dense."""
    basis, coefficients = (np.asarray(x, np.float64) for x in state[:2])
    return basis.T @ coefficients @ basis


def compare_norms() -> list[dict[str, Any]]:
    """For each kind of gradient and way to the norm: the quantiles of the ratios."""
    sources = {
        'random, scale 1/j': random_gradients(NORM_TIMES, decay=True),
        'digits autoencoder, code layer': accuracy.gradients(NORM_TIMES),
    }
    rows = []
    for source, grads in sources.items():
        for b2 in (1.0, 0.9):
            for way, ratios in norm_ratios(grads, b2).items():
                quantiles = np.quantile(ratios, list(NORM_QUANTILES.values())).tolist()
                rows.append(
                    {
                        'gradients': source,
                        'b2': b2,
                        'norm': way,
                        **dict(zip(NORM_QUANTILES, quantiles, strict=True)),
                    }
                )
    return rows


def _kind(row: dict[str, Any]) -> str:
    if row['shift']:
        return f'half the rank, shift {row["shift"]:.0e}'
    return f'condition {row["condition"]:.0e}'


def _by_method(
    rows: Sequence[dict[str, Any]],
    label: Callable[[dict[str, Any]], Sequence[str]],
    cell: Callable[[dict[str, Any]], str],
) -> list[list[str]]:
    """One line for all methods on the same matrices."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        lines.setdefault(tuple(label(row)), []).append(cell(row))
    return [[*key, *cells] for key, cells in lines.items()]


def render(
    roots: Sequence[dict[str, Any]],
    times: Sequence[dict[str, Any]],
    precisions: Sequence[dict[str, Any]],
    norms: Sequence[dict[str, Any]],
) -> str:
    """The tables."""
    columns = ['eigh', *(f'Newton-Schulz {steps}' for steps in STEPS)]

    def label(row: dict[str, Any]) -> list[str]:
        return [str(row['size']), _kind(row)]

    def text(row: dict[str, Any], *names: str, form: str = '.1e') -> list[str]:
        return [format(row[name], form) for name in names]

    def pair(*names: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: '{} ({})'.format(*text(row, *names))

    precision_columns = ['first', 'last', 'largest', 'orthonormality', 'residual']
    parts = [
        'Relative error of the inverse root in the spectral norm: largest (median)',
        report.markdown(
            ['k', 'matrices', *columns], _by_method(roots, label, pair('largest', 'median'))
        ),
        'Relative error of the smallest eigenvalue: largest (median)',
        report.markdown(
            ['k', 'matrices', *columns],
            _by_method(roots, label, pair('eigenvalue_largest', 'eigenvalue_median')),
        ),
        'What Newton-Schulz says of its error, |I - Y X| (Frobenius): largest (smallest)',
        report.markdown(
            ['k', 'matrices', *columns[1:]],
            _by_method(
                [row for row in roots if row['method'] != 'eigh'],
                label,
                pair('reported_largest', 'reported_smallest'),
            ),
        ),
        'Milliseconds for 1000 matrices',
        report.markdown(
            ['k', *columns],
            _by_method(times, lambda row: [str(row['size'])], lambda row: f'{row["ms"]:.1f}'),
        ),
        f'Shared basis, {OUTPUTS} blocks of {BLOCK}, {PRECISION_STEPS} gradients of norm about 1, '
        f'eps {EPS:g}: relative error of the direction (against dense AdaGrad; with scale 1/j '
        'against the same in float64), max |I - B B^T|, largest residual, how many roots failed',
        report.markdown(
            ['case', 'root', 'products', *precision_columns, 'failed'],
            [
                [
                    row['case'],
                    row['method'],
                    row['products'],
                    *text(row, *precision_columns),
                    str(row['failed']),
                ]
                for row in precisions
            ],
        ),
        f"The residual's norm over the exact spectral norm: rank {NORM_RANK}, all blocks of "
        f'{NORM_TIMES} gradients',
        report.markdown(
            ['gradients', 'b2', 'norm', *NORM_QUANTILES],
            [
                [
                    row['gradients'],
                    f'{row["b2"]:g}',
                    row['norm'],
                    *text(row, *NORM_QUANTILES, form='.3f'),
                ]
                for row in norms
            ],
        ),
    ]
    return '\n\n'.join(parts)


def main(argv: list[str]) -> None:
    """Measures all and prints the tables."""
    main_lib.refuse_arguments(argv)
    content = {
        'roots': compare_roots(),
        'times': time_roots(),
        'precisions': compare_precisions(),
        'norms': compare_norms(),
    }
    workdir.save_tables(flags.FLAGS.workdir, 'matrix_roots', content, render(**content))


if __name__ == '__main__':
    app.run(main)
