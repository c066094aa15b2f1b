"""The gate: a filter that a job puts above the image, so that it and the guest never write one range at once.

    guest's write ─▶ a range that the job has locked?  yes: it waits until the job unlocks it
                     no: its blocks are marked, it goes down

The job locks a range, and has it when what the guest had under way there has ended; what comes later waits. So
whatever the job reads and writes in between is alone in its range. Locks are held for one copy of a part of the
disk: some milliseconds. Reads are never held up.

`changed` has a bit for each block that was changed since the job last cleared it, with its range locked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tapcore.driver import VERBS, Driver, Env, Filter, OpenFlag
from tapcore.request import Request
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
        self._locks: list[Lock] = []
        self._flying: dict[Request, Callable[[Request], None]] = {}

    # The guest's

    def queue_write(self, request: Request) -> bool:
        start, end = request.offset, request.offset + request.length
        for lock in self._locks:
            if start < lock.end and lock.offset < end:
                lock.waiting.append(request)
                return False
        self.changed.mark(start, request.length)
        done = request.done
        request.done = self._ended
        verb: Callable[[Request], bool] = getattr(self.next, VERBS[request.op])
        if verb(request):
            request.done = done
            return True
        self._flying[request] = done
        return False

    queue_zeroes = queue_discard = queue_write

    def _ended(self, request: Request) -> None:
        request.done = self._flying.pop(request)
        start, end = request.offset, request.offset + request.length
        for lock in list(self._locks):
            if lock.others and start < lock.end and lock.offset < end:
                lock.others -= 1
                if not lock.others:
                    lock.ready(lock)
        request.done(request)

    # The job's

    def lock(self, offset: int, length: int, ready: Callable[[Lock], None]) -> None:
        """`ready(lock)` when the range is the job's alone, at once if nothing is under way there."""
        lock = Lock(offset, offset + length, ready)
        self._locks.append(lock)
        lock.others = sum(request.offset < lock.end and offset < request.offset + request.length
                          for request in self._flying)
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
