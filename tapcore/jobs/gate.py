"""The gate: a filter that a job puts above the image, so that it and the guest never write one range at once.

    guest's write ─▶ a range that the job has locked?  yes: it waits until the job unlocks it
                     no: its blocks are marked, it goes down

The job locks a range, and has it when what the guest had under way there has ended; what comes later waits. So
whatever the job reads and writes in between is alone in its range. Locks are held for one copy of a part of the
disk: some milliseconds. Reads are never held up.

`changed` has a bit for each block that was changed since the job last cleared it, with its range locked. Where a
guest changes blocks faster than they are copied, `mirror` ends that: writes are then done there too before they
are complete, and mark nothing. Not so what overlaps with others under way, whose order may be another there, and
discards, whose outcome is open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from tapcore.driver import VERBS, Driver, Env, Filter, OpenFlag
from tapcore.request import DISCARD, NO_HOLE, Request
from writelog.bitmap import Bitmap, bitmap_bytes, runs

BLOCK_BYTES: Final = 64 << 10


class Lock:
    """A range that belongs to the job, from `offset` up to, not including, `end`."""

    __slots__ = ("end", "offset", "others", "ready", "waiting")

    def __init__(self, offset: int, end: int, ready: Callable[[Lock], None]) -> None:
        self.offset = offset
        self.end = end
        self.ready = ready
        self.others = 0
        """Changes of the guest in the range that are under way."""
        self.waiting: list[Request] = []


class Gate(Filter):
    """In no chain's text; closed with what is above and below it."""

    def __init__(self, env: Env, lower: Driver) -> None:
        super().__init__(env, "", OpenFlag.NONE)
        self.attach(lower)
        size_bytes = self.info.size_bytes
        self.changed = Bitmap(bytearray(bitmap_bytes(size_bytes, BLOCK_BYTES)), size_bytes, BLOCK_BYTES)
        self.mirror: Driver | None = None
        self._locks: list[Lock] = []
        self._flying: dict[Request, Callable[[Request], None]] = {}

    # The guest's

    def queue_write(self, request: Request) -> bool:
        start, end = request.offset, request.offset + request.length
        for lock in self._locks:
            if start < lock.end and lock.offset < end:
                lock.waiting.append(request)
                return False
        done = request.done
        verb: Callable[[Request], bool] = getattr(self.next, VERBS[request.op])
        if self.mirror is not None and request.op != DISCARD and not self._overlapping(start, end):
            self._flying[request] = done
            request.done = partial(self._written, self.mirror, request.iov)
            if not verb(request) or not self._mirror(self.mirror, request.iov, request):
                return False
            self._landed(request)
            return True
        self.changed.mark(start, request.length)
        request.done = self._ended
        if verb(request):
            request.done = done
            return True
        self._flying[request] = done
        return False

    queue_zeroes = queue_discard = queue_write

    def _overlapping(self, start: int, end: int) -> int:
        """How many changes are under way there."""
        return sum(request.offset < end and start < request.offset + request.length for request in self._flying)

    def _written(self, mirror: Driver, iov: Sequence[memoryview], request: Request) -> None:
        """A write that is to be mirrored has ended late."""
        if self._mirror(mirror, iov, request):
            self._ended(request)

    def _mirror(self, mirror: Driver, iov: Sequence[memoryview], request: Request) -> bool:
        """Do a write that has ended in the mirror, too. False if that ends later."""
        def check(copy: Request) -> None:
            if copy.error:
                self.changed.mark(request.offset, request.length)

        def mirrored(copy: Request) -> None:
            check(copy)
            self._ended(request)

        if request.error:
            self.changed.mark(request.offset, request.length)
            return True
        copy = Request(request.op, request.offset, request.length, iov, request.flags & NO_HOLE, mirrored)
        verb: Callable[[Request], bool] = getattr(mirror, VERBS[request.op])
        is_complete = verb(copy)
        mirror.submit()
        if is_complete:
            check(copy)
        return is_complete

    def _ended(self, request: Request) -> None:
        self._landed(request)
        request.done(request)

    def _landed(self, request: Request) -> None:
        """A change is no more under way: who waited for that has the range."""
        request.done = self._flying.pop(request)
        start, end = request.offset, request.offset + request.length
        for lock in list(self._locks):
            if lock.others and start < lock.end and lock.offset < end:
                lock.others -= 1
                if not lock.others:
                    lock.ready(lock)

    # The job's

    def lock(self, offset: int, length: int, ready: Callable[[Lock], None]) -> None:
        """`ready(lock)` when the range is the job's alone, at once if nothing is under way there."""
        lock = Lock(offset, offset + length, ready)
        self._locks.append(lock)
        lock.others = self._overlapping(offset, lock.end)
        if not lock.others:
            ready(lock)

    def unlock(self, lock: Lock) -> None:
        """Let go on what waited for the range."""
        self._locks.remove(lock)
        for request in lock.waiting:
            if self.queue_write(request):
                request.done(request)
        if lock.waiting:
            self.next.submit()

    # What the guest has changed

    def changed_ranges(self) -> list[tuple[int, int]]:
        """(offset, end) of the ranges of blocks that are marked."""
        pairs, _ = runs(self.changed.bits, 0, self.changed.blocks, self.changed.blocks, unit=BLOCK_BYTES)
        size_bytes = self.changed.size_bytes
        return [(offset, min(size_bytes, offset + length)) for offset, length in zip(pairs[::2], pairs[1::2],
                                                                                     strict=True)]

    def changed_bytes(self) -> int:
        return BLOCK_BYTES * self.changed.bits.count()

    def unmark(self, lock: Lock) -> None:
        """The locked range, which is of whole blocks, is being copied."""
        self.changed.bits[lock.offset // BLOCK_BYTES : -(-lock.end // BLOCK_BYTES)] = 0
