"""The shared reader: reads and block status of any format whose mapping answers with extents.

    queue_read ─▶ mapping.find ─▶ DATA    preadv in the loop's thread if the page cache has it, else a worker
                      │           ZERO    filled at once
                      │           HOLE    a request to the backing; zeroes past its end, or without one
                      │           PACKED  a worker reads and unpacks
                      └ TableMiss: a worker reads the table, once for all who wait, and they try again

A format that is read alone derives its driver from `ImageDriver`, one that is written too from `WritableDriver`.
"""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Final

from tapcore.driver import Driver
from tapcore.errors import ImageError
from tapcore.formats.extents import DATA, HOLE, PACKED, ZERO, Mapping, TableMiss
from tapcore.formats.imagefile import ImageFile, fill_zeroes
from tapcore.formats.tables import Tables
from tapcore.request import (
    BACKGROUND,
    IS_ZERO,
    READ,
    STATUS,
    STATUS_HOLE,
    STATUS_ZERO,
    Extent,
    Request,
    fail,
    slice_iov,
)

logger = logging.getLogger(__name__)

Resume = Callable[[int], None]
"""Called in the loop's thread with 0, or the errno of why it cannot go on."""

MAX_STATUS_BYTES: Final = 1 << 30
MAX_STATUS_EXTENTS: Final = 256
"""The most that one block status looks at."""
UNPACKED_KEPT: Final = 8
"""Unpacked clusters kept, for those who read them piece by piece."""
MAX_COMPLAINTS: Final = 20
"""Damages that are logged; more of the same image are not."""

_Part = tuple[int, list[memoryview], int, int, int]
"""(kind, buffers, host, length, bytes to skip of what was unpacked)."""


class Flight:
    """Something under way that uses host offsets. What it may use is not given to others meanwhile."""

    __slots__ = ("background", "done", "error", "pending")

    def __init__(self, request: Request) -> None:
        self.background = bool(request.flags & BACKGROUND)
        self.pending = 1
        self.error = 0
        self.done: Callable[[int], None] = _nothing


def _nothing(code: int) -> None:
    raise AssertionError("a flight ended before it began")


