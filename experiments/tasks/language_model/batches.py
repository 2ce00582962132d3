"""Streams of tokens cut into rows, and the rows of each step."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.tasks import Stream, batches_of
from experiments.tasks.language_model.tokens import Tokenizer


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """What a token is kept as: two bytes, most often."""
    return np.min_scalar_type(len(tokenizer.num_bytes) - 1)


def pieces(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """All documents one after the other, with the end of a document before, between and after.

    So the first token of each is foretold from an end, and so is that of the whole. Empty
    documents are left out.
    """
    kind = dtype_of(tokenizer)
    end = np.array([tokenizer.end], kind)
    yield end
    for text in filter(None, documents):
        yield np.concatenate([tokenizer.encode(text).astype(kind), end])


@functools.cache  # a sweep tokenises its text once
def pack(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The `pieces` as one stream, in memory."""
    packed = np.concatenate(list(pieces(documents, tokenizer)))
    packed.flags.writeable = False
    return packed


class Rows:
    """Streams of tokens as rows that touch, for Grain.

    In a stream of its own, row i has ``length`` tokens from ``i * length`` on, and as its targets
    those one place on. So each token but a stream's first is a target in one row; fewer than
    ``length`` at its end are left out. The rows of the streams follow each other.

    Args:
      streams: of tokens, in memory or on disk; only what is asked for is read.
      length: of a row.
      what: the streams are, for errors.

    Raises:
      ValueError: if there is no row.
    """

    def __init__(self, streams: Sequence[np.ndarray], length: int, what: str) -> None:
        self._streams, self._length = streams, length
        rows = [max(0, (len(stream) - 1) // length) for stream in streams]
        self._ends = np.cumsum(rows)
        if not len(self):
            longest = max(map(len, streams))
            raise ValueError(
                f'the {what} text has {longest} tokens'
                f'{" in the longest of its parts" if len(streams) > 1 else ""}; a row of '
                f'task.length={length} and its targets need {length + 1}.'
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        which = int(np.searchsorted(self._ends, i, side='right'))
        before = int(self._ends[which - 1]) if which else 0
        first = (int(i) - before) * self._length
        row = self._streams[which][first : first + self._length + 1].astype(np.int32)
        return {'inputs': row[:-1], 'targets': row[1:]}


class Source:
    """A whole run's batches by their step, for Grain: what comes depends on seed and step alone.

    All rows come once in a pass, each pass in its own order; a batch may have the last rows of one
    and the first of the next.

    Args:
      rows: what is trained on.
      size: rows in a batch, of all processes together.
      steps: batches.
      seed: of the orders.
      shard_index: which part of each batch is this process's; rows follow each other.
      shard_count: in how many parts.

    Raises:
      ValueError: if the parts are not equal.
    """

    def __init__(
        self,
        rows: Rows,
        size: int,
        steps: int,
        seed: int,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> None:
        import grain

        if size % shard_count:
            raise ValueError(
                f'task.batch_size must be a multiple of the {shard_count} processes, got {size}.'
            )
        self._size, self._share, self._steps = size, size // shard_count, steps
        self._first = shard_index * self._share
        # Orders are computed place by place, not drawn and kept: any length, no start-up. Grain
        # adds the number of the pass to the seed, so neighbouring seeds would share orders.
        start = int(np.random.SeedSequence(seed).generate_state(1)[0]) // 2
        self._rows = grain.MapDataset.source(rows).shuffle(seed=start).repeat()
        like = jax.ShapeDtypeStruct((self._share, len(rows[0]['inputs'])), np.int32)
        self.shape = {'inputs': like, 'targets': like}

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        first = int(step) * self._size + self._first
        return stack([self._rows[i] for i in range(first, first + self._share)])


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows as arrays of shape (rows, length)."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def stream(source: Source, num_train: int, ahead: bool = False) -> Stream:
    """A source as the training loop takes it: the run is one epoch, of all its steps."""
    return Stream(
        num_train=num_train,
        steps_per_epoch=len(source),
        shapes=(source.shape,),
        batches=batches_of(source, ahead),
    )


def held(rows: Rows, size: int, count: int) -> list[dict[str, Any]]:
    """Batches for an evaluation, each row once.

    Args:
      rows: where they are from.
      size: rows in a batch.
      count: batches, of rows evenly apart. 0, or more than there are: all rows.

    Returns:
      For each batch ``inputs``, ``targets`` and ``weights``, float32 of shape (rows,): 1, but 0
      for rows that only fill up the last batch.
    """
    number = min(count * size, len(rows)) if count else len(rows)
    chosen = np.arange(number) * len(rows) // number
    batches = list[dict[str, Any]]()
    for i in range(0, number, size):
        own = chosen[i : i + size]
        filled = np.concatenate([own, np.repeat(own[-1:], size - len(own))])
        weights = np.float32(np.arange(size) < len(own))
        batches.append({**stack([rows[j] for j in filled]), 'weights': weights})
    return batches
