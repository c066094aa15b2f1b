"""What several tests need: a driver that completes when the test says so, and an owner of requests."""

from __future__ import annotations

import errno
import queue
import shutil
import threading
from collections.abc import Callable
from typing import ClassVar, TypeVar

from tapcore.driver import DiskInfo, Driver, Env, Feature, OpenFlag
from tapcore.errors import ChainError
from tapcore.request import DISCARD, FLUSH, IS_ZERO, READ, STATUS, WRITE, ZEROES, Request
from tapcore.vbd import Vbd

T = TypeVar("T")


class Manual(Driver):
    """`manual:SIZE` (bytes): memory whose requests complete when `finish` is called, or at once when `early`.

    `errors` holds errnos for the next requests; `log` the requests in the order in which they came.
    """

    name = "manual"
    opened: ClassVar[list[Manual]] = []
    refusing: ClassVar[bool] = False

    def open(self) -> None:
        if self.params == "broken" or Manual.refusing:
            raise ChainError("the manual driver was told not to open")
        size_bytes = int(self.params)
        features = Feature.FLUSH | Feature.DISCARD | Feature.ZEROES | Feature.FAST_ZEROES | Feature.STATUS
        self.info = DiskInfo(size_bytes, features, read_only=bool(self.flags & OpenFlag.RDONLY))
        self.data = bytearray(size_bytes)
        self.early = False
        self.pending: list[Request] = []
        self.log: list[tuple[int, int, int, int]] = []
        self.errors: list[int] = []
        self.submits = 0
        self.closed = False
        Manual.opened.append(self)

    def close(self) -> None:
        assert not self.pending, "closed with requests in flight"
        self.closed = True

    def _queue(self, request: Request) -> bool:
        self.log.append((request.op, request.offset, request.length, request.flags))
        if self.early:
            self._run(request)
            return True
        self.pending.append(request)
        return False

    queue_read = queue_write = queue_flush = queue_discard = queue_zeroes = queue_status = _queue

    def submit(self) -> None:
        self.submits += 1

    def finish(self, count: int | None = None) -> int:
        """Complete the oldest `count` pending requests (all without); returns how many."""
        batch = self.pending[:count]
        del self.pending[:count]
        for request in batch:
            self._run(request)
            request.done(request)
        return len(batch)

    def _run(self, request: Request) -> None:
        request.error = self.errors.pop(0) if self.errors else 0
        if request.error:
            return
        start, end = request.offset, request.offset + request.length
        if end > len(self.data):
            request.error = errno.EINVAL
        elif request.op == READ and request.takes_zero and not any(self.data[start:end]):
            request.flags |= IS_ZERO
        elif request.op == READ:
            for view in request.iov:
                view[:] = self.data[start : start + len(view)]
                start += len(view)
        elif request.op == WRITE:
            self.data[start:end] = b"".join(request.iov)
        elif request.op in (DISCARD, ZEROES):
            self.data[start:end] = bytes(request.length)
        elif request.op == STATUS:
            request.extents = [(request.length, 0)]
        else:
            assert request.op == FLUSH


class Owner:
    """Makes requests for a vbd and collects those that end late."""

    def __init__(self, vbd: Vbd) -> None:
        self.vbd = vbd
        self.late: list[Request] = []

    def request_done(self, request: Request) -> None:
        assert request not in self.late, "completed twice"
        self.late.append(request)

    def make(self, op: int, offset: int = 0, data: bytes | int = 0, flags: int = 0) -> Request:
        """A request; `data` is what to write, or a length in bytes."""
        if isinstance(data, bytes):
            iov = [memoryview(data)]
            length = len(data)
        else:
            length = data
            iov = [memoryview(bytearray(length))] if op == READ else []
        request = Request(op, offset, length, iov, flags, self.vbd.request_done)
        request.owner = self
        return request


class LoopThread:
    """A loop in a thread of its own, for tests whose clients block. `call(f)` returns what `f` returns there."""

    def __init__(self, env: Env) -> None:
        self.loop = env.loop
        self._thread = threading.Thread(target=self.loop.run, name="loop", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        answer: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put(function())
            except BaseException as error:
                answer.put(error)

        self.loop.call_threadsafe(run)
        result = answer.get(timeout=30)
        if isinstance(result, BaseException):
            raise result
        return result

    def until(self, ready: Callable[[], bool], timeout_s: float = 10) -> None:
        """Wait until `ready()`, asked in the loop's thread, is true."""
        event = threading.Event()

        def ask() -> None:
            if ready():
                event.set()
            else:
                self.loop.call_later(0.005, ask)

        self.loop.call_threadsafe(ask)
        assert event.wait(timeout_s), "it did not happen in time"

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_threadsafe(self.loop.stop)
            self._thread.join(10)
            assert not self._thread.is_alive()


def need(*programs: str) -> None:
    """Fail, saying what to do, if a program that the test runs is not installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    assert not missing, f"{', '.join(missing)} not found: tools/setup dev installs what the tests need"
