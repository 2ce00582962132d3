"""What float32 does to MBAG: the drift of its inverse over many steps, and the error of its roots.

python -m experiments.mini_blocks [--drift_steps=10000] [--workdir=DIR]

The first table compares two ways to keep the inverse H = (damping I + sum g g^T)^-1 of mini-blocks
of 32 entries: H by Sherman and Morrison's formula, made symmetric in each step, and the factor S
with H = S S^T that `scale_by_mbag` keeps. With G the exact second moment, in float64, G^(1/2) H
G^(1/2) is the identity: its extreme eigenvalues are shown. A negative one is an inverse that is
not definite, of which there is no root.

The second has the error of the roots after so many steps of Newton-Schulz: H^(1/2) from a factor
(`polar_root`), H^(1/2) and G^(-1/2) by the coupled iteration (`newton_schulz`), as a share of the
exact root along each eigenvector, the worst of them. With --workdir, the numbers go to
mini_blocks.json there, and the tables to mini_blocks.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import main as main_lib
from experiments import report, workdir
from precond_optax.kernels import matrix_root, mini_block

_STEPS = flags.DEFINE_integer('drift_steps', 10_000, 'Of the drift.', lower_bound=1)

SIZE, GROUPS, DAMPING = 32, 8, 0.01
# Standard deviations of the gradients along their principal axes: the largest and the smallest.
SPREADS = ((1.0, 1.0), (1.0, 1e-2), (1.0, 1e-4), (10.0, 1e-5))
CONDITIONS = (1e1, 1e2, 1e4, 1e6, 1e8)
ROOT_STEPS = (5, 7, 10, 15, 20, 30)


def printed(grad: jax.Array, inverse: jax.Array) -> jax.Array:
    """One step of H by equation (4) of MBAG, made symmetric."""
    h = mini_block.apply(inverse, grad)
    inverse -= mini_block.outer(h, h) / (1 + jnp.sum(grad * h, axis=-1, keepdims=True))
    square = mini_block.square(inverse)
    return ((square + jnp.swapaxes(square, -1, -2)) / 2).reshape(inverse.shape)


# How to take a step, what the damping's power is at the start, and H in float64 from what is kept.
FORMS: dict[str, tuple[Callable[..., jax.Array], float, Callable[[Any], Any]]] = {
    'printed formula': (printed, -1, lambda h: h),
    'factor': (mini_block.add_to_inverse, -0.5, lambda s: s @ np.swapaxes(s, -1, -2)),
}


@functools.partial(jax.jit, static_argnums=0)
def _run(update: Callable[..., jax.Array], held: jax.Array, grads: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda held, grad: (update(grad, held), None), held, grads)[0]


def drift(steps: int) -> list[dict[str, Any]]:
    """For each spread of the gradients and number of steps, the extreme eigenvalues of each."""
    rows = []
    counts = sorted({count for count in (100, 1_000) if count < steps} | {steps})
    for largest, smallest in SPREADS:
        rng = np.random.default_rng(0)
        turn = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
        axes = (turn * np.geomspace(largest, smallest, SIZE)).T
        grads = (rng.normal(size=(steps, GROUPS, SIZE)) @ axes).astype(np.float32)
        identity = jnp.broadcast_to(jnp.eye(SIZE).reshape(-1), (GROUPS, SIZE * SIZE))
        held = {name: identity * DAMPING**power for name, (_, power, _) in FORMS.items()}
        moment, done = DAMPING * np.eye(SIZE), 0
        for count in counts:
            part = grads[done:count].astype(np.float64)
            moment = moment + np.einsum('tgi,tgj->gij', part, part)
            row: dict[str, Any] = {
                'spread': [largest, smallest],
                'steps': count,
                'condition': float(np.linalg.cond(moment).max()),
            }
            half = np.linalg.cholesky(moment)
            for name, (update, _, inverse) in FORMS.items():
                held[name] = _run(update, held[name], grads[done:count])
                found = inverse(np.asarray(mini_block.square(held[name]), np.float64))
                relative = np.swapaxes(half, -1, -2) @ found @ half
                if np.all(np.isfinite(relative)):
                    values = np.linalg.eigvalsh((relative + np.swapaxes(relative, -1, -2)) / 2)
                    row[name] = [float(values.min()), float(values.max())]
                else:
                    row[name] = None
            rows.append(row)
            done = count
    return rows


ROOTS: dict[str, Callable[..., jax.Array]] = {
    'H^(1/2) from S': lambda h, s, steps: matrix_root.polar_root(s, steps)[0],
    'H^(1/2) from H': lambda h, s, steps: matrix_root.newton_schulz(h, steps)[0],
    'G^(-1/2) from G': lambda h, s, steps: matrix_root.newton_schulz(h, steps)[1],
}


def root_errors() -> list[dict[str, Any]]:
    """For each condition and number of steps, the worst relative error along an eigenvector."""
    rng = np.random.default_rng(0)
    turn, other = np.linalg.qr(rng.normal(size=(2, GROUPS, SIZE, SIZE)))[0]
    rows = []
    for condition in CONDITIONS:
        values = np.geomspace(1, 1 / condition, SIZE)
        matrix = ((turn * values) @ np.swapaxes(turn, -1, -2)).astype(np.float32)
        factor = ((turn * np.sqrt(values)) @ other).astype(np.float32)
        for steps in ROOT_STEPS:
            row: dict[str, Any] = {'condition': condition, 'steps': steps}
            for name, function in ROOTS.items():
                found = np.asarray(jax.jit(function, static_argnums=2)(matrix, factor, steps))
                along = np.einsum('gji,gjk,gki->gi', turn, found.astype(np.float64), turn)
                exact = values**-0.5 if name.startswith('G') else values**0.5
                row[name] = float(np.max(np.abs(along / exact - 1)))
            rows.append(row)
    return rows


def render(drift: list[dict[str, Any]], roots: list[dict[str, Any]]) -> str:
    """Both tables."""
    cells = [
        [
            ' to '.join(f'{x:g}' for x in row['spread']),
            f'{row["steps"]:,}',
            f'{row["condition"]:.1e}',
            *(
                'not finite' if row[n] is None else ' to '.join(f'{x:.3g}' for x in row[n])
                for n in FORMS
            ),
        ]
        for row in drift
    ]
    header = ['gradients', 'steps', 'condition of G', *(f'H by {name}' for name in FORMS)]
    errors = [
        [f'{row["condition"]:.0e}', str(row['steps']), *(f'{row[name]:.1e}' for name in ROOTS)]
        for row in roots
    ]
    return '\n\n'.join(
        [
            f'Eigenvalues of G^(1/2) H G^(1/2), exactly 1 to 1: {GROUPS} blocks of {SIZE}, '
            f'damping {DAMPING}, float32; gradients: their standard deviations along principal '
            'axes',
            report.markdown(header, cells),
            'Worst error of the root along an eigenvector, as a share of the exact one, float32',
            report.markdown(['condition', 'Newton-Schulz steps', *ROOTS], errors),
        ]
    )


def main(argv: list[str]) -> None:
    """Measures both and prints the tables."""
    main_lib.refuse_arguments(argv)
    content = {'drift': drift(_STEPS.value), 'roots': root_errors()}
    workdir.save_tables(flags.FLAGS.workdir, 'mini_blocks', content, render(**content))


if __name__ == '__main__':
    app.run(main)
