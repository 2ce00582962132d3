"""Optimizer step time as a ratio to optax.adam; state and workspace in bytes per parameter.

python -m experiments.benchmark [--workdir=DIR] [--rounds=20] [--noin_turn] \\
    [--methods='^(ada|soaa|sonew)'] [--trees='leaf|autoencoder']

Whole steps are timed (update and apply_updates, parameters and state donated), one of each
optimizer in turn, so that all see the same machine and none finds the caches as it left them;
with --noin_turn all steps of one optimizer follow each other, in one turn. Each turn has new
gradients: from the same ones over and over, the shared basis' matrices would have rank one, and
their eigenproblems take less time. Medians are shown, and 99th percentiles: of fewer than 100
rounds, the slowest. With --workdir, the times go to benchmark.json there, and the tables to
benchmark.md.

--methods and --trees are regular expressions that are searched for in the names in OPTIMIZERS and
TREES; optax.adam is always measured. Methods with blocks, whose state is many times the large
leaf's, are left out unless asked for:

python -m experiments.benchmark --methods=shared --trees=autoencoder --rounds=100
python -m experiments.benchmark --methods=shared --trees=POS --rounds=20
python -m experiments.benchmark --methods=every --trees=POS --rounds=100
python -m experiments.benchmark --methods='mbag|block adam|soaa' --trees=autoencoder --rounds=100
python -m experiments.benchmark --methods='shampoo|sketchy' --trees=autoencoder --rounds=60

The shared basis' 'every 10' refreshes each leaf in one step out of ten, the leaves in turns: that
no step is a spike is told by the 99th percentile, of 100 rounds or more.
"""

import functools
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import precond_optax
from configs.tasks import autoencoder as autoencoder_config
from experiments import main as main_lib
from experiments import report, workdir

_ROUNDS = flags.DEFINE_integer('rounds', 20, 'Timed steps of each optimizer.', lower_bound=1)
_IN_TURN = flags.DEFINE_boolean('in_turn', True, 'One step of each optimizer in turn.')
_METHODS = flags.DEFINE_string('methods', '^(ada|soaa|sonew)', 'Which of OPTIMIZERS, beside adam.')
_TREES = flags.DEFINE_string('trees', 'leaf|autoencoder', 'Which of TREES.')

_UNCOUNTED = 'sonew, tridiagonal'  # its step begins each turn

# Of the POS tagger's leaves; the other trees have none that it matches.
LAYOUT = {
    'attention/(query|key|value)': precond_optax.LeafRule(merge_axes=((-2, -1),)),
    'embed': precond_optax.LeafRule(precondition=False),
}
_shared = functools.partial(precond_optax.shared_basis, 1e-3, layout=LAYOUT)

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
    'soaa': lambda: precond_optax.soaa(1e-3, total_steps=1000),
    'soaa, centered': lambda: precond_optax.soaa(1e-3, total_steps=1000, fisher='centered'),
    'mbag': lambda: precond_optax.mbag(1e-3),
    'mbag, EMA': lambda: precond_optax.mbag(1e-3, decay=0.99),
    'mbag, N': lambda: precond_optax.mbag(1e-3, root=False),
    'mbag, blocks of 16': lambda: precond_optax.mbag(1e-3, block_size=16),
    'mbag, bfloat16 matrices': lambda: precond_optax.mbag(1e-3, stats_dtype=jnp.bfloat16),
    'block adam, blocks of 16': lambda: precond_optax.block_adam(1e-3, block_size=16),
    'block adam, blocks of 16, every 10': lambda: precond_optax.block_adam(
        1e-3, block_size=16, root_every=10
    ),
    'shampoo, blocks of 250': lambda: precond_optax.shampoo(1e-3, block_size=250, layout=LAYOUT),
    'shampoo, blocks of 1000': lambda: precond_optax.shampoo(1e-3, block_size=1000, layout=LAYOUT),
    'sketchy, rank 256': lambda: precond_optax.sketchy(1e-3, layout=LAYOUT),
    'shared, rank 8': lambda: _shared(rank=8),
    'shared, rank 16': lambda: _shared(rank=16),
    'shared, rank 32': lambda: _shared(rank=32),
    'shared, rank 32, every 10': lambda: _shared(rank=32, update_every=10),
    'shared, rank 32, Newton-Schulz': lambda: _shared(rank=32, root='newton_schulz'),
    'shared, rank 32, Frobenius': lambda: _shared(rank=32, residual_norm='frobenius'),
    'shared, rank 64': lambda: _shared(rank=64),
}


def autoencoder_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the MNIST autoencoder's parameters."""
    sizes = (784, *autoencoder_config.get_config().hidden, 784)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        shapes[f'dense_{i}/kernel'] = (inputs, outputs)
        shapes[f'dense_{i}/bias'] = (outputs,)
    return shapes


