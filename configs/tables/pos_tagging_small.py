"""The table of taggers for a CPU: a small model on UPOS of PTNK.

Blocks and ranks are those of the paper's table, divided as the widths are. Floats are the best of
the row's search, where there is one yet (16 random trials of the whole 20 epochs,
`experiments/results/pos_tagging/small_search`), with four digits.
"""

from ml_collections import config_dict

from configs.tables import pos_tagging

_SMALLER = dict(
    shared_basis=('rank', 8, 'shared basis, rank 8'),
    shampoo_512=('block_size', 64, 'Shampoo, blocks of 64'),
    shampoo_1024=('block_size', 128, 'Shampoo, blocks of 128'),
    sketchy=('rank', 32, 'Sketchy, rank 32'),
)
_FOUND = dict(
    adam=dict(b1=0.8146, b2=0.9751, eps=7.302e-05, learning_rate=0.003679),
    block_adam=dict(b1=0.8819, b2=0.9978, eps=1.473e-06, learning_rate=0.006383),
    sonew_tridiagonal=dict(b1=0.8437, b2=0.9908, learning_rate=0.01633, relative_eps=1.616e-06),
    sonew_band_4=dict(b1=0.8506, b2=0.827, learning_rate=0.01923, relative_eps=0.0004511),
    shared_basis=dict(b1=0.8146, b2=0.9751, eps=7.302e-05, learning_rate=0.005686),
    soaa=dict(b1=0.8146, b2=0.9751, eps=7.302e-05, gamma=0.316, learning_rate=0.002146),
    shampoo_1024=dict(b1=0.8146, b2=0.9751, eps=7.302e-05, learning_rate=0.005686),
)


def get_config() -> config_dict.ConfigDict:
    config = pos_tagging.get_config()
    config.task = 'pos_tagging_small'
    for row in config.rows.values():
        for figure in ('reported', 'confidence'):  # of another model
            if figure in row:
                del row[figure]
    for name, (setting, value, label) in _SMALLER.items():
        row = config.rows[name]
        with row.settings.unlocked():
            row.settings[setting] = value
        row.label = label
    for name, found in _FOUND.items():
        with config.rows[name].settings.unlocked():
            config.rows[name].settings.update(found)
    return config
