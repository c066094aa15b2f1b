"""qcow: what changes an image. New clusters and L2 tables are taken at the end of the file.

A commit writes, each stage after what it points at is durable:

    data │ L2 tables, new and changed │ L1 table

So a table never points at what is not there yet: after a crash there is unused space at worst. A cluster given up
is used again, while the image is open, only after the commit in which its L2 entry went.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapcore.formats.commit import Commit, array_writes
from tapcore.formats.durable import Steps
from tapcore.formats.extents import DATA, HOLE, to_big_endian
from tapcore.formats.qcow.layout import COMPRESSED
from tapcore.formats.qcow.mapping import Mapping
from tapcore.formats.tail import Place, Tail
from tapcore.formats.writer import NOWHERE, Unit, Writer
from tapcore.request import DISCARD, NO_HOLE, Request

if TYPE_CHECKING:
    from tapcore.formats.qcow.driver import QcowDriver


class QcowWriter(Writer):
    """Of one image."""

    driver: QcowDriver

    def __init__(self, driver: QcowDriver) -> None:
        mapping = self._mapping = driver.mapping
        super().__init__(driver, mapping.tables, unit_bytes=mapping.unit_bytes, piece_bytes=mapping.unit_bytes,
                         table_bytes=mapping.header.table_bytes)
        self.tail = Tail(driver.file, mapping.unit_bytes)

    def plan_write(self, guest: int, first: int, last: int) -> int | Unit:
        kind, host = self._mapping.kind_of(self._mapping.entry(guest), guest)
        if kind == DATA:
            return host
        reads_zero = kind == HOLE and not self.driver.backing_bytes(guest, self.unit_bytes)
        return Unit(guest, guest, guest + self.unit_bytes, reads_zero=reads_zero)

    def plan_range(self, request: Request, guest: int, first: int, last: int) -> Unit | None:
        kind, host = self._mapping.kind_of(self._mapping.entry(guest), guest)
        if kind == HOLE:
            return None
        if not self.driver.backing_bytes(guest, self.unit_bytes):
            return Unit(guest, first, last)
        return Unit(guest, first, last, host) if kind == DATA else None

    def writes_zeroes(self, request: Request) -> bool:
        """No entry says zero: either a hole does, or they are written."""
        return request.op != DISCARD and (
            bool(request.flags & NO_HOLE) or self.driver.backing_bytes(request.offset, request.length) > 0)

    def make_table(self, index: int) -> None:
        if self._mapping.table(index) is None:
            self._mapping.add_table(index, self._take(self._mapping.header.l2_bytes)[0])

    def allocate(self, units: list[Unit]) -> None:
        for unit in units:
            unit.host, unit.fresh = self._take(self.unit_bytes)

    def _take(self, length: int) -> tuple[int, bool]:
        place = self.tail.take(length)
        self._mapping.file_bytes = max(self._mapping.file_bytes, self.tail.end)
        return place

    def map(self, unit: Unit) -> None:
        former = self._mapping.set_entry(unit.guest, 0 if unit.host == NOWHERE else unit.host)
        if former and former != unit.host and not former & COMPRESSED:
            self.durable.drop([(former, self.unit_bytes)])

    def give_up(self, unit: Unit) -> None:
        self.durable.drop([(unit.host, self.unit_bytes)])

    def release(self, places: list[Place]) -> Steps:
        return self.tail.release(places)

    def begin_commit(self) -> Commit:
        return QcowCommit(self._mapping)


class QcowCommit(Commit):
    """The stages above."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        l2 = mapping.tables.take_dirty()
        self._l1, mapping.l1_dirty = mapping.l1_dirty, set()
        super().__init__([
            [],
            [write for index, sectors in l2.items()
             for write in array_writes(mapping.tables[index], mapping.l1[index], sectors, to_big_endian)],
            list(array_writes(mapping.l1, mapping.header.l1_table_offset, self._l1, to_big_endian)),
        ], [(mapping.tables, l2)])

    def failed(self) -> None:
        super().failed()
        self._mapping.l1_dirty |= self._l1
