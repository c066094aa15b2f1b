"""qcow2: writes, zeroes and discards that change the mapping.

A change of the mapping of clusters goes through these steps; each may have to wait, and then goes on from there:

    plan       what is to change; nobody else changes these clusters from now on: others queue behind
    tables     each L2 table concerned exists and is this image's alone
    allocate   a host cluster for each that needs one
    copy       what a write leaves of a cluster is read as the guest would read it
    write      the data
    map        the L2 entries, in memory, all at once; Durable brings them to the file

If it fails before `map` the guest sees the former data, and the new clusters are given up.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

from tapcore.errors import ImageError
from tapcore.formats.extents import DATA, HOLE, PACKED, ZERO, TableMiss
from tapcore.formats.imagefile import zero_views
from tapcore.formats.qcow2.layout import COPIED, OFFSET_MASK, ZERO_FLAG
from tapcore.formats.qcow2.refcounts import clusters_of
from tapcore.formats.reader import Flight, Resume
from tapcore.request import (
    BACKGROUND,
    DISCARD,
    FAST,
    FUA,
    NO_HOLE,
    READ,
    WRITE,
    ZEROES,
    Request,
    fail,
    slice_iov,
)

if TYPE_CHECKING:
    from tapcore.formats.qcow2.driver import Qcow2Driver

MAX_ZEROES_WRITTEN: Final = 4 << 20
MAX_CLUSTERS_CHANGED: Final = 2048
"""The most that one step of a long zeroing or discard does."""

Verb = Callable[[Request], bool]
Piece = tuple[int, list[memoryview], int]
"""(host, buffers, length)."""


class Change(Flight):
    """One request whose clusters are locked."""

    __slots__ = ("clusters", "edges", "fresh", "in_place", "request", "waiting")

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.pending = 0
        self.request = request
        self.clusters: dict[int, int] = {}
        """Guest offsets of the clusters whose mapping changes, and their new L2 entries; 0 of a write's cluster
        that has no host cluster yet."""
        self.in_place: dict[int, int] = {}
        """Of a write: guest offsets of clusters that stay where they are, and their hosts."""
        self.edges: dict[int, bool] = {}
        """Of a write: guest offsets of clusters that it covers in part; do they read as zeroes?"""
        self.fresh: set[int] = set()
        """Guest offsets of clusters whose host cluster holds zeroes."""
        self.waiting: list[Resume] = []


class Writer:
    """What changes the mapping of one image. Its verbs are like a driver's."""

    def __init__(self, driver: Qcow2Driver) -> None:
        self._driver = driver
        self._mapping = driver.mapping
        self._refcounts = driver.refcounts
        self._cluster_bits = driver.header.cluster_bits
        self._cluster_bytes = driver.header.cluster_bytes
        self._has_zero_flag = driver.header.version >= 3
        self._locks: dict[int, Change] = {}

    # Plan

    def write(self, request: Request) -> bool:
        return self._planned(request, self._plan_write, self.write)

    def change_clusters(self, request: Request) -> bool:
        """Zeroes or a discard of whole clusters of one L2 table, by their L2 entries."""
        return self._planned(request, self._plan_entries, self.change_clusters)

    def _planned(self, request: Request, plan: Callable[[Change], Change | None], verb: Verb) -> bool:
        driver = self._driver
        if driver.distrusted:
            return fail(request, errno.EIO)
        resume = partial(driver.again, verb, request)
        mapping, refcounts = self._mapping, self._refcounts
        if len(mapping.dirty) >= mapping.capacity or len(refcounts.dirty) >= refcounts.capacity:
            driver.durable.wait(resume)
            return False
        change = Change(request)
        try:
            holder = plan(change)
        except TableMiss as miss:
            driver.load(miss, resume)
            return False
        except ImageError as error:
            return driver.complain(request, error)
        if holder is not None:
            holder.waiting.append(resume)
            return False
        for offset in change.clusters:
            self._locks[offset] = change
        for index in self._tables(change):
            self._mapping.pin(index)
        return self._begin(change)

    def _tables(self, change: Change) -> Iterable[int]:
        return {offset >> self._mapping.table_shift for offset in change.clusters}

    def _plan_write(self, change: Change) -> Change | None:
        """Returns who must end first, if anyone. TableMiss, ImageError."""
        mapping, request = self._mapping, change.request
        offset, end = request.offset, request.offset + request.length
        holder = None
        first = offset & -self._cluster_bytes
        for cluster in range(first, end, self._cluster_bytes):
            entry = mapping.entry(cluster)
            kind, host = mapping.kind_of(entry, cluster)
            if kind == DATA and entry & COPIED:
                change.in_place[cluster] = host
                continue
            holder = holder or self._locks.get(cluster)
            change.clusters[cluster] = host | COPIED if kind == ZERO and host and entry & COPIED else 0
            if cluster < offset or cluster + self._cluster_bytes > end:
                change.edges[cluster] = kind == ZERO or (
                    kind == HOLE and not self._driver.backing_bytes(cluster, self._cluster_bytes))
        return holder

    def _plan_entries(self, change: Change) -> Change | None:
        """Returns who must end first, if anyone. TableMiss, ImageError."""
        mapping, request = self._mapping, change.request
        new_entry = self._discarded if request.op == DISCARD else self._zeroed
        holder = None
        for cluster in range(request.offset, request.offset + request.length, self._cluster_bytes):
            entry = mapping.entry(cluster)
            kind, host = mapping.kind_of(entry, cluster)
            shows_backing = self._driver.backing_bytes(cluster, self._cluster_bytes) > 0
            new = new_entry(entry, kind, host, shows_backing, request.flags)
            if new != entry:
                change.clusters[cluster] = new
            if new != entry or cluster in self._locks:
                holder = holder or self._locks.get(cluster)
        return holder

    def _discarded(self, entry: int, kind: int, host: int, shows_backing: bool, flags: int) -> int:
        if not shows_backing:
            return 0
        if kind == HOLE or not self._has_zero_flag:
            return entry
        return ZERO_FLAG

    def _zeroed(self, entry: int, kind: int, host: int, shows_backing: bool, flags: int) -> int:
        if not self._has_zero_flag:
            return 0
        if flags & NO_HOLE:
            return entry | ZERO_FLAG if kind in (DATA, ZERO) and host else ZERO_FLAG
        return entry if kind == HOLE and not shows_backing else ZERO_FLAG

    # Tables, allocate

    def _begin(self, change: Change) -> bool:
        try:
            self._make_tables(change)
            if change.request.op != WRITE:
                return self._end(change, 0)
            self._allocate(change)
        except TableMiss as miss:
            self._driver.fly(change)
            self._driver.load(miss, partial(self._begin_again, change))
            return False
        except ImageError as error:
            self._driver.distrust(error)
            return self._end(change, errno.EIO)
        return self._copy_edges(change)

    def _begin_again(self, change: Change, code: int) -> None:
        self._late(change, self._end(change, code) if code else self._begin(change))

    def _late(self, change: Change, complete: bool) -> None:
        """A step was not taken within the verb: if it was the last, say so."""
        if complete:
            change.request.done(change.request)
        self._driver.submit()

    def _make_tables(self, change: Change) -> None:
        mapping = self._mapping
        for index in self._tables(change):
            if mapping.is_private(index):
                continue
            mapping.table(index)
            first, _ = self._take(1)
            self._refcounts.take_fresh(first, 1)
            self._refcounts.protect([first << self._cluster_bits])
            former = mapping.replace_table(index, first << self._cluster_bits)
            if former:
                self._refcounts.unprotect(former)
                self._driver.durable.drop(clusters_of(former, None, self._cluster_bits))

    def _allocate(self, change: Change) -> None:
        homeless = [offset for offset, entry in change.clusters.items() if not entry]
        at = 0
        while at < len(homeless):
            first, count = self._take(len(homeless) - at)
            fresh = self._refcounts.take_fresh(first, count)
            for number, offset in enumerate(homeless[at : at + count]):
                change.clusters[offset] = first + number << self._cluster_bits | COPIED
                if fresh:
                    change.fresh.add(offset)
            at += count

    def _take(self, count: int) -> tuple[int, int]:
        first, count = self._refcounts.allocate(count)
        end = self._refcounts.file_end << self._cluster_bits
        self._mapping.file_bytes = max(self._mapping.file_bytes, end)
        return first, count

    # Copy, write

    def _copy_edges(self, change: Change) -> bool:
        """Read what the write leaves of clusters that get a new place."""
        driver = self._driver
        pieces: list[Piece] = []
        request = change.request
        start, end = request.offset, request.offset + request.length
        ready = True
        for cluster, entry in (change.in_place | change.clusters).items() if change.clusters else ():
            stop = cluster + self._cluster_bytes
            host = entry & OFFSET_MASK
            first, last = max(start, cluster), min(end, stop)
            views = slice_iov(request.iov, first - start, last - first)
            reads_zero = change.edges.get(cluster, True)
            if cluster not in change.edges or (reads_zero and cluster in change.fresh):
                pieces.append((host + first - cluster, views, last - first))
            elif reads_zero:
                views = [*zero_views(first - cluster), *views, *zero_views(stop - last)]
                pieces.append((host, views, self._cluster_bytes))
            else:
                head, tail = bytearray(first - cluster), bytearray(stop - last)
                inside = min(stop, driver.info.size_bytes) - last
                ready &= self._copy(change, cluster, memoryview(head), partial(self._write, change, pieces))
                ready &= self._copy(change, last, memoryview(tail)[:inside], partial(self._write, change, pieces))
                views = [memoryview(head), *views, memoryview(tail)]
                pieces.append((host, views, self._cluster_bytes))
        if not change.clusters:
            pieces = self._in_place_pieces(change)
        if not ready:
            driver.fly(change)
            return False
        return self._write(change, pieces)

    def _in_place_pieces(self, change: Change) -> list[Piece]:
        request, start = change.request, change.request.offset
        end = start + request.length
        pieces: list[Piece] = []
        for cluster, host in change.in_place.items():
            first, length = max(start, cluster), min(end, cluster + self._cluster_bytes) - max(start, cluster)
            pieces.append((host + first - cluster, slice_iov(request.iov, first - start, length), length))
        return pieces

    def _copy(self, change: Change, offset: int, view: memoryview, then: Callable[[], bool]) -> bool:
        """Read into `view`; True if that is done, else `then()` follows the last one."""
        if not len(view):
            return True

        def done(part: Request) -> None:
            change.error = change.error or part.error
            change.pending -= 1
            if not change.pending:
                self._late(change, then())

        part = Request(READ, offset, len(view), [view], BACKGROUND if change.background else 0, done)
        change.pending += 1
        if not self._driver.queue_read(part):
            return False
        change.pending -= 1
        change.error = change.error or part.error
        return True

    def _write(self, change: Change, pieces: list[Piece]) -> bool:
        if change.error:
            return self._end(change, change.error)
        driver = self._driver
        left = merge(pieces)
        if not change.background:
            while left and driver.watch.allows(left[0][2]):
                host, views, length = left[0]
                if driver.file.write_inline(views, host) != length:
                    break
                left.pop(0)
        if not left:
            return self._end(change, 0)
        driver.fly(change)
        result = [errno.EIO]

        def work() -> None:
            for host, views, length in left:
                result[0] = driver.file.write(views, host, length)
                if result[0]:
                    return

        driver.env.workers.submit(work, lambda: self._late(change, self._end(change, result[0])))
        return False

    # Map

    def _end(self, change: Change, code: int) -> bool:
        """True if the request is complete with that; a FUA write still waits for a flush."""
        driver, mapping = self._driver, self._mapping
        for offset, entry in change.clusters.items():
            if code:
                self._give_up(change, offset, entry)
            else:
                former = mapping.set_entry(offset, entry)
                if (former ^ entry) & OFFSET_MASK or former & ~(COPIED | OFFSET_MASK | ZERO_FLAG):
                    self._drop(former)
            del self._locks[offset]
        for index in self._tables(change):
            mapping.unpin(index)
        change.request.error = code
        for resume in change.waiting:
            driver.env.loop.call_soon(partial(self._wake, resume))
        change.waiting = []
        driver.ground(change)
        driver.durable.relieve()
        if code or not change.request.flags & FUA:
            return True
        driver.durable.flush(change.request)
        return False

    def _give_up(self, change: Change, offset: int, entry: int) -> None:
        """A new host cluster that was not needed after all."""
        if change.request.op == WRITE and entry and not self._is_mapped(offset, entry):
            self._drop(entry)

    def _is_mapped(self, offset: int, entry: int) -> bool:
        table = self._mapping.tables.get(offset >> self._mapping.table_shift)
        index = offset >> self._cluster_bits & self._mapping.index_mask
        return table is not None and not (table[index] ^ entry) & OFFSET_MASK

    def _drop(self, entry: int) -> None:
        packed = entry & (1 << 62)
        place = self._mapping.packed_place(entry) if packed else None
        self._driver.durable.drop(clusters_of(entry, place, self._cluster_bits))

    def _wake(self, resume: Resume) -> None:
        resume(0)
        self._driver.submit()

    # Ranges

    def change_range(self, request: Request) -> bool:
        """Zeroes or a discard of any length, in parts, one after the other."""
        return Range(self, request).run()

    def zero_by_writing(self, request: Request) -> bool:
        """Write zeroes, unless zeroes are read there anyway."""
        try:
            found = self._mapping.find(request.offset, request.length)
        except TableMiss as miss:
            self._driver.load(miss, partial(self._driver.again, self.zero_by_writing, request))
            return False
        except ImageError as error:
            return self._driver.complain(request, error)
        offset = request.offset
        for kind, length, _ in found:
            if kind in (DATA, PACKED) or (kind == HOLE and self._driver.backing_bytes(offset, length)):
                return self.write(request)
            offset += length
        return True

    def next_part(
        self, request: Request, cursor: int, done: Callable[[Request], None]
    ) -> tuple[Request, Verb | None]:
        """What is to be done from `cursor` on for a zeroing or discard, and how (None: nothing)."""
        end = request.offset + request.length
        whole_end = end if end == self._driver.info.size_bytes else end & -self._cluster_bytes
        background = request.flags & BACKGROUND
        if cursor % self._cluster_bytes or cursor >= whole_end:
            stop = min(end, (cursor | self._cluster_bytes - 1) + 1)
            part = Request(WRITE, cursor, stop - cursor, zero_views(stop - cursor), background, done)
            return part, None if request.op == DISCARD else self.zero_by_writing
        if request.op == ZEROES and self.must_write_zeroes(request):
            length = min(whole_end - cursor, MAX_ZEROES_WRITTEN)
            return Request(WRITE, cursor, length, zero_views(length), background, done), self.zero_by_writing
        table_end = (cursor >> self._mapping.table_shift) + 1 << self._mapping.table_shift
        length = min(whole_end, table_end, cursor + MAX_CLUSTERS_CHANGED * self._cluster_bytes) - cursor
        part = Request(request.op, cursor, length, flags=background | request.flags & NO_HOLE, done=done)
        return part, self.change_clusters

    def must_write_zeroes(self, request: Request) -> bool:
        """Can whole clusters of `request` not be zeroed by their L2 entries?"""
        return not self._has_zero_flag and (
            bool(request.flags & NO_HOLE) or self._driver.backing_bytes(request.offset, request.length) > 0)

    def is_fast(self, request: Request) -> bool:
        """Does zeroing write no data?"""
        end = request.offset + request.length
        whole = not request.offset % self._cluster_bytes and (
            not end % self._cluster_bytes or end == self._driver.info.size_bytes)
        return whole and not self.must_write_zeroes(request)

    def resume_soon(self, step: Callable[[], None]) -> None:
        """After others in the loop had their turn."""
        def run() -> None:
            step()
            self._driver.submit()

        self._driver.env.loop.call_soon(run)

    def flush(self, request: Request) -> None:
        self._driver.durable.flush(request)


class Range(Flight):
    """The progress of one zeroing or discard."""

    __slots__ = ("_cursor", "_request", "_writer")

    def __init__(self, writer: Writer, request: Request) -> None:
        super().__init__(request)
        self._writer = writer
        self._request = request
        self._cursor = request.offset

    def run(self) -> bool:
        """True if the request is complete."""
        request, writer = self._request, self._writer
        if request.op == ZEROES and request.flags & FAST and not writer.is_fast(request):
            return fail(request, errno.ENOTSUP)
        return self._go_on()

    def _go_on(self) -> bool:
        request, writer = self._request, self._writer
        end = request.offset + request.length
        parts = 0
        while self._cursor < end:
            if parts == 4:
                writer.resume_soon(self._go_on_late)
                return False
            parts += 1
            part, verb = writer.next_part(request, self._cursor, self._part_done)
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
        writer.flush(request)
        return False

    def _part_done(self, part: Request) -> None:
        if part.error:
            self._cursor = self._request.offset + self._request.length
            fail(self._request, part.error)
            self._request.done(self._request)
        else:
            self._go_on_late()

    def _go_on_late(self) -> None:
        if self._go_on():
            self._request.done(self._request)


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
