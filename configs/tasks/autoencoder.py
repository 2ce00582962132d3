"""MNIST autoencoder, 784-1000-500-250-30-250-500-1000-784, as in the SONew paper."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='autoencoder',
            source='mnist',  # mnist, digits (scikit-learn's 8x8, embedded) or synthetic
            hidden=(1000, 500, 250, 30, 250, 500, 1000),  # units; the smallest is the code
            param_dtype='float32',  # or bfloat16; the gradients have it too
            compute_dtype='float32',  # of the activations; the loss is float32
            batch_size=1000,  # examples
            epochs=100,  # of num_train // batch_size steps, the remainder dropped
            warmup_epochs=5,  # the first of them at learning rate 0
            seed=0,  # of the parameters and of the shuffling
            log_every=20,  # steps between two log lines: one compiled scan
            checkpoint_every_epochs=1,  # a multiple of log_every steps, rounded up
            max_consecutive_errors=5,  # non-finite gradients skipped in a row
        )
    )
