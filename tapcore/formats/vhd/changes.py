"""VHD: what changes an image: blocks are added at the end of the file, sector bits set and cleared in memory.

A commit writes, each stage after what it points at is durable:

    data; footer behind the new end; batmap, if a full block is full no longer | sector bitmaps | BAT

A block comes to lie where the footer was: until the commit the copy at the start of the file is the only one. With
this order the BAT points at no block whose bitmap is not there, no bit is set for data that is not there, and the
batmap calls no block full that is not: at worst blocks at the end of the file are leaked.

On a block device the footer stays at its end, blocks are added behind the last one, and their places do not read
as zeroes.

A block stays where it is. Discarded sectors are holes in the file, and absent if nothing shows through then: QEMU
does not look at the bits, so without a parent what is absent has to be zero in the file, too. What becomes full
gets into the batmap when the image is closed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from tapcore.errors import ImageError
from tapcore.formats.commit import Commit, Write, array_writes, runs
from tapcore.formats.durable import Steps
from tapcore.formats.extents import to_big_endian
from tapcore.formats.tables import Tables
from tapcore.formats.vhd.layout import SECTOR_BYTES, UNUSED, Image, round_up
from tapcore.formats.vhd.load import batmap_writes
from tapcore.formats.vhd.mapping import Mapping
from tapcore.formats.writer import NOWHERE, Unit, Writer
from tapcore.request import DISCARD, NO_HOLE, Request

if TYPE_CHECKING:
    from tapcore.formats.vhd.driver import VhdDriver

ALIGN_BYTES = 4096
"""Of the data of new blocks, as XenServer has it."""
MAX_FILE_BYTES = UNUSED * SECTOR_BYTES
"""A BAT entry has 32 bits for a sector, and one number says that there is none."""
KEEP, PRESENT, ABSENT = range(3)
"""What `map` does to the bits of a unit's sectors."""


