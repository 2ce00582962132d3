"""optax.adagrad."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='adagrad',
            learning_rate=1e-2,
            initial_accumulator_value=0.1,
            eps=1e-7,
        )
    )
