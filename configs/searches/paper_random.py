"""The papers' search: log-uniform over the learning rate, 1 - b1, 1 - b2 and eps.

One space for all, so that no optimizer's is better placed; eps is Adam's for Adam, and in units
of squared gradients for SONew, so it spans both.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            sampler='random',
            trials=10,
            seed=0,
            metric=config_dict.placeholder(str),  # None: the table's first, or train_loss
            space=dict(
                learning_rate=dict(low=1e-3, high=2e-2),
                b1=dict(low=0.02, high=0.2, one_minus=True),
                b2=dict(low=0.002, high=0.2, one_minus=True),
                eps=dict(low=1e-9, high=1e-4),
            ),
        )
    )
