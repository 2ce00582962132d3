"""What an optimizer step costs: time as a ratio to optax.adam, memory traffic, state, workspace.

python -m experiments.step_cost [--workdir=DIR] [--rounds=20] [--noin_turn] [--backend=gpu] \\
    [--optimizers='^(ada|muon|soaa|sonew)'] [--tree='leaf4096|autoencoder']
JAX_PLATFORMS=cpu python -m experiments.step_cost --compile_for=v5e:2x2|h200 [...]

Whole steps are timed (update and apply_updates, parameters and state donated), one of each
optimizer in turn, so that all see the same machine and none finds the caches as it left them;
with --noin_turn all steps of one optimizer follow each other, in one turn. Each turn has an order
of its own, drawn from a seed: what the one before left behind falls on no optimizer more than on
others. And it has new gradients: from the same ones over and over, the shared basis' matrices
would have rank one, and their eigenproblems take less time. Medians are shown, the 10th and 90th
percentiles, and the 99th: of fewer than 100 rounds, the slowest.

A step at least reads parameters, gradients and state, and writes parameters and state. The time
that this takes at the speed of a copy, measured in the same turns, is shown as a share of the
step's: 1 would be a step as fast as memory allows. More than 1 is a tree that caches hold.

With --compile_for nothing runs: the compiler says what a TPU's or a GPU's memory reads and writes
in a step. That needs libtpu or jax's CUDA plugin, but no TPU and no GPU, and is the same on every
machine. Rows of SONew's fused kernels are offered so, and on TPUs and GPUs.

With --workdir, the numbers go to step_cost.json there, and the tables to step_cost.md.

--optimizers and --tree are regular expressions that are searched for in the names in OPTIMIZERS
and TREES; optax.adam is always there. Methods with blocks, whose state is many times the large
leaf's, are left out unless asked for; lm_1b, a language model of 1.1 billion parameters, is for
compilers and large devices:

python -m experiments.step_cost --optimizers=shared --tree=autoencoder --rounds=100
python -m experiments.step_cost --optimizers=shared --tree='pos_tagging$' --rounds=20
python -m experiments.step_cost --optimizers='mbag|block adam|soaa' --tree=autoencoder --rounds=100
python -m experiments.step_cost --optimizers='shampoo|sketchy' --tree=autoencoder --rounds=60
JAX_PLATFORMS=cpu python -m experiments.step_cost --tree=lm_1b --compile_for=v5p:2x2x1

The shared basis' 'every 10' refreshes each leaf in one step out of ten, the leaves in turns: that
no step is a spike is told by the 99th percentile, of 100 rounds or more.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

import precond_optax
from configs.tasks import autoencoder as autoencoder_config
from experiments import gpu_compile, optimizers, report, tpu_compile, workdir
from experiments import main as main_lib
from experiments.tasks import pos_tagging
from experiments.tasks.pos_tagging import model as tagger

_ROUNDS = flags.DEFINE_integer('rounds', 20, 'Timed steps of each optimizer.', lower_bound=1)
_IN_TURN = flags.DEFINE_boolean('in_turn', True, 'One step of each optimizer in turn.')
_OPTIMIZERS = flags.DEFINE_string(
    'optimizers', '^(ada|muon|soaa|sonew)', 'Which of OPTIMIZERS, beside adam.'
)
_TREES = flags.DEFINE_string('tree', 'leaf4096|autoencoder', 'Which of TREES.')
_BACKEND = flags.DEFINE_string('backend', None, 'The platform, such as gpu; None: the default.')
_TOPOLOGY = flags.DEFINE_string(
    'compile_for',
    None,
    'A TPU topology, such as v5e:2x2, for one chip of which all is compiled; or a GPU: h200.',
)

# Rows of the embedding and outputs, of the data that the configs name.
_TAGGERS = {'pos_tagging': (35_858, 835), 'pos_tagging_small': (3_355, 15)}
_UNCOUNTED = 'sonew, tridiagonal'  # its step begins each turn
_COPIED = 2**26  # numbers, 256 MB: more than caches hold

Layout = Mapping[str, precond_optax.LeafRule] | None


def _ours(
    factory: Callable[..., optax.GradientTransformation], **keywords: Any
) -> Callable[[Layout], optax.GradientTransformation]:
    return lambda layout: factory(1e-3, layout=layout, **keywords)


def _muon(layout: Layout) -> optax.GradientTransformation:
    dimensions = functools.partial(optimizers.matrices, layout=layout) if layout else None
    return optax.contrib.muon(1e-3, muon_weight_dimension_numbers=dimensions)


# Without the mean, which is another pass that reads; its own row tells what that costs.
_sonew = functools.partial(_ours, precond_optax.sonew, mean_eps=None)
_shared = functools.partial(_ours, precond_optax.shared_basis)
_mbag = functools.partial(_ours, precond_optax.mbag, impl='xla')
_block_adam = functools.partial(_ours, precond_optax.block_adam, block_size=16, impl='xla')
_shampoo = functools.partial(_ours, precond_optax.shampoo)

# From a tree's layout.
OPTIMIZERS: dict[str, Callable[[Layout], optax.GradientTransformation]] = {
    'adam': lambda layout: optax.adam(1e-3),
    'adafactor': lambda layout: optax.adafactor(1e-3),
    'muon': _muon,
    'sonew, diagonal': _sonew(band=0, impl='xla'),
    'sonew, tridiagonal': _sonew(impl='xla'),
    'sonew, tridiagonal, mean_eps': _sonew(mean_eps=0.1, impl='xla'),
    'sonew, tridiagonal, order C': _sonew(order='C', impl='xla'),
    'sonew, tridiagonal, no graft': _sonew(graft=None, impl='xla'),
    'sonew, tridiagonal, delayed graft': _sonew(delayed_graft=True, impl='xla'),
    'sonew, tridiagonal, bfloat16 state': _sonew(
        mu_dtype=jnp.bfloat16, stats_dtype=jnp.bfloat16, impl='xla'
    ),
    'sonew, band 2': _sonew(band=2, impl='xla'),
    'sonew, band 4': _sonew(band=4, impl='xla'),
    'sonew, band 8': _sonew(band=8, impl='xla'),
    'soaa': lambda layout: precond_optax.soaa(1e-3, total_steps=1000),
    'soaa, centered': lambda layout: precond_optax.soaa(1e-3, total_steps=1000, fisher='centered'),
    'mbag': _mbag(),
    'mbag, EMA': _mbag(decay=0.99),
    'mbag, N': _mbag(root=False),
    'mbag, blocks of 16': _mbag(block_size=16),
    'mbag, bfloat16 matrices': _mbag(stats_dtype=jnp.bfloat16),
    'block adam, blocks of 16': _block_adam(),
    'block adam, blocks of 16, every 10': _block_adam(root_every=10),
    'shampoo, blocks of 250': _shampoo(block_size=250),
    'shampoo, blocks of 1000': _shampoo(block_size=1000),
    'sketchy, rank 256': _ours(precond_optax.sketchy),
    'shared, rank 8': _shared(rank=8),
    'shared, rank 16': _shared(rank=16),
    'shared, rank 32': _shared(rank=32),
    'shared, rank 32, every 10': _shared(rank=32, update_every=10),
    'shared, rank 32, Newton-Schulz': _shared(rank=32, root='newton_schulz'),
    'shared, rank 32, Frobenius': _shared(rank=32, residual_norm='frobenius'),
    'shared, rank 64': _shared(rank=64),
}
# Of the fused kernels, which other machines than TPUs and GPUs interpret.
IN_ONE_PASS: dict[str, Callable[[Layout], optax.GradientTransformation]] = {
    'sonew, diagonal, one pass': _sonew(band=0, impl='pallas'),
    'sonew, tridiagonal, one pass': _sonew(impl='pallas'),
    'sonew, tridiagonal, mean_eps, one pass': _sonew(mean_eps=0.1, impl='pallas'),
    'sonew, tridiagonal, no graft, one pass': _sonew(graft=None, impl='pallas'),
    'sonew, tridiagonal, delayed graft, one pass': _sonew(delayed_graft=True, impl='pallas'),
    'sonew, band 2, one pass': _sonew(band=2, impl='pallas'),
    'sonew, band 4, one pass': _sonew(band=4, impl='pallas'),
    'sonew, band 8, one pass': _sonew(band=8, impl='pallas'),
    'sonew, tridiagonal, bfloat16 state, one pass': _sonew(
        mu_dtype=jnp.bfloat16, stats_dtype=jnp.bfloat16, impl='pallas'
    ),
    'sonew, tridiagonal, bfloat16 state, delayed graft, one pass': _sonew(
        mu_dtype=jnp.bfloat16, stats_dtype=jnp.bfloat16, delayed_graft=True, impl='pallas'
    ),
    'sonew, band 4, delayed graft, one pass': _sonew(band=4, delayed_graft=True, impl='pallas'),
    'mbag, one pass': _mbag(impl='pallas'),
    'mbag, EMA, one pass': _mbag(decay=0.99, impl='pallas'),
    'mbag, N, one pass': _mbag(root=False, impl='pallas'),
}


class Tree(NamedTuple):
    """Parameters to step.

    Attributes:
      title: over its table.
      shapes: of the leaves, all float32.
      layout: what the shapes do not tell.
    """

    title: str
    shapes: Mapping[str, tuple[int, ...]]
    layout: Layout = None


def autoencoder_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the MNIST autoencoder's parameters."""
    sizes = (784, *autoencoder_config.get_config().hidden, 784)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        shapes[f'dense_{i}/kernel'] = (inputs, outputs)
        shapes[f'dense_{i}/bias'] = (outputs,)
    return shapes


