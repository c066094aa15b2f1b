"""qcow2: guest offsets to host offsets, over the L1 table and cached L2 tables. No I/O.

    guest offset = | L1 index | L2 index | within the cluster |

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Final

from tapcore.errors import ImageError
from tapcore.formats.extents import DATA, HOLE, PACKED, ZERO, MapExtent, TableMiss, from_big_endian
from tapcore.formats.qcow2 import packed
from tapcore.formats.qcow2.layout import (
    COMPRESSED,
    COMPRESSIONS,
    COPIED,
    ENTRY_RESERVED,
    OFFSET_MASK,
    ZERO_FLAG,
    Header,
)
from tapcore.formats.tables import SECTOR_BYTES, Tables

CACHE_BYTES: Final = 32 << 20
"""Of L2 tables: with clusters of 64 KiB, enough for 256 GiB of disk at a time, and with clusters of 512 bytes for
2 GiB. All tables of one read or write must fit."""
MIN_CACHED: Final = 16

SECTOR_ENTRIES: Final = SECTOR_BYTES // 8
L2: Final = "L2 table"


class Mapping:
    """The active L1 table and its cached L2 tables, by L1 index. Changed tables stay until they were written."""

    words_shift = 0
    """An L2 entry has 1 << this words."""

    def __init__(self, header: Header, l1: array[int]) -> None:
        self.header = header
        self.l1 = l1
        self.unit_bytes = header.cluster_bytes
        self.cluster_bits = header.cluster_bits
        self.table_shift = 2 * header.cluster_bits - header.l2_entry_bits
        self.index_mask = (1 << header.cluster_bits - header.l2_entry_bits) - 1
        self.host_mask = OFFSET_MASK & -header.cluster_bytes
        self.reserved = ENTRY_RESERVED | (ZERO_FLAG if header.version < 3 else 0)
        self.not_plain = ~(self.host_mask | COPIED) & ((1 << 64) - 1)
        """What an entry for plain data has none of."""
        self.external = header.data_file is not None
        """The data is in a file of its own, each cluster at its guest offset."""
        self.is_plain = not self.external and not header.has_subclusters
        """An L2 entry alone says what a cluster is."""
        self.file_bytes = 0
        """How long the file is: nothing may point past it."""
        self.data_end = 1 << 62 if self.external else 0
        """Where the file of the data ends."""
        self.tables: Tables[array[int]] = Tables(max(MIN_CACHED, CACHE_BYTES >> header.cluster_bits))
        self.l1_dirty: set[int] = set()

    # Reading

    def find(self, offset: int, length: int, max_extents: int = 0) -> list[MapExtent]:
        extents: list[MapExtent] = []
        end = offset + length
        cluster_bits, within_mask = self.cluster_bits, self.unit_bytes - 1
        last_kind, last_length, last_host = -1, 0, 0
        not_plain = -1 if self.external else self.not_plain
        while offset < end:
            try:
                table = self.table(offset >> self.table_shift)
            except TableMiss:
                if max_extents and last_length:
                    break
                raise
            if table is None:
                kind, host = HOLE, 0
                piece = min(end, (offset >> self.table_shift) + 1 << self.table_shift) - offset
            else:
                entry = table[offset >> cluster_bits & self.index_mask]
                within = offset & within_mask
                piece = min(end - offset, self.unit_bytes - within)
                host = entry & self.host_mask
                if host and not entry & not_plain and host < self.file_bytes:
                    kind, host = DATA, host + within
                else:
                    kind, host = self.kind_of(entry, offset)
                    if kind == DATA:
                        host += within
            if kind == last_kind and kind != PACKED and (kind != DATA or last_host + last_length == host):
                last_length += piece
            else:
                if last_length:
                    extents.append((last_kind, last_length, last_host))
                    if len(extents) == max_extents:
                        return extents
                last_kind, last_length, last_host = kind, piece, host
            offset += piece
        extents.append((last_kind, last_length, last_host))
        return extents

    def kind_of(self, entry: int, offset: int) -> tuple[int, int]:
        """(kind, host) of an L2 entry of the guest offset `offset`. ImageError if it cannot be right."""
        host = entry & OFFSET_MASK
        if self.external:
            if entry & (COMPRESSED | self.reserved) or (self.has_host(entry) and (
                    not entry & COPIED or host != offset & -self.unit_bytes)):
                raise ImageError(f"L2 entry {entry:#x} of guest offset {offset}: compressed, shared, reserved "
                                 "bits, or another offset in the data file than the guest's")
        elif entry & COMPRESSED:
            place, length = packed.packed_place(entry, self.cluster_bits)
            if place < self.unit_bytes or place + length > (self.file_bytes + 511 & -512):
                raise ImageError(f"L2 entry {entry:#x} of guest offset {offset}: compressed data outside the file")
            return PACKED, entry
        elif entry & self.reserved or host % self.unit_bytes or host >= max(self.file_bytes, 1):
            raise ImageError(f"L2 entry {entry:#x} of guest offset {offset}: reserved bits, no cluster's offset, "
                             "or outside the file")
        if entry & ZERO_FLAG:
            return ZERO, host
        return (DATA, host) if self.has_host(entry) else (HOLE, 0)

    def table(self, index: int) -> array[int] | None:
        """The L2 table of L1 index `index`, None if there is none. TableMiss; ImageError for a bad L1 entry."""
        table = self.tables.use(index)
        if table is not None:
            return table
        entry = self.l1[index]
        host = entry & OFFSET_MASK
        if not host:
            return None
        if entry & ~(OFFSET_MASK | COPIED) or host % self.unit_bytes or host >= self.file_bytes:
            raise ImageError(f"L1 entry {index}, {entry:#x}, is not the offset of a cluster in the file")
        raise TableMiss(L2, index, host, self.unit_bytes)

    def entry(self, offset: int) -> int:
        """The L2 entry of the cluster at the guest offset `offset`. TableMiss, ImageError."""
        table = self.table(offset >> self.table_shift)
        return 0 if table is None else table[offset >> self.cluster_bits & self.index_mask]

    def entries(self, table: array[int]) -> Iterable[int]:
        """The L2 entries of a table."""
        return table

    def is_present(self, entry: int, offset: int, length: int) -> bool:
        """Is this part of one cluster, whose table is cached and whose L2 entry looks plain, in the file for
        certain?"""
        return not self.external or entry == offset & -self.unit_bytes | COPIED

    def has_host(self, entry: int) -> bool:
        """Has the cluster of this L2 entry a place in the file?"""
        return bool(entry & (OFFSET_MASK | COPIED if self.external else OFFSET_MASK))

    def install(self, miss: TableMiss, data: bytes) -> None:
        if miss.index not in self.tables and self.l1[miss.index] & OFFSET_MASK == miss.host:
            self.tables.put(miss.index, from_big_endian("Q", data))

    def packed_place(self, host: int) -> tuple[int, int]:
        return packed.packed_place(host, self.cluster_bits)

    def unpack(self, data: bytes) -> bytes:
        return packed.unpack(data, COMPRESSIONS[self.header.compression_type], self.unit_bytes)

    def grow(self, file_bytes: int) -> None:
        """The file is at least so long."""
        self.file_bytes = max(self.file_bytes, file_bytes)
        if not self.external:
            self.data_end = self.file_bytes

    # Changing, in memory

    def is_private(self, index: int) -> bool:
        """May the L2 table be changed in place?"""
        return bool(self.l1[index] & OFFSET_MASK and self.l1[index] & COPIED)

    def replace_table(self, index: int, host: int) -> int:
        """Let the L2 table live at `host`, a new cluster, from now on; returns where it was, or 0."""
        former = self.l1[index] & OFFSET_MASK
        if not former:
            self.tables[index] = array("Q", bytes(self.unit_bytes))
        self.l1[index] = host | COPIED
        self.l1_dirty.add(index // SECTOR_ENTRIES)
        self.tables.change_all(index, self.unit_bytes // SECTOR_BYTES)
        self.tables.make_room()
        return former

    def set_entry(self, offset: int, entry: int) -> int:
        """Change the L2 entry of the cluster at `offset`; its table is cached and private. Returns the former."""
        index, at = offset >> self.table_shift, offset >> self.cluster_bits & self.index_mask
        table = self.tables[index]
        former, table[at] = table[at], entry
        self.tables.change(index, at // SECTOR_ENTRIES)
        return former
