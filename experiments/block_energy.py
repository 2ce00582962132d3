r"""How much of a second moment lies in its diagonal blocks, and of these in a shared basis.

python -m experiments.block_energy --task=configs/tasks/autoencoder.py \
    --optimizer=configs/optimizers/sonew.py --data_dir=DATA [--workdir=DIR] \
    [--layers=dense_0,dense_2] [--warmup=100] [--steps=200] [--max_online_rank=64]

Trains with a constant learning rate, and after the warm-up steps keeps the gradients of some
kernels (inputs, outputs). H is the sum of g g^T over these steps, cut into blocks by output neuron
and by input neuron. Then, by output neuron, how much of the diagonal blocks H_i is held by
separate bases, the best one of each block; by the one in hindsight, the top eigenvectors of the
sum of H_i^2, shared by all; and by the one that `scale_by_shared_basis` ends with on the same
gradients. With --workdir, the numbers go to block_energy.json there, the tables to
block_energy.md and a plot to block_energy.png.

The online bases take most of the time, which grows as the cube of their rank.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

import precond_optax
from experiments import gradients, report, workdir
from experiments import main as main_lib

_MAX_ONLINE_RANK = flags.DEFINE_integer('max_online_rank', 64, 'No online basis above this rank.')

RANKS = (1, 2, 4, 8, 16, 32, 64)
BASES = {
    'separate': 'a basis of its own for each block',
    'hindsight': 'shared, in hindsight',
    'online': 'shared, as the method finds it',
}
MEASURES = {'trace': 'sum of tr H_i', 'squares': 'sum of ||H_i||_F^2'}


def gram_matrices(grads: np.ndarray) -> np.ndarray:
    """K_i = G_i G_i^T for each output: (steps, inputs, outputs) -> (outputs, steps, steps).

    With H_ij = G_i^T G_j the blocks' inner products are sums over pairs of steps:
    ||H_ij||_F^2 = <K_i, K_j>. So no block is ever formed.
    """
    blocks = np.moveaxis(grads, -1, 0).astype(np.float64)
    return blocks @ np.swapaxes(blocks, -1, -2)


def block_shares(grams: np.ndarray) -> dict[str, float]:
    """How much of ||H||_F^2 its diagonal blocks have, and what to compare that with.

    Returns:
      ``share``; ``even``, were all blocks alike; ``least``, were each off-diagonal block as large
      as its two diagonal ones allow (Cauchy-Schwarz); ``across``, the share without what each
      step's gradient has with itself: that is of rank one and knows no blocks, but fades only as
      the number of steps grows.
    """
    norms = np.linalg.norm(grams, axis=(-2, -1))
    others = 1 - np.eye(grams.shape[-1])
    return {
        'share': float(np.sum(grams**2) / np.sum(np.sum(grams, axis=0) ** 2)),
        'even': 1 / len(grams),
        'least': float(np.sum(norms**2) / np.sum(norms) ** 2),
        'across': float(np.sum(grams**2 * others) / np.sum(np.sum(grams, axis=0) ** 2 * others)),
    }


def hindsight_basis(grads: np.ndarray, grams: np.ndarray, rank: int) -> np.ndarray:
    """The top eigenvectors (rank, inputs) of the sum of H_i^2 = G_i^T K_i G_i.

    In float64: the eigenvalues are fourth powers of the gradients' singular values.
    """
    total = np.zeros((grads.shape[1],) * 2)
    for i, gram in enumerate(grams):
        block = grads[:, :, i].astype(np.float64)
        total += block.T @ (gram @ block)
    return np.linalg.eigh(total)[1][:, ::-1][:, :rank].T


def online_basis(grads: np.ndarray, rank: int) -> np.ndarray:
    """The basis (rank, inputs) that the method has after these gradients."""
    tx = precond_optax.scale_by_shared_basis(rank=rank, graft=None)

    @jax.jit
    def run(grads: jax.Array) -> jax.Array:
        state = tx.init(jnp.zeros_like(grads[0]))
        state, _ = jax.lax.scan(lambda state, g: (tx.update(g, state)[1], None), state, grads)
        return cast(Any, state).basis

    return np.asarray(run(jnp.asarray(grads)), np.float64)


def held_by(basis: np.ndarray, grads: np.ndarray, grams: np.ndarray) -> dict[str, float]:
    """The shares of the diagonal blocks that B^T R_i B has with the best R_i = B H_i B^T."""
    coordinates = np.tensordot(grads.astype(np.float64), basis, (1, 1))  # (steps, outputs, rank)
    coordinates = np.moveaxis(coordinates, 1, 0)
    inside = np.swapaxes(coordinates, -1, -2) @ coordinates
    return {
        'trace': float(np.sum(coordinates**2) / np.trace(grams, axis1=-2, axis2=-1).sum()),
        'squares': float(np.sum(inside**2) / np.sum(grams**2)),
    }


def held_by_separate(grams: np.ndarray, ranks: Sequence[int]) -> list[dict[str, float]]:
    """The same where each block has its own best basis."""
    values = np.maximum(np.linalg.eigvalsh(grams)[:, ::-1], 0)
    return [
        {
            'trace': float(values[:, :rank].sum() / values.sum()),
            'squares': float((values[:, :rank] ** 2).sum() / (values**2).sum()),
        }
        for rank in ranks
    ]


def measure(grads: np.ndarray, ranks: Sequence[int], max_online_rank: int) -> dict[str, Any]:
    """All numbers of a layer with gradients (steps, inputs, outputs)."""
    inputs = grads.shape[1]
    grams = gram_matrices(grads)
    blocks = {
        'output': block_shares(grams),
        'input': block_shares(gram_matrices(np.swapaxes(grads, 1, 2))),
    }
    ranks = [rank for rank in ranks if rank <= inputs]
    best = hindsight_basis(grads, grams, max(ranks))
    held: dict[str, list[dict[str, float] | None]] = {
        'separate': [*held_by_separate(grams, ranks)],
        'hindsight': [held_by(best[:rank], grads, grams) for rank in ranks],
        'online': [
            held_by(online_basis(grads, rank), grads, grams) if rank <= max_online_rank else None
            for rank in ranks
        ],
    }
    return {'shape': grads.shape[1:], 'blocks': blocks, 'ranks': ranks, 'held': held}


def render(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the blocks' shares, and one for each layer of what the bases hold."""
    header = ['layer', 'blocks', 'in the diagonal', 'if even', 'at least', 'between steps']
    cells = []
    for name, found in layers.items():
        inputs, outputs = found['shape']
        for side, count, size in (('output', outputs, inputs), ('input', inputs, outputs)):
            shares = found['blocks'][side]
            cells.append(
                [
                    f'{name}, by {side}',
                    f'{count} of {size}',
                    *(f'{100 * shares[key]:.3g}' for key in ('share', 'even', 'least', 'across')),
                ]
            )
    parts = [
        'share of ||H||_F^2 in the diagonal blocks, in percent\n\n'
        + report.markdown(header, cells)
    ]
    columns = [(measure, basis) for measure in MEASURES for basis in BASES]
    for name, found in layers.items():
        cells = []
        for i, rank in enumerate(found['ranks']):
            values = [(found['held'][basis][i] or {}).get(kind) for kind, basis in columns]
            shown = ['' if value is None else f'{100 * value:.2f}' for value in values]
            cells.append([str(rank), *shown])
        header = ['rank', *(f'{kind}, {basis}' for kind, basis in columns)]
        inputs, outputs = found['shape']
        parts.append(
            f'{name}, {outputs} blocks of {inputs} inputs: held by a basis, in percent\n\n'
            + report.markdown(header, cells)
        )
    return '\n\n'.join(parts)


