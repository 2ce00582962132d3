"""optax.adamw."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='adamw',
            learning_rate=3e-3,
            b1=0.9,
            b2=0.99,
            eps=1e-8,
            weight_decay=1e-4,
        )
    )
