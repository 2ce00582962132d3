"""SONew, tridiagonal; band=0 is the diagonal method, above 1 the banded one."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='sonew',
            learning_rate=3e-3,
            b1=0.9,
            b2=0.9,
            eps=1e-4,
            band=1,
            order='F',
            edge_tolerance=config_dict.placeholder(float),
            relative_eps=0.0,
            graft='adam',
            mu_dtype=config_dict.placeholder(str),
            stats_dtype=config_dict.placeholder(str),
            stochastic_rounding=True,
            diagnostics=False,
            weight_decay=0.0,
        )
    )
