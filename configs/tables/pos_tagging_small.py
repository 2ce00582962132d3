"""The table of taggers for a CPU: a small model on UPOS of PTNK.

Blocks and ranks are those of the paper's table, divided as the widths are.
"""

from ml_collections import config_dict

from configs.tables import pos_tagging

_SMALLER = dict(
    shared_basis=('rank', 8, 'shared basis, rank 8'),
    shampoo_512=('block_size', 64, 'Shampoo, blocks of 64'),
    shampoo_1024=('block_size', 128, 'Shampoo, blocks of 128'),
    sketchy=('rank', 32, 'Sketchy, rank 32'),
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
    return config
