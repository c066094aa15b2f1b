"""qcow2: the mapping of images with extended L2 entries. No I/O.

A cluster has 32 subclusters; each is in the file, zeroes, or the backing's. Here an entry is one number:

    | reads as zeroes, a bit for each (32) | in the file, a bit for each (32) | L2 entry as in other images (64) |

Specification: https://www.qemu.org/docs/master/interop/qcow2.html (extended L2 entries)
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from tapcore.errors import ImageError
from tapcore.formats.extents import DATA, HOLE, PACKED, ZERO, MapExtent
from tapcore.formats.qcow2.layout import COMPRESSED, Header
from tapcore.formats.qcow2.mapping import SECTOR_ENTRIES, Mapping

SUBCLUSTERS: Final = 32
ALL: Final = (1 << SUBCLUSTERS) - 1
"""Every subcluster of a cluster."""
IN_FILE_AT: Final = 64
ZERO_AT: Final = 96
"""Where in an entry the bits of the subclusters begin."""


class SubclusterMapping(Mapping):
    """As Mapping, with subclusters."""

    words_shift = 1

    def __init__(self, header: Header, l1: array[int]) -> None:
        super().__init__(header, l1)
        self.piece_bytes = header.cluster_bytes // SUBCLUSTERS
        self.piece_bits = header.cluster_bits - 5

    def bits(self, first: int, last: int) -> int:
        """The subclusters that guest range [first, last) of one cluster touches."""
        within = self.unit_bytes - 1
        return (2 << ((last - 1 & within) >> self.piece_bits)) - (1 << ((first & within) >> self.piece_bits))

    def is_present(self, entry: int, offset: int, length: int) -> bool:
        bits = self.tables[offset >> self.table_shift][2 * (offset >> self.cluster_bits & self.index_mask) + 1]
        return (not self.bits(offset, offset + length) & ~bits and not bits & bits >> SUBCLUSTERS
                and super().is_present(entry, offset, length))

    def find(self, offset: int, length: int, max_extents: int = 0) -> list[MapExtent]:
        extents: list[MapExtent] = []
        for piece in self._pieces(offset, offset + length):
            kind, piece_bytes, host = piece
            if extents:
                last_kind, last_length, last_host = extents[-1]
                if kind == last_kind and kind != PACKED and (kind != DATA or last_host + last_length == host):
                    extents[-1] = kind, last_length + piece_bytes, last_host
                    continue
                if len(extents) == max_extents:
                    return extents
            extents.append(piece)
        return extents

    def _pieces(self, offset: int, end: int) -> Iterator[MapExtent]:
        while offset < end:
            table = self.table(offset >> self.table_shift)
            if table is None:
                stop = min(end, (offset >> self.table_shift) + 1 << self.table_shift)
                yield HOLE, stop - offset, 0
            else:
                stop = min(end, (offset | self.unit_bytes - 1) + 1)
                yield from self._pieces_of(self.entry(offset), offset, stop)
            offset = stop

    def _pieces_of(self, entry: int, offset: int, end: int) -> Iterator[MapExtent]:
        """Of the part [offset, end) of one cluster."""
        kind, host = self.kind_of(entry, offset)
        if kind == PACKED:
            yield kind, end - offset, host
            return
        host += offset & self.unit_bytes - 1
        if entry >> IN_FILE_AT in (0, ALL, ALL << SUBCLUSTERS):
            yield kind, end - offset, host
            return
        while offset < end:
            stop = min(end, (offset | self.piece_bytes - 1) + 1)
            yield self.kind_at(entry, offset), stop - offset, host
            host += stop - offset
            offset = stop

    def kind_at(self, entry: int, offset: int) -> int:
        """The kind of one subcluster of a cluster that is not compressed, whose entry is right."""
        number = (offset & self.unit_bytes - 1) >> self.piece_bits
        if entry >> IN_FILE_AT + number & 1:
            return DATA
        return ZERO if entry >> ZERO_AT + number & 1 else HOLE

    def kind_of(self, entry: int, offset: int) -> tuple[int, int]:
        in_file, zero = entry >> IN_FILE_AT & ALL, entry >> ZERO_AT
        if entry & COMPRESSED:
            if in_file or zero:
                raise ImageError(f"L2 entry {entry:#x} of guest offset {offset}: compressed, with subclusters")
            return super().kind_of(entry, offset)
        if entry & 1 or in_file & zero or (in_file and not self.has_host(entry)):
            raise ImageError(f"L2 entry {entry:#x} of guest offset {offset}: a subcluster is in the file and "
                             "zero, or in a cluster that is nowhere")
        _, host = super().kind_of(entry, offset)
        return self.kind_at(entry, offset), host

    def entry(self, offset: int) -> int:
        table = self.table(offset >> self.table_shift)
        if table is None:
            return 0
        at = 2 * (offset >> self.cluster_bits & self.index_mask)
        return table[at] | table[at + 1] << IN_FILE_AT

    def entries(self, table: array[int]) -> Iterator[int]:
        for at in range(0, len(table), 2):
            yield table[at] | table[at + 1] << IN_FILE_AT

    def set_entry(self, offset: int, entry: int) -> int:
        former = self.entry(offset)
        index, at = offset >> self.table_shift, 2 * (offset >> self.cluster_bits & self.index_mask)
        table = self.tables[index]
        table[at], table[at + 1] = entry & (1 << 64) - 1, entry >> IN_FILE_AT
        self.tables.change(index, at // SECTOR_ENTRIES)
        return former


def make_mapping(header: Header, l1: array[int]) -> Mapping:
    """The mapping for the kind of L2 entries that the image has."""
    return SubclusterMapping(header, l1) if header.has_subclusters else Mapping(header, l1)
