"""The shared writer: writes, zeroes and discards of any format whose mapping can be changed.

A *unit* is what a format allocates at once (a cluster, a grain, a block), a *piece* the smallest part of one that
can be there for itself (a subcluster, a sector; often the whole unit). A change of the mapping of units goes
through these steps; each may have to wait, and then goes on from there. Those with a star are the format's:

    plan*      what is to change; nobody else changes these units from now on: others queue behind
    tables*    each table concerned is cached and may be changed
    allocate*  a place for each unit that needs one
    copy       what a write leaves of what it changes is read as the guest would read it
    write      the data
    map*       the entries, in memory, all at once; Durable brings them to the file in a commit*

If it fails before `map` the guest sees the former data, and the new places are given up.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tapcore.errors import ImageError
from tapcore.formats.commit import Commit
from tapcore.formats.durable import Durable, Steps
from tapcore.formats.extents import DATA, HOLE, PACKED, TableMiss
from tapcore.formats.imagefile import zero_views
from tapcore.formats.reader import Flight, Resume
from tapcore.formats.tables import Tables
from tapcore.request import BACKGROUND, FUA, NO_HOLE, READ, WRITE, Request, fail, slice_iov

if TYPE_CHECKING:
    from tapcore.formats.writable import WritableDriver

NOWHERE: Final = -1
"""The host offset of a unit that has no place yet."""

Verb = Callable[[Request], bool]
Piece = tuple[int, list[memoryview], int]
"""(host, buffers, length)."""


class MustWriteError(Exception):
    """A zeroing cannot be done by the mapping; raised by `plan_range` for a part of one unit."""


class Unit:
    """What one request does to one unit whose mapping changes: the guest range [start, stop) of it becomes the
    file's. Of a write, what of that range it does not cover is copied; `stop` may be past the disk's end.

    `host` is where the unit's first byte is, or NOWHERE. `reads_zero`: what is copied reads as zeroes. `fresh`,
    set by `allocate`: the new place holds zeroes. `entry` is the format's own.
    """

    __slots__ = ("entry", "fresh", "guest", "host", "is_new", "reads_zero", "start", "stop")

    def __init__(
        self, guest: int, start: int, stop: int, host: int = NOWHERE, *, reads_zero: bool = False, entry: Any = 0
    ) -> None:
        self.guest = guest
        self.start = start
        self.stop = stop
        self.host = host
        self.reads_zero = reads_zero
        self.entry = entry
        self.fresh = False
        self.is_new = False


class Change(Flight):
    """One request whose units are locked."""

    __slots__ = ("parts", "request", "units", "waiting")

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.pending = 0
        self.request = request
        self.units: list[Unit] = []
        """Those whose mapping changes."""
        self.parts: list[tuple[int, int, int | Unit]] = []
        """Of a write, in order: guest range [first, last), and the host of its unit if that stays as it is."""
        self.waiting: list[Resume] = []


class Writer(ABC):
    """What changes the mapping of one image, and its format's part of that. Its verbs are like a driver's.

    A table maps `table_bytes` of the disk, `tables` caches them. All of these sizes are powers of two. No hook
    does I/O or is called in another thread than the loop's; those that may raise TableMiss are called again later.
    An ImageError with ENOSPC says that the image cannot grow: that is no damage, the request alone fails with it.
    """

    def __init__(
        self, driver: WritableDriver, tables: Tables[Any], *, unit_bytes: int, piece_bytes: int, table_bytes: int
    ) -> None:
        self.driver = driver
        self.tables = tables
        self.unit_bytes = unit_bytes
        self.piece_bytes = piece_bytes
        self.table_bytes = table_bytes
        self.durable = Durable(self)
        self._locks: dict[int, Change] = {}

    # What a format supplies

    @abstractmethod
    def plan_write(self, guest: int, first: int, last: int) -> int | Unit:
        """How [first, last) of the unit at `guest` is to be written: the unit's host if nothing but the data
        changes. Else a Unit whose range holds it, aligned to pieces but where the piece at its edge is present and
        stays in its place. TableMiss; ImageError for an entry that cannot be right."""

    @abstractmethod
    def plan_range(self, request: Request, guest: int, first: int, last: int) -> Unit | None:
        """How [first, last) of the unit at `guest`, whole pieces or up to the disk's end, is to be zeroed or
        discarded, as `request` says. None: nothing changes. A Unit with a host: its range is zeroed in the file,
        by a hole if it may be, before `map`. TableMiss, ImageError; MustWriteError, of less than a unit alone:
        zeroes are written."""

    def writes_zeroes(self, request: Request) -> bool:
        """Must zeroes be written, because `plan_range` cannot zero whole pieces of `request`?"""
        return False

    @abstractmethod
    def make_table(self, index: int) -> None:
        """See that the table is cached and may be changed in memory. TableMiss; ImageError if the image's tables
        contradict each other: it is not written any more."""

    @abstractmethod
    def allocate(self, units: list[Unit]) -> None:
        """Set `host`, and `fresh` where it is so, of units that have none. TableMiss, after which the rest is
        asked for again; ImageError as for `make_table`."""

    @abstractmethod
    def map(self, unit: Unit) -> None:
        """Change the mapping in memory; give what it replaces to `durable.drop`."""

    @abstractmethod
    def give_up(self, unit: Unit) -> None:
        """What `allocate` gave is not needed after all."""

    @abstractmethod
    def begin_commit(self) -> Commit:
        """What has changed in memory since the last commit, as bytes."""

    def release(self, places: list[Any]) -> Steps:
        """Nothing in the file points any more at what was dropped, and nobody uses it."""
        yield from ()

    @property
    def full(self) -> bool:
        """Must changes wait for a commit?"""
        return self.tables.full

    @property
    def crowded(self) -> bool:
        """Should a commit begin that nobody asked for?"""
        return self.tables.crowded

    # Plan

    def write(self, request: Request) -> bool:
        return self._planned(request, self._plan_write, self.write)

    def change_pieces(self, request: Request) -> bool:
        """Zeroes or a discard of whole pieces of one table."""
        return self._planned(request, self._plan_range, self.change_pieces)

    def _planned(self, request: Request, plan: Callable[[Change], Change | None], verb: Verb) -> bool:
        driver = self.driver
        if driver.distrusted:
            return fail(request, errno.EIO)
        resume = partial(driver.again, verb, request)
        if self.full:
            self.durable.wait(resume)
            return False
        change = Change(request)
        try:
            holder = plan(change)
        except TableMiss as miss:
            driver.load(miss, resume)
            return False
        except ImageError as error:
            full = error.errno == errno.ENOSPC
            return fail(request, errno.ENOSPC) if full else driver.complain(request, error)
        except MustWriteError:
            request.op, request.iov = WRITE, zero_views(request.length)
            return self.zero_by_writing(request)
        if holder is not None:
            holder.waiting.append(resume)
            return False
        for unit in change.units:
            self._locks[unit.guest] = change
        for index in self._tables_of(change):
            self.tables.pin(index)
        return self._begin(change)

    def _tables_of(self, change: Change) -> Iterable[int]:
        return {unit.guest // self.table_bytes for unit in change.units}

    def _plan_write(self, change: Change) -> Change | None:
        """Returns who must end first, if anyone. TableMiss, ImageError."""
        unit_bytes = self.unit_bytes
        offset, end = change.request.offset, change.request.offset + change.request.length
        holder = None
        for guest in range(offset & -unit_bytes, end, unit_bytes):
            first, last = max(guest, offset), min(guest + unit_bytes, end)
            place = self.plan_write(guest, first, last)
            change.parts.append((first, last, place))
            if isinstance(place, Unit):
                change.units.append(place)
                holder = holder or self._locks.get(guest)
        return holder

    def _plan_range(self, change: Change) -> Change | None:
        """Returns who must end first, if anyone. TableMiss, ImageError."""
        unit_bytes, request = self.unit_bytes, change.request
        offset, end = request.offset, request.offset + request.length
        holder = None
        for guest in range(offset & -unit_bytes, end, unit_bytes):
            unit = self.plan_range(request, guest, max(guest, offset), min(guest + unit_bytes, end))
            if unit is not None:
                change.units.append(unit)
            holder = holder or self._locks.get(guest)
        return holder

    # Tables, allocate

    def _begin(self, change: Change) -> bool:
        is_write = change.request.op == WRITE
        try:
            for index in self._tables_of(change):
                self.make_table(index)
            if is_write:
                self._allocate(change)
        except TableMiss as miss:
            self.driver.fly(change)
            self.driver.load(miss, partial(self._begin_again, change))
            return False
        except ImageError as error:
            if error.errno == errno.ENOSPC:
                return self._end(change, errno.ENOSPC)
            self.driver.distrust(error)
            return self._end(change, errno.EIO)
        return self._copy_edges(change) if is_write else self._zero_in_place(change)

    def _allocate(self, change: Change) -> None:
        homeless = [unit for unit in change.units if unit.host == NOWHERE]
        if homeless:
            for unit in homeless:
                unit.is_new = True
            self.allocate(homeless)

    def _begin_again(self, change: Change, code: int) -> None:
        self._late(change, self._end(change, code) if code else self._begin(change))

    def _late(self, change: Change, complete: bool) -> None:
        """A step was not taken within the verb: if it was the last, say so."""
        if complete:
            change.request.done(change.request)
        self.driver.submit()

    # Copy, write

    def _copy_edges(self, change: Change) -> bool:
        """Read what the write leaves of what it changes."""
        request = change.request
        pieces: list[Piece] = []
        ready = True
        for first, last, place in change.parts:
            if last - first == request.length:
                views = list(request.iov)
            else:
                views = slice_iov(request.iov, first - request.offset, last - first)
            if not isinstance(place, Unit):
                pieces.append((place + (first & self.unit_bytes - 1), views, last - first))
                continue
            start, stop = place.start, place.stop
            if (start == first and stop == last) or (place.reads_zero and place.fresh):
                start, stop = first, last
            elif place.reads_zero:
                views = [*zero_views(first - start), *views, *zero_views(stop - last)]
            else:
                head, tail = bytearray(first - start), bytearray(stop - last)
                inside = max(0, min(stop, self.driver.info.size_bytes) - last)
                ready &= self._copy(change, start, memoryview(head), pieces)
                ready &= self._copy(change, last, memoryview(tail)[:inside], pieces)
                views = [memoryview(head), *views, memoryview(tail)]
            pieces.append((place.host + start - place.guest, views, stop - start))
        if not ready:
            self.driver.fly(change)
            return False
        return self._write(change, pieces)

    def _copy(self, change: Change, offset: int, view: memoryview, pieces: list[Piece]) -> bool:
        """Read into `view`; True if that is done, else the `pieces` are written after the last one."""
        if not len(view):
            return True

        def done(part: Request) -> None:
            change.error = change.error or part.error
            change.pending -= 1
            if not change.pending:
                self._late(change, self._write(change, pieces))

        part = Request(READ, offset, len(view), [view], BACKGROUND if change.background else 0, done)
        change.pending += 1
        if not self.driver.queue_read(part):
            return False
        change.pending -= 1
        change.error = change.error or part.error
        return True

    def _write(self, change: Change, pieces: list[Piece]) -> bool:
        if change.error:
            return self._end(change, change.error)
        driver, data = self.driver, self.driver.data
        left = merge(pieces)
        if not change.background:
            done = 0
            for host, views, length in left:
                if not driver.watch.allows(length) or data.write_inline(views, host) != length:
                    break
                done += 1
            del left[:done]
        if not left:
            return self._end(change, 0)

        def work() -> int:
            for host, views, length in left:
                code = data.write(views, host, length)
                if code:
                    return code
            return 0

        return self._work(change, work)

    def _zero_in_place(self, change: Change) -> bool:
        request, data = change.request, self.driver.data
        ranges = [(unit.host + unit.start - unit.guest, unit.stop - unit.start)
                  for unit in change.units if unit.host != NOWHERE]
        if not ranges:
            return self._end(change, 0)

        def work() -> int:
            for host, length in ranges:
                code = data.zeroes(host, length, request.flags & NO_HOLE)
                if code:
                    return code
            return 0

        return self._work(change, work)

    def _work(self, change: Change, work: Callable[[], int]) -> bool:
        """Do it in a worker; what it returns ends the change."""
        self.driver.fly(change)
        result = [errno.EIO]

        def run() -> None:
            result[0] = work()

        self.driver.env.workers.submit(run, lambda: self._late(change, self._end(change, result[0])))
        return False

    # Map

    def _end(self, change: Change, code: int) -> bool:
        """True if the request is complete with that; a FUA write still waits for a flush."""
        driver, request = self.driver, change.request
        for unit in change.units:
            if not code:
                self.map(unit)
            elif unit.is_new and unit.host != NOWHERE:
                self.give_up(unit)
            del self._locks[unit.guest]
        for index in self._tables_of(change):
            self.tables.unpin(index)
        request.error = code
        for resume in change.waiting:
            driver.env.loop.call_soon(partial(self._wake, resume))
        change.waiting = []
        driver.ground(change)
        self.durable.relieve()
        if code or not request.flags & FUA:
            return True
        self.durable.flush(request)
        return False

    def _wake(self, resume: Resume) -> None:
        resume(0)
        self.driver.submit()

    # Zeroes that are data

    def zero_by_writing(self, request: Request) -> bool:
        """Write zeroes, unless zeroes are read there anyway."""
        driver = self.driver
        try:
            found = driver.mapping.find(request.offset, request.length)
        except TableMiss as miss:
            driver.load(miss, partial(driver.again, self.zero_by_writing, request))
            return False
        except ImageError as error:
            return driver.complain(request, error)
        offset = request.offset
        for kind, length, _ in found:
            if kind in (DATA, PACKED) or (kind == HOLE and driver.backing_bytes(offset, length)):
                return self.write(request)
            offset += length
        return True


def merge(pieces: Iterable[Piece]) -> list[Piece]:
    """`pieces` with neighbours joined where the host offsets follow each other."""
    merged: list[Piece] = []
    for host, views, length in pieces:
        if merged and merged[-1][0] + merged[-1][2] == host:
            first, before, before_length = merged[-1]
            merged[-1] = (first, before + views, before_length + length)
        else:
            merged.append((host, views, length))
    return merged
