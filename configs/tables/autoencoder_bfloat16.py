"""The same with parameters, gradients and activations in bfloat16, SONew's second table.

The floats are those that float32's search found, of MBAG-EMA its second trial's, as the first
one's diverge in float32 already. The paper's figures of this table are not known.
"""

from ml_collections import config_dict

from configs.tables import autoencoder


def get_config() -> config_dict.ConfigDict:
    config = autoencoder.get_config()
    config.settings.update(param_dtype='bfloat16', compute_dtype='bfloat16')
    for row in config.rows.values():
        for figure in ('reported', 'confidence'):  # float32's
            if figure in row:
                del row[figure]
    config.rows.adafactor.settings.dtype_momentum = 'bfloat16'
    low = 'in bfloat16 too, rounded to nearest'
    for name in ('adam', 'adamw', 'rmsprop', 'adagrad'):
        config.rows[name].note = f'second moment {low}'
    config.rows.adafactor.note = f'factors of the second moment {low}'
    config.rows.muon.note = f"second moment of the biases' Adam {low}"
    config.rows.schedule_free.note = (
        f'second moment {low}, and the sum of the weights, which soon stops growing'
    )
    config.rows.mbag_ema.settings.update(learning_rate=2.243e-4, momentum=0.8666, damping=2.153e-2)
    config.rows.mbag_ema.note = (
        'settings of the second trial of its search; stopped, as it diverged in the 28th epoch'
    )
    # So the same for one of ours, whose statistics are float32 else; and for another the mean of
    # the gradients, bfloat16 else, in float32.
    for name, base, kept, dtype, text in (
        ('sonew_tridiagonal_low', 'sonew_tridiagonal', 'stats_dtype', 'bfloat16', 'statistics'),
        ('sonew_band_4_mu', 'sonew_band_4', 'mu_dtype', 'float32', 'mean'),
        ('block_adam_mu', 'block_adam', 'mu_dtype', 'float32', 'mean'),
    ):
        row = config.rows[base].copy_and_resolve_references()
        with row.unlocked():
            row.settings[kept] = dtype
            row.label += f', {text} in {dtype}'
        with config.unlocked():
            config.rows[name] = row
    config.rows.block_adam_mu.note = 'stopped in the fourth epoch, as it gains little'
    return config
