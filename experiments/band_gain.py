r"""What the neighbours of a gradient's entry along the chain tell of it, by layer and band.

python -m experiments.band_gain --task=configs/tasks/autoencoder.py \
    --optimizer=configs/optimizers/sonew.py --data_dir=DATA [--workdir=DIR] \
    [--layers=dense_0,dense_2] [--warmup=100] [--steps=200] [--bands=1,2,4,8,12] [--columns=24]

Trains with a constant learning rate, and after the warm-up steps keeps the gradients of some
kernels (inputs, outputs). With H their running mean of g g^T as SONew keeps it, a its damped
diagonal and S_j what of a_j the b entries after j leave open (the Schur complement), shown is

    mean of log(S_j / a_j)

over the entries that are not damping alone: how much nearer to the inverse of H, in the LogDet
divergence by entry, SONew with b bands is than a diagonal. Zero: the neighbours tell nothing, and
the bands cost for nothing. It is shown for chains down the inputs (order 'F') and along the
outputs ('C'), each over some of their lines, which are taken as separate chains. The decay and
the damping are the optimizer's ``b2`` and ``eps`` unless --b2 and --eps say otherwise; a mean over
few steps, 1 / (1 - b2), is told by many bands whatever it is of. With --workdir, the numbers go to
band_gain.json there, and the table to band_gain.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags

from experiments import gradients, report, workdir
from experiments import main as main_lib

_BANDS = flags.DEFINE_list('bands', ['1', '2', '4', '8', '12'], 'Numbers of off-diagonals.')
_COLUMNS = flags.DEFINE_integer('columns', 24, 'Lines of each kernel.', lower_bound=1)
_B2 = flags.DEFINE_float('b2', None, "Decay, in place of the optimizer's.", 0, 1)
_EPS = flags.DEFINE_float('eps', None, "Damping, in place of the optimizer's.", 1e-30)


def gains(lines: np.ndarray, bands: Sequence[int], b2: float, eps: float) -> list[float]:
    """The means of log(S / a), one for each band.

    Args:
      lines: gradients (steps, entries, chains).
      bands: numbers of off-diagonals, each below the number of entries.
      b2: decay of the mean, in [0, 1).
      eps: added to the diagonal, above 0.

    Raises:
      ValueError: if ``eps`` leaves a singular system.
    """
    steps, entries, chains = lines.shape
    longest = max(bands)
    weights = b2 ** np.arange(steps)[::-1] * (1 - b2) / (1 - b2**steps)
    # Nothing follows a chain's end.
    grads = np.zeros((steps, entries + longest, chains))
    grads[:, :entries] = lines
    moments = np.zeros((longest + 1, entries + longest, chains))  # by lag
    for lag, moment in enumerate(moments):
        shifted = np.roll(grads, -lag, axis=1)
        np.einsum('t,tic,tic->ic', weights, grads, shifted, out=moment)
    # The systems of each entry, bands last; the first pivots of a factor are those of fewer bands.
    system = np.empty((entries, chains, longest, longest))
    for p, q in np.ndindex(longest, longest):
        first = 1 + min(p, q)
        system[..., p, q] = moments[abs(p - q), first : first + entries] + (p == q) * eps
    edges = np.moveaxis(moments[1:, :entries], 0, -1)[..., None]
    try:
        factor = np.linalg.cholesky(system)
    except np.linalg.LinAlgError:
        raise ValueError(
            f'--eps: {eps:g} is too small for these gradients, of which some are told by others.'
        ) from None
    told = np.linalg.solve(factor, edges)[..., 0] ** 2
    diag = moments[0, :entries]
    shares = 1 - np.cumsum(told, axis=-1) / (diag[..., None] + eps)
    counts = diag > eps
    if not counts.any():
        return [0.0] * len(bands)
    return [float(np.mean(np.log(shares[..., band - 1]), where=counts)) for band in bands]


def measure(
    grads: np.ndarray, bands: Sequence[int], columns: int, b2: float, eps: float
) -> dict[str, Any]:
    """The numbers of a layer with gradients (steps, inputs, outputs), by order and band."""
    rng, found = np.random.default_rng(0), {}
    for order, lines in (('F', grads), ('C', np.swapaxes(grads, 1, 2))):
        entries, chains = lines.shape[1:]
        taken = rng.choice(chains, min(chains, columns), replace=False)
        own = [band for band in bands if band < entries]
        values = gains(lines[:, :, taken], own, b2, eps) if own else []
        found[order] = dict(zip(map(str, own), values, strict=True))
    return {'shape': grads.shape[1:], 'gains': found}


def render(layers: Mapping[str, Mapping[str, Any]], bands: Sequence[int]) -> str:
    """A line for each layer and order."""
    lines = []
    for name, found in layers.items():
        shape = ' x '.join(map(str, found['shape']))
        for order, values in found['gains'].items():
            shown = [f'{values[str(b)]:.2f}' if str(b) in values else '' for b in bands]
            lines.append([name, shape, order, *shown])
    return report.markdown(['layer', 'shape', 'order', *(f'band {b}' for b in bands)], lines)


def main(argv: list[str]) -> None:
    """Trains, measures the layers and prints the table."""
    main_lib.refuse_arguments(argv)
    flag = flags.FLAGS
    with main_lib.clear_errors():
        bands = [int(band) for band in _BANDS.value]
        if not bands or min(bands) < 1:
            raise ValueError(f'--bands: integers >= 1, got {_BANDS.value}.')
        own = {}
        for name, value in (('b2', _B2.value), ('eps', _EPS.value)):
            own[name] = flag.optimizer.get(name) if value is None else value
            if own[name] is None:
                raise ValueError(f'--{name}: needed, {flag.optimizer.name} has none.')
        grads, about = gradients.of_flags()
        layers = {
            layer: measure(grads.pop(layer), bands, _COLUMNS.value, **own)
            for layer in tqdm.tqdm(list(grads), unit='layer')
        }
    settings = ', '.join(f'{name} {value:.4g}' for name, value in own.items())
    text = (
        f'mean of log(S / a)\n\n{render(layers, bands)}\n\n{gradients.describe(about)}; {settings}'
    )
    workdir.save_tables(flag.workdir, 'band_gain', {**about, **own, 'layers': layers}, text)


if __name__ == '__main__':
    main_lib.run(main, 'task', 'optimizer')