def tagger_shapes(name: str = 'pos_tagging') -> dict[str, tuple[int, ...]]:
    """The shapes of a part-of-speech tagger's parameters, by the name of its config."""
    words, tags = _TAGGERS[name]
    config = importlib.import_module(f'configs.tasks.{name}').get_config()
    sizes = {part: config[part] for part in pos_tagging.SIZES}

    def init() -> Any:
        net = tagger.Tagger(words, tags, **sizes, dropout=0.0, rngs=nnx.Rngs(0))
        return nnx.to_pure_dict(nnx.state(net, nnx.Param))

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init))
    return {jax.tree_util.keystr(at, simple=True, separator='/'): x.shape for at, x in leaves}


TREES: dict[str, Tree] = {
    'leaf4096': Tree('one (4096, 4096) leaf', {'kernel': (4096, 4096)}),
    'leaf8192': Tree('one (8192, 8192) leaf', {'kernel': (8192, 8192)}),
    'autoencoder': Tree("the autoencoder's tree", autoencoder_shapes()),
    'pos_tagging': Tree("the POS tagger's tree", tagger_shapes(), pos_tagging.LAYOUT),
    'pos_tagging_small': Tree(
        "the small POS tagger's tree", tagger_shapes('pos_tagging_small'), pos_tagging.LAYOUT
    ),
    'lm_1b': Tree(
        "a language model's tree of 1.1 billion parameters",
        {name: shape for name, (shape, _) in tpu_compile.LANGUAGE_MODEL.items()},
        tpu_compile.LAYOUT,
    ),
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
    tree: Tree,
    rounds: int,
    in_turn: bool = True,
    methods: Iterable[str] = tuple(OPTIMIZERS),
    copied: int = _COPIED,
) -> dict[str, Any]:
    """Times optimizers on a tree, turn by turn, and a copy.

    Args:
      tree: the parameters.
      rounds: timed steps of each optimizer.
      in_turn: one step of each in turn, or all steps of one and then of the next.
      methods: their names; Adam is measured in any case, and is the first in the result.
      copied: how many numbers the copy has.

    Returns:
      ``copy_bytes_per_second``, the median; and ``steps``, for each optimizer its times in
      seconds, those to compile it, and bytes per parameter: of state, of temporary memory, by the
      compiler's word, and of what a step at least reads and writes.
    """
    factories = OPTIMIZERS | IN_ONE_PASS

    @jax.jit
    def draw(turn: int) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), turn), len(tree.shapes))
        pairs = zip(keys, tree.shapes.items(), strict=True)
        return {name: jax.random.normal(key, shape) for key, (name, shape) in pairs}

    grads = draw(0)
    count = sum(math.prod(shape) for shape in tree.shapes.values())

    def prepared(name: str) -> list[Any]:
        tx = optax.with_extra_args_support(factories[name](tree.layout))

        def step(params: Any, state: Any, grads: Any) -> Any:
            # The value is a loss, where one is taken.
            return precond_optax.update_and_apply(tx, grads, state, params, value=1.0)

        params = jax.tree.map(jnp.zeros_like, grads)
        state = tx.init(params)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads)
        clock = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - clock
        memory: Any = compiled.memory_analysis()
        facts = {
            'compile_seconds': seconds,
            'state_bytes_per_parameter': size / count,
            'temporary_bytes_per_parameter': memory.temp_size_in_bytes / count,
            # Parameters and state both ways, and gradients.
            'least_bytes_per_parameter': (3 * 4 * count + 2 * size) / count,
        }
        return [compiled, *compiled(params, state, grads), [], facts]

    def timed(run: list[Any]) -> float:
        compiled, params, state, *_ = run
        clock = time.perf_counter()
        run[1], run[2] = jax.block_until_ready(compiled(params, state, grads))
        return time.perf_counter() - clock

    runs = {name: prepared(name) for name in dict.fromkeys(('adam', *methods))}
    # Neither Adam, which would find its caches warm, nor one that does not do the same in each
    # step, of which the counted steps would be a choice.
    uncounted = runs[_UNCOUNTED] if _UNCOUNTED in runs else prepared(_UNCOUNTED)
    copy, copies = jax.jit(lambda x: x + 1, donate_argnums=0), []  # in place, as a step is
    numbers = jax.block_until_ready(jnp.zeros(copied))
    turns, block = (rounds, 1) if in_turn else (1, rounds)
    shuffle = np.random.default_rng(0)
    for turn in range(turns):
        grads = jax.block_until_ready(draw(turn + 1))
        for _ in range(1 + block):  # the first one is not counted
            clock = time.perf_counter()
            numbers = jax.block_until_ready(copy(numbers))
            copies.append(time.perf_counter() - clock)
        del copies[-1 - block]
        # Not counted: the gigabytes that the last one freed slow the next that needs memory.
        timed(uncounted)
        for name in shuffle.permutation(list(runs)):
            for _ in range(block):
                runs[name][3].append(timed(runs[name]))
    return {
        'copy_bytes_per_second': 2 * numbers.nbytes / statistics.median(copies),
        'steps': [
            {'optimizer': name, 'seconds': times, **facts}
            for name, (_, _, _, times, facts) in runs.items()
        ],
    }


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One table for each tree, by its title."""
    parts = []
    for title, result in results.items():
        steps, speed = result['steps'], result['copy_bytes_per_second']
        adam = statistics.median(steps[0]['seconds'])
        cells = []
        for step in steps:
            median = statistics.median(step['seconds'])
            low, high, slowest = (
                1e3 * np.percentile(step['seconds'], p, method='inverted_cdf')
                for p in (10, 90, 99)
            )
            share = step['least_bytes_per_parameter'] * result['parameters'] / speed / median
            cells.append(
                [
                    step['optimizer'],
                    f'{1e3 * median:.2f}',
                    f'{low:.2f} to {high:.2f}',
                    f'{slowest:.2f}',
                    f'{median / adam:.2f}',
                    f'{share:.3f}',
                    *(
                        f'{step[f"{kind}_bytes_per_parameter"]:.2f}'
                        for kind in ('least', 'state', 'temporary')
                    ),
                    f'{step["compile_seconds"]:.1f}',
                ]
            )
        header = ['optimizer', 'ms per step', 'p10 to p90', 'p99', 'ratio to adam']
        header += ["share of a copy's speed", 'least bytes', 'state', 'workspace', 'compile, s']
        about = f"{title}; a copy's speed is {speed / 1e9:.1f} GB/s; bytes are per parameter"
        parts.append(f'{about}\n\n' + report.markdown(header, cells))
    return '\n\n'.join(parts)


def compiled_for(
    topology: str, tree: Tree, methods: Iterable[str]
) -> dict[str, tpu_compile.Facts | str]:
    """What a compiler makes of steps on one chip, or the first line of its refusal."""
    factories = OPTIMIZERS | IN_ONE_PASS
    chip = tpu_compile.one_leaf((), topology).sharding
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=chip)
        for name, shape in tree.shapes.items()
    }
    found: dict[str, tpu_compile.Facts | str] = {}
    for name in dict.fromkeys(('adam', *methods)):
        try:
            found[name] = tpu_compile.measure(factories[name](tree.layout), params)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            # No memory, say, or a loop.
            found[name] = str(error).partition('\n')[0][:200]
    return found


def render_compiled(
    results: Mapping[str, Mapping[str, tpu_compile.Facts | str]],
) -> str:
    """One table for each tree, by its title; bytes per parameter."""
    counts = {tree.title: _count(tree) for tree in TREES.values()}
    parts = []
    for title, found in results.items():
        cells = []
        for name, facts in found.items():
            if isinstance(facts, str):
                cells.append([name, *['not compiled'] * 6])
                continue
            least = facts.arguments + facts.donated
            sizes = (facts.traffic, least, facts.arguments, facts.temporary)
            cells.append(
                [
                    name,
                    *(f'{size / counts[title]:.1f}' for size in sizes),
                    f'{least / facts.traffic:.2f}',
                    f'{facts.seconds:.1f}',
                ]
            )
        header = ['optimizer', 'traffic', 'least', 'arguments', 'workspace', 'least to traffic']
        text = report.markdown([*header, 'compile, s'], cells)
        refused = [f'{name}: {why}' for name, why in found.items() if isinstance(why, str)]
        parts.append('\n\n'.join([f'{title}, bytes per parameter', text, *refused]))
    return '\n\n'.join(parts)


def _count(tree: Tree) -> int:
    return sum(math.prod(shape) for shape in tree.shapes.values())


def main(argv: list[str]) -> None:
    """Measures the chosen trees and prints the tables."""
    main_lib.refuse_arguments(argv)
    topology = _TOPOLOGY.value
    with main_lib.clear_errors():
        if _BACKEND.value:
            jax.config.update('jax_platforms', _BACKEND.value)
        try:
            compiled = topology is not None or jax.default_backend() in ('gpu', 'tpu')
        except RuntimeError as error:
            raise ValueError(f'--backend={_BACKEND.value}: {error}') from error
        if topology is not None:
            try:
                tpu_compile.one_leaf((), topology)
            except (IndexError, RuntimeError, ValueError) as error:
                why = str(error).partition('\n')[0]
                raise ValueError(
                    f'--compile_for={topology}: {why}; v5e:2x2 is one, or h200.'
                ) from error
        offered = OPTIMIZERS | (IN_ONE_PASS if compiled else {})
        methods = chosen('optimizers', _OPTIMIZERS.value, offered)
        trees = [TREES[name] for name in chosen('tree', _TREES.value, TREES)]
    content: dict[str, Any]
    if topology is None:
        results = {
            tree.title: {'parameters': _count(tree)}
            | measure(tree, _ROUNDS.value, _IN_TURN.value, methods)
            for tree in trees
        }
        text, content = render(results), {'results': results}
    else:
        found = {tree.title: compiled_for(topology, tree, methods) for tree in trees}
        text = f'one chip of {topology}\n\n' + render_compiled(found)
        compiler = 'jax-cuda12-plugin' if topology in gpu_compile.TARGETS else 'libtpu'
        content = {
            compiler: importlib.metadata.version(compiler),
            'topology': topology,
            'results': {
                title: {
                    name: facts if isinstance(facts, str) else dataclasses.asdict(facts)
                    for name, facts in steps.items()
                }
                for title, steps in found.items()
            },
        }
    workdir.save_tables(flags.FLAGS.workdir, 'step_cost', content, text)


if __name__ == '__main__':
    app.run(main)
