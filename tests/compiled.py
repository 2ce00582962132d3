"""Reads the text of a compiled program, of a CPU's or a TPU's: what moves between devices."""

import collections
import math
import re
from collections.abc import Iterator

KINDS = (
    'all-gather',
    'all-reduce',
    'all-to-all',
    'collective-broadcast',
    'collective-permute',
    'ragged-all-to-all',
    'reduce-scatter',
)
# '%x = f32[16,8]{1,0:T(8,128)} all-gather(' or '%x = (f32[8]{0}, f32[8]{0}) all-reduce-done(%y'.
_COLLECTIVE = re.compile(
    rf'(\S+) = (\(.*?\)|\S+) ({"|".join(KINDS)})(-start|-done)?\(([^\s,)]*)(.*)'
)
_ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?)?')
_PAIRS = re.compile(r'source_target_pairs=\{([\d,{}]*)\}')


def collectives(text: str, *, padded: bool = False) -> list[tuple[str, int]]:
    """The kinds and the bytes of all collectives of a compiled text.

    The bytes are those of the result on one device. An asynchronous pair counts once, by its
    ``-done``: the result of a ``-start`` holds the operands as well. A collective in the body of
    a loop counts once, however often it runs.

    Args:
      text: of ``Compiled.as_text()``.
      padded: bytes as laid out in memory: TPUs pad the most minor axes to tiles.

    Returns:
      Pairs such as ('collective-permute', 2048), in the text's order.

    Example:
      >>> line = '%x = f32[128,1]{1,0:T(8,128)} collective-permute(%y), channel_id=1'
      >>> collectives(line), collectives(line, padded=True)
      ([('collective-permute', 512)], [('collective-permute', 65536)])
    """
    return [(kind, size) for kind, size, _ in _read(text, padded)]


def sent(text: str) -> int:
    """The most bytes that any one device has in collectives.

    A permute counts for its sources only, so two permutes from different devices, such as a
    border's and the wrap around's, do not add up. Others count for every device.

    Example:
      >>> row = '%x = f32[8]{0} collective-permute(%y), source_target_pairs='
      >>> sent(row + '{{1,0},{2,1}}\\n' + row + '{{0,2}}')
      32
    """
    everywhere, own = 0, collections.Counter[str]()
    for kind, size, attributes in _read(text):
        pairs = _PAIRS.search(attributes) if kind == 'collective-permute' else None
        if pairs is None:
            everywhere += size
        else:
            own.update({source: size for source in re.findall(r'\{(\d+),', pairs[1])})
    return everywhere + max(own.values(), default=0)


def _read(text: str, padded: bool = False) -> Iterator[tuple[str, int, str]]:
    """Kind, bytes and attributes of each collective."""
    attributes_of = {}
    for name, result, kind, part, operand, attributes in _COLLECTIVE.findall(text):
        if part == '-start':
            attributes_of[name] = attributes
            continue
        if part == '-done':  # the attributes stand with the start
            attributes = attributes_of.get(operand, '')
        yield kind, sum(_bytes(padded, *array) for array in _ARRAY.findall(result)), attributes


def _bytes(padded: bool, kind: str, bits: str, shape: str, order: str, tile: str) -> int:
    """Of an array such as ``f32[16,8]{1,0:T(8,128)}``: ``order`` is '1,0', ``tile`` '8,128'."""
    sizes = _integers(shape)
    if padded and tile:
        sizes = [sizes[axis] for axis in reversed(_integers(order))]  # as laid out, minor last
        tiles = _integers(tile)
        sizes = [1] * (len(tiles) - len(sizes)) + sizes
        tiles = [1] * (len(sizes) - len(tiles)) + tiles
        sizes = [-(-size // t) * t for size, t in zip(sizes, tiles, strict=True)]
    return math.ceil(math.prod(sizes) * (8 if kind == 'pred' else int(bits)) / 8)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(',') if number]
