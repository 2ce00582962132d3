"""Text: from files, from TFDS, or made up; for training and for validation."""

import functools
import glob
import pathlib
from typing import NamedTuple

import numpy as np

from experiments.tasks import prepared

SOURCES = ('text', 'tfds', 'synthetic')


class Documents(NamedTuple):
    train: tuple[str, ...]
    validation: tuple[str, ...]


@functools.cache  # a sweep reads its data once
def load(
    source: str,
    files: tuple[str, ...] = (),
    validation_fraction: float = 0.0,
    tfds_name: str = '',
    tfds_splits: tuple[str, ...] = (),
    data_dir: str | None = None,
) -> Documents:
    """The documents of a source, in memory.

    Args:
      source: 'text', 'tfds' or 'synthetic'.
      files: of 'text': files, folders (all ``*.txt`` in them) or patterns, below ``data_dir`` or
        with whole paths. Each file is a document; those of a folder or a pattern are sorted.
      validation_fraction: of the characters of each document, the end that is held out; of more
        than ``1 / validation_fraction`` documents, those that are, whole and evenly apart. For
        'tfds' only where there is one split.
      tfds_name: of 'tfds': a builder whose examples have a ``text``, with its config.
      tfds_splits: those of training and of validation, or the one that has both.
      data_dir: where the data lie.

    Raises:
      ValueError: if the source is unknown or a file has no text.
      FileNotFoundError: if the data are not there.
    """
    if source == 'text':
        return _held_out(tuple(map(_read, _paths(files, data_dir))), validation_fraction)
    if source == 'tfds':
        if not tfds_name or len(tfds_splits) not in (1, 2):
            raise ValueError(
                "source 'tfds' needs task.tfds_name, such as 'c4/en', and one or two "
                f'task.tfds_splits, got {tfds_name!r} and {tfds_splits!r}.'
            )
        splits = [_read_tfds(tfds_name, split, data_dir) for split in tfds_splits]
        return Documents(*splits) if splits[1:] else _held_out(splits[0], validation_fraction)
    if source == 'synthetic':
        return _held_out(_synthetic(8, 2000), validation_fraction)
    raise ValueError(f'task.source must be one of {list(SOURCES)}, got {source!r}.')


def _paths(given: tuple[str, ...], data_dir: str | None) -> list[pathlib.Path]:
    """The files that are meant, each once, in the order of what was given."""
    if not given or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f'task.files must be one file or more, got {given!r}.')
    found: dict[pathlib.Path, None] = {}
    for name in given:
        path = pathlib.Path(data_dir or '') / name
        if path.is_dir():
            own = sorted(path.glob('*.txt'))
        else:
            own = [path] if path.is_file() else sorted(map(pathlib.Path, glob.glob(str(path))))
        if not own:
            problem = 'no *.txt in this folder' if path.is_dir() else 'no such file'
            raise FileNotFoundError(
                f'{path}: {problem}; --data_dir is the folder of the data set.'
            )
        found.update(dict.fromkeys(own))
    return list(found)


def _read(path: pathlib.Path) -> str:
    try:
        text = path.read_bytes().decode('utf-8')  # line ends stay as they are
    except UnicodeDecodeError as problem:
        raise ValueError(f'{path}: not UTF-8: {problem}.') from problem
    if not text.strip():
        raise ValueError(f'{path}: no text.')
    return text


def _held_out(documents: tuple[str, ...], fraction: float) -> Documents:
    """Whole documents where there are many, so that none begins in the middle; else their ends."""
    if not 0 < fraction < 1:
        raise ValueError(f'task.validation_fraction must be in (0, 1), got {fraction!r}.')
    if (number := len(documents)) > 1 / fraction:
        count = min(round(fraction * number), number - 1)
        held = set(((2 * np.arange(count) + 1) * number // (2 * count)).tolist())
        return Documents(
            tuple(text for i, text in enumerate(documents) if i not in held),
            tuple(documents[i] for i in sorted(held)),
        )
    cuts = [len(text) - round(fraction * len(text)) for text in documents]
    pairs = list(zip(documents, cuts, strict=True))
    train, validation = [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]
    return Documents(tuple(filter(None, train)), tuple(filter(None, validation)))


def _read_tfds(name: str, split: str, data_dir: str | None) -> tuple[str, ...]:
    texts = (example['text'] for example in prepared.data_source(name, split, data_dir))
    decoded = (text.decode('utf-8') if isinstance(text, bytes) else str(text) for text in texts)
    if not (documents := tuple(filter(str.strip, decoded))):
        raise ValueError(f'{name}, {split}: no text.')
    return documents


def _synthetic(count: int, length: int) -> tuple[str, ...]:
    """Words of a made-up language in which each word hangs on the one before, for tests."""
    rng = np.random.default_rng(0)
    words = [''.join(rng.choice(list('abcdefgh'), rng.integers(1, 6))) for _ in range(30)]
    follows = rng.integers(30, size=(30, 3))
    documents = []
    for _ in range(count):
        text, word = '', 0
        while len(text) < length:
            word = follows[word, rng.integers(3)]
            text += words[word] + (' ' if rng.random() < 0.9 else '\n')
        documents.append(text)
    return tuple(documents)
