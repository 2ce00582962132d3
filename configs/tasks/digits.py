"""The autoencoder on scikit-learn's 8x8 digits: a small net that trains in seconds."""

from ml_collections import config_dict

from configs.tasks import autoencoder


def get_config() -> config_dict.ConfigDict:
    config = autoencoder.get_config()
    config.update(
        source='digits',
        hidden=(128, 64, 12, 64, 128),
        batch_size=128,
        epochs=60,
        log_every=30,
        checkpoint_every_epochs=10,
    )
    return config
