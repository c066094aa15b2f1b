"""Zeroes and discards of any length, in parts, one after the other.

    |edge|  whole pieces of one table  |  of the next  |edge|      edges: zeroes are written, a discard leaves them
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from tapcore.formats.imagefile import zero_views
from tapcore.formats.reader import Flight
from tapcore.request import BACKGROUND, DISCARD, FAST, FUA, NO_HOLE, WRITE, ZEROES, Request, fail

if TYPE_CHECKING:
    from tapcore.formats.writer import Verb, Writer

MAX_ZEROES_WRITTEN: Final = 4 << 20
MAX_UNITS_CHANGED: Final = 2048
"""The most that one part does."""
PARTS_AT_ONCE: Final = 4
"""After so many, others in the loop have their turn."""


class Range(Flight):
    """The progress of one zeroing or discard."""

    __slots__ = ("_cursor", "_end", "_request", "_writer")

    def __init__(self, writer: Writer, request: Request) -> None:
        super().__init__(request)
        self._writer = writer
        self._request = request
        self._cursor = request.offset
        self._end = request.offset + request.length

    def run(self) -> bool:
        """True if the request is complete."""
        request = self._request
        if request.op == ZEROES and request.flags & FAST and not self._is_fast():
            return fail(request, errno.ENOTSUP)
        return self._go_on()

    def _is_fast(self) -> bool:
        """Does zeroing write no data?"""
        piece_bytes = self._writer.piece_bytes
        whole = not self._request.offset % piece_bytes and (
            not self._end % piece_bytes or self._end == self._writer.driver.info.size_bytes)
        return whole and not self._writer.writes_zeroes(self._request)

    def _go_on(self) -> bool:
        request = self._request
        parts = 0
        while self._cursor < self._end:
            if parts == PARTS_AT_ONCE:
                self._writer.driver.env.loop.call_soon(self._go_on_soon)
                return False
            parts += 1
            part, verb = self._next_part()
            self._cursor += part.length
            if verb is None:
                continue
            if not verb(part):
                return False
            if part.error:
                return fail(request, part.error)
        request.error = 0
        if not request.flags & FUA:
            return True
        self._writer.durable.flush(request)
        return False

    def _next_part(self) -> tuple[Request, Verb | None]:
        """What is to be done next, and how (None: nothing)."""
        request, writer, cursor = self._request, self._writer, self._cursor
        piece_bytes, end = writer.piece_bytes, self._end
        whole_end = end if end == writer.driver.info.size_bytes else end & -piece_bytes
        if cursor % piece_bytes or cursor >= whole_end:
            stop = min(end, (cursor | piece_bytes - 1) + 1)
            return self._zeroes(stop - cursor), None if request.op == DISCARD else writer.zero_by_writing
        if request.op == ZEROES and writer.writes_zeroes(request):
            return self._zeroes(min(whole_end - cursor, MAX_ZEROES_WRITTEN)), writer.zero_by_writing
        length = self._pieces_end(whole_end) - cursor
        flags = request.flags & (BACKGROUND | NO_HOLE)
        return Request(request.op, cursor, length, flags=flags, done=self._part_done), writer.change_pieces

    def _pieces_end(self, end: int) -> int:
        """Where the next part ends: it is less than a unit, or whole units of one table."""
        cursor, unit_bytes = self._cursor, self._writer.unit_bytes
        if cursor % unit_bytes or cursor + unit_bytes > end:
            return min(end, (cursor | unit_bytes - 1) + 1)
        table_end = (cursor | self._writer.table_bytes - 1) + 1
        if end < self._writer.driver.info.size_bytes:
            end &= -unit_bytes
        return min(end, table_end, cursor + MAX_UNITS_CHANGED * unit_bytes)

    def _zeroes(self, length: int) -> Request:
        flags = self._request.flags & BACKGROUND
        return Request(WRITE, self._cursor, length, zero_views(length), flags, self._part_done)

    def _part_done(self, part: Request) -> None:
        if part.error:
            fail(self._request, part.error)
            self._request.done(self._request)
        else:
            self._go_on_late()

    def _go_on_soon(self) -> None:
        self._go_on_late()
        self._writer.driver.submit()

    def _go_on_late(self) -> None:
        if self._go_on():
            self._request.done(self._request)


