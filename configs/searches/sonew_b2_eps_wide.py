"""The grid behind SONew's default b2 and eps, beyond the corner where the first one ended."""

from ml_collections import config_dict

from configs.searches import sonew_b2_eps


def get_config() -> config_dict.ConfigDict:
    config = sonew_b2_eps.get_config()
    config.space.b2.grid = (0.8, 0.9, 0.95)
    config.space.eps.grid = (1e-4, 1e-3, 1e-2)
    return config