def tagger_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the part-of-speech tagger's parameters, a Transformer encoder."""
    width, heads, hidden, words, tags = 512, 8, 2048, 12000, 1500
    head_dim = width // heads

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f'{name}/scale': (width,), f'{name}/bias': (width,)}

    shapes: dict[str, tuple[int, ...]] = {'embed/embedding': (words, width)}
    for layer in (f'layer_{i}' for i in range(6)):
        shapes |= norm(f'{layer}/attention_norm')
        for name in ('query', 'key', 'value'):
            shapes[f'{layer}/attention/{name}/kernel'] = (width, heads, head_dim)
        shapes[f'{layer}/attention/out/kernel'] = (heads, head_dim, width)
        shapes |= norm(f'{layer}/mlp_norm')
        shapes[f'{layer}/mlp/dense_0/kernel'] = (width, hidden)
        shapes[f'{layer}/mlp/dense_0/bias'] = (hidden,)
        shapes[f'{layer}/mlp/dense_1/kernel'] = (hidden, width)
        shapes[f'{layer}/mlp/dense_1/bias'] = (width,)
    return shapes | norm('norm') | {'output/kernel': (width, tags), 'output/bias': (tags,)}


TREES: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    'one (4096, 4096) leaf': lambda: {'kernel': (4096, 4096)},
    "the autoencoder's tree": autoencoder_shapes,
    "the POS tagger's tree": tagger_shapes,
}


def chosen(flag: str, pattern: str, names: Iterable[str]) -> list[str]:
    """The names in which a flag's regular expression is found.

    Raises:
      ValueError: if it is none, or there are no such names.
    """
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f'--{flag}={pattern!r} is no regular expression: {error}.') from error
    if not found:
        raise ValueError(f'--{flag}={pattern!r} is found in none of {list(names)}.')
    return found


def measure(
    shapes: Mapping[str, tuple[int, ...]],
    rounds: int,
    in_turn: bool = True,
    methods: Iterable[str] = tuple(OPTIMIZERS),
) -> list[dict[str, Any]]:
    """Times optimizers on a tree, turn by turn.

    Args:
      shapes: of the leaves, all float32.
      rounds: timed steps of each optimizer.
      in_turn: one step of each in turn, or all steps of one and then of the next.
      methods: their names; Adam is measured in any case, before them.

    Returns:
      For each optimizer its times in seconds, and bytes per parameter: of state, and of temporary
      memory, by the compiler's word.
    """

    @jax.jit
    def draw(turn: int) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), turn), len(shapes))
        pairs = zip(keys, shapes.items(), strict=True)
        return {name: jax.random.normal(key, shape) for key, (name, shape) in pairs}

    grads = draw(0)
    count = sum(math.prod(shape) for shape in shapes.values())

    def prepared(name: str) -> list[Any]:
        tx = optax.with_extra_args_support(OPTIMIZERS[name]())

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params, value=1.0)  # a loss, where taken
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
        return [compiled, *compiled(params, state, grads), [], sizes]

    def timed(run: list[Any]) -> float:
        compiled, params, state, *_ = run
        clock = time.perf_counter()
        run[1], run[2] = jax.block_until_ready(compiled(params, state, grads))
        return time.perf_counter() - clock

    runs = {name: prepared(name) for name in dict.fromkeys(('adam', *methods))}
    # Neither Adam, which would find its caches warm, nor one that does not do the same in each
    # step, of which the counted steps would be a choice.
    uncounted = runs[_UNCOUNTED] if _UNCOUNTED in runs else prepared(_UNCOUNTED)
    turns, block = (rounds, 1) if in_turn else (1, rounds)
    for turn in range(turns):
        grads = jax.block_until_ready(draw(turn + 1))
        # Not counted: the gigabytes that the last one freed slow the next that needs memory.
        timed(uncounted)
        for run in (run for run in runs.values() for _ in range(block)):
            run[3].append(timed(run))
    return [
        {'optimizer': name, 'seconds': times, **sizes}
        for name, (_, _, _, times, sizes) in runs.items()
    ]


def render(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """One table for each tree."""
    parts = []
    for tree, rows in results.items():
        adam = statistics.median(rows[0]['seconds'])
        adam_state = rows[0]['state_bytes_per_parameter']
        cells = [
            [
                row['optimizer'],
                f'{1e3 * statistics.median(row["seconds"]):.2f}',
                f'{1e3 * np.percentile(row["seconds"], 99, method="inverted_cdf"):.2f}',
                f'{statistics.median(row["seconds"]) / adam:.2f}',
                f'{row["state_bytes_per_parameter"]:.2f}',
                f'{row["temporary_bytes_per_parameter"]:.1f}',
                f'{row["state_bytes_per_parameter"] / adam_state:.2f}',
            ]
            for row in rows
        ]
        header = [
            'optimizer',
            'ms per step',
            'p99 ms',
            'ratio to adam',
            'state bytes',
            'temporary bytes',
            'state to adam',
        ]
        parts.append(f'{tree}\n\n' + report.markdown(header, cells))
    return '\n\n'.join(parts)


def main(argv: list[str]) -> None:
    """Measures the chosen trees and prints the tables."""
    main_lib.refuse_arguments(argv)
    with main_lib.clear_errors():
        methods = chosen('methods', _METHODS.value, OPTIMIZERS)
        trees = chosen('trees', _TREES.value, TREES)
    results = {
        tree: measure(TREES[tree](), _ROUNDS.value, _IN_TURN.value, methods) for tree in trees
    }
    text = render(results)
    content = {'results': results}
    workdir.save_tables(flags.FLAGS.workdir, 'benchmark', content, text)


if __name__ == '__main__':
    app.run(main)
