"""optax.adafactor, with momentum."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='adafactor',
            learning_rate=3e-3,
            min_dim_size_to_factor=128,
            momentum=0.9,
            dtype_momentum='float32',  # must be the parameters', or no step can be skipped
            search_space=dict(
                learning_rate=dict(low=1e-3, high=3e-2),
                momentum=dict(low=0.02, high=0.2, one_minus=True),
            ),
        )
    )
