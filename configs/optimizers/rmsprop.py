"""optax.rmsprop, with momentum."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='rmsprop',
            learning_rate=3e-4,
            decay=0.99,
            eps=1e-8,
            momentum=0.9,
        )
    )
