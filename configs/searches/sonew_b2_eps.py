"""The grid behind SONew's default b2 and eps."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            sampler='grid',
            seed=0,  # of the order of the trials
            metric=config_dict.placeholder(str),  # None: the table's first, or train_loss
            space=dict(b2=dict(grid=(0.9, 0.95, 0.99)), eps=dict(grid=(1e-8, 1e-6, 1e-4))),
        )
    )
