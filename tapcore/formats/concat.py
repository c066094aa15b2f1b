"""Disks made of parts of others: a window on a range of one, and several one behind the other.

    Concat   |── part 0 ──|──── part 1 ────|─ part 2 ─|      a format whose image is several files
    Window   lower  ......|== start, length ==|.......       a range of a file; an extent's share of the backing
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from tapcore.driver import VERBS, Driver, Env, OpenFlag
from tapcore.formats.reader import join_extents
from tapcore.request import FLUSH, IS_ZERO, STATUS, Request, slice_iov

Verb = Callable[[Request], bool]


class Window(Driver):
    """The `length` bytes of `lower` from `start` on. `close` closes `lower`."""

    def __init__(self, lower: Driver, start: int, length: int) -> None:
        super().__init__(lower.env, lower.params, lower.flags)
        self._lower = lower
        self._start = start
        self._verbs = [getattr(lower, verb) for verb in VERBS]
        self.info = lower.info.with_changes(size_bytes=length)

    def _queue(self, request: Request) -> bool:
        return _queue_elsewhere(self._verbs[request.op], request, request.offset + self._start)

    queue_read = queue_write = queue_flush = queue_discard = queue_zeroes = queue_status = _queue

    def submit(self) -> None:
        self._lower.submit()

    def quiesce(self, done: Callable[[], None]) -> None:
        self._lower.quiesce(done)

    def close(self) -> None:
        self._lower.close()


def _queue_elsewhere(verb: Verb, request: Request, offset: int) -> bool:
    """Let `verb` do the same at another offset."""
    part = Request(request.op, offset, request.length, request.iov, request.flags)
    part.takes_zero = request.takes_zero

    def take_answer(part: Request) -> None:
        request.error, request.extents = part.error, part.extents
        request.flags |= part.flags & IS_ZERO

    def done(part: Request) -> None:
        take_answer(part)
        request.done(request)

    part.done = done
    if not verb(part):
        return False
    take_answer(part)
    return True


class _Joint:
    """One request that is on its way as several parts."""

    __slots__ = ("error", "parts", "pending", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pending = 1
        self.error = 0
        self.parts: list[Request] = []

    def arrived(self, part: Request) -> None:
        if self.landed(part.error):
            self.request.done(self.request)

    def landed(self, code: int) -> bool:
        """One part less is under way; True if that was the last."""
        self.error = self.error or code
        self.pending -= 1
        if not self.pending:
            self.request.error = self.error
            if self.request.op == STATUS:
                self.request.extents = join_extents(self.parts)
        return not self.pending


class Concat(Driver):
    """`parts`, at least one, one behind the other. They are closed with it."""

    def __init__(self, env: Env, flags: OpenFlag, parts: Sequence[Driver]) -> None:
        super().__init__(env, "", flags)
        self.parts = parts
        self.starts = list(accumulate((part.info.size_bytes for part in parts), initial=0))
        """Where each begins, and where the last one ends."""
        self._verbs = [[getattr(part, verb) for verb in VERBS] for part in parts]
        self._own_verbs = [[getattr(part, "queue_own_status", part.queue_status)] * len(VERBS) for part in parts]
        self._queued: set[int] = set()
        features = parts[0].info.features
        for part in parts:
            features &= part.info.features
        self.info = parts[0].info.with_changes(
            size_bytes=self.starts[-1], features=features,
            min_block_bytes=max(part.info.min_block_bytes for part in parts),
            read_only=any(part.info.read_only for part in parts))

    def _queue(self, request: Request) -> bool:
        return self._queue_on(self._verbs, request)

    def queue_own_status(self, request: Request) -> bool:
        """As `ImageDriver` has it: without what the parts' parents have."""
        return self._queue_on(self._own_verbs, request)

    def _queue_on(self, verbs: Sequence[Sequence[Verb]], request: Request) -> bool:
        starts = self.starts
        first = bisect_right(starts, request.offset) - 1
        self._queued.add(first)
        end = request.offset + request.length
        if end <= starts[first + 1]:
            verb = verbs[first][request.op]
            if not first:
                return verb(request)
            return _queue_elsewhere(verb, request, request.offset - starts[first])
        joint = _Joint(request)
        offset = request.offset
        while offset < end:
            stop = min(end, starts[first + 1])
            iov = request.iov and slice_iov(request.iov, offset - request.offset, stop - offset)
            part = Request(request.op, offset - starts[first], stop - offset, iov, request.flags)
            self._start(joint, first, verbs[first][request.op], part)
            offset = stop
            first += 1
        return joint.landed(0)

    queue_read = queue_write = queue_discard = queue_zeroes = queue_status = _queue

    def queue_flush(self, request: Request) -> bool:
        joint = _Joint(request)
        for number in range(len(self.parts)):
            self._start(joint, number, self._verbs[number][FLUSH], Request(FLUSH, flags=request.flags))
        return joint.landed(0)

    def _start(self, joint: _Joint, number: int, verb: Verb, part: Request) -> None:
        self._queued.add(number)
        part.done = joint.arrived
        joint.parts.append(part)
        joint.pending += 1
        if verb(part):
            joint.landed(part.error)

    def submit(self) -> None:
        queued, self._queued = self._queued, set()
        for number in queued:
            self.parts[number].submit()

    def quiesce(self, done: Callable[[], None]) -> None:
        left = len(self.parts)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for part in self.parts:
            part.quiesce(one_less)

    def close(self) -> None:
        """The first failure is raised after all were closed."""
        failure: Exception | None = None
        for part in self.parts:
            try:
                part.close()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
