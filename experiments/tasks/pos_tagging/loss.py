"""The loss, what is counted in an evaluation, and the learning-rate schedule."""

import collections
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from experiments.tasks.pos_tagging import vocabulary


def token_losses(logits: jax.Array, tags: jax.Array) -> jax.Array:
    """Cross-entropy in nats of each token, of shape (batch, length); 0 where there is no tag."""
    known = tags != vocabulary.NO_TAG
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, tags, 0))
    return jnp.where(known, losses, 0)


def mean_loss(logits: jax.Array, tags: jax.Array) -> jax.Array:
    """The mean of `token_losses` over the tokens with a tag."""
    count = jnp.sum(tags != vocabulary.NO_TAG)
    return jnp.sum(token_losses(logits, tags)) / jnp.maximum(count, 1)


def counts(logits: jax.Array, words: jax.Array, tags: jax.Array) -> dict[str, jax.Array]:
    """What `ratios` takes, of one batch; sums of batches are those of all sentences."""
    tokens = words != vocabulary.PADDING
    right = (jnp.argmax(logits, axis=-1) == tags) & tokens
    sentences = tokens.any(axis=-1)
    return {
        'loss': jnp.sum(token_losses(logits, tags)),
        'tagged': jnp.sum(tags != vocabulary.NO_TAG),
        'tokens': jnp.sum(tokens),
        'right': jnp.sum(right),
        'sentences': jnp.sum(sentences),
        'right_sentences': jnp.sum(sentences & (right == tokens).all(axis=-1)),
    }


def ratios(counted: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The metrics of a split.

    ``accuracy`` is the part of the tokens that are right. A tag that the training data have not
    cannot be right; the loss, which would be infinite there, leaves it out.
    ``accuracy_with_root`` counts one more token in each sentence, right, as the reference
    pipeline does: only for comparisons with the paper's figures.
    """
    c = counted
    return {
        'loss': c['loss'] / jnp.maximum(c['tagged'], 1),
        'accuracy': c['right'] / c['tokens'],
        'accuracy_with_root': (c['right'] + c['sentences']) / (c['tokens'] + c['sentences']),
        'sentence_accuracy': c['right_sentences'] / c['sentences'],
    }


def confusions(answers: Iterable[tuple[str, str]], worst: int) -> list[tuple[str, str, int]]:
    """From pairs of right and given tags, those that differ, the most frequent first."""
    wrong = collections.Counter((right, given) for right, given in answers if right != given)
    ranked = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
    return [(right, given, count) for (right, given), count in ranked[:worst]]


def warmup_then_inverse_root(
    peak: float, epochs: int, warmup_epochs: int, steps_per_epoch: int, anneal: bool = True
) -> optax.Schedule:
    """By step: linearly up to the peak, then down with the inverse square root of the step.

    With w steps of warm-up, step t from 1 on has peak * min(t / w, sqrt(w / t)). Without
    ``anneal`` the peak is kept.

    Raises:
      ValueError: unless ``1 <= warmup_epochs <= epochs``.
    """
    if not 1 <= warmup_epochs <= epochs:
        raise ValueError(
            f'task.warmup_epochs must be in [1, task.epochs = {epochs}], got {warmup_epochs}.'
        )
    top = warmup_epochs * steps_per_epoch

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        part = (jnp.asarray(count) + 1) / top
        down = jax.lax.rsqrt(jnp.maximum(part, 1)) if anneal else 1.0
        return peak * jnp.minimum(part, down)

    return schedule
