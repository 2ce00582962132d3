"""Four learning rates, higher ones: where SONew's best lie."""

from ml_collections import config_dict

from configs.searches import learning_rate


def get_config() -> config_dict.ConfigDict:
    config = learning_rate.get_config()
    config.space.learning_rate.grid = (3e-3, 5e-3, 8e-3, 1.2e-2)
    return config
