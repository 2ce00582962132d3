"""Optimizer step time as a ratio to optax.adam; state and workspace in bytes per parameter.

python -m experiments.benchmark [--workdir=DIR] [--rounds=20] [--noin_turn]

Whole steps are timed (update and apply_updates, parameters and state donated), one of each
optimizer in turn, so that all see the same machine and none finds the caches as it left them;
with --noin_turn all steps of one optimizer follow each other. Medians are shown. With --workdir,
the times go to benchmark.json there, and the tables to benchmark.md.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import precond_optax
from configs.tasks import autoencoder as autoencoder_config
from experiments import main as main_lib
from experiments import report, workdir

_ROUNDS = flags.DEFINE_integer('rounds', 20, 'Timed steps of each optimizer.', lower_bound=1)
_IN_TURN = flags.DEFINE_boolean('in_turn', True, 'One step of each optimizer in turn.')

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    'adam': lambda: optax.adam(1e-3),
    'adafactor': lambda: optax.adafactor(1e-3),
    'sonew, diagonal': lambda: precond_optax.sonew(1e-3, band=0),
    'sonew, tridiagonal': lambda: precond_optax.sonew(1e-3),
    'sonew, tridiagonal, order C': lambda: precond_optax.sonew(1e-3, order='C'),
    'sonew, tridiagonal, no graft': lambda: precond_optax.sonew(1e-3, graft=None),
    'sonew, tridiagonal, bfloat16 state': lambda: precond_optax.sonew(
        1e-3, mu_dtype=jnp.bfloat16, stats_dtype=jnp.bfloat16
    ),
    'sonew, band 2': lambda: precond_optax.sonew(1e-3, band=2),
    'sonew, band 4': lambda: precond_optax.sonew(1e-3, band=4),
    'sonew, band 8': lambda: precond_optax.sonew(1e-3, band=8),
}


def autoencoder_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the MNIST autoencoder's parameters."""
    sizes = (784, *autoencoder_config.get_config().hidden, 784)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        shapes[f'dense_{i}/kernel'] = (inputs, outputs)
        shapes[f'dense_{i}/bias'] = (outputs,)
    return shapes


TREES: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    'one (4096, 4096) leaf': lambda: {'kernel': (4096, 4096)},
    "the autoencoder's tree": autoencoder_shapes,
}


def measure(
    shapes: dict[str, tuple[int, ...]], rounds: int, in_turn: bool = True
) -> list[dict[str, Any]]:
    """Times every optimizer on a tree, turn by turn.

    Args:
      shapes: of the leaves, all float32.
      rounds: timed steps of each optimizer.
      in_turn: one step of each in turn, or all steps of one and then of the next.

    Returns:
      For each optimizer its times in seconds, and bytes per parameter: of state, and of temporary
      memory, by the compiler's word.
    """
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    count = sum(g.size for g in grads.values())
    runs: dict[str, list[Any]] = {}
    for name, make in OPTIMIZERS.items():
        tx = make()

        def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.zeros_like, grads)
        state = tx.init(params)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
        memory: Any = compiled.memory_analysis()
        sizes = {
            'state_bytes_per_parameter': size / count,
            'temporary_bytes_per_parameter': memory.temp_size_in_bytes / count,
        }
        runs[name] = [compiled, *compiled(params, state, grads), [], sizes]

    def timed(run: list[Any]) -> float:
        compiled, params, state, *_ = run
        clock = time.perf_counter()
        run[1], run[2] = jax.block_until_ready(compiled(params, state, grads))
        return time.perf_counter() - clock

    turns, block = (rounds, 1) if in_turn else (1, rounds)
    for _ in range(turns):
        # Not counted: the gigabytes that the last one freed slow the next that needs memory.
        timed(runs['sonew, tridiagonal'])
        for run in (run for run in runs.values() for _ in range(block)):
            run[3].append(timed(run))
    return [
        {'optimizer': name, 'seconds': times, **sizes}
        for name, (_, _, _, times, sizes) in runs.items()
    ]


def render(results: dict[str, list[dict[str, Any]]]) -> str:
    """One table for each tree."""
    parts = []
    for tree, rows in results.items():
        adam = statistics.median(rows[0]['seconds'])
        cells = [
            [
                row['optimizer'],
                f'{1e3 * statistics.median(row["seconds"]):.2f}',
                f'{statistics.median(row["seconds"]) / adam:.2f}',
                f'{row["state_bytes_per_parameter"]:.2f}',
                f'{row["temporary_bytes_per_parameter"]:.1f}',
            ]
            for row in rows
        ]
        header = ['optimizer', 'ms per step', 'ratio to adam', 'state bytes', 'temporary bytes']
        parts.append(f'{tree}\n\n' + report.markdown(header, cells))
    return '\n\n'.join(parts)


def main(argv: list[str]) -> None:
    """Measures all trees and prints the tables."""
    main_lib.refuse_arguments(argv)
    results = {
        name: measure(shapes(), _ROUNDS.value, _IN_TURN.value) for name, shapes in TREES.items()
    }
    text = render(results)
    content = {'results': results}
    workdir.save_tables(flags.FLAGS.workdir, 'benchmark', content, text)


if __name__ == '__main__':
    app.run(main)
