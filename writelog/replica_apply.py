"""Applies extents to a chain: as many at once as come, but overlapping ones one after the other.

Two writes in flight have no order between them, and a hot block can come again while its former version is still
on its way to the disk. So the extents queue up, and the first one starts only when nothing that it overlaps is in
flight. All of it runs in the loop's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from tapcore.driver import Driver, Feature
from tapcore.request import FLUSH, READ, WRITE, ZEROES, Request
from tapcore.workers import Workers

MAX_IN_FLIGHT_BYTES = 16 << 20
MAX_IN_FLIGHT = 256
MAX_QUEUED_BYTES = 128 << 20
MAX_QUEUED = 4096
"""Extents, however short, that wait."""
ZERO_PIECE = memoryview(bytes(1 << 20))
"""What is written where a chain has no zeroes operation of its own."""

Done = Callable[[int], None]
"""Called with 0 or an errno."""
Look = Callable[[memoryview], None]
"""Called in a thread with what was read. It must not raise."""


class Job:
    """One request on its way; a read to be looked at has a `look`."""

    __slots__ = ("done", "end", "look", "request")

    def __init__(self, request: Request, done: Done, look: Look | None = None) -> None:
        self.request = request
        self.end = request.offset + request.length
        self.done = done
        self.look = look


class Applier:
    """Writes, zeroes, flushes and reads for `head`. `queued_bytes` counts payload that has not ended yet."""

    def __init__(self, head: Driver, workers: Workers) -> None:
        self._head = head
        self._workers = workers
        self._queue: deque[Job] = deque()
        self._flying: dict[Request, Job] = {}
        self._flying_bytes = 0
        self._idle_waiters: list[Callable[[], None]] = []
        self._starting = False
        self.queued_bytes = 0

    def turn_to(self, head: Driver) -> None:
        """Apply to another head from now on. Only while nothing is queued."""
        assert not self._queue
        self._head = head

    def write(self, offset: int, data: memoryview, done: Done) -> None:
        """Queue a write of `data`, which must not change before `done(errno)`."""
        self._append(Job(Request(WRITE, offset, len(data), (data,), done=self._request_done), done))

    def zero(self, offset: int, length: int, done: Done) -> None:
        """Queue what makes the range read as zeroes, as a hole where the chain can."""
        if self._head.info.features & Feature.ZEROES:
            request = Request(ZEROES, offset, length, done=self._request_done)
        else:
            whole, rest = divmod(length, len(ZERO_PIECE))
            iov = [ZERO_PIECE] * whole + ([ZERO_PIECE[:rest]] if rest else [])
            request = Request(WRITE, offset, length, iov, done=self._request_done)
        self._append(Job(request, done))

    def flush(self, done: Done) -> None:
        """Make all that has ended durable, then `done(errno)`. It waits for nothing that is under way."""
        self._start(Job(Request(FLUSH, done=self._request_done), done))
        self._head.submit()

    def read(self, offset: int, buffer: memoryview, done: Done) -> None:
        """Fill `buffer` from `offset`, then `done(errno)`. In no order with writes."""
        self._start(Job(Request(READ, offset, len(buffer), (buffer,), done=self._request_done), done))
        self._head.submit()

    def inspect(self, offset: int, length: int, look: Look, done: Done) -> None:
        """Queue a read, in order with the writes, of what `look` is given before `done(errno)`; after an error it
        is not called."""
        self._append(Job(Request(READ, offset, length, done=self._request_done), done, look))

    def drop_queued(self) -> None:
        """Forget what has not started; its `done` is not called."""
        self.queued_bytes -= sum(job.request.length for job in self._queue)
        self._queue.clear()
        self._check_idle()

    def when_idle(self, action: Callable[[], None]) -> None:
        """`action()` once nothing is queued or in flight."""
        self._idle_waiters.append(action)
        self._check_idle()

    @property
    def is_idle(self) -> bool:
        return not self._queue and not self._flying

    @property
    def is_full(self) -> bool:
        """No more extents should be queued until some have ended."""
        return self.queued_bytes > MAX_QUEUED_BYTES or len(self._queue) >= MAX_QUEUED

    def _append(self, job: Job) -> None:
        self._queue.append(job)
        self.queued_bytes += job.request.length

    def start(self) -> None:
        """Start what is queued, as far as it may. To be called after a batch was queued."""
        if self._starting:
            return
        self._starting = True
        queue = self._queue
        started = False
        while queue and self._may_start(queue[0]):
            job = queue.popleft()
            started = True
            self._start(job)
        self._starting = False
        if started:
            self._head.submit()

    def _may_start(self, job: Job) -> bool:
        flying = self._flying
        if not flying:
            return True
        if self._flying_bytes >= MAX_IN_FLIGHT_BYTES or len(flying) >= MAX_IN_FLIGHT:
            return False
        start, end = job.request.offset, job.end
        return all(other.end <= start or end <= other.request.offset for other in flying.values())

    def _start(self, job: Job) -> None:
        request = job.request
        self._flying[request] = job
        self._flying_bytes += request.length
        if job.look is not None:
            request.iov = (memoryview(bytearray(request.length)),)
        head = self._head
        queue = (head.queue_read, head.queue_write, head.queue_flush, None, head.queue_zeroes)[request.op]
        assert queue is not None
        if queue(request):
            self._served(request)

    def _request_done(self, request: Request) -> None:
        self._served(request)
        self.start()

    def _served(self, request: Request) -> None:
        """The chain is done with it."""
        look = self._flying[request].look
        if look is None or request.error:
            self._end(request)
        else:
            self._workers.submit(partial(look, request.iov[0]), partial(self._looked, request))

    def _looked(self, request: Request) -> None:
        self._end(request)
        self.start()

    def _end(self, request: Request) -> None:
        job = self._flying.pop(request)
        self._flying_bytes -= request.length
        if request.op in (WRITE, ZEROES) or job.look is not None:
            self.queued_bytes -= request.length
        job.done(request.error)
        self._check_idle()

    def _check_idle(self) -> None:
        while self._idle_waiters and self.is_idle:
            self._idle_waiters.pop(0)()

