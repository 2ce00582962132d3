"""Tokens on disk, in parts that may be made apart: each host then reads only its own rows.

A folder has the tokenizer's model, if there is one, and for each part a file such as
``3_of_16.json``, which says of what and by what the part was made, and which files have its
tokens. It comes last and whole, so a part is there if it is; files of tokens that no such file
names were left by a process that was killed, and may be deleted.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks.language_model import batches, reading, tokens

SOURCE = 'tokens'  # of a config: what is here


def folder(files: Sequence[str], data_dir: str | None) -> pathlib.Path:
    """Where the parts are, by a task's config.

    Raises:
      ValueError: if there is not just one folder.
    """
    if len(files) != 1 or not isinstance(files[0], str):
        raise ValueError(
            f"source {SOURCE!r} needs task.files to be one folder, such as ('c4_tokens',), "
            f'got {tuple(files)!r}.'
        )
    return pathlib.Path(data_dir or '') / files[0]


def kept(where: pathlib.Path) -> bytes:
    """The model of a folder's tokenizer; empty if there is none."""
    file = where / tokens.FILE
    return file.read_bytes() if file.exists() else b''


def publish(where: pathlib.Path, model: bytes) -> bytes:
    """Puts a tokenizer's model into a folder that has none yet; the one that is there then."""
    where.mkdir(parents=True, exist_ok=True)
    if model and not kept(where):
        begun = _written(where, tokens.FILE, model)
        with contextlib.suppress(OSError):  # another process has; or there are no links here
            os.link(begun, where / tokens.FILE)
        if not kept(where):
            begun.replace(where / tokens.FILE)
        begun.unlink(missing_ok=True)
    return kept(where)


def _by(kind: str, tokenizer: tokens.Tokenizer) -> dict[str, Any]:
    """What a part says of the tokenizer."""
    return {
        'task.tokenizer': kind,
        'tokenizer.model': hashlib.sha256(tokenizer.model).hexdigest(),
        'dtype': batches.dtype_of(tokenizer).newbyteorder('<').str,
    }


class Part(NamedTuple):
    """What the file of a part says."""

    file: pathlib.Path
    number: int
    about: dict[str, Any]  # the same in all parts of a folder
    held: dict[str, tuple[str, int]]  # of each split, the file of its tokens, and their number

    def must_be(self, expected: Mapping[str, Any], there: str) -> None:
        """Raises ``ValueError`` unless it is of this text and by this tokenizer."""
        for name, value in expected.items():
            if (found := self.about.get(name)) != value:
                raise ValueError(f'{self.file}: {name} is {found!r} there, {value!r} {there}.')


def _parts(where: pathlib.Path) -> list[Part]:
    """The parts that are there, by their number; each has all of its tokens."""
    found = list[Part]()
    for file in sorted(where.glob('*.json')):
        if not (name := re.fullmatch(r'(\d+)_of_\d+\.json', file.name)):
            continue
        try:
            told = json.loads(file.read_text())
            own = {split: (told['tokens'][split][0], int(told['tokens'][split][1]))
                   for split in reading.Documents._fields}  # fmt: skip
            part = Part(file, int(name[1]), dict(told['about']), own)
            size = np.dtype(part.about['dtype']).itemsize
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f'{file} does not tell of a part of a text: {error!r}.') from error
        for path, count in ((where / path, count) for path, count in own.values()):
            held = path.stat().st_size if path.exists() else 0
            if held != count * size:
                raise ValueError(
                    f'{path} has {held} bytes, {count} tokens of {size} were written; remove '
                    f'{file.name} and make the part again.'
                )
        found.append(part)
    return sorted(found, key=lambda part: part.number)


