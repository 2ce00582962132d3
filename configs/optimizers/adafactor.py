"""optax.adafactor, with momentum."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='adafactor',
            learning_rate=3e-3,
            min_dim_size_to_factor=128,
            momentum=0.9,
        )
    )
