"""SONew, tridiagonal; band=0 is the diagonal method, above 1 the banded one."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='sonew',
            learning_rate=3e-3,
            b1=0.9,
            b2=0.9,
            # What serves the autoencoder, without the library's default for any loss, which is
            # eps=1e-16 and mean_eps=0.1.
            eps=1e-4,
            mean_eps=config_dict.placeholder(float),
            nesterov=False,
            band=1,
            order='F',
            edge_tolerance=config_dict.placeholder(float),
            relative_eps=0.0,
            graft='adam',
            delayed_graft=False,
            mu_dtype=config_dict.placeholder(str),
            stats_dtype=config_dict.placeholder(str),
            stochastic_rounding=True,
            diagnostics=False,
            impl='auto',
            weight_decay=0.0,
            schedules=dict(),
            layout=(),
            search_space=dict(
                learning_rate=dict(low=1e-3, high=3e-2),
                b1=dict(low=0.02, high=0.2, one_minus=True),
                b2=dict(low=0.002, high=0.2, one_minus=True),
                eps=dict(low=1e-7, high=1e-2),
            ),
        )
    )