def write(
    where: pathlib.Path,
    text: Mapping[str, Any],
    documents: reading.Documents,
    kind: str,
    tokenizer: tokens.Tokenizer,
    index: int,
    count: int,
) -> dict[str, int]:
    """Makes one of ``count`` parts, if it is not there; the numbers of its tokens by split.

    Documents are read, tokenised and written one by one.

    Args:
      where: the folder of all parts.
      text: what says which text it is, of JSON's kinds.
      documents: all of them.
      kind: of the tokenizer.
      tokenizer: the tokenizer, the published one.
      index: of the part.
      count: of parts.

    Raises:
      ValueError: if there is a part of another text or by another tokenizer.
    """
    sizes = [len(own) for own in documents]
    about = {**text, 'documents': sizes, **_by(kind, tokenizer), 'parts': count}
    about = json.loads(json.dumps(about))
    name, made = f'{index}_of_{count}', dict[str, tuple[str, int]]()

    def there() -> Part | None:
        parts = _parts(where)
        for part in parts:
            part.must_be(about, 'here; parts of one folder are made by the same flags')
        return next((part for part in parts if part.number == index), None)

    where.mkdir(parents=True, exist_ok=True)
    if (part := there()) is None:
        begun, published = dict[str, pathlib.Path](), False
        try:
            for split, own in documents._asdict().items():
                handle, begun[split] = _begin(where, f'{name}.{split}.', '.bin')
                length = _tokens(handle, own.part(index, count), tokenizer)
                made[split] = (begun[split].name, length)
            if (part := there()) is None:  # no other process was quicker
                told = json.dumps({'about': about, 'tokens': made}, indent=2)
                _written(where, name, told.encode()).replace(where / f'{name}.json')
                published = True
        finally:
            if not published:
                for path in begun.values():
                    path.unlink()
    found = made if part is None else part.held
    return {split: length for split, (_, length) in found.items()}


def _tokens(handle: int, documents: Iterable[str], tokenizer: tokens.Tokenizer) -> int:
    """Writes the tokens of documents to an open file; how many there are."""
    count, kind = 0, batches.dtype_of(tokenizer).newbyteorder('<')
    with os.fdopen(handle, 'wb') as opened:
        for piece in batches.pieces(documents, tokenizer):
            opened.write(piece.astype(kind).tobytes())
            count += len(piece)
        opened.flush()
        os.fsync(handle)
    return count


def _begin(where: pathlib.Path, prefix: str, suffix: str) -> tuple[int, pathlib.Path]:
    """A new file that is no other process's, which others may read."""
    handle, path = tempfile.mkstemp(suffix, prefix, where)
    with contextlib.suppress(OSError):  # a mounted bucket may know no permissions
        os.fchmod(handle, 0o644)
    return handle, pathlib.Path(path)


def _written(where: pathlib.Path, name: str, content: bytes) -> pathlib.Path:
    """A file of its own with some content, to be renamed: so no one sees a part of it."""
    handle, path = _begin(where, f'{name}.', '.begun')
    with os.fdopen(handle, 'wb') as opened:
        opened.write(content)
        opened.flush()
        os.fsync(handle)
    return path


class Stored(NamedTuple):
    """A folder with all of its parts.

    Attributes:
      first: one of them.
      model: of the tokenizer; empty where there is none.
      streams: of each split, one for each part, read from the disk as they are asked for.
    """

    first: Part
    model: bytes
    streams: Mapping[str, Sequence[np.ndarray]]

    def check(self, kind: str, tokenizer: tokens.Tokenizer) -> None:
        """Raises ``ValueError`` unless the tokens are this tokenizer's."""
        self.first.must_be(_by(kind, tokenizer), 'in this run')


def load(where: pathlib.Path, kind: str) -> Stored:
    """The parts of a folder, by a tokenizer of this kind.

    Raises:
      FileNotFoundError: if there is no part, one is missing, or the tokenizer's model is.
      ValueError: if the parts are not of one text, or by a tokenizer of another kind.
    """
    if not (parts := _parts(where)):
        raise FileNotFoundError(
            f'{where}: no parts of a text, as `python -m experiments.prepare_text` makes them; '
            '--data_dir is the folder that task.files is below.'
        )
    first = parts[0]
    first.must_be({'task.tokenizer': kind}, 'in this run')
    for part in parts:
        part.must_be(first.about, f'in {first.file.name}')
    missing = sorted(set(range(first.about['parts'])) - {part.number for part in parts})
    if missing:
        raise FileNotFoundError(
            f'{where}: of {first.about["parts"]} parts there are no {missing}.'
        )
    model = kept(where)
    if kind == 'sentencepiece' and not model:
        raise FileNotFoundError(
            f'{where}: no {tokens.FILE}; `python -m experiments.prepare_text` puts it back.'
        )
    streams = {
        split: [np.memmap(where / part.held[split][0], first.about['dtype'], 'r')
                for part in parts]
        for split in reading.Documents._fields
    }  # fmt: skip
    return Stored(first, model, streams)
