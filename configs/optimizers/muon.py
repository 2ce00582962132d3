"""optax.contrib.muon; Adam for the leaves that are not matrices."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='muon',
            learning_rate=1e-2,
            beta=0.95,
            weight_decay=0.0,
            search_space=dict(
                learning_rate=dict(low=1e-3, high=3e-2),
                beta=dict(low=0.02, high=0.2, one_minus=True),
            ),
        )
    )
