"""What the TPU compiler makes of one optimizer step; needs libtpu, but no TPU.

JAX_PLATFORMS=cpu python -m experiments.tpu_compile [--band=0 --band=1] [--rank=32] [--workdir=DIR]

Whole steps (update and apply_updates, parameters and state donated) are compiled for a v5e pod
of 256 chips on 64 hosts, of a language model's 1.1 billion parameters, and for one chip of one
(8192, 8192) leaf; nothing runs. The first table is what the pod's chips hold and send, the second
the memory traffic. With --workdir, the numbers go to tpu_compile.json there, and the tables to
tpu_compile.md.
"""

import dataclasses
import functools
import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from experiments import gpu_compile, report, workdir
from experiments import main as main_lib
from tests import compiled as reader

BANDS = (0, 1, 4)
ONE_PASS_BANDS = (0, 1, 2, 4)  # of the fused kernel
_BANDS = flags.DEFINE_multi_integer('band', BANDS, "SONew's bands.", lower_bound=0)
_RANKS = flags.DEFINE_multi_integer('rank', [], "The shared basis' ranks.", lower_bound=1)

LAYERS, WIDTH, HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 16, 2048, 16, 128, 8192, 32768
_INWARD = ((LAYERS, WIDTH, HEADS, HEAD_DIM), P(None, 'data', 'model', None))
_SCALE = ((LAYERS, WIDTH), P(None, 'data'))

# A decoder-only language model, its layers scanned: shape and sharding of each leaf, over 'data'
# as FSDP does and over 'model' along heads, hidden units and the vocabulary.
LANGUAGE_MODEL: dict[str, tuple[tuple[int, ...], P]] = {
    'embedding': ((VOCABULARY, WIDTH), P('model', 'data')),
    'layers/attention/query': _INWARD,
    'layers/attention/key': _INWARD,
    'layers/attention/value': _INWARD,
    'layers/attention/out': ((LAYERS, HEADS, HEAD_DIM, WIDTH), P(None, 'model', None, 'data')),
    'layers/attention/scale': _SCALE,
    'layers/mlp/gate': ((LAYERS, WIDTH, HIDDEN), P(None, 'data', 'model')),
    'layers/mlp/up': ((LAYERS, WIDTH, HIDDEN), P(None, 'data', 'model')),
    'layers/mlp/down': ((LAYERS, HIDDEN, WIDTH), P(None, 'model', 'data')),
    'layers/mlp/scale': _SCALE,
    'final_scale': ((WIDTH,), P('data')),
}
LAYOUT = {
    '^embedding$': precond_optax.LeafRule(precondition=False),
    '^layers/': precond_optax.LeafRule(batch_axes=1),
}
# The shared basis merges the heads' axes, so that each entry of a head is an output.
SHARED_BASIS_LAYOUT = {
    'attention/(query|key|value)': precond_optax.LeafRule(batch_axes=1, merge_axes=((-2, -1),)),
    **LAYOUT,
}
# One leaf of each kind that is preconditioned.
KINDS_OF_LEAVES = (
    'layers/attention/query',
    'layers/attention/out',
    'layers/mlp/gate',
    'layers/mlp/down',
)
LEAF_SIZE = 8192 * 8192
COUNT = sum(math.prod(shape) for shape, _ in LANGUAGE_MODEL.values())


def pod_devices(topology: str) -> np.ndarray:
    """All chips of a TPU topology, which need not be there, in its shape; or a GPU by its name."""
    if topology in gpu_compile.TARGETS:
        return np.array(gpu_compile.devices(topology))
    # Else libtpu asks a server that TPU machines have, and complains at length.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-256')
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    # The chips are nobody's: others may compile at the same time.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    described = topologies.get_topology_desc(platform='tpu', topology_name=topology)
    shape = tuple(int(size) for size in topology.split(':')[1].split('x'))
    return np.array(described.devices).reshape(shape)


def pod_mesh(topology: str = 'v5e:16x16') -> Mesh:
    """Those of a topology with two axes as a ('data', 'model') mesh."""
    return Mesh(pod_devices(topology), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


def language_model(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters' shapes and shardings, float32."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in LANGUAGE_MODEL.items()
    }


def one_leaf(
    shape: tuple[int, ...] = (8192, 8192), topology: str = 'v5e:2x2'
) -> jax.ShapeDtypeStruct:
    """A leaf on one chip."""
    chip = Mesh(pod_devices(topology).ravel()[:1], ('data',), axis_types=(AxisType.Auto,))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(chip, P()))


def compile_step(tx: optax.GradientTransformation, params: Any) -> jax.stages.Compiled:
    """Update and apply_updates, parameters and state donated, compiled where ``params`` lie."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        return precond_optax.update_and_apply(tx, grads, state, params)

    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        precond_optax.state_sharding(tx, params),
    )
    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):  # so a trace knows the platform
        return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one compiled step, in bytes on one chip.

    Attributes:
      arguments: parameters, state and gradients.
      temporary: what the step needs beside them.
      donated: arguments whose memory the results take: parameters and state.
      traffic: read from and written to the chip's memory, as the compiler counts; on GPUs each
        operand and result of each kernel.
      collectives: kinds and bytes of what goes between chips.
      padded: the bytes of the collectives as laid out, in tiles.
      seconds: to trace and compile.
    """

    arguments: int
    temporary: int
    donated: int
    traffic: float
    collectives: list[tuple[str, int]]
    padded: int
    seconds: float

    @property
    def held(self) -> int:
        """Bytes of memory that the step needs."""
        return self.arguments + self.temporary

    @property
    def moved(self) -> int:
        """Bytes of all collectives."""
        return sum(size for _, size in self.collectives)


