"""Error of SONew's direction against the dense float64 oracle, by band and dtype.

JAX_ENABLE_X64=1 python -m experiments.accuracy [--workdir=DIR]

The gradients are those of the digits autoencoder's code layer, a (64, 16) kernel, over
minibatches at its initial parameters. The oracle gets the very numbers that the transformation
gets, and drops edges at a tolerance of 1e-7, float32's default. No graft, so the sizes count as
well. With --workdir, the numbers go to accuracy.json there, and the tables to accuracy.md.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import precond_optax
from configs.tasks import digits
from experiments import main as main_lib
from experiments import report, tasks, workdir
from tests import oracles

BANDS = (1, 2, 4, 8)
# After one step H has rank one up to eps, after five rank five; then it is well filled.
STEPS = (1, 5, 30)
EPS = (1e-8, 1e-4)
# The gradients' dtype, and what is asked for beside it.
DTYPES: dict[str, tuple[str, dict[str, Any]]] = {
    'float64': ('float64', {}),
    'float32': ('float32', {}),
    'float32, relative_eps 1e-4': ('float32', {'relative_eps': 1e-4}),
    'bfloat16 gradients': ('bfloat16', {'mu_dtype': 'float32'}),
    'bfloat16 mean': ('float32', {'mu_dtype': 'bfloat16'}),
    'bfloat16 gradients and mean': ('bfloat16', {}),
    'bfloat16 statistics, stochastic': ('float32', {'stats_dtype': 'bfloat16'}),
    'bfloat16 statistics, nearest': (
        'float32',
        {'stats_dtype': 'bfloat16', 'stochastic_rounding': False},
    ),
}


def gradients(count: int) -> list[np.ndarray]:
    """Gradients of the layer before the code, one for each of some minibatches."""
    config = digits.get_config()
    task = tasks.make(config, None)
    params = task.init(jax.random.key(config.seed))
    layer = f'dense_{list(config.hidden).index(min(config.hidden))}'
    grad = jax.jit(jax.grad(task.loss))
    order = np.random.default_rng(0)
    found = []
    for _ in range(count):
        rows = order.choice(len(task.train_data), config.batch_size, replace=False)
        found.append(np.asarray(grad(params, task.train_data[rows])[layer]['kernel']))
    return found


def measure(grads: Sequence[np.ndarray], dtype: str, band: int, eps: float) -> dict[str, float]:
    """The relative error of the direction after the gradients, and the share of dropped edges."""
    kind, keywords = DTYPES[dtype]
    cast = [jnp.asarray(g).astype(kind) for g in grads]
    tx = precond_optax.scale_by_sonew(
        eps=eps, mean_eps=None, band=band, graft=None, diagnostics=True, **keywords
    )
    update, state = jax.jit(tx.update), tx.init(cast[0])
    for grad in cast:
        updates, state = update(grad, state)
    exact = oracles.sonew_direction(
        [np.asarray(g, np.float64) for g in cast],
        band=band,
        eps=eps,
        mean_eps=0.0,
        graft=None,
        relative_eps=keywords.get('relative_eps', 0.0),
    )
    error = np.asarray(updates, np.float64) - exact
    edges = sum(exact.size - k for k in range(1, band + 1))
    return {
        'error': float(np.linalg.norm(error) / np.linalg.norm(exact)),
        'dropped': float(state.dropped_edges[0]) / edges,
    }


def render(rows: Sequence[dict[str, Any]]) -> str:
    """One table for each eps: the error, and the share of edges dropped where there are any."""
    parts = []
    for eps in EPS:
        cells = []
        for dtype in DTYPES:
            for steps in STEPS:
                found = {
                    row['band']: row
                    for row in rows
                    if (row['dtype'], row['steps'], row['eps']) == (dtype, steps, eps)
                }
                cells.append([dtype, str(steps), *(_cell(found[band]) for band in BANDS)])
        header = ['dtype', 'steps', *(f'band {band}' for band in BANDS)]
        parts.append(f'eps {eps:g}\n\n' + report.markdown(header, cells))
    return '\n\n'.join(parts)


def _cell(row: dict[str, float]) -> str:
    dropped = f' ({100 * row["dropped"]:.1f} % dropped)' if row['dropped'] else ''
    return f'{row["error"]:.1e}{dropped}'


def main(argv: list[str]) -> None:
    """Measures all and prints the tables."""
    main_lib.refuse_arguments(argv)
    if not jax.config.read('jax_enable_x64'):
        raise app.UsageError('float64 is off: set JAX_ENABLE_X64=1')
    grads = gradients(max(STEPS))
    rows = [
        {'eps': eps, 'dtype': dtype, 'steps': steps, 'band': band}
        | measure(grads[:steps], dtype, band, eps)
        for eps in EPS
        for dtype in DTYPES
        for steps in STEPS
        for band in BANDS
    ]
    size = np.sqrt(np.mean(np.square(grads)))
    text = render(rows) + f'\n\nroot mean square of the gradients: {size:.2g}'
    content = {'rms': float(size), 'rows': rows}
    workdir.save_tables(flags.FLAGS.workdir, 'accuracy', content, text)


if __name__ == '__main__':
    app.run(main)
