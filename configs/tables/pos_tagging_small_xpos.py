"""The same small model on XPOS, trained on the treebank of the paper's table, for 10 epochs.

The settings are those found for UPOS on PTNK; the learning rate, which a search at another length
and on another treebank tells little of, is searched again around the one found:

python -m experiments.table --stage=search --epochs=4 --search=configs/searches/grid.py \\
    --table=configs/tables/pos_tagging_small_xpos.py --table.settings.warmup_epochs=1 \\
    --workdir=DIR --data_dir=DATA
"""

from ml_collections import config_dict

from configs.tables import pos_tagging_small
from configs.tasks import pos_tagging_small as small

_MODEL = ('layers', 'width', 'heads', 'qkv', 'mlp', 'dropout', 'word_dropout')
_FACTORS = (0.25, 0.5, 1, 2)
# The best ones.
_RATES = dict(
    adam=0.004144,
    block_adam=0.01277,
    sonew_tridiagonal=0.03862,
    sonew_band_4=0.03862,
    shared_basis=0.01137,
    shared_basis_graft=0.002198,
    soaa=0.002084,
    mbag=0.002838,
    shampoo_512=0.005686,
    shampoo_1024=0.005686,
    sketchy=0.01137,
)


def get_config() -> config_dict.ConfigDict:
    config = pos_tagging_small.get_config()
    task = small.get_config()
    config.task = 'pos_tagging'
    config.settings = {name: task[name] for name in _MODEL}
    config.settings.update(epochs=10, warmup_epochs=2, checkpoint_every_epochs=2)
    for name, found in pos_tagging_small.FOUND.items():
        rate = found['learning_rate']
        grid = tuple(float(f'{factor * rate:.4g}') for factor in _FACTORS)
        row = config.rows[name]
        with row.settings.unlocked():
            row.settings.search_space = dict(learning_rate=dict(grid=grid))
            row.settings.learning_rate = _RATES[name]
    return config
