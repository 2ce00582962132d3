"""The papers' search at Adam's lower learning rates: half of those of `paper_random` are too
large for it. So Adam gets twice the trials of the others.
"""

from ml_collections import config_dict

from configs.searches import paper_random


def get_config() -> config_dict.ConfigDict:
    config = paper_random.get_config()
    config.space.learning_rate.update(low=3e-4, high=5e-3)
    return config
