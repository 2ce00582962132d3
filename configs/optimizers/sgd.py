"""optax.sgd, with momentum."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='sgd',
            learning_rate=1e-3,
            momentum=0.9,
            nesterov=False,
            search_space=dict(
                learning_rate=dict(low=1e-4, high=3e-3),
                momentum=dict(low=0.02, high=0.2, one_minus=True),
            ),
        )
    )
