"""The paper's table of taggers: the best accuracy on dev, and that on test at the same step.

With the paper's model, which needs a GPU; ``pos_tagging_small`` and ``pos_tagging_small_xpos`` are
for CPUs. ``reported`` are the shared basis paper's figures, with its artificial ROOT tokens and on
the official training data, so they stand beside the column with ROOT. What a row does not set is
the optimizer config's.
"""

from ml_collections import config_dict

_CONFIDENCE = 'with ROOT'
# Damped in units of each leaf's own statistics: the config's eps is of the autoencoder's summed
# loss, whose gradients are far larger.
SONEW = dict(
    eps=1e-12,
    relative_eps=1e-4,
    search_space=dict(
        learning_rate=dict(low=1e-3, high=3e-2),
        b1=dict(low=0.02, high=0.2, one_minus=True),
        b2=dict(low=0.002, high=0.2, one_minus=True),
        relative_eps=dict(low=1e-6, high=1e-1),
    ),
)


def _row(optimizer: str, settings: dict | None = None, **more: object) -> dict:
    return dict(optimizer=optimizer, settings=settings or {}, **more)


def get_config() -> config_dict.ConfigDict:
    config = config_dict.ConfigDict(
        dict(
            task='pos_tagging',
            settings={},
            metrics=(
                ('best_dev_accuracy', 'dev %', 100.0),
                ('at_best_dev/test_accuracy', 'test %', 100.0),
                ('at_best_dev/dev_accuracy_with_root', 'dev with ROOT %', 100.0),
                ('at_best_dev/dev_sentence_accuracy', 'dev sentences %', 100.0),
            ),
            largest=True,
            baseline=dict(
                label='most frequent tag',
                metrics={
                    'best_dev_accuracy': 'most_frequent_tag/dev_accuracy',
                    'at_best_dev/test_accuracy': 'most_frequent_tag/test_accuracy',
                },
            ),
            rows=dict(
                adam=_row('adam', label='Adam', reported=67.36),
                block_adam=_row(
                    'block_adam', dict(block_size=8), label='Block Adam, 8', reported=70.43
                ),
                sonew_tridiagonal=_row('sonew', SONEW, label='SONew, tridiagonal'),
                sonew_band_4=_row('sonew', dict(band=4, **SONEW), label='SONew, band 4'),
                shared_basis=_row('shared_basis', label='shared basis, rank 32', reported=70.63),
                mbag=_row('mbag', label='MBAG'),
                soaa=_row('soaa', label='SOAA'),
                shampoo_512=_row(
                    'shampoo',
                    dict(block_size=512),
                    label='Shampoo, blocks of 512',
                    reported=68.79,
                ),
                shampoo_1024=_row(
                    'shampoo',
                    dict(block_size=1024),
                    label='Shampoo, blocks of 1024',
                    reported=68.81,
                ),
                sketchy=_row('sketchy', label='Sketchy, rank 256', reported=68.32),
            ),
        )
    )
    for row in config.rows.values():
        if 'reported' in row:
            row.confidence = _CONFIDENCE
    return config
