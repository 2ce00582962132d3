"""All combinations of the values that the optimizer config's search_space gives.

Half of the trials are stopped in the middle of a run.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            sampler='grid',
            seed=0,  # of the order of the trials
            metric=config_dict.placeholder(str),  # None: the table's first, or train_loss
            rungs=(0.5,),  # parts of a run, after which only the best go on
            keep=0.5,  # how many of them, rounded up
        )
    )
