"""qcow2: how often each cluster of the file is referred to, counted in memory. No I/O.

    63 62 61 | 55 … 0        of each cluster, 8 bytes
     │  │  │   references that the image shall have
     │  │  └ an active table refers to it without COPIED
     │  └ … with COPIED
     └ the image in the file refers to it: not to be overwritten
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from typing import Final

from tapcore.errors import ImageError

CHUNK_BITS: Final = 10
CHUNK: Final = 1 << CHUNK_BITS
MAX_CHUNKS: Final = 1 << 18
"""2 GiB of memory: for files of up to 16 TiB with clusters of 64 KiB."""

OLD: Final = 1 << 63
MARKED: Final = 1 << 62
UNMARKED: Final = 1 << 61
COUNT: Final = (1 << 56) - 1


class Counts:
    """By cluster; 0 where nothing was counted."""

    def __init__(self) -> None:
        self.chunks: dict[int, array[int]] = {}
        """By cluster >> CHUNK_BITS."""
        self._hint = 0

    def chunk(self, number: int) -> array[int]:
        """Made if it is not there yet. ImageError if that would be too many."""
        chunk = self.chunks.get(number)
        if chunk is None:
            if len(self.chunks) >= MAX_CHUNKS:
                raise ImageError("refers to more clusters than can be counted", errno=errno.E2BIG)
            chunk = self.chunks[number] = array("Q", bytes(8 * CHUNK))
        return chunk

    def get(self, cluster: int) -> int:
        """References that the image shall have."""
        chunk = self.chunks.get(cluster >> CHUNK_BITS)
        return 0 if chunk is None else chunk[cluster & CHUNK - 1] & COUNT

    def add(self, cluster: int, refs: int, flags: int = 0) -> None:
        chunk, at = self.chunk(cluster >> CHUNK_BITS), cluster & CHUNK - 1
        chunk[at] = chunk[at] + refs | flags

    def take(self, count: int, refs: int = 1) -> int:
        """The first of `count` clusters in a row that nothing refers to; now they have `refs` references."""
        first = self._find(self._hint if count == 1 else 1, count)
        for cluster in range(first, first + count):
            self.add(cluster, refs)
        if count == 1:
            self._hint = first + 1
        return first

    def _find(self, first: int, count: int) -> int:
        while True:
            chunk = self.chunks.get(first >> CHUNK_BITS)
            if chunk is not None:
                try:
                    first = (first & -CHUNK) + chunk.index(0, first & CHUNK - 1)
                except ValueError:
                    first = (first | CHUNK - 1) + 1
                    continue
            length = next((more for more in range(1, count) if self._is_known(first + more)), count)
            if length == count:
                return first
            first += length

    def _is_known(self, cluster: int) -> bool:
        chunk = self.chunks.get(cluster >> CHUNK_BITS)
        return chunk is not None and chunk[cluster & CHUNK - 1] != 0

    def used(self) -> Iterator[tuple[int, int]]:
        """(cluster, references) where the image shall have any, in order."""
        for number in sorted(self.chunks):
            for at, value in enumerate(self.chunks[number], number << CHUNK_BITS):
                if value & COUNT:
                    yield at, value & COUNT

    def given_up(self) -> Iterator[int]:
        """Clusters that the image in the file refers to, and the one that shall be does not, in order."""
        for number in sorted(self.chunks):
            for at, value in enumerate(self.chunks[number], number << CHUNK_BITS):
                if value & OLD and not value & COUNT:
                    yield at
