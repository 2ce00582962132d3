"""What a step of the paper's tagger costs: rows of `pos_tagging` for `experiments.train_cost`."""

from ml_collections import config_dict

from configs.tables import pos_tagging


def get_config() -> config_dict.ConfigDict:
    config = pos_tagging.get_config()
    every_10 = config.rows.shared_basis.copy_and_resolve_references()
    with every_10.unlocked():
        every_10.settings = dict(update_every=10)
        every_10.label += ', every 10 steps'
        del every_10.reported, every_10.confidence
    config.rows.shared_basis_every_10 = every_10
    return config
