"""vmdk: what changes the mapping of one extent, and the order in which that reaches its file.

    data (already written) │ redundant grain tables │ grain tables
                           ▲ a barrier (fdatasync) before each, and one at the end

Power loss may undo, or half-do, whatever was written since the last barrier. With this order no table points at a
grain whose data is not there: at worst grains are leaked, which only the redundant tables know, or none. The
directories never change: every table is there before the first write (`tables.py`). A grain that was given up is
used again only after the last barrier of the commit in which both tables let go of it.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, Any, Final

from tapcore.driver import SECTOR_BYTES
from tapcore.errors import ImageError
from tapcore.formats.commit import Commit, array_writes
from tapcore.formats.durable import Steps
from tapcore.formats.extents import DATA, HOLE, ZERO
from tapcore.formats.tail import Tail
from tapcore.formats.vmdk.layout import GTE_HOLE, GTE_ZERO
from tapcore.formats.vmdk.mapping import to_little_endian
from tapcore.formats.writer import Unit, Writer
from tapcore.request import DISCARD, NO_HOLE, Request

if TYPE_CHECKING:
    from tapcore.formats.vmdk.extent import SparseExtent

MAX_FILE_BYTES: Final = SECTOR_BYTES << 32
"""A table's entry has 32 bits for a sector."""
KEEP: Final = -1
"""Of a unit: its table entry stays."""


class VmdkWriter(Writer):
    """Of one extent; `redundant` is its second directory, if it has one."""

    def __init__(self, extent: SparseExtent, redundant: array[int] | None) -> None:
        mapping, header = extent.mapping, extent.header
        super().__init__(extent, mapping.tables, unit_bytes=header.grain_bytes, piece_bytes=header.grain_bytes,
                         table_bytes=header.reach_bytes)
        self._mapping = mapping
        self._redundant = redundant
        self.tail = Tail(extent.file, header.grain_bytes)

    # Plan

    def plan_write(self, guest: int, first: int, last: int) -> int | Unit:
        kind, host = self._mapping.kind_of(self._mapping.entry(guest), guest)
        if kind == DATA:
            return host
        if self.tail.end >= MAX_FILE_BYTES - self.unit_bytes:
            raise ImageError("the extent is full: its file has 2 TiB", errno=errno.ENOSPC)
        reads_zero = kind == ZERO or not self.driver.backing_bytes(guest, self.unit_bytes)
        return Unit(guest, guest, guest + self.unit_bytes, reads_zero=reads_zero)

    def plan_range(self, request: Request, guest: int, first: int, last: int) -> Unit | None:
        kind, host = self._mapping.kind_of(self._mapping.entry(guest), guest)
        if kind == DATA and request.op != DISCARD and request.flags & NO_HOLE:
            return Unit(guest, first, last, host, entry=KEEP)
        shows_backing = self.driver.backing_bytes(guest, self.unit_bytes) > 0
        if not shows_backing:
            return None if kind == HOLE else Unit(guest, first, last, entry=GTE_HOLE)
        if not self._mapping.header.has_zero_grain:
            return Unit(guest, first, last, host, entry=KEEP) if kind == DATA else None
        if kind == ZERO or (kind == HOLE and request.op == DISCARD):
            return None
        return Unit(guest, first, last, entry=GTE_ZERO)

    def writes_zeroes(self, request: Request) -> bool:
        return (not self._mapping.header.has_zero_grain
                and self.driver.backing_bytes(request.offset, request.length) > 0)

    # Change

    def make_table(self, index: int) -> None:
        if self._mapping.table(index) is None:
            raise ImageError(f"grain directory entry {index} has no table")

    def allocate(self, units: list[Unit]) -> None:
        for unit in units:
            unit.host, unit.fresh = self.tail.take(self.unit_bytes)
        self._mapping.end_sector = max(self._mapping.end_sector, self.tail.end // SECTOR_BYTES)

    def map(self, unit: Unit) -> None:
        if unit.entry == KEEP:
            return
        former = self._mapping.set_entry(unit.guest, unit.host // SECTOR_BYTES if unit.is_new else unit.entry)
        if former > GTE_ZERO:
            self.durable.drop([(former * SECTOR_BYTES, self.unit_bytes)])

    def give_up(self, unit: Unit) -> None:
        self.durable.drop([(unit.host, self.unit_bytes)])

    def begin_commit(self) -> Commit:
        tables = self._mapping.tables
        taken = tables.take_dirty()
        directory, redundant = self._mapping.directory, self._redundant
        copies = [directory] if redundant is None else [redundant, directory]
        stages = [[write for index, sectors in taken.items()
                   for write in array_writes(tables[index], copy[index] * SECTOR_BYTES, sectors, to_little_endian)]
                  for copy in copies]
        return Commit([[], *stages], [(tables, taken)])

    def release(self, places: list[Any]) -> Steps:
        return self.tail.release(places)
