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
            search_space=dict(
                learning_rate=dict(low=3e-5, high=1e-3),
                decay=dict(low=0.002, high=0.2, one_minus=True),
                eps=dict(low=1e-9, high=1e-4),
                momentum=dict(low=0.02, high=0.2, one_minus=True),
            ),
        )
    )
