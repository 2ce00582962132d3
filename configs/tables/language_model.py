"""Optimizers on the language model, `--table=configs/tables/language_model.py:SIZE`.

For CPUs, so with shorter runs than the sizes' own: tiny on the novels' bytes, small on their
SentencePiece tokens. What a row does not set is the optimizer config's. Searches take shorter runs
by `--table.settings.steps=N --table.settings.warmup_steps=M`; trials are stopped at checkpoints.
Floats are the best of the row's search, where there is one, with four digits
(`experiments/results/language_model/tiny_search` and `small_search`).
"""

from typing import Any

from ml_collections import config_dict

from configs.tables import pos_tagging

_LENGTHS = dict(
    tiny=dict(
        files=('text/books/*.txt',),
        length=128,
        batch_size=16,
        steps=2000,
        warmup_steps=200,
        log_every=50,
        checkpoint_every_steps=50,
        evaluate_every_steps=250,
        evaluate_batches=64,
    ),
    small=dict(
        remat='dots',  # on CPUs what is kept costs more than what is computed again
        batch_size=4,
        steps=600,
        warmup_steps=60,
        log_every=20,
        checkpoint_every_steps=60,
        evaluate_every_steps=100,
        evaluate_batches=32,
    ),
)
_FOUND: dict[str, dict[str, dict[str, float]]] = dict(
    tiny=dict(
        adamw=dict(
            b1=0.8801, b2=0.994, eps=1.322e-05, learning_rate=0.008868, weight_decay=0.2124
        ),
        adafactor=dict(learning_rate=0.02682, momentum=0.9295),
        sonew_tridiagonal=dict(b1=0.8506, b2=0.827, learning_rate=0.01923, relative_eps=0.0004511),
        sonew_band_4=dict(b1=0.8146, b2=0.9751, learning_rate=0.02734, relative_eps=0.00375),
        shared_basis=dict(b1=0.8146, b2=0.9751, eps=7.302e-05, learning_rate=0.005686),
    ),
    small=dict(
        adamw=dict(
            b1=0.8146, b2=0.9751, eps=7.302e-05, learning_rate=0.003679, weight_decay=0.00663
        ),
        adafactor=dict(learning_rate=0.02682, momentum=0.9295),
        sonew_tridiagonal=dict(
            b1=0.9289, b2=0.9478, learning_rate=0.00269, relative_eps=0.0003582
        ),
        shared_basis=dict(b1=0.9478, b2=0.9448, eps=1.001e-09, learning_rate=0.001398),
        shared_basis_graft=dict(b1=0.8437, b2=0.9908, eps=1.277e-05, learning_rate=0.0005762),
    ),
)


def _row(optimizer: str, label: str, **settings: Any) -> dict[str, Any]:
    return dict(optimizer=optimizer, settings=settings, label=label)


def get_config(size: str = 'tiny') -> config_dict.ConfigDict:
    """The table of a size.

    Raises:
      ValueError: if there is none.
    """
    if size not in _LENGTHS:
        raise ValueError(f'there are tables of {list(_LENGTHS)}, got {size!r}.')
    rows = dict(
        adamw=_row('adamw', 'AdamW'),
        adafactor=_row('adafactor', 'Adafactor'),
        sonew_tridiagonal=_row('sonew', 'SONew, tridiagonal', **pos_tagging.SONEW),
        sonew_band_4=_row('sonew', 'SONew, band 4', band=4, **pos_tagging.SONEW),
        shared_basis=_row('shared_basis', 'shared basis, rank 32'),
    )
    if size == 'small':  # roots of rank 32 in each step would take a CPU longer than the model
        cheaper = dict(rank=8, update_every=10)
        label = 'shared basis, rank 8, every 10'
        rows['shared_basis'] = _row('shared_basis', label, **cheaper)
        # The row before gives the embedding the gradient with RMSProp's norm, as in the paper.
        rows['shared_basis_graft'] = _row(
            'shared_basis', f'{label}, the embedding by RMSProp', fallback='graft', **cheaper
        )
    rows['adafactor']['note'] = (
        "Optax's: it clips the update of all stacked layers as one, and leaves the second moment "
        "of attention's kernels whole, whose heads are narrower than 128"
    )
    for name, found in _FOUND[size].items():
        rows[name]['settings'].update(found)
    return config_dict.ConfigDict(
        dict(
            task=f'language_model:{size}',
            settings=_LENGTHS[size],
            metrics=(
                ('validation_loss', 'validation loss', 1.0, 3),
                ('validation_bits_per_byte', 'bits per byte', 1.0, 3),
                ('train_loss', 'train loss', 1.0, 3),
            ),
            reference='adamw',
            rows=rows,
        )
    )