def plot(layers: Mapping[str, Mapping[str, Any]], file: pathlib.Path) -> None:
    """What the bases leave out, by rank: a column for each layer, a row for each measure."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(MEASURES),
        len(layers),
        figsize=(3.2 * len(layers) + 1, 6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout='constrained',
    )
    styles = ('o-', 's-', 'x--')
    for column, (name, found) in enumerate(layers.items()):
        inputs, outputs = found['shape']
        ranks = found['ranks']
        for axis, kind in zip(axes[:, column], MEASURES, strict=True):
            for style, (basis, label) in zip(styles, BASES.items(), strict=True):
                points = [
                    (rank, 100 * (1 - held[kind]))
                    for rank, held in zip(ranks, found['held'][basis], strict=True)
                    if held
                ]
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
            if kind == 'trace':
                shares = [100 * (1 - rank / inputs) for rank in ranks]
                axis.plot(ranks, shares, ':', color='gray', label='a random basis')
            axis.set_xscale('log', base=2)
            axis.xaxis.set_major_formatter('{x:g}')
            axis.set(yscale='log', ylim=(1e-3, 150))
            axis.yaxis.set_major_formatter('{x:g}')
            axis.grid(visible=True, alpha=0.25)
        axes[0, column].set_title(f'{name}: {outputs} blocks of {inputs}', fontsize='medium')
        axes[-1, column].set_xlabel('rank')
    for axis, label in zip(axes[:, 0], MEASURES.values(), strict=True):
        axis.set_ylabel(f'% left out of the {label}')
    axes[0, -1].legend(fontsize='x-small', loc='lower left')
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    """Trains, measures the layers and prints the tables."""
    main_lib.refuse_arguments(argv)
    folder = flags.FLAGS.workdir
    with main_lib.clear_errors():
        grads, about = gradients.of_flags()
    layers = {
        layer: measure(grads.pop(layer), RANKS, _MAX_ONLINE_RANK.value)
        for layer in tqdm.tqdm(list(grads), unit='layer')
    }
    text = f'{render(layers)}\n\n{gradients.describe(about)}'
    workdir.save_tables(folder, 'block_energy', {**about, 'layers': layers}, text)
    if folder:
        plot(layers, pathlib.Path(folder) / 'block_energy.png')


if __name__ == '__main__':
    main_lib.run(main, 'task', 'optimizer')
