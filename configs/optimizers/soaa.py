"""SOAA, a diagonal Fisher matrix with a trust region that follows the loss."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='soaa',
            learning_rate=3e-3,
            b1=0.9,
            b2=0.999,
            gamma=0.25,
            eps=1e-8,
            total_steps=config_dict.placeholder(int),  # None: the run's
            fisher='uncentered',  # or centered
            mu_dtype=config_dict.placeholder(str),
            stats_dtype=config_dict.placeholder(str),
            stochastic_rounding=True,
            weight_decay=0.0,
            search_space=dict(
                learning_rate=dict(low=2e-4, high=6e-3),
                b1=dict(low=0.02, high=0.2, one_minus=True),
                b2=dict(low=0.002, high=0.2, one_minus=True),
                gamma=dict(low=0.1, high=0.5),
                eps=dict(low=1e-9, high=1e-4),
            ),
        )
    )
