"""The grid behind SONew's default b2 and eps, beyond the corner where the first one ended."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            sampler='grid',
            seed=0,  # of the order of the trials
            metric='train_loss',
            space=dict(b2=dict(grid=(0.8, 0.9, 0.95)), eps=dict(grid=(1e-4, 1e-3, 1e-2))),
        )
    )
