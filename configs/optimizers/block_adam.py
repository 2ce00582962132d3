"""Block Adam."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='block_adam',
            learning_rate=3e-3,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            block_size=32,
            root_every=1,
            root='auto',
            graft=config_dict.placeholder(str),
            mu_dtype=config_dict.placeholder(str),
            stats_dtype=config_dict.placeholder(str),
            stochastic_rounding=True,
            weight_decay=0.0,
            search_space=dict(
                learning_rate=dict(low=5e-4, high=1.5e-2),
                b1=dict(low=0.02, high=0.2, one_minus=True),
                b2=dict(low=0.002, high=0.2, one_minus=True),
                eps=dict(low=1e-9, high=1e-4),
            ),
        )
    )
