"""optax.adam."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='adam',
            learning_rate=3e-3,
            b1=0.9,
            b2=0.99,
            eps=1e-8,
        )
    )