def measure(tx: optax.GradientTransformation, params: Any) -> Facts:
    """Compiles a step and reads what it needs."""
    clock = time.perf_counter()
    compiled = compile_step(tx, params)
    seconds = time.perf_counter() - clock
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    text: Any = compiled.as_text()
    return Facts(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        donated=memory.alias_size_in_bytes,
        traffic=_traffic(cost, text),
        collectives=reader.collectives(text),
        padded=sum(size for _, size in reader.collectives(text, padded=True)),
        seconds=seconds,
    )


def _traffic(cost: Any, text: str) -> float:
    """By the TPU compiler's count, beside which kernels are; the GPU's has none."""
    if cost is None:
        return reader.gpu_traffic(text)
    return cost['bytes accessed'] + reader.kernel_traffic(text)


def one_pass(band: int, params: Any, layout: Any = None) -> optax.GradientTransformation:
    """SONew through the fused kernel, on each chip's part of the parameters."""
    tx = precond_optax.sonew(1e-3, mean_eps=None, band=band, impl='pallas', layout=layout)
    return precond_optax.explicit_sharding(tx, params)


def shared_basis(rank: int, **keywords: Any) -> optax.GradientTransformation:
    """The shared basis with blocks as long as the model's hidden layers are wide."""
    keywords = {'layout': SHARED_BASIS_LAYOUT, 'max_block_dim': HIDDEN, **keywords}
    return precond_optax.shared_basis(1e-3, rank=rank, **keywords)


def optimizers(
    bands: Sequence[int], ranks: Sequence[int] = ()
) -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Factories that take a layout: Adam, SONew of each band by XLA, shared bases of each rank.

    The shared basis has a layout of its own.
    """
    return (
        {'adam': lambda layout=None: optax.adam(1e-3)}
        | {
            f'sonew, band {band}': functools.partial(
                precond_optax.sonew, 1e-3, mean_eps=None, band=band, impl='xla'
            )
            for band in bands
        }
        | {
            f'shared basis, rank {rank}': lambda layout=None, rank=rank: shared_basis(rank)
            for rank in ranks
        }
    )


def language_model_table(results: dict[str, Facts]) -> str:
    """What each chip of the pod holds and sends."""
    share = 4 * COUNT / 256
    rows = [
        [
            name,
            *(f'{size / 1e6:.2f}' for size in (facts.arguments, facts.temporary)),
            f'{facts.held / share:.2f}',
            *(f'{size / 1e6:.4f}' for size in (facts.moved, facts.padded)),
            f'{facts.seconds:.1f}',
        ]
        for name, facts in results.items()
    ]
    header = [
        'optimizer',
        'arguments, MB',
        'temporary, MB',
        'both, in shares of the parameters',
        'collectives, MB',
        'in tiles, MB',
        'compile, s',
    ]
    return report.markdown(header, rows)


def leaf_table(results: dict[str, dict[str, Facts]], params: Any) -> str:
    """What the step of one leaf alone sends, and the leaf's border."""
    rows = [
        [
            optimizer,
            name,
            str(params[name].sharding.shard_shape(params[name].shape)),
            *(f'{size / 1e3:.1f}' for size in (facts.moved, reader.border(params[name]))),
        ]
        for optimizer, leaves in results.items()
        for name, facts in leaves.items()
    ]
    header = ['optimizer', 'leaf', 'shard', 'collectives, KB', 'border, KB']
    return report.markdown(header, rows)


def traffic_table(results: dict[str, Facts]) -> str:
    """The memory traffic of one chip with one leaf."""
    rows = [
        [name, f'{facts.traffic / LEAF_SIZE:.1f}', f'{facts.temporary / LEAF_SIZE:.1f}']
        for name, facts in results.items()
    ]
    return report.markdown(['optimizer', 'traffic', 'temporary'], rows)


def main(argv: list[str]) -> None:
    """Compiles all steps and prints the tables."""
    main_lib.refuse_arguments(argv)
    with main_lib.clear_errors():
        made = optimizers(_BANDS.value, _RANKS.value)
        on_pod = {name: make(layout=LAYOUT) for name, make in made.items()}
    params = language_model(pod_mesh())
    one_by_one = {name: {name: params[name]} for name in KINDS_OF_LEAVES}
    whole = {name: measure(tx, params) for name, tx in on_pod.items()}
    leaves = {
        name: {kind: measure(tx, leaf) for kind, leaf in one_by_one.items()}
        for name, tx in on_pod.items()
        if name != 'adam'
    }
    single = {name: measure(make(), one_leaf()) for name, make in made.items()}
    for band in ONE_PASS_BANDS:
        name = f'sonew, band {band}, in one pass'
        whole[name] = measure(one_pass(band, params, LAYOUT), params)
        leaves[name] = {
            kind: measure(one_pass(band, leaf, LAYOUT), leaf) for kind, leaf in one_by_one.items()
        }
        single[name] = measure(one_pass(band, one_leaf()), one_leaf())
    text = '\n\n'.join(
        [
            f"the language model's {COUNT:,} parameters on 256 v5e chips, for each chip",
            language_model_table(whole),
            'the step of one leaf, for each chip',
            leaf_table(leaves, params),
            'one (8192, 8192) leaf on one v5e chip, bytes per parameter',
            traffic_table(single),
        ]
    )
    content = {
        'libtpu': importlib.metadata.version('libtpu'),
        'language model': {name: dataclasses.asdict(facts) for name, facts in whole.items()},
        'leaves': {
            name: {leaf: dataclasses.asdict(facts) for leaf, facts in by_leaf.items()}
            for name, by_leaf in leaves.items()
        },
        'one leaf on one chip': {n: dataclasses.asdict(f) for n, f in single.items()},
    }
    workdir.save_tables(flags.FLAGS.workdir, 'tpu_compile', content, text)


if __name__ == '__main__':
    app.run(main)
