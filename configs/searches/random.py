"""Log-uniform random search over the optimizer's own ranges, the same budget for all.

Half of the trials that are left are stopped at 40 % and at 70 % of a run: of 16, 4 get to the
end.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            sampler='random',
            trials=16,
            seed=0,
            metric=config_dict.placeholder(str),  # None: the table's first, or train_loss
            rungs=(0.4, 0.7),  # parts of a run, after which only the best go on
            keep=0.5,  # how many of them, rounded up
        )
    )
