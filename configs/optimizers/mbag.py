"""MBAG; ``--optimizer.decay=0.95`` is MBAG-EMA, ``--optimizer.root=False`` MBAG-N."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='mbag',
            learning_rate=1e-2,
            momentum=0.9,
            damping=0.01,
            block_size=32,
            root_every=50,
            newton_schulz_steps=10,
            decay=config_dict.placeholder(float),
            root=True,
            order='F',
            graft=config_dict.placeholder(str),
            mu_dtype=config_dict.placeholder(str),
            stats_dtype=config_dict.placeholder(str),
            stochastic_rounding=True,
            weight_decay=0.0,
            search_space=dict(
                learning_rate=dict(low=1e-4, high=3e-3),
                momentum=dict(low=0.02, high=0.2, one_minus=True),
                damping=dict(low=1e-4, high=1e-1),
            ),
        )
    )
