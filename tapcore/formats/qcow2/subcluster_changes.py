"""qcow2: what changes an image with extended L2 entries: of a cluster only the subclusters that are touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapcore.formats.extents import PACKED
from tapcore.formats.qcow2.changes import Qcow2Writer
from tapcore.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from tapcore.formats.qcow2.subclusters import ALL, IN_FILE_AT, ZERO_AT, SubclusterMapping
from tapcore.formats.writer import NOWHERE, MustWriteError, Unit
from tapcore.request import DISCARD, NO_HOLE, Request

if TYPE_CHECKING:
    from tapcore.formats.qcow2.driver import Qcow2Driver


class SubclusterWriter(Qcow2Writer):
    _mapping: SubclusterMapping

    def __init__(self, driver: Qcow2Driver) -> None:
        super().__init__(driver)
        self.piece_bytes = self._mapping.piece_bytes

    # Writes

    def plan_write(self, guest: int, first: int, last: int) -> int | Unit:
        mapping = self._mapping
        entry = mapping.entry(guest)
        kind, host = mapping.kind_of(entry, guest)
        if kind == PACKED:
            return Unit(guest, guest, guest + self.unit_bytes, entry=ALL << IN_FILE_AT | COPIED)
        touched, in_file = mapping.bits(first, last), entry >> IN_FILE_AT & ALL
        if not mapping.has_host(entry) or not (entry & COPIED or in_file):
            return self._new(guest, first, last, entry, touched)
        if not entry & COPIED:
            return self._new(guest, first, last, entry, touched | in_file)
        if touched & ~in_file == 0:
            return host
        start, stop = first, last
        if not in_file & mapping.bits(first, first + 1):
            start &= -self.piece_bytes
        if not in_file & mapping.bits(last - 1, last):
            stop = self.end_of((last - 1 | self.piece_bytes - 1) + 1)
        new = COPIED | (in_file | touched) << IN_FILE_AT | (entry >> ZERO_AT & ~touched) << ZERO_AT
        reads_zero = self._reads_zero(entry, start, first) and self._reads_zero(entry, last, stop)
        return Unit(guest, start, stop, host, reads_zero=reads_zero, entry=new)

    def _new(self, guest: int, first: int, last: int, entry: int, needed: int) -> Unit:
        """At a new place, with all from the first to the last of the subclusters that are `needed` there."""
        start = guest + ((needed & -needed).bit_length() - 1) * self.piece_bytes
        stop = self.end_of(guest + needed.bit_length() * self.piece_bytes)
        taken = self._mapping.bits(start, stop)
        new = COPIED | taken << IN_FILE_AT | (entry >> ZERO_AT & ~taken) << ZERO_AT
        reads_zero = self._reads_zero(entry, start, first) and self._reads_zero(entry, last, stop)
        return Unit(guest, start, stop, reads_zero=reads_zero, entry=new)

    def _reads_zero(self, entry: int, first: int, last: int) -> bool:
        """Is all of [first, last), which is less than a cluster, read as zeroes?"""
        if first == last:
            return True
        touched = self._mapping.bits(first, last)
        if touched & entry >> IN_FILE_AT:
            return False
        return not touched & ~(entry >> ZERO_AT) or not self.driver.backing_bytes(first, last - first)

    # Zeroes and discards

    def plan_range(self, request: Request, guest: int, first: int, last: int) -> Unit | None:
        mapping = self._mapping
        entry = mapping.entry(guest)
        kind, _ = mapping.kind_of(entry, guest)
        touched = mapping.bits(first, last)
        whole = mapping.bits(guest, min(guest + self.unit_bytes, self.driver.info.size_bytes))
        if touched == whole:
            touched = ALL
        elif kind == PACKED:
            if request.op == DISCARD:
                return None
            raise MustWriteError
        in_file = 0 if kind == PACKED else entry >> IN_FILE_AT & ~touched & ALL
        zero = entry >> ZERO_AT & ~touched | self._zero_bits(request, entry, guest, touched)
        host = 0 if kind == PACKED else entry & (OFFSET_MASK | COPIED)
        if not in_file and not (request.flags & NO_HOLE and request.op != DISCARD):
            host = 0
        new = host | in_file << IN_FILE_AT | zero << ZERO_AT
        if new == entry:
            return None
        had_data = self._external and entry >> IN_FILE_AT & touched
        return Unit(guest, first, last, guest if had_data else NOWHERE, entry=new)

    def _zero_bits(self, request: Request, entry: int, guest: int, touched: int) -> int:
        """Those of `touched` that are to be marked as zeroes; the others are to be left to the backing."""
        shows_backing = self.driver.backing_bytes(guest, self.unit_bytes) > 0
        unmarked = 0 if entry & COMPRESSED else touched & ~(entry >> IN_FILE_AT | entry >> ZERO_AT)
        if request.op == DISCARD:
            return touched & ~unmarked if shows_backing else 0
        if shows_backing or request.flags & NO_HOLE:
            return touched
        return touched & ~unmarked
