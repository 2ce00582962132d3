"""Text: from files, from TFDS, or made up; for training and for validation."""

import functools
import glob
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from experiments.tasks import prepared

SOURCES = ('text', 'tfds', 'synthetic')
# Of a task's config, what says which text it is.
FIELDS = ('source', 'files', 'validation_fraction', 'tfds_name', 'tfds_splits')


class Texts(Sequence[str]):
    """Documents that are read when they are asked for, so that a corpus need not fit into memory.

    Args:
      read: from a number, a document; an empty one where there is nothing in it.
      numbers: of those that are meant.
    """

    def __init__(self, read: Callable[[int], str], numbers: Sequence[int] | np.ndarray) -> None:
        self._read, self._numbers = read, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> 'Texts': ...
    def __getitem__(self, i: int | slice) -> 'str | Texts':
        if isinstance(i, slice):
            return Texts(self._read, self._numbers[i])
        return self._read(int(self._numbers[i]))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def part(self, index: int, count: int) -> 'Texts':
        """One of some parts that follow each other and hold every document once."""
        first, end = (len(self) * i // count for i in (index, index + 1))
        return self[first:end]


class Documents(NamedTuple):
    train: Texts
    validation: Texts


def of(config: Mapping[str, Any], data_dir: str | None) -> Documents:
    """The documents of a task's config."""
    given = [config[name] for name in FIELDS]
    return load(*(tuple(x) if isinstance(x, list) else x for x in given), data_dir)


def identity(config: Mapping[str, Any], data_dir: str | None) -> dict[str, Any]:
    """What says which text a config's is: fields, and of files their names and sizes."""
    found = {f'task.{name}': config[name] for name in FIELDS}
    if config['source'] == 'text':
        paths = _paths(tuple(config['files']), data_dir)
        listed = [(path.name, path.stat().st_size) for path in paths]
        found['files'] = hashlib.sha256(repr(listed).encode()).hexdigest()
    return json.loads(json.dumps(found))


@functools.cache  # a sweep lists its data once
def load(
    source: str,
    files: tuple[str, ...] = (),
    validation_fraction: float = 0.0,
    tfds_name: str = '',
    tfds_splits: tuple[str, ...] = (),
    data_dir: str | None = None,
) -> Documents:
    """The documents of a source.

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
      ValueError: if the source is unknown; where it is read, if a file has no text.
      FileNotFoundError: if the data are not there.
    """
    if source == 'text':
        paths = _paths(files, data_dir)
        return _held_out(lambda i: _read(paths[i]), len(paths), validation_fraction)
    if source == 'tfds':
        if not tfds_name or len(tfds_splits) not in (1, 2):
            raise ValueError(
                "source 'tfds' needs task.tfds_name, such as 'c4/en', and one or two "
                f'task.tfds_splits, got {tfds_name!r} and {tfds_splits!r}.'
            )
        splits = [_tfds(tfds_name, split, data_dir) for split in tfds_splits]
        if splits[1:]:
            return Documents(*(Texts(read, range(count)) for read, count in splits))
        return _held_out(*splits[0], validation_fraction)
    if source == 'synthetic':
        texts = _synthetic(8, 2000)
        return _held_out(texts.__getitem__, len(texts), validation_fraction)
    raise ValueError(f'task.source must be one of {[*SOURCES, "tokens"]}, got {source!r}.')


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


def _held_out(read: Callable[[int], str], number: int, fraction: float) -> Documents:
    """Whole documents where there are many, so that none begins in the middle; else their ends."""
    if not 0 < fraction < 1:
        raise ValueError(f'task.validation_fraction must be in (0, 1), got {fraction!r}.')
    if number > 1 / fraction:
        count = min(round(fraction * number), number - 1)
        held = (2 * np.arange(count) + 1) * number // (2 * count)
        trained = np.delete(np.arange(number), held)
        return Documents(Texts(read, trained), Texts(read, held))

    def cut(i: int) -> tuple[str, str]:
        text = read(i)
        place = len(text) - round(fraction * len(text))
        return text[:place], text[place:]

    return Documents(
        Texts(lambda i: cut(i)[0], range(number)), Texts(lambda i: cut(i)[1], range(number))
    )


def _tfds(name: str, split: str, data_dir: str | None) -> tuple[Callable[[int], str], int]:
    """How a document of a split is read, by its number, and how many there are."""
    examples = prepared.data_source(name, split, data_dir)

    def read(i: int) -> str:
        text = examples[i]['text']
        text = text.decode('utf-8') if isinstance(text, bytes) else str(text)
        return text if text.strip() else ''

    return read, len(examples)


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
