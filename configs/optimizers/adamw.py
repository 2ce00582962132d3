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
            search_space=dict(
                learning_rate=dict(low=3e-4, high=1e-2),
                b1=dict(low=0.02, high=0.2, one_minus=True),
                b2=dict(low=0.002, high=0.2, one_minus=True),
                eps=dict(low=1e-9, high=1e-4),
                weight_decay=dict(low=1e-6, high=0.3),
            ),
        )
    )
