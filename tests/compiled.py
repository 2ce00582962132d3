"""Reads the text of a compiled program: what moves between devices, and to and from memory."""

import math
import re
from typing import Any

import jax

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
    rf'= (\(.*?\)|\S+) ({"|".join(KINDS)})(-start|-done)?\((?:.*?channel_id=(\d+))?'
)
_COMPUTATION = re.compile(r'(?:ENTRY )?(%[\w.-]+) \(')
_RESULT = re.compile(r'(%[\w.-]+) = (\(.*?\)|\S+) [\w-]+\(')
_KERNEL = re.compile(
    r'(%[\w.-]+) = [^\n]*? custom-call\(([^)]*)\), custom_call_target="tpu_custom_call"'
    r'(?![^\n]*"cost_estimate")'
)
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)')
_FREE = ('bitcast', 'constant', 'get-tuple-element', 'parameter', 'tuple')
_PARTS = ('dynamic-slice', 'gather', 'slice')  # of their first operand
_ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?)?')


def collectives(text: str, *, padded: bool = False) -> list[tuple[str, int]]:
    """The kinds and the bytes of all collectives of a compiled text.

    The bytes are those of the result on one device. An asynchronous pair counts once, by its
    ``-done``: the result of a ``-start`` holds the operands as well. So does one that the TPU
    compiler spreads over several fusions, each of which repeats it with the same channel (outside
    of fusions the collectives of a manual region all have one channel). A collective in the body
    of a loop counts once, however often it runs.

    Args:
      text: of ``Compiled.as_text()``.
      padded: bytes as laid out in memory: TPUs pad the most minor axes to tiles.

    Returns:
      Pairs such as ('collective-permute', 2048), in the text's order.

    Example:
      >>> line = '%x = f32[128,1]{1,0:T(8,128)} collective-permute(%y), channel_id=1'
      >>> collectives(line), collectives(line, padded=True)
      ([('collective-permute', 512)], [('collective-permute', 65536)])
      >>> len(collectives('\\n'.join(['%fused_computation.1 (x: f32[1])', line] * 2)))
      1
      >>> len(collectives('\\n'.join(['%main.1 (x: f32[1])', line] * 2)))
      2
    """
    found, seen, in_fusion = [], set(), False
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            in_fusion = 'fus' in computation[1]
        for result, kind, part, channel in _COLLECTIVE.findall(line):
            size = sum(_bytes(padded, *array) for array in _ARRAY.findall(result))
            # The size as well: the compiler now and then gives a channel to two of one kind.
            again = in_fusion and channel and (kind, channel, size) in seen
            if part != '-start' and not again:
                found.append((kind, size))
                seen.add((kind, channel, size))
    return found


def kernel_traffic(text: str) -> int:
    """Bytes that a TPU program's Pallas kernels read and write: their operands and results.

    The compiler's own count leaves them out, but for those that say themselves what they move:
    such as read a part of their operands only.

    Example:
      >>> lines = [
      ...   '%x = f32[8,128]{1,0} parameter(0)',
      ...   '%y = f32[8,128]{1,0} custom-call(%x, %x), custom_call_target="tpu_custom_call"',
      ... ]
      >>> kernel_traffic('\\n'.join(lines)) // (8 * 128 * 4)
      3
    """
    sizes = {
        name: sum(_bytes(False, *array) for array in _ARRAY.findall(result))
        for name, result in _RESULT.findall(text)
    }
    return sum(
        sizes[name] + sum(sizes[operand] for operand in re.findall(r'%[\w.-]+', operands))
        for name, operands in _KERNEL.findall(text)
    )


def gpu_traffic(text: str) -> int:
    """Bytes that a GPU program's kernels read and write, each operand once: it has large caches.

    Of an operand that a fusion only cuts parts out of, these. The compiler itself does not count.

    Raises:
      ValueError: if there is a loop or a branch, whose kernels run who knows how often.

    Example:
      >>> lines = [
      ...   '%fused (p: f32[8,128]) -> f32[2,128] {',
      ...   '  %p = f32[8,128]{1,0} parameter(0)',
      ...   '  ROOT %s = f32[2,128]{1,0} slice(%p), slice={[0:2], [0:128]}',
      ...   'ENTRY %main (x: f32[8,128]) -> f32[8,128] {',
      ...   '  %x = f32[8,128]{1,0} parameter(0)',
      ...   '  %y = f32[2,128]{1,0} fusion(%x), kind=kLoop, calls=%fused',
      ...   '  ROOT %z = f32[8,128]{1,0} custom-call(%x, %y), custom_call_target="any"',
      ... ]
      >>> gpu_traffic('\\n'.join(lines)) // (128 * 4)
      22
    """
    programs: dict[str, list[tuple[str, str, list[str], str]]] = {}
    sizes, entry, own = {}, '', ''
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            own = computation[1]
            programs[own] = []
            entry = own if line.startswith('ENTRY') else entry
        elif own and (found := _INSTRUCTION.match(line)):
            name, result, kind, given, more = found.groups()
            sizes[own, name] = sum(_bytes(False, *array) for array in _ARRAY.findall(result))
            number = [given] if kind == 'parameter' else []
            programs[own].append((name, kind, number or re.findall(r'%[\w.-]+', given), more))

    def parts(program: str, name: str) -> int:
        """What a fusion reads of an array: all, or what it cuts out of it."""
        total = 0
        for result, kind, operands, _ in programs[program]:
            if name in operands:
                if kind == 'bitcast':
                    total += parts(program, result)
                elif kind in _PARTS and name not in operands[1:]:
                    total += sizes[program, result]
                else:
                    return sizes[program, name]
        return min(total, sizes[program, name])

    total = 0
    for name, kind, operands, more in programs[entry]:
        if kind in ('call', 'conditional', 'while'):
            raise ValueError(f'{name} is a {kind}: how often its kernels run is not known.')
        if kind in _FREE:
            continue
        total += sizes[entry, name]
        if kind == 'fusion' and (called := re.search(r'calls=(%[\w.-]+)', more)):
            inner = called[1]
            numbered = {o[0]: n for n, k, o, _ in programs[inner] if k == 'parameter'}
            given = {operand: numbered[str(i)] for i, operand in enumerate(operands)}
            total += sum(parts(inner, parameter) for parameter in given.values())
        else:
            total += sum(sizes[entry, operand] for operand in set(operands))
    return total


def border(leaf: Any) -> int:
    """Bytes of a shard's faces along each sharded axis, both sides, one entry deep."""
    shard = leaf.sharding.shard_shape(leaf.shape)
    faces = (
        math.prod(shard) // own
        for own, whole in zip(shard, leaf.shape, strict=True)
        if own < whole
    )
    return 2 * leaf.dtype.itemsize * sum(faces)


def bytes_by_device(tree: Any) -> dict[Any, int]:
    """What each of our devices holds of the leaves of a tree; those with nothing are left out."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held


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
