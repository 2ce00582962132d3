"""What the TPU compiler makes of a whole train step of a task; needs libtpu, but no TPU.

JAX_PLATFORMS=cpu python -m experiments.tpu_train_step --task=TASK --data_dir=DATA \\
    --with=configs/optimizers/adamw.py --with=configs/optimizers/sonew.py:band=4 --scanned=16 \\
    [--topology=v5e:16x16 --pod_mesh=1,64,4 --topology=v5p:4x4x4 --pod_mesh=1,16,4] \\
    [--workdir=DIR]

Forward, backward and update of the longest batch, on each topology in the mesh that is given with
it, parameters and state donated. With --workdir the numbers go to tpu_train_step.json there, and
the table to tpu_train_step.md, after each step that is compiled; the same command goes on with
those that are missing. ``--task.accumulation`` and so on act as in a run.

The compiler counts the body of a loop once. So that layers which are scanned count as often as
they run, with --scanned=LAYERS the step is compiled again with the scans of that length unrolled
by their least divisor d, and what it counts, be it FLOPs, bytes or collectives, is taken to be
linear ::

    count(1) + (length - 1) * (count(d) - count(1)) / (d - 1)

The step of sonew.py is the fused kernel, as on a TPU; with sonew.py:impl='xla' it is XLA's. The
bytes of a kernel are counted, its FLOPs are not.

Memory is that of the step as it runs, not unrolled. Branches of a ``cond`` are as the compiler
counts them, whether they are taken in each step or in few.
"""

import ast
import collections
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import jax
from absl import flags
from jax.sharding import Mesh

from experiments import main as main_lib
from experiments import mesh as mesh_lib
from experiments import optimizers, program, report, segments, tasks, tpu_compile, workdir
from tests import compiled as reader

NAME = 'tpu_train_step'  # of the files

_WITH = flags.DEFINE_multi_string(
    'with',
    ['configs/optimizers/adamw.py'],
    'Optimizers: config files, FILE or FILE:name=value,...',
)
_TOPOLOGIES = flags.DEFINE_multi_string('topology', ['v5e:16x16', 'v5p:4x4x4'], 'TPU topologies.')
_MESHES = flags.DEFINE_multi_string('pod_mesh', ['1,64,4', '1,16,4'], 'A mesh for each of them.')
_LAYERS = flags.DEFINE_integer('scanned', None, 'The length of the scans over layers.')


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one compiled train step, on one chip; bytes where nothing else is said.

    Attributes:
      arguments: parameters, state and batch.
      share: what that is if all are cut over the chips of one copy of the model.
      temporary: what the step needs beside them.
      output: what it returns; but for numbers in the memory of the arguments.
      donated: how much of it is there.
      flops: in floating point operations.
      traffic: read from and written to the chip's memory, as the compiler counts.
      collectives: what comes from other chips, by the kind of operation.
      seconds: to trace and compile, once.
    """

    arguments: int
    share: int
    temporary: int
    output: int
    donated: int
    flops: float
    traffic: float
    collectives: dict[str, float]
    seconds: float


@contextlib.contextmanager
def unrolled(length: int, by: int) -> Iterator[None]:
    """Within it scans of this length are traced with so many steps in their body."""
    real = jax.lax.scan

    def scan(f: Any, init: Any, xs: Any = None, *given: Any, **keywords: Any) -> Any:
        count = keywords.get('length', given[0] if given else None)
        if count is None:
            count = jax.tree.leaves(xs)[0].shape[0]
        if count == length:
            keywords['unroll'] = by
        return real(f, init, xs, *given, **keywords)

    with mock.patch.object(jax.lax, 'scan', scan):
        yield


def compile_step(
    config: Mapping[str, Any], optimizer: Mapping[str, Any], task: tasks.Task, mesh: Mesh
) -> jax.stages.Compiled:
    """The train step of a run's largest batch, in a mesh whose devices need not be there."""
    if task.stream is None:
        raise ValueError('a train step is compiled for tasks with a stream.')
    segments.check(dataclasses.replace(task, stream=None), mesh, config.get('accumulation', 1))
    tx = program.make_tx(task, config, optimizer, mesh)
    places: Any = program.shardings(task, tx, mesh)
    carry = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(lambda: program.initial(task, tx, 0)),
        places,
    )
    largest = max(task.stream.shapes, key=lambda like: sum(x.size for x in jax.tree.leaves(like)))
    batch = jax.tree.map(lambda x: segments.placed(x, mesh, 1), largest)
    step = program.make_step(task, tx, config, places.params)
    with jax.set_mesh(mesh):
        return segments.single_step(step, places).lower(carry, batch).compile()


def _share(compiled: Any, mesh: Mesh) -> int:
    """The least bytes of arguments on one chip; axes that nothing divides make it more."""
    (carry, batch), _ = compiled.in_avals
    parts = (carry, mesh.size // mesh.shape['data']), (batch, mesh_lib.rows(mesh))
    sizes = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // count
        for tree, count in parts
    )
    return sum(sizes)


def _counts(compiled: Any) -> dict[str, float]:
    """What is counted once for each loop."""
    cost, text = compiled.cost_analysis(), compiled.as_text()
    traffic = cost['bytes accessed'] + reader.kernel_traffic(text)
    counts = collections.Counter({'flops': cost['flops'], 'traffic': traffic})
    for kind, size in reader.collectives(text):
        counts[kind] += size
    return dict(counts)


