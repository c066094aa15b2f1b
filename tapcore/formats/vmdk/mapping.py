"""vmdk: guest offsets to places in an extent's file, over its grain directory and cached grain tables. No I/O.

    guest offset = | directory index | table index | within the grain |

Specification: VMware, Virtual Disk Format 5.0 (https://www.vmware.com/support/developer/vddk/vmdk_50_technote.pdf).
"""

from __future__ import annotations

import sys
import zlib
from array import array
from typing import Final

from tapcore.driver import SECTOR_BYTES
from tapcore.errors import ImageError
from tapcore.formats.extents import DATA, HOLE, PACKED, ZERO, MapExtent, TableMiss
from tapcore.formats.tables import Tables
from tapcore.formats.vmdk.layout import GRAIN_MARKER, GTE_BYTES, GTE_HOLE, GTE_ZERO, Header
from tapcore.layout import Buffer

CACHE_BYTES: Final = 8 << 20
"""Of grain tables, of each extent: with grains of 64 KiB, enough for 128 GiB of disk at a time."""
MIN_CACHED: Final = 16
SECTOR_ENTRIES: Final = SECTOR_BYTES // GTE_BYTES
GT: Final = "grain table"


def from_little_endian(data: Buffer) -> array[int]:
    """A directory's or table's entries, in the machine's order."""
    values = array("I", bytes(data))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def to_little_endian(values: array[int]) -> bytes:
    """The reverse; `values` stays as it is."""
    copy = values[:]
    if sys.byteorder == "big":
        copy.byteswap()
    return copy.tobytes()


class Mapping:
    """The grain directory of one extent and its cached grain tables, by directory index. Entries count in
    sectors."""

    def __init__(self, header: Header, directory: array[int], file_bytes: int) -> None:
        self.header = header
        self.directory = directory
        self.unit_bytes = header.grain_bytes
        self.grain_bits = header.grain_bytes.bit_length() - 1
        self.table_bits = header.reach_bytes.bit_length() - 1
        self.index_mask = header.gtes_per_gt - 1
        self.first_sector = -(-header.metadata_bytes // SECTOR_BYTES)
        self.end_sector = -(-file_bytes // SECTOR_BYTES)
        """Where grains may be; the end grows with the file."""
        table_bytes = header.table_bytes
        self.tables: Tables[array[int]] = Tables(max(MIN_CACHED, CACHE_BYTES // table_bytes))

    def find(self, offset: int, length: int, max_extents: int = 0) -> list[MapExtent]:
        extents: list[MapExtent] = []
        end = offset + length
        last_kind, last_length, last_host = -1, 0, 0
        while offset < end:
            try:
                table = self.table(offset >> self.table_bits)
            except TableMiss:
                if max_extents and last_length:
                    break
                raise
            if table is None:
                kind, host = HOLE, 0
                piece = min(end, (offset >> self.table_bits) + 1 << self.table_bits) - offset
            else:
                within = offset & self.unit_bytes - 1
                piece = min(end - offset, self.unit_bytes - within)
                kind, host = self.kind_of(table[offset >> self.grain_bits & self.index_mask], offset)
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
        """(kind, host of the grain) of a table's entry for the guest offset `offset`. ImageError if it cannot be
        right."""
        if entry == GTE_HOLE:
            return HOLE, 0
        if entry == GTE_ZERO and self.header.has_zero_grain:
            return ZERO, 0
        if not self.first_sector <= entry < self.end_sector:
            raise ImageError(f"grain table entry {entry} of guest offset {offset}: no grain's place in the file")
        return PACKED if self.header.compressed else DATA, entry * SECTOR_BYTES

    def table(self, index: int) -> array[int] | None:
        """The grain table at directory index `index`, None if there is none. TableMiss; ImageError for a bad
        directory entry."""
        table = self.tables.use(index)
        if table is not None:
            return table
        entry = self.directory[index]
        if not entry:
            return None
        if entry * SECTOR_BYTES + self.header.table_bytes > self.end_sector * SECTOR_BYTES:
            raise ImageError(f"grain directory entry {index}, {entry}, is not the place of a grain table")
        raise TableMiss(GT, index, entry * SECTOR_BYTES, self.header.table_bytes)

    def entry(self, offset: int) -> int:
        """The table entry of the grain at the guest offset `offset`. TableMiss, ImageError."""
        table = self.table(offset >> self.table_bits)
        return GTE_HOLE if table is None else table[offset >> self.grain_bits & self.index_mask]

    def install(self, miss: TableMiss, data: bytes) -> None:
        if miss.index not in self.tables and self.directory[miss.index] * SECTOR_BYTES == miss.host:
            self.tables.put(miss.index, from_little_endian(data))

    def set_entry(self, offset: int, entry: int) -> int:
        """Change the table entry of the grain at `offset`; its table is cached. Returns the former."""
        index, at = offset >> self.table_bits, offset >> self.grain_bits & self.index_mask
        table = self.tables[index]
        former, table[at] = table[at], entry
        self.tables.change(index, at // SECTOR_ENTRIES)
        return former

    def packed_place(self, host: int) -> tuple[int, int]:
        return host, min(self.header.max_packed_bytes, self.end_sector * SECTOR_BYTES - host)

    def unpack(self, data: bytes) -> bytes:
        return unpack_grain(self.header, data)[1]


def unpack_grain(header: Header, data: bytes) -> tuple[int | None, bytes]:
    """(the first sector that its marker names, the grain) from its place in the file; what follows it in `data` is
    ignored. ImageError if it is damaged."""
    lba = None
    if header.has_markers:
        if len(data) < GRAIN_MARKER.size:
            raise ImageError("a compressed grain is damaged: its marker is cut short")
        marker = GRAIN_MARKER.unpack(data)
        lba, size = marker["lba"], marker["size"]
        data = data[GRAIN_MARKER.size : GRAIN_MARKER.size + size]
        if not 0 < size <= header.max_packed_bytes or len(data) < size:
            raise ImageError(f"a compressed grain is damaged: its marker says it takes {size} bytes")
    try:
        out = zlib.decompressobj().decompress(data, header.grain_bytes)
    except zlib.error as error:
        raise ImageError(f"a compressed grain is damaged: {error}") from None
    if not out:
        raise ImageError("a compressed grain is damaged: it is empty")
    return lba, out.ljust(header.grain_bytes, b"\0")
