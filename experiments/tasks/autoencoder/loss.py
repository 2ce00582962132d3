"""The loss and the learning-rate schedule."""

import jax
import jax.numpy as jnp
import optax


def reconstruction_loss(logits: jax.Array, pixels: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy, summed over the pixels, mean over the batch. In nats.

    Args:
      logits: of shape (batch, pixels).
      pixels: the targets in [0, 1], of the same shape.
    """
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, pixels), axis=-1))


def warmup_then_linear(
    peak: float, epochs: int, warmup_epochs: int, steps_per_epoch: int, anneal: bool = True
) -> optax.Schedule:
    """One learning rate for each epoch: up from 0 to the peak, then linearly towards 0.

    Epochs count from 0. The warm-up's epochs are spread evenly from 0 to the peak, both reached;
    the line down would reach 0 at the epoch after the last. With 5 of 10 epochs of warm-up and
    peak 1: 0, 1/4, 2/4, 3/4, 1, 5/6, 4/6, 3/6, 2/6, 1/6. Without ``anneal`` the peak is kept.

    Raises:
      ValueError: unless ``1 <= warmup_epochs <= epochs``.
    """
    if not 1 <= warmup_epochs <= epochs:
        raise ValueError(
            f'task.warmup_epochs must be in [1, task.epochs = {epochs}], got {warmup_epochs}.'
        )
    top = warmup_epochs - 1

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        epoch = jnp.asarray(count) // steps_per_epoch
        up = epoch / max(top, 1) if top else 1.0
        down = (epochs - epoch) / (epochs - top) if anneal else 1.0
        return peak * jnp.clip(jnp.minimum(up, down), 0)

    return schedule
