"""The table of taggers for a CPU: a small model on UPOS of PTNK.

Blocks of matrices and ranks are those of the paper's table, divided as the widths are; mini-blocks
are as large as there. Floats are the best of the row's search, where there is one (16 random
trials of the whole 20 epochs, `experiments/results/pos_tagging/small_search`), with four digits.
"""

from ml_collections import config_dict

from configs.tables import pos_tagging

_SMALLER = dict(
    shared_basis=(dict(rank=8), 'shared basis, rank 8'),
    shampoo_512=(dict(block_size=64), 'Shampoo, blocks of 64'),
    shampoo_1024=(dict(block_size=128), 'Shampoo, blocks of 128'),
    sketchy=(dict(rank=32, block_size=128), 'Sketchy, rank 32'),
)
FOUND = dict(
    adam=dict(b1=0.8819, b2=0.9978, eps=1.473e-06, learning_rate=0.004144),
    block_adam=dict(b1=0.8819, b2=0.9978, eps=1.473e-06, learning_rate=0.006383),
    sonew_tridiagonal=dict(b1=0.9347, b2=0.9296, learning_rate=0.01931, relative_eps=1.097e-06),
    sonew_band_4=dict(b1=0.9347, b2=0.9296, learning_rate=0.01931, relative_eps=1.097e-06),
    shared_basis=dict(b1=0.8146, b2=0.9751, eps=7.302e-05, learning_rate=0.005686),
    mbag=dict(damping=0.0001694, learning_rate=0.001419, momentum=0.9451),
    soaa=dict(b1=0.9289, b2=0.9478, eps=2.848e-08, gamma=0.2275, learning_rate=0.004169),
    shampoo_512=dict(b1=0.8146, b2=0.9751, eps=7.302e-05, learning_rate=0.005686),
    shampoo_1024=dict(b1=0.8146, b2=0.9751, eps=7.302e-05, learning_rate=0.005686),
    sketchy=dict(b1=0.8146, b2=0.9751, eps=7.302e-05, learning_rate=0.005686),
    shared_basis_graft=dict(b1=0.9454, b2=0.9977, eps=5.602e-07, learning_rate=0.002198),
)


def get_config() -> config_dict.ConfigDict:
    config = pos_tagging.get_config()
    # That of the reference pipeline is of use beside the papers' figures alone.
    config.metrics = tuple(m for m in config.metrics if 'with_root' not in m[0])
    config.task = 'pos_tagging_small'
    for row in config.rows.values():
        for figure in ('reported', 'confidence'):  # of another model
            if figure in row:
                del row[figure]
    for name, (settings, label) in _SMALLER.items():
        row = config.rows[name]
        with row.settings.unlocked():
            row.settings.update(settings)
        row.label = label
    other = config.rows.shared_basis.copy_and_resolve_references()
    with other.unlocked():
        other.settings.fallback = 'graft'
        other.label += ', embeddings by RMSProp'
    config.rows.shared_basis_graft = other
    for name, row in config.rows.items():
        if name in FOUND:
            with row.settings.unlocked():
                row.settings.update(FOUND[name])
        else:
            row.note = 'not searched, the settings are those of its config'
    return config
