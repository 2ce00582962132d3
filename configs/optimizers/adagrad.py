"""optax.adagrad."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='adagrad',
            learning_rate=1e-2,
            initial_accumulator_value=0.1,
            eps=1e-7,
            search_space=dict(
                learning_rate=dict(low=2e-3, high=6e-2),
                initial_accumulator_value=dict(low=1e-3, high=1.0),
                eps=dict(low=1e-9, high=1e-4),
            ),
        )
    )
