"""Tokens on disk, in parts that may be made apart: each host then reads only its own rows.

A folder has the tokenizer's model, if there is one, and for each part a folder such as ``3_of_16``
with the tokens of its documents, ``train.bin`` and ``validation.bin``, and ``part.json``, which
says of what and by what they were made.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.tasks.language_model import batches, reading, tokens

SOURCE = 'tokens'  # of a config: what is here


def _described(
    text: Mapping[str, Any], kind: str, tokenizer: tokens.Tokenizer, count: int
) -> dict[str, Any]:
    """What all parts of a folder have in common."""
    about = {
        **{f'task.{name}': text[name] for name in reading.FIELDS},
        'task.tokenizer': kind,
        'tokenizer.model': hashlib.sha256(tokenizer.model).hexdigest(),
        'parts': count,
        'dtype': batches.dtype_of(tokenizer).newbyteorder('<').str,
    }
    return json.loads(json.dumps(about))


def _read(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / 'part.json'
    try:
        found = json.loads(file.read_text())
        found['parts'], found['dtype'], found['tokens']['train'], found['tokens']['validation']
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{file} does not tell of a part of a text: {error!r}.') from error
    return found


def _must_be(folder: pathlib.Path, expected: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What is said of a part, without its tokens; raises if it is not as expected."""
    found = _read(folder)
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f'{folder}: {name} is {found.get(name)!r} there, {value!r} {what}; parts of one '
                'folder are made by the same flags.'
            )
    return found


def write(
    folder: str | pathlib.Path,
    text: Mapping[str, Any],
    documents: reading.Documents,
    kind: str,
    tokenizer: tokens.Tokenizer,
    index: int,
    count: int,
) -> dict[str, int]:
    """Makes one of ``count`` parts, if it is not there; the numbers of its tokens by split.

    Documents are read, tokenised and written one by one. A part that was cut off does not count.

    Args:
      folder: of all parts.
      text: a task's config, of which it is kept where the text is from.
      documents: all of them.
      kind: of the tokenizer.
      tokenizer: the tokenizer.
      index: of the part.
      count: of parts.

    Raises:
      ValueError: if there is a part of another text or by another tokenizer.
    """
    folder = pathlib.Path(folder)
    expected = _described(text, kind, tokenizer, count)
    for part in sorted(folder.glob('*_of_*/part.json')):
        _must_be(part.parent, expected, 'here')
    made = folder / f'{index}_of_{count}'
    if not made.exists():
        # Another process may be making the same.
        begun = folder / f'{made.name}.{os.uname().nodename}.{os.getpid()}'
        begun.mkdir(parents=True)
        try:
            lengths = {
                split: _tokens(begun / f'{split}.bin', own.part(index, count), tokenizer)
                for split, own in documents._asdict().items()
            }
            if tokenizer.model:
                _whole(folder / tokens.FILE, tokenizer.model)
            (begun / 'part.json').write_text(json.dumps({**expected, 'tokens': lengths}, indent=2))
            begun.rename(made)
        except OSError:
            if not made.exists():
                raise
        finally:
            shutil.rmtree(begun, ignore_errors=True)
    return _read(made)['tokens']


def _tokens(file: pathlib.Path, documents: Iterable[str], tokenizer: tokens.Tokenizer) -> int:
    """Writes the tokens of documents; how many there are."""
    count, kind = 0, batches.dtype_of(tokenizer).newbyteorder('<')
    with file.open('wb') as opened:
        for piece in batches.pieces(documents, tokenizer):
            opened.write(piece.astype(kind).tobytes())
            count += len(piece)
    return count


def _whole(file: pathlib.Path, content: bytes) -> None:
    """Writes a file so that no other process sees a part of it."""
    begun = file.with_name(f'{file.name}.{os.uname().nodename}.{os.getpid()}')
    begun.write_bytes(content)
    begun.replace(file)


def kept(folder: pathlib.Path) -> bytes:
    """The model of a folder's tokenizer; empty if there is none."""
    file = folder / tokens.FILE
    return file.read_bytes() if file.exists() else b''


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


def load(
    folder: pathlib.Path, kind: str, tokenizer: tokens.Tokenizer
) -> dict[str, list[np.ndarray]]:
    """The streams of each split, one for each part, read from the disk as they are asked for.

    Raises:
      FileNotFoundError: if there is no part, or one is missing.
      ValueError: if the parts are not of one text, or by another tokenizer.
    """
    parts = sorted(
        (int(found[1]), path)
        for path in folder.glob('*_of_*')
        if (found := re.fullmatch(r'(\d+)_of_\d+', path.name))
    )
    if not parts:
        raise FileNotFoundError(
            f'{folder}: no parts of a text, as `python -m experiments.prepare_text` makes them; '
            '--data_dir is the folder that task.files is below.'
        )
    first = {name: value for name, value in _read(parts[0][1]).items() if name != 'tokens'}
    for name, value in _described(_text(first), kind, tokenizer, first['parts']).items():
        if first.get(name) != value:
            raise ValueError(
                f'{folder}: {name} is {first.get(name)!r} there, {value!r} in this run.'
            )
    missing = sorted(set(range(first['parts'])) - {index for index, _ in parts})
    if missing:
        raise FileNotFoundError(f'{folder}: of {first["parts"]} parts there are no {missing}.')
    streams = dict[str, list[np.ndarray]](train=[], validation=[])
    for _, path in parts:
        lengths = _must_be(path, first, f'in {parts[0][1].name}')['tokens']
        for split, own in streams.items():
            stream = np.memmap(path / f'{split}.bin', first['dtype'], mode='r')
            if len(stream) != lengths[split]:
                raise ValueError(
                    f'{path}/{split}.bin has {len(stream)} tokens, {lengths[split]} were written.'
                )
            own.append(stream)
    return streams


def _text(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: about.get(f'task.{name}') for name in reading.FIELDS}
