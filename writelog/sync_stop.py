"""What stops a sync or its pause, and the watch that times the pause."""

from __future__ import annotations

import time


class Interrupted(Exception):
    """The operator stopped the sync."""


class BrokenOff(Exception):
    """The switch-over is broken off, to be tried again; `str()` says why."""


class PauseTooLong(BrokenOff):
    """It takes too long; `str()` says how long."""


class Stopwatch:
    """Adds up the time between laps under the laps' names, in seconds."""

    def __init__(self) -> None:
        self.parts_s: dict[str, float] = {}
        self.start_s = self._lap_s = time.monotonic()

    def lap(self, name: str) -> None:
        now_s = time.monotonic()
        self.parts_s[name] = self.parts_s.get(name, 0.0) + now_s - self._lap_s
        self._lap_s = now_s
