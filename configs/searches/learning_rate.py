"""Four learning rates."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            sampler='grid',
            seed=0,  # of the order of the trials
            metric=config_dict.placeholder(str),  # None: the table's first, or train_loss
            space=dict(learning_rate=dict(grid=(1e-3, 2e-3, 3e-3, 5e-3))),
        )
    )
