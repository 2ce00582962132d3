"""The shared-basis block low-rank preconditioner."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='shared_basis',
            learning_rate=3e-3,
            b1=0.9,
            b2=0.9,
            eps=1e-8,
            nesterov=False,
            rank=32,
            power_iterations=1,
            oversampling=0,
            update_every=1,
            start_step=0,
            root='auto',
            residual_norm='spectral',
            graft='rmsprop_normalized',
            max_block_dim=4096,
            fallback='sgd',  # as in the paper; language models want 'graft', the default
            mu_dtype=config_dict.placeholder(str),
            stats_dtype=config_dict.placeholder(str),
            stochastic_rounding=True,
            seed=0,
            weight_decay=0.0,
            search_space=dict(
                learning_rate=dict(low=5e-4, high=1.5e-2),
                b1=dict(low=0.02, high=0.2, one_minus=True),
                b2=dict(low=0.002, high=0.2, one_minus=True),
                eps=dict(low=1e-9, high=1e-4),
            ),
        )
    )
