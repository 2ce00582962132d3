"""Text as tokens and back: by bytes, or by SentencePiece trained on the text."""

import functools
import io
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

KINDS = ('bytes', 'sentencepiece')
FILE = 'tokenizer.model'  # the SentencePiece model, beside a run's checkpoints

_MOST = 100_000_000  # characters that a model is trained on
_CHUNK = 4000  # characters of a line that SentencePiece is trained on at once
_LINES = 10_000  # that it encodes at once


class Tokenizer(Protocol):
    """Text as numbers from 0 on.

    Attributes:
      end: the token that ends a document.
      num_bytes: the bytes of UTF-8 that each token stands for, of shape (tokens,), int32; 0 for
        ``end``.
      model: what it is made from again; empty if nothing is needed.
    """

    end: int
    num_bytes: np.ndarray
    model: bytes

    def __hash__(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""


class Bytes:
    """The bytes of UTF-8, and a token for the end of a document."""

    end = 256
    model = b''

    def __init__(self) -> None:
        self.num_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode('utf-8'), np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(i for i in tokens if i != self.end).decode('utf-8', errors='replace')


class SentencePiece:
    """A SentencePiece model, as `train` makes it.

    A text comes back as it was, to the byte, but for U+2581, SentencePiece's own sign for a
    space, which comes back as one.

    Raises:
      ValueError: if a model of another kind has no end of a sentence; by ``encode``, where the
        pieces of a text are not as many bytes as it has: bits per byte would be wrong.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.model, self.end = model, self._processor.eos_id()
        if self.end < 0:
            raise ValueError('the SentencePiece model has no token for the end of a sentence.')
        pieces = range(self._processor.vocab_size())
        self.num_bytes = np.array([self._bytes(i) for i in pieces], np.int32)

    def _bytes(self, token: int) -> int:
        processor = self._processor
        if processor.is_control(token) or processor.is_unknown(token):
            return 0
        if processor.is_byte(token):
            return 1
        return len(processor.id_to_piece(token).replace('\u2581', ' ').encode('utf-8'))

    def encode(self, text: str) -> np.ndarray:
        # Lines share no token, and a list of all tokens at once would be large.
        lines = text.split('\n')
        ended = [line + '\n' for line in lines[:-1]] + [lines[-1]]
        parts = [
            np.array(tokens, np.int32)
            for i in range(0, len(ended), _LINES)
            for tokens in self._processor.encode(ended[i : i + _LINES])
        ]
        found = np.concatenate(parts)
        counted = int(self.num_bytes[found].sum(dtype=np.int64))
        size = len(text.replace('\u2581', ' ').encode('utf-8'))
        if counted != size:
            raise ValueError(
                f'the SentencePiece model makes {counted} bytes of a text of {size}; one is '
                'needed that keeps texts as they are, trained with byte_fallback=true, '
                'add_dummy_prefix=false, remove_extra_whitespaces=false and '
                'normalization_rule_name=identity; see task.tokenizer_path.'
            )
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in tokens])


def train(documents: Sequence[str], size: int) -> bytes:
    """A SentencePiece model: byte pairs, with bytes for what is rare; the same in each training.

    Texts are taken as they are: no normalisation, no spaces added or removed. A line's end is a
    token of its own. Of more than a hundred million characters, some documents
    are taken.

    Raises:
      ValueError: if the texts cannot give this many tokens.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(_some(documents, _MOST)),
            model_writer=model,
            model_type='bpe',
            vocab_size=size,
            normalization_rule_name='identity',
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            character_coverage=0.9999,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # their number is written into the model
            max_sentence_length=4 * _CHUNK + 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f'no SentencePiece model with task.vocab_size={size} from this text: {error}'
        ) from error
    return model.getvalue()


def _some(documents: Sequence[str], most: int) -> Iterator[str]:
    """All of them, or as many, spread evenly, as have some characters; the last one cut.

    They come in their own order.
    """
    chosen, left, number = dict[int, str](), most, len(documents)
    # Multiples of a number near the golden section of theirs, prime to it: each comes once, and
    # those that have come are evenly apart at any time.
    stride = next((i for i in range(int(0.618 * number), 0, -1) if math.gcd(i, number) == 1), 1)
    for k in range(number):
        i = k * stride % number
        chosen[i] = documents[i][:left]
        left -= len(chosen[i])
        if not left:
            break
    return (chosen[i] for i in sorted(chosen))


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for line in text.split('\n'):
            yield from (line[i : i + _CHUNK] for i in range(0, len(line), _CHUNK))


@functools.cache  # a sweep trains one once
def make(
    kind: str, size: int, path: str, documents: Sequence[str], kept: bytes = b''
) -> Tokenizer:
    """The tokenizer of a config.

    Args:
      kind: 'bytes' or 'sentencepiece'.
      size: the vocabulary of the model; a trained one has exactly as many tokens.
      path: of a SentencePiece model. '': the one that is kept, or one is trained on the documents.
      documents: the texts of training.
      kept: the SentencePiece model of a run that goes on.

    Raises:
      ValueError: if the kind is unknown, the vocabulary too small, or the model of ``path`` not
        the one that is kept.
      FileNotFoundError: if there is no such model.
    """
    tokenizer: Tokenizer
    if kind == 'bytes':
        tokenizer = Bytes()
    elif kind == 'sentencepiece':
        if path and not pathlib.Path(path).is_file():
            raise FileNotFoundError(f'{path}: no such file, see task.tokenizer_path.')
        model = pathlib.Path(path).read_bytes() if path else kept or train(documents, size)
        if kept and model != kept:
            raise ValueError(
                f'{path} is not the model that the run began with; the run cannot go on.'
            )
        tokenizer = SentencePiece(model)
    else:
        raise ValueError(f'task.tokenizer must be one of {list(KINDS)}, got {kind!r}.')
    if len(tokenizer.num_bytes) > size:
        raise ValueError(
            f'task.vocab_size must be at least {len(tokenizer.num_bytes)}, the tokens of the '
            f'tokenizer, got {size}.'
        )
    return tokenizer
