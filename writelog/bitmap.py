"""One dirty bit for each block of a disk, over memory that somebody else owns.

Bit n, little-endian within its byte, stands for bytes [n * granularity, (n + 1) * granularity) of the disk; the
last block may be short. Bits past the last block are never set. `mark` is on the path of every guest write, and
`runs` is how every reader finds what is set; both work at the speed of bitarray's C code.

The engine alone writes the memory (no atomic OR exists across processes). It can be killed at any instruction and
the memory outlives it, so it is only changed by span assignments and by in-place operations on byte-aligned views:
these take each word from its old to its new value at once, where assigning one bitarray to a slice of another can
pass through wrong states.
"""

from __future__ import annotations

from itertools import islice

from bitarray import bitarray

from tapcore.errors import LogError
from tapcore.layout import Buffer

SECTOR_BYTES = 512
MIN_GRANULARITY_BYTES = 512
MAX_GRANULARITY_BYTES = 1 << 20
DEFAULT_GRANULARITY_BYTES = 4096


def check_granularity(granularity_bytes: int) -> int:
    """`granularity_bytes` if it is a power of two from 512 bytes to 1 MiB; LogError otherwise."""
    in_range = MIN_GRANULARITY_BYTES <= granularity_bytes <= MAX_GRANULARITY_BYTES
    if not in_range or granularity_bytes & (granularity_bytes - 1):
        raise LogError(f"granularity of {granularity_bytes} bytes",
                       hint=f"a power of two from {MIN_GRANULARITY_BYTES} to {MAX_GRANULARITY_BYTES} is needed")
    return granularity_bytes


def block_count(size_bytes: int, granularity_bytes: int) -> int:
    """Blocks of a disk, the short last one included."""
    return -(-size_bytes // granularity_bytes)


def bitmap_bytes(size_bytes: int, granularity_bytes: int) -> int:
    """Memory that the bitmap of a disk takes: whole 64-bit words."""
    return -(-block_count(size_bytes, granularity_bytes) // 64) * 8


class Bitmap:
    """The bits of a disk of `size_bytes`, at the start of `buffer`, which must be writable and long enough."""

    __slots__ = ("bits", "blocks", "granularity_bytes", "memory", "shift", "size_bytes")

    def __init__(self, buffer: Buffer, size_bytes: int, granularity_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.granularity_bytes = check_granularity(granularity_bytes)
        self.shift = granularity_bytes.bit_length() - 1
        self.blocks = block_count(size_bytes, granularity_bytes)
        self.memory = memoryview(buffer)[: bitmap_bytes(size_bytes, granularity_bytes)]
        self.bits = bitarray(buffer=self.memory, endian="little")

    def mark(self, offset: int, length: int) -> None:
        """Set the bit of every block that [offset, offset + length) touches. Inside the disk: not checked."""
        first = offset >> self.shift
        last = (offset + length - 1) >> self.shift
        if first == last:
            self.bits[first] = 1
        else:
            self.bits[first : last + 1] = 1

    def fill(self) -> None:
        """Set the bit of every block, and none past the end."""
        self.bits[: self.blocks] = 1
        self.bits[self.blocks :] = 0

    def view(self, first: int, stop: int) -> bitarray:
        """The blocks [first, stop) as a bitarray over the same memory; both are multiples of 8."""
        return bitarray(buffer=self.memory[first >> 3 : stop >> 3], endian="little")


def runs(
    bits: bitarray, start: int, stop: int, limit: int, base: int = 0, unit: int = 1
) -> tuple[list[int], int]:
    """The runs of set bits in bits[start:stop], at most `limit` of them, as one flat list.

    The list is [(base + first bit) * unit, bits * unit, ...]: pairs without a tuple for each. Returned with it is
    the index where the next call goes on: `stop` when there is no more. Single bits, which are nearly all that a
    scattered log has, come out of one iterator at some 100 ns each; a longer run costs a search for its end.
    """
    out: list[int] = []
    append = out.append
    while True:
        last = -2
        at = -1
        for at in islice(bits.search(1, start, stop), limit - len(out) // 2 + 1):
            if at == last + 1:
                break
            append((base + at) * unit)
            append(unit)
            last = at
        else:
            if len(out) > 2 * limit:
                del out[-2:]
                return out, last
            return out, stop
        end = bits.find(0, at, stop)
        start = end if end >= 0 else stop
        out[-1] = (start - last) * unit