def measure(
    config: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    task: tasks.Task,
    mesh: Mesh,
    layers: int | None = None,
) -> Facts:
    """Compiles a train step, twice if layers are scanned, and reads what it needs."""
    clock = time.perf_counter()
    compiled = compile_step(config, optimizer, task, mesh)
    seconds = time.perf_counter() - clock
    counts = _counts(compiled)
    if layers is not None and layers > 1:
        by = next(d for d in range(2, layers + 1) if layers % d == 0)
        jax.clear_caches()  # what was traced before has other scans
        with unrolled(layers, by):
            more = _counts(compile_step(config, optimizer, task, mesh))
        jax.clear_caches()
        counts = {
            name: once + (layers - 1) * (more.get(name, 0.0) - once) / (by - 1)
            for name, once in ((name, counts.get(name, 0.0)) for name in {*counts, *more})
        }
    memory: Any = compiled.memory_analysis()
    return Facts(
        arguments=memory.argument_size_in_bytes,
        share=_share(compiled, mesh),
        temporary=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes,
        donated=memory.alias_size_in_bytes,
        flops=counts['flops'],
        traffic=counts['traffic'],
        collectives={kind: counts[kind] for kind in reader.KINDS if counts.get(kind)},
        seconds=seconds,
    )


def table(results: Mapping[tuple[str, str], Facts]) -> str:
    """A row for each topology and optimizer; ratios are to the topology's first."""
    kinds = [k for k in reader.KINDS if any(k in facts.collectives for facts in results.values())]
    first: dict[str, Facts] = {}
    rows = []
    for names, facts in results.items():
        base = first.setdefault(names[0], facts)
        rows.append(
            [
                *names,
                f'{facts.arguments / 1e6:.1f}',
                f'{facts.arguments / facts.share:.2f}',
                f'{facts.temporary / 1e6:.1f}',
                f'{facts.output / 1e6:.1f}',
                f'{facts.flops / 1e9:.2f}',
                f'{facts.flops / base.flops:.3f}',
                f'{facts.traffic / 1e6:.1f}',
                f'{facts.traffic / base.traffic:.3f}',
                *(f'{facts.collectives.get(kind, 0) / 1e6:.2f}' for kind in kinds),
                f'{facts.seconds:.0f}',
            ]
        )
    header = ['topology and mesh', 'optimizer', 'arguments, MB', 'to a fair share']
    header += ['temporary, MB', 'output, MB']
    header += ['GFLOP', 'ratio', 'accessed, MB', 'ratio']
    header += [*(f'{kind}, MB' for kind in kinds), 'compile, s']
    return report.markdown(header, rows)


def _read(folder: str | None, about: Mapping[str, Any]) -> dict[tuple[str, str], Facts]:
    """What an earlier call has saved, if it was about the same.

    Raises:
      ValueError: if it was not.
    """
    file = pathlib.Path(folder or '.') / f'{NAME}.json'
    if folder is None or not file.exists():
        return {}
    held = json.loads(file.read_text())
    if {key: held[key] for key in about} != json.loads(json.dumps(about)):
        raise ValueError(f'{file} is of another task or libtpu; give another --workdir.')
    return {(step.pop('topology'), step.pop('optimizer')): Facts(**step) for step in held['steps']}


def main(argv: list[str]) -> None:
    """Compiles the steps of the flags and prints the table."""
    main_lib.refuse_arguments(argv)
    flag = flags.FLAGS
    with main_lib.clear_errors():
        if len(_TOPOLOGIES.value) != len(_MESHES.value):
            raise ValueError('give one --pod_mesh for each --topology.')
        about = {
            'libtpu': importlib.metadata.version('libtpu'),
            'task': workdir.plain(flag.task),
        }
        results = _read(flag.workdir, about)
        config = {**flag.task, 'mesh': None}  # of the pod, which is not here
        task = tasks.make(config, flag.data_dir)
        chosen = {text.removeprefix('configs/optimizers/'): _chosen(text) for text in _WITH.value}
        for topology, sizes in zip(_TOPOLOGIES.value, _MESHES.value, strict=True):
            shape = dict(zip(mesh_lib.AXES, map(int, sizes.split(',')), strict=True))
            devices = tpu_compile.pod_devices(topology).ravel().tolist()
            mesh = mesh_lib.make(shape, devices)
            for name, optimizer in chosen.items():
                key = (f'{topology} as {sizes}', name)
                if key in results:
                    continue
                results[key] = measure(config, optimizer, task, mesh, _LAYERS.value)
                _save(flag.workdir, about, results)
    _save(flag.workdir, about, results)


def _save(
    folder: str | None, about: Mapping[str, Any], results: Mapping[tuple[str, str], Facts]
) -> None:
    steps = [
        {'topology': where, 'optimizer': name, **dataclasses.asdict(facts)}
        for (where, name), facts in results.items()
    ]
    text = 'one train step, for each chip\n\n' + table(results)
    workdir.save_tables(folder, NAME, {**about, 'steps': steps}, text)


def _chosen(text: str) -> dict[str, Any]:
    """An optimizer's config, from FILE or FILE:name=value,...

    Raises:
      ValueError: if there is none, or a name or value is wrong.
    """
    file, _, changes = text.partition(':')
    try:
        module = importlib.import_module(file.removesuffix('.py').replace('/', '.'))
        config = module.get_config()
        for change in filter(None, changes.split(',')):
            name, value = change.split('=')
            if name not in config:
                raise KeyError(name)
            config[name] = ast.literal_eval(value)
    except (ImportError, KeyError, TypeError, SyntaxError) as error:
        raise ValueError(f'--with={text}: {error}') from error
    return optimizers.without_search_space(config)


if __name__ == '__main__':
    main_lib.run(main, 'task')
