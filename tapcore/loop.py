"""The event loop: one thread, epoll, timers, and a door for other threads.

Everything that touches a chain, a vbd, a log or a connection runs in the loop's thread, so nothing there needs
a lock. Workers (`tapcore.workers`) and other threads come in through `call_threadsafe` alone.
"""

from __future__ import annotations

import heapq
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

Callback = Callable[[], None]

MAX_EVENTS = 256
"""Events taken from one epoll_wait."""
MIN_SPIN_S = 5e-6
MAX_SPIN_S = 100e-6
"""How long to look for events before sleeping, where that pays."""


class Timer:
    """One call that is due at `when_s` (monotonic seconds)."""

    __slots__ = ("callback", "when_s")

    def __init__(self, when_s: float, callback: Callback) -> None:
        self.when_s = when_s
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.when_s < other.when_s


class Loop:
    """Call back when a descriptor is ready, when a time has come, or when this turn ends.

    An exception that leaves a callback is logged with its traceback, and the loop goes on: one connection's bug
    must not take every guest's disk with it.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[Callback | None, Callback | None]] = {}
        self._timers: list[Timer] = []
        self._soon: deque[Callback] = deque()
        self._foreign: deque[Callback] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._woken = False
        self._stopping = False
        self._closed = False
        self._spin_s = 0.0
        self.add_reader(self._wake_fd, self._on_wake)

    def time_s(self) -> float:
        """The clock of `call_later`, in seconds."""
        return time.monotonic()

    def add_reader(self, fd: int, callback: Callback | None) -> None:
        """Call `callback` whenever `fd` is readable or has hung up; None takes it away."""
        self._set(fd, callback, self._handlers.get(fd, (None, None))[1])

    def add_writer(self, fd: int, callback: Callback | None) -> None:
        """Call `callback` whenever `fd` is writable; None takes it away."""
        self._set(fd, self._handlers.get(fd, (None, None))[0], callback)

    def remove(self, fd: int) -> None:
        """Forget `fd`. To be called before it is closed."""
        if fd in self._handlers and not self._closed:
            self._set(fd, None, None)

    def _set(self, fd: int, reader: Callback | None, writer: Callback | None) -> None:
        # A descriptor that nobody waits for is not registered: epoll would report its hang-up again and again.
        known = fd in self._handlers
        events = (select.EPOLLIN if reader else 0) | (select.EPOLLOUT if writer else 0)
        if not events:
            if known:
                del self._handlers[fd]
                self._epoll.unregister(fd)
            return
        self._handlers[fd] = (reader, writer)
        if known:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        timer = Timer(self.time_s() + delay_s, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def call_soon(self, callback: Callback) -> None:
        """Call at the end of this turn, after every ready descriptor was served."""
        self._soon.append(callback)

    def call_threadsafe(self, callback: Callback) -> None:
        """Call in the loop's thread, soon. The one method that other threads may use."""
        self._foreign.append(callback)
        if not self._woken:
            self._woken = True
            os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Leave `run` after this turn."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop`."""
        self._stopping = False
        while not self._stopping:
            self.turn()

    def run_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Serve until `ready()` is true; TimeoutError after `timeout_s`."""
        deadline_s = self.time_s() + timeout_s
        while not ready():
            left_s = deadline_s - self.time_s()
            if left_s <= 0:
                raise TimeoutError(f"not ready after {timeout_s} s")
            self.turn(min(left_s, 0.05))

    def turn(self, longest_wait_s: float = 3600.0) -> None:
        """One round: wait for events at most `longest_wait_s`, serve them, timers and what was deferred."""
        wait_s = longest_wait_s
        if self._soon or self._stopping:
            wait_s = 0
        elif self._timers:
            wait_s = max(0.0, min(wait_s, self._timers[0].when_s - self.time_s()))
        handlers = self._handlers
        for fd, events in self._wait(wait_s):
            reader, writer = handlers.get(fd, (None, None))
            if writer is not None and events & ~select.EPOLLIN:
                self._call(writer)
                reader = handlers.get(fd, (None, None))[0]
            if reader is not None and events & ~select.EPOLLOUT:
                self._call(reader)
        self._run_timers()
        soon = self._soon
        for _ in range(len(soon)):
            self._call(soon.popleft())

    def _wait(self, wait_s: float) -> list[tuple[int, int]]:
        """The events that are ready within `wait_s`.

        A thread that sleeps takes tens of microseconds to wake, more than most requests take to serve. So before
        it sleeps the loop asks again and again for a little while, as QEMU's event loop does: for longer when the
        last event came soon after it had gone to sleep, for shorter when none came for long.
        """
        poll = self._epoll.poll
        events = poll(0, MAX_EVENTS)
        if events or wait_s <= 0:
            return events
        clock = time.monotonic
        start_s = clock()
        if self._spin_s:
            end_s = start_s + self._spin_s
            while clock() < end_s:
                events = poll(0, MAX_EVENTS)
                if events:
                    return events
        events = poll(wait_s, MAX_EVENTS)
        if clock() - start_s < MAX_SPIN_S:
            self._spin_s = min(max(2 * self._spin_s, MIN_SPIN_S), MAX_SPIN_S)
        else:
            self._spin_s /= 2
            if self._spin_s < MIN_SPIN_S:
                self._spin_s = 0.0
        return events

    def close(self) -> None:
        """Release the descriptors. Nothing may be called afterwards."""
        self._closed = True
        self._epoll.close()
        os.close(self._wake_fd)

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except Exception:
            logger.exception("a callback failed")

    def _on_wake(self) -> None:
        os.eventfd_read(self._wake_fd)
        self._woken = False
        foreign = self._foreign
        while foreign:
            self._call(foreign.popleft())

    def _run_timers(self) -> None:
        timers = self._timers
        if not timers:
            return
        now_s = self.time_s()
        while timers and timers[0].when_s <= now_s:
            callback = heapq.heappop(timers).callback
            if callback is not None:
                self._call(callback)