class ImageDriver(Driver):
    """A level whose data lies where a mapping says. `open` of a format calls `start_reading`."""

    keeps_tables = True
    file_kind: ClassVar[type[ImageFile]] = ImageFile
    file: ImageFile
    """Where the tables are, and PACKED extents."""
    data: ImageFile
    """Where DATA extents are; mostly the same."""
    mapping: Mapping

    def start_reading(self, file: ImageFile, mapping: Mapping, data: ImageFile | None = None) -> None:
        self.file = file
        self.data = data or file
        self.mapping = mapping
        self._fd = self.data.fd
        flags = self.data.quick_read_flags()
        self._reads_inline = flags is not None
        self._read_flags = flags or 0
        self.flights: dict[Flight, int] = {}
        """What is under way, oldest first, numbered."""
        self._flight_number = 0
        self._loads: dict[tuple[str, int], list[Resume]] = {}
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        self._asked: dict[Driver, None] = {}
        """Those below to which something was queued."""
        self._complaints = 0

    def close(self) -> None:
        self.close_files()

    def close_files(self) -> None:
        self.file.close()
        if self.data is not self.file:
            self.data.close()

    def share_memory(self, images: int) -> None:
        tables = getattr(self.mapping, "tables", None)
        if isinstance(tables, Tables):
            tables.share(images)

    def fileno(self) -> int:
        return self.file.fd

    # Reading

    def queue_read(self, request: Request) -> bool:
        try:
            extents = self.mapping.find(request.offset, request.length)
        except TableMiss as miss:
            self.load(miss, partial(self.again, self.queue_read, request))
            return False
        except ImageError as error:
            return self.complain(request, error)
        if len(extents) == 1 and extents[0][0] in (ZERO, HOLE):
            inside = self.backing_bytes(request.offset, request.length) if extents[0][0] == HOLE else 0
            if inside == request.length:
                return self._first_below(request.offset, inside).queue_read(request)
            if not inside:
                return _answer_zeroes(request)
        flight = Flight(request)
        parts: list[_Part] = []
        at = 0
        for kind, length, host in extents:
            iov = request.iov if length == request.length else slice_iov(request.iov, at, length)
            if kind == DATA:
                if (request.flags or not self._reads_inline
                        or not self.data.read_inline(iov, host, length, self._read_flags)):
                    parts.append((kind, list(iov), host, length, 0))
            elif kind == PACKED:
                self._read_packed(parts, iov, host, length, (request.offset + at) % self.mapping.unit_bytes)
            elif kind == ZERO:
                fill_zeroes(iov)
            else:
                self._read_backing(flight, iov, request.offset + at, length)
            at += length
        if parts:
            self._read_late(flight, parts)
        if not self.land(flight, partial(self.finish, request)):
            return False
        request.error = flight.error
        return True

    def _read_packed(
        self, parts: list[_Part], iov: Sequence[memoryview], host: int, length: int, skip: int
    ) -> None:
        data = self._unpacked.get(host)
        if data is None:
            parts.append((PACKED, list(iov), host, length, skip))
        else:
            _copy(data, skip, iov)

    def _read_backing(self, flight: Flight, iov: Sequence[memoryview], offset: int, length: int) -> None:
        inside = self.backing_bytes(offset, length)
        if inside < length:
            fill_zeroes(slice_iov(iov, inside, length - inside))
        if inside:
            part = Request(READ, offset, inside, slice_iov(iov, 0, inside), BACKGROUND if flight.background else 0)
            self.ask_backing(flight, part)

    def _read_late(self, flight: Flight, parts: list[_Part]) -> None:
        result = [errno.EIO]
        unpacked: dict[int, bytes] = {}

        def work() -> None:
            result[0] = self._read_parts(parts, unpacked)

        def done() -> None:
            self._unpacked.update(unpacked)
            while len(self._unpacked) > UNPACKED_KEPT:
                self._unpacked.popitem(last=False)
            self.arrived(flight, result[0])

        flight.pending += 1
        self.env.workers.submit(work, done)

    def _read_parts(self, parts: list[_Part], unpacked: dict[int, bytes]) -> int:
        """In a worker. Returns 0 or an errno."""
        for kind, iov, host, length, skip in parts:
            if kind == DATA:
                code = self.data.read_padded(iov, host, length)
                if code:
                    return code
                continue
            offset, packed_bytes = self.mapping.packed_place(host)
            try:
                data = self.mapping.unpack(self.file.load(offset, packed_bytes, "a compressed cluster"))
            except ImageError as error:
                logger.error("%s: %s", self.path, error)
                return errno.EIO
            unpacked[host] = data
            _copy(data, skip, iov)
        return 0

    # The backing

    def backing_bytes(self, offset: int, length: int) -> int:
        """How many of the `length` bytes from `offset` on the backing has."""
        if self.backing is None:
            return 0
        return min(length, max(0, self.backing.info.size_bytes - offset))

    def ask_backing(self, flight: Flight, request: Request) -> None:
        """Queue `request` at the backing as a part of `flight`."""
        below = self._first_below(request.offset, request.length)
        request.done = lambda request: self.arrived(flight, request.error)
        verb = below.queue_read if request.op == READ else below.queue_status
        flight.pending += 1
        if verb(request):
            flight.pending -= 1
            flight.error = flight.error or request.error

    def _first_below(self, offset: int, length: int) -> Driver:
        """Who is to be asked for a range that is a hole here: the backing, or where that has a hole too the next
        one below it, and so on; a deep chain costs a look at each level's table, not a request."""
        below = self.backing
        while isinstance(below, ImageDriver) and below.backing_bytes(offset, length) == length:
            try:
                kind, found_bytes, _ = below.mapping.find(offset, length, 1)[0]
            except (TableMiss, ImageError):
                break
            if kind != HOLE or found_bytes < length:
                break
            below = below.backing
        assert below is not None
        self._asked[below] = None
        return below

    def submit(self) -> None:
        if self._asked:
            asked, self._asked = self._asked, {}
            for driver in asked:
                driver.submit()

    # What is under way

    def land(self, flight: Flight, done: Callable[[int], None]) -> bool:
        """All parts of `flight` were begun: True if all are complete, else `done(errno)` follows."""
        flight.pending -= 1
        if not flight.pending:
            return True
        flight.done = done
        self.fly(flight)
        return False

    def fly(self, flight: Flight) -> None:
        """`flight` will not end in this call."""
        if flight not in self.flights:
            self.flights[flight] = self._flight_number
            self._flight_number += 1

    def ground(self, flight: Flight) -> None:
        """`flight` uses nothing any more."""
        if self.flights.pop(flight, None) is not None:
            self.landed()

    def arrived(self, flight: Flight, code: int) -> None:
        """A part of `flight` is complete."""
        flight.error = flight.error or code
        flight.pending -= 1
        if not flight.pending:
            self.ground(flight)
            flight.done(flight.error)

    def landed(self) -> None:
        """Called after a flight has ended."""

    def newest_flight(self) -> int:
        """The number of the flight that began last."""
        return self._flight_number - 1

    def flown(self, number: int) -> bool:
        """Has every flight up to `number` ended?"""
        return not self.flights or next(iter(self.flights.values())) > number

    def load(self, miss: TableMiss, resume: Resume) -> None:
        """Read the table that is missing in a worker, then `resume(errno)`."""
        waiting = self._loads.setdefault((miss.table, miss.index), [])
        waiting.append(resume)
        if len(waiting) == 1:
            data = bytearray(miss.length)
            result = [errno.EIO]

            def work() -> None:
                result[0] = self.file.read_padded([memoryview(data)], miss.host, miss.length)

            self.env.workers.submit(work, lambda: self._loaded(miss, bytes(data), result[0]))

    def _loaded(self, miss: TableMiss, data: bytes, code: int) -> None:
        if not code:
            try:
                self.install(miss, data)
            except ImageError as error:
                self.log_damage(error)
                code = errno.EIO
        for resume in self._loads.pop((miss.table, miss.index)):
            resume(code)
        self.submit()

    def install(self, miss: TableMiss, data: bytes) -> None:
        """A table was read. ImageError if it cannot be right."""
        self.mapping.install(miss, data)

    def again(self, verb: Callable[[Request], bool], request: Request, code: int) -> None:
        """Try a request once more whose table was missing."""
        if code:
            self.finish(request, code)
        elif verb(request):
            request.done(request)

    def finish(self, request: Request, code: int) -> None:
        request.error = code
        request.done(request)

    def complain(self, request: Request, error: ImageError) -> bool:
        """The image is damaged where `request` looked: EIO."""
        self.log_damage(error)
        return fail(request, errno.EIO)

    def log_damage(self, error: ImageError) -> None:
        self._complaints += 1
        if self._complaints <= MAX_COMPLAINTS:
            logger.error("%s: %s", self.path, error)

    # Status

    def queue_status(self, request: Request) -> bool:
        return self._status(request)

    def queue_own_status(self, request: Request) -> bool:
        """Block status of this image alone: HOLE is what it does not have, whatever its parents have; ZERO what it
        has as zeroes."""
        return self._status(request, own=True)

    def _status(self, request: Request, *, own: bool = False) -> bool:
        length = min(request.length, MAX_STATUS_BYTES, self.mapping.unit_bytes * 16384)
        try:
            found = self.mapping.find(request.offset, length, MAX_STATUS_EXTENTS)
        except TableMiss as miss:
            self.load(miss, partial(self.again, partial(self._status, own=own), request))
            return False
        except ImageError as error:
            return self.complain(request, error)
        flight = Flight(request)
        answers: list[tuple[int, list[Extent]] | Request] = []
        offset = request.offset
        for kind, length, _ in found:
            inside = self.backing_bytes(offset, length) if kind == HOLE and not own else 0
            if inside:
                part = Request(STATUS, offset, inside, flags=request.flags)
                answers.append(part)
                self.ask_backing(flight, part)
            state = 0 if kind in (DATA, PACKED) else STATUS_HOLE | STATUS_ZERO
            if own and state:
                state = STATUS_HOLE if kind == HOLE else STATUS_ZERO
            answers.append((length - inside, [(length - inside, state)]))
            offset += length

        def finish(code: int) -> None:
            request.extents = join_extents(answers)
            self.finish(request, code)

        if not self.land(flight, finish):
            return False
        request.extents = join_extents(answers)
        request.error = flight.error
        return True


def join_extents(answers: Sequence[tuple[int, list[Extent]] | Request]) -> list[Extent]:
    """The parts' extents in one list, up to the first part that was not answered in full; neighbours of one state
    are one extent."""
    joined: list[Extent] = []
    for answer in answers:
        wanted, extents = (answer.length, answer.extents) if isinstance(answer, Request) else answer
        for length, state in extents:
            if length and joined and joined[-1][1] == state:
                joined[-1] = (joined[-1][0] + length, state)
            elif length:
                joined.append((length, state))
        if sum(length for length, _ in extents) < wanted:
            break
    return joined


def _answer_zeroes(request: Request) -> bool:
    if request.takes_zero:
        request.flags |= IS_ZERO
    else:
        fill_zeroes(request.iov)
    return True


def _copy(data: bytes, at: int, iov: Sequence[memoryview]) -> None:
    for view in iov:
        view[:] = data[at : at + len(view)]
        at += len(view)
