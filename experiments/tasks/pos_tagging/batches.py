"""Sentences in batches of one length each, of a few lengths in all."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from experiments.tasks import Stream, batches_of
from experiments.tasks.pos_tagging import vocabulary


def plan(
    lengths: np.ndarray, buckets: Sequence[int], size: int, rng: np.random.Generator | None = None
) -> list[tuple[int, np.ndarray]]:
    """Which sentences go together: each in one batch, all batches full but one.

    A sentence goes to the shortest bucket that holds it; those that fill no batch there go on to
    the next bucket. So how many batches a bucket has does not hang on the order.

    Args:
      lengths: of the sentences.
      buckets: lengths to pad to, ascending; the last holds the longest sentence.
      size: sentences in a batch.
      rng: draws the order of the sentences and of the batches. None: as they come, short first.

    Returns:
      For each batch the length to pad to, and the numbers of its sentences.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    bucket_of = np.searchsorted(buckets, lengths[order])
    batches, left = [], order[:0]
    for i, length in enumerate(buckets):
        waiting = np.concatenate([left, order[bucket_of == i]])
        full = len(waiting) // size * size
        batches += [(length, rows) for rows in waiting[:full].reshape(-1, size)]
        left = waiting[full:]
    if len(left):
        needed = lengths[left].max()
        batches.append((min(n for n in shapes(lengths, buckets, size) if n >= needed), left))
    if rng is not None:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches


def shapes(lengths: np.ndarray, buckets: Sequence[int], size: int) -> list[int]:
    """The lengths of the batches of a `plan`, whatever its order."""
    bucket_of = np.searchsorted(buckets, lengths)
    used, waiting = set(), 0
    for i, length in enumerate(buckets):
        waiting += int(np.sum(bucket_of == i))
        if waiting >= size:
            used.add(length)
        waiting %= size
    return sorted(used | ({buckets[int(bucket_of.max())]} if waiting else set()))


def collate(
    encoded: vocabulary.Encoded, rows: np.ndarray, length: int, size: int
) -> dict[str, np.ndarray]:
    """Some sentences as arrays of shape (size, length), with empty rows at the end."""
    words = np.full((size, length), vocabulary.PADDING, np.int32)
    tags = np.full((size, length), vocabulary.NO_TAG, np.int32)
    for place, row in enumerate(rows):
        count = len(encoded.words[row])
        words[place, :count] = encoded.words[row]
        tags[place, :count] = encoded.tags[row]
    return {'words': words, 'tags': tags}


def padding_waste(lengths: np.ndarray, buckets: Sequence[int], size: int) -> float:
    """The part of an epoch's places that hold no word."""
    places = sum(size * length for length, _ in plan(lengths, buckets, size))
    return 1 - int(lengths.sum()) / places


class Source:
    """A whole run's batches by their step, for Grain: what comes depends on seed and step alone.

    Args:
      encoded: the sentences.
      buckets: see `plan`.
      size: sentences in a batch, of all processes together.
      epochs: passes over the sentences, each in its own order.
      seed: of the orders.
      shard_index: which part of each batch is this process's; rows follow each other.
      shard_count: in how many parts.

    Raises:
      ValueError: if the parts are not equal.
    """

    def __init__(
        self,
        encoded: vocabulary.Encoded,
        buckets: Sequence[int],
        size: int,
        epochs: int,
        seed: int,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> None:
        if size % shard_count:
            raise ValueError(
                f'task.batch_size must be a multiple of the {shard_count} processes, got {size}.'
            )
        self._encoded, self._size, self._share = encoded, size, size // shard_count
        self._first, self._epochs = shard_index * self._share, epochs
        lengths = encoded.lengths
        self.steps_per_epoch = -(-len(lengths) // size)
        self.shapes = [self._shape(length) for length in shapes(lengths, buckets, size)]

        @functools.lru_cache(maxsize=2)
        def of_epoch(epoch: int) -> list[tuple[int, np.ndarray]]:
            return plan(lengths, buckets, size, np.random.default_rng((seed, epoch)))

        self._of_epoch = of_epoch

    def _shape(self, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        like = jax.ShapeDtypeStruct((self._share, length), np.int32)
        return {'words': like, 'tags': like, 'step': jax.ShapeDtypeStruct((), np.int32)}

    def __len__(self) -> int:
        return self._epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(int(step), self.steps_per_epoch)
        length, rows = self._of_epoch(epoch)[index]
        own = rows[self._first : self._first + self._share]
        batch = collate(self._encoded, own, length, self._share)
        return {**batch, 'step': np.array(step, np.int32)}


def stream(source: Source, num_train: int) -> Stream:
    """A source as the training loop takes it."""
    return Stream(
        num_train=num_train,
        steps_per_epoch=source.steps_per_epoch,
        shapes=tuple(source.shapes),
        batches=batches_of(source),
    )
