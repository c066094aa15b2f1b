"""A token bucket: lets bytes through at a rate that holds on average. No clock of its own."""

from __future__ import annotations

from typing import Final

BURST_S: Final = 0.05
"""What was not used is kept for so long."""


class Bucket:
    """Lets `rate` bytes a second through. Who finds it open takes what it needs, however much, and the bucket
    stays shut until that is made up for."""

    def __init__(self, rate: float, now_s: float) -> None:
        self._rate = rate
        self._level = rate * BURST_S
        self._filled_s = now_s

    @property
    def rate(self) -> float:
        return self._rate

    def set_rate(self, rate: float, now_s: float) -> None:
        self._fill(now_s)
        self._rate = rate

    def wait_s(self, now_s: float) -> float:
        """Until it opens; 0 if it is open."""
        self._fill(now_s)
        return -self._level / self._rate if self._level <= -1 else 0.0

    def take(self, amount: int) -> None:
        self._level -= amount

    def _fill(self, now_s: float) -> None:
        self._level = min(self._level + (now_s - self._filled_s) * self._rate, self._rate * BURST_S)
        self._filled_s = now_s
