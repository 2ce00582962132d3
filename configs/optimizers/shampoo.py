"""Shampoo with blocking, as in the benchmarks: `--optimizer.block_size=250` is their other one."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='shampoo',
            learning_rate=3e-3,
            b1=0.9,
            b2=0.99,
            eps=1e-6,
            nesterov=False,
            block_size=1024,
            update_every=10,
            start_step=101,
            root='auto',
            graft='rmsprop_normalized',
            max_dim=4096,
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
