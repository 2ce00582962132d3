"""Autoencoder on images: binary cross-entropy summed over the pixels, mean over the batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.tasks import Task
from experiments.tasks.autoencoder import data, loss, model


def make_task(config: Mapping[str, Any], data_dir: str | None) -> Task:
    """The task; see ``configs/tasks/autoencoder.py`` for the fields of ``config``."""
    train, test = data.load(config['source'], data_dir)
    if not 1 <= config['batch_size'] <= len(train):
        raise ValueError(
            f'task.batch_size must be in [1, {len(train)}] for source {config["source"]!r}, '
            f'got {config["batch_size"]}.'
        )
    hidden = tuple(config['hidden'])
    if not hidden or not all(isinstance(units, int) and units > 0 for units in hidden):
        raise ValueError(f'task.hidden must be integers >= 1, one at least, got {hidden!r}.')
    dtypes = {name: config[name] for name in ('param_dtype', 'compute_dtype')}
    for name, dtype in dtypes.items():
        if dtype not in ('float32', 'bfloat16'):
            raise ValueError(f"task.{name} must be 'float32' or 'bfloat16', got {dtype!r}.")
    steps_per_epoch = len(train) // config['batch_size']
    sizes = (train.shape[1], *hidden, train.shape[1])

    def make(rngs: nnx.Rngs) -> model.Autoencoder:
        return model.Autoencoder(sizes, rngs, **dtypes)

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: jax.Array) -> Any:
        network = make(nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(network, nnx.Param))

    def pixels_of(images: jax.Array) -> jax.Array:
        return images.astype(jnp.float32) / data.MAX_PIXEL[config['source']]

    def batch_loss(params: Any, images: jax.Array) -> jax.Array:
        pixels = pixels_of(images)
        return loss.reconstruction_loss(nnx.merge(graphdef, params)(pixels), pixels)

    def schedule(peak: float, anneal: bool = True) -> optax.Schedule:
        return loss.warmup_then_linear(
            peak, config['epochs'], config['warmup_epochs'], steps_per_epoch, anneal
        )

    arrays = {'train_loss': jnp.asarray(train), 'test_loss': jnp.asarray(test)}

    @jax.jit
    def mean_loss(params: Any, images: jax.Array) -> jax.Array:
        # In slices: 60,000 examples at once would need gigabytes of activations.
        chunk = min(1000, len(images))
        whole = len(images) // chunk * chunk
        slices = images[:whole].reshape(-1, chunk, images.shape[1])
        total = chunk * jnp.sum(jax.lax.map(lambda x: batch_loss(params, x), slices))
        if whole < len(images):
            total += (len(images) - whole) * batch_loss(params, images[whole:])
        return total / len(images)

    @jax.jit
    def constant_units(params: Any) -> jax.Array:
        images = jnp.asarray(train[:: -(-len(train) // 1000)])  # every so many: they are sorted
        return nnx.merge(graphdef, params).constant_units(pixels_of(images))

    return Task(
        train_data=arrays['train_loss'],
        batch_size=config['batch_size'],
        epochs=config['epochs'],
        init=init,
        loss=batch_loss,
        schedule=schedule,
        evaluate=lambda params: {k: mean_loss(params, x) for k, x in arrays.items()},
        describe=lambda params: {'constant_units': float(constant_units(params))},
    )
