"""Says which requests of a disk make no progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from tapcore.loop import Loop, Timer
from tapcore.request import Request
from tapcore.stats import Stats

logger = logging.getLogger(__name__)


class Watchdog:
    """Reports each of the requests that `under_way` gives, once, if it was started `stall_report_s` ago."""

    def __init__(self, loop: Loop, name: str, stall_report_s: float, under_way: Callable[[], Iterable[Request]],
                 statistics: Stats) -> None:
        self._loop = loop
        self._name = name
        self._stall_report_s = stall_report_s
        self._under_way = under_way
        self._statistics = statistics
        self._reported: set[Request] = set()
        self._timer: Timer | None = None

    def watch(self) -> None:
        self._timer = self._loop.call_later(self._stall_report_s / 2, self.watch)
        oldest_ns = time.monotonic_ns() - int(self._stall_report_s * 1e9)
        for request in self._under_way():
            if request.started_ns < oldest_ns and request not in self._reported:
                self._reported.add(request)
                self._statistics.stalls += 1
                logger.warning("%s: %r has made no progress for %g s", self._name, request, self._stall_report_s)

    def ended(self, request: Request) -> None:
        """A request that was late has ended."""
        if request in self._reported:
            self._reported.discard(request)
            logger.warning("%s: %r ended after all", self._name, request)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
