"""qcow: guest offsets to host offsets, over the L1 table and cached L2 tables. No I/O.

    guest offset = | L1 index | L2 index | within the cluster |

Reference: https://gitlab.com/qemu-project/qemu/-/blob/master/block/qcow.c
"""

from __future__ import annotations

import zlib
from array import array
from typing import Final

from tapcore.errors import ImageError
from tapcore.formats.extents import DATA, HOLE, PACKED, MapExtent, TableMiss, from_big_endian
from tapcore.formats.qcow.layout import COMPRESSED, SECTOR_BYTES, Header
from tapcore.formats.tables import Tables

CACHE_BYTES: Final = 32 << 20
"""Of L2 tables: with clusters of 4 KiB, enough for 16 GiB of disk at a time."""
MIN_CACHED: Final = 16
SECTOR_ENTRIES: Final = SECTOR_BYTES // 8
WINDOW_BITS: Final = -12
"""Of compressed clusters, which are deflated without a header."""


class Mapping:
    """The L1 table and its cached L2 tables, by L1 index. Changed tables stay until they were written."""

    def __init__(self, header: Header, l1: array[int]) -> None:
        self.header = header
        self.l1 = l1
        self.unit_bytes = header.cluster_bytes
        self.cluster_bits = header.cluster_bits
        self.table_shift = header.cluster_bits + header.l2_bits
        self.index_mask = (1 << header.l2_bits) - 1
        self.file_bytes = 0
        """How long the file is: no entry may point past it."""
        self.first_host = header.l1_table_offset + 8 * header.l1_size
        self.tables: Tables[array[int]] = Tables(max(MIN_CACHED, CACHE_BYTES // header.l2_bytes))
        self.l1_dirty: set[int] = set()

    # Reading

    def find(self, offset: int, length: int, max_extents: int = 0) -> list[MapExtent]:
        extents: list[MapExtent] = []
        end = offset + length
        first_host, file_bytes, within_mask = self.first_host, self.file_bytes, self.unit_bytes - 1
        last_kind, last_length, last_host = -1, 0, 0
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
                host = table[offset >> self.cluster_bits & self.index_mask]
                within = offset & within_mask
                piece = min(end - offset, self.unit_bytes - within)
                if first_host <= host < file_bytes and not host % SECTOR_BYTES:
                    kind, host = DATA, host + within
                else:
                    kind, host = self.kind_of(host, offset)
                    host += within if kind == DATA else 0
            if kind == last_kind and (kind == HOLE or (kind == DATA and last_host + last_length == host)):
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

    def place(self, offset: int, length: int) -> int:
        """Where a range within one cluster is in the file; -1 if it is not, or its table is not cached."""
        if (offset & self.unit_bytes - 1) + length > self.unit_bytes:
            return -1
        table = self.tables.use(offset >> self.table_shift)
        if table is None:
            return -1
        host = table[offset >> self.cluster_bits & self.index_mask]
        if not self.first_host <= host < self.file_bytes or host % SECTOR_BYTES:
            return -1
        return host + (offset & self.unit_bytes - 1)

    def kind_of(self, entry: int, offset: int) -> tuple[int, int]:
        """(kind, host) of the L2 entry of the guest offset `offset`. ImageError if it cannot be right."""
        if not entry:
            return HOLE, 0
        if entry & COMPRESSED:
            place, length = self.packed_place(entry)
            if not length or not self.is_free_for(place, length) or place + length > self.file_bytes:
                raise ImageError(f"L2 entry {entry:#x} of guest offset {offset}: compressed data outside the "
                                 "file, in the L1 table, or of no length")
            return PACKED, entry
        if entry % SECTOR_BYTES or entry >= self.file_bytes or not self.is_free_for(entry, self.unit_bytes):
            raise ImageError(f"L2 entry {entry:#x} of guest offset {offset}: not a sector's offset, outside the "
                             "file, or in the L1 table")
        return DATA, entry

    def is_free_for(self, host: int, length: int) -> bool:
        """Is neither the header nor the L1 table there?"""
        return host >= self.first_host or (
            host + length <= self.header.l1_table_offset and host >= SECTOR_BYTES)

    def table(self, index: int) -> array[int] | None:
        """The L2 table of L1 index `index`, None if there is none. TableMiss; ImageError for a bad L1 entry."""
        table = self.tables.use(index)
        if table is not None:
            return table
        host = self.l1[index]
        if not host:
            return None
        if host % SECTOR_BYTES or host >= self.file_bytes or not self.is_free_for(host, self.header.l2_bytes):
            raise ImageError(f"L1 entry {index}, {host:#x}: not a sector's offset, outside the file, or in the L1 "
                             "table")
        raise TableMiss("L2 table", index, host, self.header.l2_bytes)

    def entry(self, offset: int) -> int:
        """The L2 entry of the cluster at the guest offset `offset`. TableMiss, ImageError."""
        table = self.table(offset >> self.table_shift)
        return 0 if table is None else table[offset >> self.cluster_bits & self.index_mask]

    def install(self, miss: TableMiss, data: bytes) -> None:
        if miss.index not in self.tables and self.l1[miss.index] == miss.host:
            self.tables.put(miss.index, from_big_endian("Q", data))

    def packed_place(self, host: int) -> tuple[int, int]:
        offset_bits = 63 - self.cluster_bits
        return host & (1 << offset_bits) - 1, host >> offset_bits & self.unit_bytes - 1

    def unpack(self, data: bytes) -> bytes:
        try:
            out = zlib.decompressobj(WINDOW_BITS).decompress(data, self.unit_bytes)
        except zlib.error as error:
            raise ImageError(f"a compressed cluster is damaged: {error}") from None
        if len(out) != self.unit_bytes:
            raise ImageError(f"a compressed cluster is damaged: it holds {len(out)} bytes, not {self.unit_bytes}")
        return out

    # Changing, in memory

    def add_table(self, index: int, host: int) -> None:
        """A new L2 table without entries."""
        self.l1[index] = host
        self.l1_dirty.add(index // SECTOR_ENTRIES)
        self.tables.put(index, array("Q", bytes(self.header.l2_bytes)))
        self.tables.change_all(index, self.header.l2_bytes // SECTOR_BYTES)

    def set_entry(self, offset: int, entry: int) -> int:
        """Change the L2 entry of the cluster at `offset`, whose table is cached. Returns the former."""
        index, at = offset >> self.table_shift, offset >> self.cluster_bits & self.index_mask
        table = self.tables[index]
        former, table[at] = table[at], entry
        self.tables.change(index, at // SECTOR_ENTRIES)
        return former