class VhdWriter(Writer):
    """Of a dynamic or differencing image. `in_batmap` are the blocks that the file's batmap calls full; `end` is
    where the next block may lie."""

    driver: VhdDriver

    def __init__(
        self, driver: VhdDriver, mapping: Mapping, image: Image, in_batmap: bytearray, end: int
    ) -> None:
        super().__init__(driver, mapping.bitmaps, unit_bytes=mapping.unit_bytes, piece_bytes=SECTOR_BYTES,
                         table_bytes=mapping.unit_bytes)
        self.mapping = mapping
        self.image = image
        self.in_batmap = in_batmap
        self.batmap_dirty = False
        self.on_device = driver.file.is_device
        self.end = self.footer_at = round_up(end)
        """Where the footer belongs in a file, and where the last commit has it."""
        self._free: list[int] = []
        """Places of blocks that were given up, and in a file hold zeroes."""

    # Plan

    def plan_write(self, guest: int, first: int, last: int) -> int | Unit:
        block = guest >> self.mapping.shift
        host = self.mapping.host(block)
        if host is not None and self.mapping.full[block]:
            return host
        start, stop = first & -SECTOR_BYTES, round_up(last)
        if host is not None:
            bitmap = self.mapping.bitmap(block)
            if bitmap.find(0, (start - guest) >> 9, (stop - guest) >> 9) < 0:
                return host
            start = first if bitmap[(first - guest) >> 9] else start
            stop = last if bitmap[(last - 1 - guest) >> 9] else stop
        hidden = not self.driver.backing_bytes(start, stop - start)
        return Unit(guest, start, stop, NOWHERE if host is None else host, reads_zero=hidden, entry=PRESENT)

    def plan_range(self, request: Request, guest: int, first: int, last: int) -> Unit | None:
        block = guest >> self.mapping.shift
        host = self.mapping.host(block)
        shows_backing = self.driver.backing_bytes(first, last - first) > 0
        if host is None:
            if request.op == DISCARD or not shows_backing:
                return None
            self._check_room()
            return Unit(guest, first, last, entry=PRESENT)
        if shows_backing and request.op != DISCARD:
            return Unit(guest, first, last, host, entry=PRESENT)
        if not self.mapping.full[block]:
            bitmap = self.mapping.bitmap(block)
            if bitmap.find(1, (first - guest) >> 9, round_up(last - guest) >> 9) < 0:
                return None
        keeps = shows_backing or request.flags & NO_HOLE
        return Unit(guest, first, last, host, entry=KEEP if keeps else ABSENT)

    def writes_zeroes(self, request: Request) -> bool:
        """A new block is no way to zeroes where it does not read as such."""
        return self.on_device and self.driver.backing_bytes(request.offset, request.length) > 0

    # Tables, allocate

    def make_table(self, index: int) -> None:
        self.mapping.editable_bitmap(index)

    def allocate(self, units: list[Unit]) -> None:
        for unit in units:
            unit.host, unit.fresh = self._take() + self.mapping.bitmap_bytes, not self.on_device

    def _take(self) -> int:
        """The place of a block; in a file it reads as zeroes. ImageError if there is none."""
        self._check_room()
        if self._free:
            return self._free.pop()
        place = self._next_place()
        self.end = place + self.mapping.header.stride_bytes
        if not self.on_device:
            self.mapping.grow_to(self.end)
        return place

    def _next_place(self) -> int:
        bitmap_bytes = self.mapping.bitmap_bytes
        return round_up(self.end + bitmap_bytes, ALIGN_BYTES) - bitmap_bytes

    def _check_room(self) -> None:
        """ImageError if there is none for another block: on the device, or for its sector's number in the BAT."""
        stride = self.mapping.header.stride_bytes
        limit = self.image.end_bytes if self.on_device else MAX_FILE_BYTES + stride - SECTOR_BYTES
        if not self._free and self._next_place() + stride > limit:
            raise ImageError("there is no room for another block", errno=errno.ENOSPC)

    def give_up(self, unit: Unit) -> None:
        place = unit.host - self.mapping.bitmap_bytes
        if self.on_device:
            self._free.append(place)
        else:
            self.durable.drop([place])

    def release(self, places: list[int]) -> Steps:
        """Zero them, and take them again."""
        file, stride = self.driver.file, self.mapping.header.stride_bytes
        zeroed: list[int] = []

        def zero() -> None:
            zeroed.extend(place for place in places if not file.zeroes(place, stride, 0))

        yield zero
        self._free += zeroed

    # Map

    def map(self, unit: Unit) -> None:
        mapping = self.mapping
        block = unit.guest >> mapping.shift
        if mapping.bat[block] == UNUSED:
            place = self._take() if unit.host == NOWHERE else unit.host - mapping.bitmap_bytes
            mapping.set_place(block, place // SECTOR_BYTES)
        if unit.entry == KEEP:
            return
        first, last = (unit.start - unit.guest) >> 9, round_up(unit.stop - unit.guest) >> 9
        mapping.mark(block, first, last, unit.entry == PRESENT)
        if self.in_batmap[block] and not mapping.full[block]:
            self.in_batmap[block] = 0
            self.batmap_dirty = True

    # Commit

    def begin_commit(self) -> Commit:
        return VhdCommit(self)


class VhdCommit(Commit):
    """The stages above."""

    def __init__(self, writer: VhdWriter) -> None:
        self._writer = writer
        mapping = writer.mapping
        first: list[Write] = []
        self._former_footer_at, writer.footer_at = writer.footer_at, writer.end
        if writer.footer_at != self._former_footer_at and not writer.on_device:
            first.append((writer.footer_at, writer.image.footer.pack()))
        self._batmap, writer.batmap_dirty = writer.batmap_dirty, False
        if self._batmap:
            first += batmap_writes(writer.image, writer.in_batmap)
        bitmaps = mapping.bitmaps.take_dirty()
        second = []
        for block, sectors in bitmaps.items():
            data = mapping.bitmaps[block].tobytes().ljust(mapping.bitmap_bytes, b"\0")
            for at, count in runs(sectors):
                part = data[SECTOR_BYTES * at : SECTOR_BYTES * (at + count)]
                second.append(((mapping.bat[block] + at) * SECTOR_BYTES, part))
        self._bat, mapping.bat_dirty = mapping.bat_dirty, set()
        third = list(array_writes(mapping.bat, mapping.header.table_offset, self._bat, to_big_endian))
        super().__init__([first, second, third], [(mapping.bitmaps, bitmaps)])

    def failed(self) -> None:
        super().failed()
        self._writer.footer_at = self._former_footer_at
        self._writer.batmap_dirty |= self._batmap
        self._writer.mapping.bat_dirty |= self._bat


class FixedWriter(Writer):
    """Of a fixed image: everything is in its place."""

    driver: VhdDriver

    def __init__(self, driver: VhdDriver) -> None:
        super().__init__(driver, Tables(1), unit_bytes=1 << 30, piece_bytes=1, table_bytes=1 << 30)

    def plan_write(self, guest: int, first: int, last: int) -> int | Unit:
        return guest

    def plan_range(self, request: Request, guest: int, first: int, last: int) -> Unit | None:
        return Unit(guest, first, last, guest)

    def make_table(self, index: int) -> None:
        pass

    def allocate(self, units: list[Unit]) -> None:
        raise AssertionError("a fixed VHD has a place for everything")

    def map(self, unit: Unit) -> None:
        pass

    def give_up(self, unit: Unit) -> None:
        raise AssertionError("a fixed VHD has a place for everything")

    def begin_commit(self) -> Commit:
        return Commit([])
