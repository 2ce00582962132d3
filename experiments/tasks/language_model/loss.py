"""The loss, what is summed up in an evaluation, and the learning-rate schedule."""

import math

import jax
import jax.numpy as jnp
import optax

DECAYS = ('cosine', 'linear', 'constant')


def token_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each token the cross-entropy in nats, and log z, the softmax' denominator.

    Args:
      logits: of shape (..., V), float32.
      targets: of shape (...), the right ones.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A sum, not a look-up: logits that are cut along the vocabulary stay where they are.
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    right = jnp.sum(jnp.where(places == targets[..., None], logits, 0), axis=-1)
    return log_z - right, log_z


def training_loss(logits: jax.Array, targets: jax.Array, z_loss: float) -> jax.Array:
    """The mean cross-entropy in nats, and ``z_loss`` times the mean square of log z."""
    nats, log_z = token_losses(logits, targets)
    return jnp.mean(nats) + (z_loss * jnp.mean(log_z**2) if z_loss else 0.0)


def sums(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, num_bytes: jax.Array
) -> dict[str, jax.Array]:
    """What `metrics` takes, of one batch; the sums of batches are those of all rows.

    Args:
      logits: of shape (B, T, V), float32.
      targets: of shape (B, T).
      weights: of shape (B,), 0 for rows that do not count.
      num_bytes: the bytes of each token of the vocabulary.
    """
    nats, log_z = token_losses(logits, targets)
    each = {
        'nats': nats,
        'tokens': jnp.ones_like(nats),
        'bytes': num_bytes[targets].astype(jnp.float32),
        'squared_log_z': log_z**2,
    }
    return {name: jnp.sum(x * weights[:, None]) for name, x in each.items()}


def metrics(summed: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The loss in nats per token, without z-loss, and what follows from it.

    ``bits_per_byte`` is the same measure for all tokenizers: all nats over all bytes of the text
    and ln 2. The ends of documents are foretold, too, and have no byte.
    """
    mean = summed['nats'] / summed['tokens']
    return {
        'loss': mean,
        'perplexity': jnp.exp(mean),
        'bits_per_byte': summed['nats'] / summed['bytes'] / math.log(2),
        'squared_log_z': summed['squared_log_z'] / summed['tokens'],
    }


def warmup_then_decay(
    peak: float,
    steps: int,
    warmup_steps: int,
    decay: str,
    final_fraction: float,
    anneal: bool = True,
) -> optax.Schedule:
    """By step: linearly up to the peak, then down to a part of it, which the last step has.

    With w steps of warm-up, step t from 1 on has peak * t / w; after them, with the part
    p = (t - w) / (steps - w) of the way, ``final_fraction`` + (1 - ``final_fraction``) times
    (1 + cos(pi p)) / 2 for 'cosine', 1 - p for 'linear' and 1 for 'constant' of it. Without
    ``anneal`` the peak is kept.

    Raises:
      ValueError: unless ``0 <= warmup_steps <= steps``, ``0 <= final_fraction <= 1`` and the
        decay is known.
    """
    if not 0 <= warmup_steps <= steps:
        raise ValueError(
            f'task.warmup_steps must be in [0, task.steps = {steps}], got {warmup_steps}.'
        )
    if not 0 <= final_fraction <= 1:
        raise ValueError(f'task.final_fraction must be in [0, 1], got {final_fraction!r}.')
    if decay not in DECAYS:
        raise ValueError(f'task.decay must be one of {list(DECAYS)}, got {decay!r}.')

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count) + 1
        up = jnp.minimum(step / max(warmup_steps, 1), 1) if warmup_steps else 1.0
        way = jnp.clip((step - warmup_steps) / max(steps - warmup_steps, 1), 0, 1)
        left = {
            'cosine': (1 + jnp.cos(jnp.pi * way)) / 2,
            'linear': 1 - way,
            'constant': jnp.ones_like(way),
        }[decay if anneal else 'constant']
        return peak * up * (final_fraction + (1 - final_fraction) * left)

    return schedule
