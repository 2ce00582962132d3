"""The autoencoder on scikit-learn's 8x8 digits: a small net that trains in seconds."""

from ml_collections import config_dict

from configs.tasks import autoencoder


def get_config() -> config_dict.ConfigDict:
    config = autoencoder.get_config()
    config.update(
        source='digits',
        hidden=(256, 128, 64, 16, 64, 128, 256),
        batch_size=128,
        epochs=20,
        log_every=12,  # an epoch
        checkpoint_every_epochs=5,
    )
    return config
