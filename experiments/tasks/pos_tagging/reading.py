"""Tagged sentences: from CoNLL-U files, from TFDS, or made up."""

import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks import prepared

COLUMNS = {'upos': 3, 'xpos': 4}  # of CoNLL-U, from 0
SOURCES = ('conllu', 'synthetic', 'tfds')

_NUM_COLUMNS = 10
_MISSING = ('_', 'None')  # in CoNLL-U, and as TFDS's builder writes it


class Sentence(NamedTuple):
    words: tuple[str, ...]
    tags: tuple[str, ...]


Corpus = tuple[Sentence, ...]


class Splits(NamedTuple):
    train: Corpus
    dev: Corpus
    test: Corpus


@functools.cache  # a sweep reads its data once
def load(
    source: str,
    tags: str,
    files: tuple[tuple[str, ...], ...] = (),
    tfds_config: str | None = None,
    data_dir: str | None = None,
) -> Splits:
    """The sentences of a source.

    Args:
      source: 'conllu', 'tfds' or 'synthetic'.
      tags: which tags, 'xpos' or 'upos'.
      files: of 'conllu': the files to train on, those of dev and those of test, below
        ``data_dir`` or with whole paths.
      tfds_config: of 'tfds': a config of its builder ``universal_dependencies``.
      data_dir: where the files lie; for 'tfds', TFDS's own folder or one that has it as
        ``tensorflow_datasets``.

    Returns:
      The sentences, in the order of the files.

    Raises:
      ValueError: if the source or the tags are unknown, or a file is not as it should be, with
        the file and the line; of TFDS the split and the sentence.
      FileNotFoundError: if a file is not there.
    """
    if tags not in COLUMNS:
        raise ValueError(f'task.tags must be one of {sorted(COLUMNS)}, got {tags!r}.')
    if source == 'conllu':
        for name, given in zip(('train', 'dev', 'test'), files, strict=True):
            if not given or not all(isinstance(file, str) for file in given):
                raise ValueError(f'task.{name}_files must be one file or more, got {given!r}.')
        root = pathlib.Path(data_dir or '')
        return Splits(
            *(tuple(s for file in given for s in read(root / file, tags)) for given in files)
        )
    if source == 'tfds':
        return Splits(*(_read_tfds(tfds_config, s, tags, data_dir) for s in Splits._fields))
    if source == 'synthetic':
        return Splits(_synthetic(256, 0), _synthetic(32, 1), _synthetic(32, 2))
    raise ValueError(f'task.source must be one of {list(SOURCES)}, got {source!r}.')


def read(path: pathlib.Path, tags: str) -> Corpus:
    """The sentences of a CoNLL-U file, with one kind of tags.

    Words are syntactic words: lines of multiword tokens (``3-4``) and of empty nodes (``3.1``)
    are left out.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not CoNLL-U, or a word has no tag of this kind; the file and the
        line are named.
    """
    import conllu.exceptions
    import conllu.parser

    parsers = {n: conllu.parser.DEFAULT_FIELD_PARSERS[n] for n in ('id', 'head')}
    number, rows = 0, list[tuple[str, str]]()
    started = 0  # the first line of the sentence, 0 between sentences
    sentences = []

    def error(problem: str, line: int) -> ValueError:
        return ValueError(f'{path}:{line}: {problem}.')

    def close() -> None:
        if not rows:
            raise error('a sentence without words', started)
        words, own = zip(*rows, strict=True)
        sentences.append(Sentence(words, own))
        rows.clear()

    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; --data_dir is the folder of the data set.')
    for number, raw in enumerate(path.read_bytes().split(b'\n'), 1):
        try:
            line = raw.decode('utf-8').rstrip('\r')
        except UnicodeDecodeError as problem:
            raise error(f'not UTF-8: {problem}', number) from problem
        if not line.strip():
            if started:
                close()
            started = 0
            continue
        started = started or number
        if line.startswith('#'):
            continue
        columns = line.split('\t')
        if len(columns) != _NUM_COLUMNS:
            needed = f'{_NUM_COLUMNS} columns between tabs are needed'
            raise error(f'{needed}, found {len(columns)}', number)
        if any('  ' in column or not column for column in columns[:5]):
            raise error('an empty column, or two spaces in one', number)
        try:
            token = conllu.parser.parse_line(line, conllu.parser.DEFAULT_FIELDS, parsers)
        except conllu.exceptions.ParseException as problem:
            raise error(str(problem).rstrip('.'), number) from problem
        if isinstance(token['id'], tuple):
            continue
        if token['id'] != len(rows) + 1:
            raise error(f'word {len(rows) + 1} should come here, got {columns[0]!r}', number)
        if token[tags] == '_':
            place = f'column {COLUMNS[tags] + 1} is _'
            raise error(f'{columns[1]!r} has no {tags.upper()} ({place}); see task.tags', number)
        rows.append((token['form'], token[tags]))
    if started:
        close()
    if not sentences:
        raise error('no sentence', number)
    return tuple(sentences)


def _read_tfds(config: str | None, split: str, tags: str, data_dir: str | None) -> Corpus:
    """A split of TFDS's ``universal_dependencies``, prepared as array_record: no TensorFlow."""
    if not config:
        raise ValueError("source 'tfds' needs task.tfds_config, such as 'grc_perseus'.")
    source = prepared.data_source(f'universal_dependencies/{config}', split, data_dir)
    names = source.dataset_info.features['upos'].feature.names
    return tuple(_from_tfds(example, tags, names, split) for example in source)


def _from_tfds(example: Any, tags: str, names: list[str], split: str) -> Sentence:
    """An example's words.

    The builder keeps the lines of multiword tokens and of empty nodes, which alone have no head,
    and writes what is missing as ``None``.

    Raises:
      ValueError: if a word has no tag of this kind, or there is no word.
    """

    def text(value: Any) -> str:
        return value.decode() if isinstance(value, bytes) else str(value)

    words, heads = map(text, example['tokens']), map(text, example['head'])
    own = [names[tag] if tags == 'upos' else text(tag) for tag in example[tags]]
    where = f'{split}, sentence {text(example["idx"])}'
    rows = [
        (word, tag)
        for word, tag, head in zip(words, own, heads, strict=True)
        if head not in _MISSING
    ]
    if not rows:
        raise ValueError(f'{where}: a sentence without words.')
    if untagged := [word for word, tag in rows if tag in _MISSING]:
        raise ValueError(f'{where}: {untagged[0]!r} has no {tags.upper()}; see task.tags.')
    return Sentence(*(tuple(part) for part in zip(*rows, strict=True)))


def _synthetic(count: int, seed: int) -> Corpus:
    """Words whose tag is told by the word or by the one before, for tests of the drivers."""
    rng = np.random.default_rng(seed)
    sentences = []
    for _ in range(count):
        ids = rng.integers(20, size=rng.integers(1, 9))
        tags = [(word if word < 10 else before) % 5 for before, word in zip([0, *ids], ids)]  # noqa: B905
        sentences.append(Sentence(tuple(f'w{i}' for i in ids), tuple(f't{i}' for i in tags)))
    return tuple(sentences)
