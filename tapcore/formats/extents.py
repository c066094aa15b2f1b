"""The vocabulary of every copy-on-write format: a mapping says where a range of the disk is.

    guest   |---- DATA ----|-- ZERO --|---- HOLE ----|- PACKED -|
                  |          zeroes    backing, or        |
    file    ......[host].............  zeroes there ......[compressed, host]

`guest` offsets are those of the disk, `host` offsets those of the image file; both in bytes.
"""

from __future__ import annotations

import sys
from array import array
from typing import Final, Protocol, TypeAlias

from tapcore.layout import Buffer

DATA: Final = 0
"""In the file, at `host`."""
ZERO: Final = 1
"""Reads as zeroes, whatever is below."""
HOLE: Final = 2
"""Not in this image: the backing's, and zeroes where there is none."""
PACKED: Final = 3
"""Compressed; `host` is what the mapping's `unpack` takes."""

MapExtent: TypeAlias = tuple[int, int, int]
"""(kind, length in bytes, host)."""


class TableMiss(Exception):
    """A table that the answer depends on is not cached: read `length` bytes at `host`, give them to `install`."""

    def __init__(self, table: str, index: int, host: int, length: int) -> None:
        super().__init__(f"{table} {index} at {host}")
        self.table = table
        self.index = index
        self.host = host
        self.length = length


class Mapping(Protocol):
    """Where the disk's ranges are. Everything but `unpack` in the loop's thread, and without I/O."""

    unit_bytes: int
    """The size and alignment of what one PACKED extent unpacks to."""

    def find(self, offset: int, length: int, max_extents: int = 0) -> list[MapExtent]:
        """Consecutive extents from `offset` on: all `length` bytes, or if `max_extents` is not 0 that many at
        most, and perhaps only what comes before a table that is not cached. Raises TableMiss, and ImageError for
        an entry that cannot be right."""

    def install(self, miss: TableMiss, data: bytes) -> None:
        """Cache a table. ImageError if it cannot be right."""

    def packed_place(self, host: int) -> tuple[int, int]:
        """(offset in the file, length) of a PACKED extent's compressed bytes."""

    def unpack(self, data: bytes) -> bytes:
        """`unit_bytes` of data. Any thread. ImageError if they are damaged."""


def from_big_endian(typecode: str, data: Buffer) -> array[int]:
    """An array of the file's big-endian integers, in the machine's order."""
    values: array[int] = array(typecode)
    values.frombytes(data)
    if sys.byteorder == "little":
        values.byteswap()
    return values


def to_big_endian(values: array[int]) -> bytes:
    """The reverse of `from_big_endian`; `values` stays as it is."""
    copy = values[:]
    if sys.byteorder == "little":
        copy.byteswap()
    return copy.tobytes()
