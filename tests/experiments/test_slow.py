"""The main job on the real data, for a few epochs. Run by `make test-slow`."""

import pytest

from configs.optimizers import adam, sonew
from configs.tasks import autoencoder
from experiments import train


@pytest.mark.slow
@pytest.mark.usefixtures('optimized')
def test_sonew_beats_adam_on_real_mnist(data_dir, tmp_path):
    """Four epochs at the configs' settings. Measured: far apart; asserted: clearly apart."""
    task = autoencoder.get_config()
    task.update(epochs=4, warmup_epochs=2)
    losses = {}
    for config in (adam, sonew):
        optimizer = config.get_config()
        folder = tmp_path / optimizer.name
        summary = train.train_and_evaluate(task, optimizer, folder, data_dir, progress=False)
        losses[optimizer.name] = summary['train_loss']
        assert summary['notfinite'] == 0
    assert losses['sonew'] < losses['adam'] - 10, losses
