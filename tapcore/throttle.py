"""Slows a disk's writes down: a token bucket in front of the queue. Reads, flushes and the rest pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tapcore.bucket import Bucket
from tapcore.loop import Loop, Timer
from tapcore.request import WRITE, Request


class Throttle:
    """Lets `rate` bytes a second of writes through. Those beyond wait in `waiting`, and are given to `release`
    when it is their turn."""

    def __init__(self, loop: Loop, rate: float, release: Callable[[list[Request]], None]) -> None:
        self.waiting: list[Request] = []
        self._loop = loop
        self._release = release
        self._bucket = Bucket(rate, time.monotonic())
        self._timer: Timer | None = None

    @property
    def rate(self) -> float:
        return self._bucket.rate

    def end(self) -> list[Request]:
        """Stop; those that still wait."""
        if self._timer is not None:
            self._timer.cancel()
        return self.waiting

    def admit(self, batch: Sequence[Request]) -> list[Request]:
        """Those that may go now; the others wait."""
        now_s = time.monotonic()
        passed = []
        for request in batch:
            if request.op != WRITE:
                passed.append(request)
            elif self.waiting or self._bucket.wait_s(now_s):
                self.waiting.append(request)
            else:
                self._bucket.take(request.length)
                passed.append(request)
        self._arm(now_s)
        return passed

    def _arm(self, now_s: float) -> None:
        if self.waiting and self._timer is None:
            self._timer = self._loop.call_later(self._bucket.wait_s(now_s), self._turn)

    def _turn(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        count = 0
        while count < len(self.waiting) and not self._bucket.wait_s(now_s):
            self._bucket.take(self.waiting[count].length)
            count += 1
        ready = self.waiting[:count]
        del self.waiting[:count]
        self._arm(now_s)
        if ready:
            self._release(ready)
