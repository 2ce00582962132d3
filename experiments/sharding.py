"""What a sharded step of SONew moves, and what each of eight CPU devices holds.

python -m experiments.sharding [--workdir=DIR]

The first table has the bytes of all collectives in the compiled step of one leaf, for each device,
in every way to put a (4, 2) mesh on it; the second the optimizer state on the fullest device,
right after ``init`` and after an update. With --workdir, the numbers go to sharding.json there,
and the tables to sharding.md.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from experiments import main as main_lib
from experiments import report, workdir
from tests import compiled, test_sharding

BANDS = (0, 1, 2, 4, 8)
# A small model, and how each of its leaves lies on the mesh.
SHAPES = {'embedding': (4096, 256), 'layers': (8, 256, 1024), 'bias': (1024,)}
SPECS = {'embedding': P('x', 'y'), 'layers': P(None, 'x', 'y'), 'bias': P(('x', 'y'))}


def collective_bytes() -> list[dict[str, Any]]:
    """For each way to shard a leaf and each band, what the compiled step moves."""
    rows = []
    for shape, specs in test_sharding.WAYS.items():
        for spec in specs:
            for band in BANDS:
                keywords = dict(band=band, mean_eps=None)
                found, edge = test_sharding.compiled_step(shape, spec, **keywords)
                rows.append(
                    {
                        'shape': shape,
                        'sharding': str(spec),
                        'band': band,
                        'leaf_bytes': 4 * jnp.zeros(shape).size,
                        'border_bytes': edge,
                        'collectives': found,
                    }
                )
    return rows


def device_bytes() -> list[dict[str, Any]]:
    """State bytes on the fullest device: as `jit(init)` leaves them, and as `state_sharding`."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    rows = []
    for band in BANDS:
        tx = precond_optax.sonew(1e-3, mean_eps=None, band=band)
        with jax.set_mesh(mesh):
            params = {
                k: jax.device_put(jnp.ones(shape), NamedSharding(mesh, SPECS[k]))
                for k, shape in SHAPES.items()
            }
            plain = jax.jit(tx.init)(params)
            shardings = precond_optax.state_sharding(tx, params)
            state = jax.jit(tx.init, out_shardings=shardings)(params)
            _, after = jax.jit(tx.update)(params, state, params)
        rows.append(
            {
                'band': band,
                'total': sum(x.nbytes for x in jax.tree.leaves(state)),
                'jit_init': fullest(plain),
                'state_sharding': fullest(state),
                'after_an_update': fullest(after),
            }
        )
    return rows


def fullest(tree: Any) -> int:
    """Bytes on the device that holds most."""
    return max(compiled.bytes_by_device(tree).values())


def render(moved: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> str:
    """Both tables."""
    by_way: dict[tuple[Any, ...], dict[int, int]] = {}
    for row in moved:
        way = (row['shape'], row['sharding'], row['leaf_bytes'], row['border_bytes'])
        by_way.setdefault(way, {})[row['band']] = sum(size for _, size in row['collectives'])
    header = ['leaf', 'sharding', 'leaf, bytes', 'border', *(f'band {b}' for b in BANDS)]
    cells = [
        ['x'.join(map(str, shape)), spec, f'{size:,}', f'{border:,}']
        + [f'{by_band[band]:,}' for band in BANDS]
        for (shape, spec, size, border), by_band in by_way.items()
    ]
    first = report.markdown(header, cells)
    names = ['total', 'jit_init', 'state_sharding', 'after_an_update']
    header = ['band', 'whole state, bytes', 'jit(init)', 'with state_sharding', 'after an update']
    second = report.markdown(
        header,
        [
            [str(row['band']), f'{row["total"]:,}', *(_share(row, name) for name in names[1:])]
            for row in held
        ],
    )
    return (
        f'bytes of all collectives of a step, for each of eight devices\n\n{first}\n\n'
        f'bytes of state on the fullest of eight devices\n\n{second}'
    )


def _share(row: dict[str, Any], name: str) -> str:
    return f'{row[name]:,} ({row[name] / row["total"]:.3f})'


def main(argv: list[str]) -> None:
    """Measures and prints the tables."""
    main_lib.refuse_arguments(argv)
    jax.config.update('jax_num_cpu_devices', 8)
    moved, held = collective_bytes(), device_bytes()
    text = render(moved, held)
    content = {'moved': moved, 'held': held}
    workdir.save_tables(flags.FLAGS.workdir, 'sharding', content, text)


if __name__ == '__main__':
    app.run(main)
