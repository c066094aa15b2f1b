"""VHD: guest offsets to host offsets, over the BAT and cached sector bitmaps. No I/O.

    guest offset = | block | sector | within the sector |        BAT[block] → bitmap | data

The BAT is in memory, 4 bytes a block. Bitmaps are read as they are needed, but for blocks that are known to be
full: a batmap tells, or a bitmap has told.
"""

from __future__ import annotations

from array import array
from typing import Final

from bitarray import bitarray

from tapcore.errors import ImageError
from tapcore.formats.extents import DATA, HOLE, MapExtent, TableMiss
from tapcore.formats.tables import Tables
from tapcore.formats.vhd.layout import SECTOR_BYTES, UNUSED, Header

CACHE_BYTES: Final = 16 << 20
"""Of bitmaps: with blocks of 2 MiB, enough for 48 GiB of disk at a time, full blocks not counted."""
OBJECT_BYTES: Final = 160
"""What a bitmap takes beside its bits."""
MAX_REQUEST_BYTES: Final = 1 << 32
"""All bitmaps of one request must fit."""
ENOUGH_BYTES: Final = 64 << 20
"""Of an answer to a block status: it begins anew with each bitmap that it has to wait for."""
BITMAP: Final = "sector bitmap of block"
BAT_SECTOR_ENTRIES: Final = SECTOR_BYTES // 4


