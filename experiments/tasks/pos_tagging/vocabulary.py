"""Words and tags as numbers, and the tagger that knows nothing but words."""

import collections
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from experiments.tasks.pos_tagging.reading import Corpus

PADDING, UNKNOWN = 0, 1  # words
NO_TAG = -1  # of padding, and of tags that the training data have not


class Vocabulary(NamedTuple):
    """What the training data have, the most frequent first, equally frequent ones by their text.

    Attributes:
      words: with the numbers from 2 on.
      tags: with the numbers from 0 on.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def num_words(self) -> int:
        """The rows of an embedding: those of ``words``, padding and unknown words."""
        return len(self.words) + 2


class Encoded(NamedTuple):
    """Sentences as numbers, int32 of shape (length,) each."""

    words: tuple[np.ndarray, ...]
    tags: tuple[np.ndarray, ...]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(words) for words in self.words])


def build(train: Corpus, min_count: int = 1) -> Vocabulary:
    """The vocabulary of training data; words that are rarer than ``min_count`` are unknown."""
    words = _ranked(word for sentence in train for word in sentence.words)
    tags = _ranked(tag for sentence in train for tag in sentence.tags)
    return Vocabulary(tuple(w for w, n in words if n >= min_count), tuple(t for t, _ in tags))


def _ranked(items: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(collections.Counter(items).items(), key=lambda pair: (-pair[1], pair[0]))


def encode(corpus: Corpus, vocabulary: Vocabulary) -> Encoded:
    """A corpus in the numbers of a vocabulary."""
    words = {word: i for i, word in enumerate(vocabulary.words, 2)}
    tags = {tag: i for i, tag in enumerate(vocabulary.tags)}
    return Encoded(
        tuple(np.array([words.get(w, UNKNOWN) for w in s.words], np.int32) for s in corpus),
        tuple(np.array([tags.get(t, NO_TAG) for t in s.tags], np.int32) for s in corpus),
    )


def most_frequent_tag_accuracy(train: Corpus, corpus: Corpus) -> float:
    """The part of a corpus that has its word's most frequent tag in the training data.

    Words that are not there get the tag that is most frequent of all. Of equally frequent tags
    of a word the one that came first is taken.
    """
    counts = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
    for sentence in train:
        for word, tag in zip(*sentence, strict=True):
            counts[word][tag] += 1
    overall = _ranked(tag for sentence in train for tag in sentence.tags)[0][0]
    best = {word: own.most_common(1)[0][0] for word, own in counts.items()}
    pairs = [pair for sentence in corpus for pair in zip(*sentence, strict=True)]
    return sum(best.get(word, overall) == tag for word, tag in pairs) / len(pairs)
