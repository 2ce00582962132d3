"""The papers' autoencoder table: final losses after 100 epochs.

What a row does not set is the optimizer config's. The searches of these rows are still to be run.
``reported`` are the papers' figures, ``confidence`` how sure we are of them.
"""

from ml_collections import config_dict

_KFAC = (
    'kfac-jax 0.0.8, the last release, cannot be imported with jax 0.10 (by TFP, which it uses)'
)


def _row(optimizer: str, settings: dict | None = None, **more: object) -> dict:
    return dict(optimizer=optimizer, settings=settings or {}, **more)


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            task='autoencoder',
            settings={},  # of the task, where they are not its config's
            # Of a run's summary, and how the column is called; the rows are sorted by the first.
            metrics=(('train_loss', 'train loss'), ('test_loss', 'test loss')),
            rows=dict(
                sgd=_row('sgd', label='SGD, momentum'),
                adagrad=_row('adagrad', label='AdaGrad'),
                rmsprop=_row('rmsprop', label='RMSProp'),
                adam=_row('adam', label='Adam', reported=53.59, confidence='recalled'),
                adamw=_row('adamw', label='AdamW'),
                adafactor=_row('adafactor', label='Adafactor'),
                muon=_row('muon', label='Muon'),
                schedule_free=_row('schedule_free_adamw', label='Schedule-Free AdamW'),
                sonew_diagonal=_row(
                    'sonew',
                    dict(band=0),
                    label='SONew, diagonal',
                    reported=53.03,
                    confidence='recalled',
                ),
                sonew_tridiagonal=_row(
                    'sonew',
                    label='SONew, tridiagonal',
                    reported=51.72,
                    confidence='recalled',
                ),
                sonew_band_4=_row(
                    'sonew',
                    dict(band=4),
                    label='SONew, band 4',
                    reported=51.36,
                    confidence='recalled',
                ),
                shared_basis=_row('shared_basis', label='shared basis, rank 32'),
                # The best of its kinds: `experiments/results/autoencoder/mini_blocks_epochs_100`.
                mbag_ema=_row('mbag', dict(decay=0.99), label='MBAG-EMA'),
                soaa=_row('soaa', label='SOAA'),
                block_adam=_row(
                    'block_adam', dict(block_size=16, root_every=10), label='Block Adam, 16'
                ),
                shampoo_250=_row(
                    'shampoo',
                    dict(block_size=250),
                    label='Shampoo, blocks of 250',
                    reported=51.56,
                    confidence='garbled table',
                ),
                shampoo_1000=_row(
                    'shampoo', dict(block_size=1000), label='Shampoo, blocks of 1000'
                ),
                shampoo_every_20=_row(
                    'shampoo',
                    dict(block_size=1000, update_every=20),
                    label='Shampoo, every 20 steps',
                    reported=50.70,
                    confidence='recalled',
                ),
                sketchy=_row('sketchy', label='Sketchy, rank 256'),
                kfac=dict(label='K-FAC', reported=52.90, confidence='read; other net', note=_KFAC),
            ),
        )
    )