class Mapping:
    """Of a dynamic or differencing image."""

    def __init__(self, header: Header, table: array[int], full: bytearray, file_bytes: int) -> None:
        self.header = header
        self.bat = table
        """By block, the sector of the file where its bitmap begins."""
        self.bat_dirty: set[int] = set()
        """Changed sectors of it."""
        self.full = full
        """By block, 1 if it is known that all of its sectors are present."""
        self.unit_bytes = header.block_size
        self.shift = header.block_size.bit_length() - 1
        self.bitmap_bytes = header.bitmap_bytes
        self.sectors = header.block_size // SECTOR_BYTES
        capacity = max(CACHE_BYTES // (self.bitmap_bytes + OBJECT_BYTES), MAX_REQUEST_BYTES >> self.shift)
        self.bitmaps: Tables[bitarray] = Tables(capacity)
        self.max_entry = 0
        """No entry may be larger."""
        self.grow_to(file_bytes)

    def grow_to(self, file_bytes: int) -> None:
        """The file is so long."""
        self.max_entry = min((file_bytes - self.header.stride_bytes) // SECTOR_BYTES, UNUSED - 1)

    def find(self, offset: int, length: int, max_extents: int = 0) -> list[MapExtent]:
        """A block status (`max_extents`) is cut at a missing bitmap if there is enough to be said already."""
        extents: list[MapExtent] = []
        begin, end = offset, offset + length
        while offset < end:
            block = offset >> self.shift
            stop = min(end, (block + 1) << self.shift)
            host = self.host(block)
            if host is None:
                _add(extents, HOLE, stop - offset, 0)
            elif self.full[block]:
                _add(extents, DATA, stop - offset, host + offset - (block << self.shift))
            else:
                if max_extents and offset - begin >= ENOUGH_BYTES and block not in self.bitmaps:
                    return extents
                self._find_in_block(extents, block, host, offset, stop)
            if max_extents and len(extents) > max_extents:
                return extents[:max_extents]
            offset = stop
        return extents

    def _find_in_block(self, extents: list[MapExtent], block: int, host: int, offset: int, stop: int) -> None:
        bitmap = self.bitmap(block)
        start = block << self.shift
        while offset < stop:
            sector = (offset - start) // SECTOR_BYTES
            present = bitmap[sector]
            other = bitmap.find(not present, sector)
            piece = min(stop, start + other * SECTOR_BYTES if other >= 0 else stop) - offset
            if present:
                _add(extents, DATA, piece, host + offset - start)
            else:
                _add(extents, HOLE, piece, 0)
            offset += piece

    def place(self, offset: int, length: int) -> int:
        """The host offset of a range within one block, if it is known that all of it is present; else -1."""
        block = offset >> self.shift
        start = offset & (self.unit_bytes - 1)
        entry = self.bat[block]
        if start + length > self.unit_bytes or not 0 < entry <= self.max_entry:
            return -1
        if not self.full[block]:
            bitmap = self.bitmaps.use(block)
            if bitmap is None or bitmap.find(0, start >> 9, (start + length + 511) >> 9) >= 0:
                return -1
        return entry * SECTOR_BYTES + self.bitmap_bytes + start

    def host(self, block: int) -> int | None:
        """Where the block's data begins, None if it has none. ImageError for an entry that cannot be right."""
        entry = self.bat[block]
        if entry == UNUSED:
            return None
        if not 0 < entry <= self.max_entry:
            raise ImageError(f"BAT entry {block}, {entry:#x}: no block of the file is there")
        return entry * SECTOR_BYTES + self.bitmap_bytes

    def bitmap(self, block: int) -> bitarray:
        """Of a block that has a place. TableMiss if it is not cached."""
        bitmap = self.bitmaps.use(block)
        if bitmap is None:
            raise TableMiss(BITMAP, block, self.bat[block] * SECTOR_BYTES, self.bitmap_bytes)
        return bitmap

    def install(self, miss: TableMiss, data: bytes) -> None:
        if miss.index in self.bitmaps or self.bat[miss.index] * SECTOR_BYTES != miss.host:
            return
        bitmap = bitarray(endian="big")
        bitmap.frombytes(data)
        del bitmap[self.sectors :]
        if bitmap.all():
            self.full[miss.index] = 1
        else:
            self.bitmaps.put(miss.index, bitmap)

    # Changing

    def editable_bitmap(self, block: int) -> bitarray:
        """The block's bitmap, cached, of a block without a place with no sector present. TableMiss, ImageError."""
        if self.host(block) is None:
            self.bitmaps.put(block, bitarray(self.sectors, endian="big"))
        elif self.full[block] and block not in self.bitmaps:
            bitmap = bitarray(self.sectors, endian="big")
            bitmap.setall(1)
            self.bitmaps.put(block, bitmap)
        return self.bitmap(block)

    def set_place(self, block: int, entry: int) -> None:
        """The block is at the sector `entry`; its bitmap is yet to be written."""
        self.bat[block] = entry
        self.bat_dirty.add(block // BAT_SECTOR_ENTRIES)
        self.bitmaps.change_all(block, self.bitmap_bytes // SECTOR_BYTES)

    def mark(self, block: int, first: int, last: int, present: int) -> None:
        """The sectors [first, last) of the block are present, or not; its bitmap is cached."""
        bitmap = self.bitmaps[block]
        if bitmap.find(not present, first, last) < 0:
            return
        bitmap[first:last] = present
        self.full[block] = bitmap.all()
        for sector in range(first >> 12, ((last - 1) >> 12) + 1):
            self.bitmaps.change(block, sector)

    def packed_place(self, host: int) -> tuple[int, int]:
        raise AssertionError("VHD has no compressed blocks")

    def unpack(self, data: bytes) -> bytes:
        raise AssertionError("VHD has no compressed blocks")


class FixedMapping:
    """Of a fixed image: the disk is the file."""

    unit_bytes = 1 << 20

    def place(self, offset: int, length: int) -> int:
        return offset

    def find(self, offset: int, length: int, max_extents: int = 0) -> list[MapExtent]:
        return [(DATA, length, offset)]

    def install(self, miss: TableMiss, data: bytes) -> None:
        raise AssertionError("a fixed VHD has no tables")

    def packed_place(self, host: int) -> tuple[int, int]:
        raise AssertionError("a fixed VHD has no compressed blocks")

    def unpack(self, data: bytes) -> bytes:
        raise AssertionError("a fixed VHD has no compressed blocks")


def _add(extents: list[MapExtent], kind: int, length: int, host: int) -> None:
    if extents:
        last_kind, last_length, last_host = extents[-1]
        if kind == last_kind and (kind == HOLE or last_host + last_length == host):
            extents[-1] = (kind, last_length + length, last_host)
            return
    extents.append((kind, length, host))
