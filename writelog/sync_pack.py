"""Compression of what a sync sends, where it pays: tried extent by extent, and left alone on a link that is faster
than the processor.

What zstd makes no smaller goes as it is, and after each such miss more extents pass untried. How fast the link is
shows while nothing is compressed; the estimate fades meanwhile, so that a link that became slower is noticed. That
little is sent because the replica has most of it already does not make a link slow.
"""

from __future__ import annotations

import math
import time
from typing import Final

import zstandard

from writelog.plan import Meter

LEVEL: Final = 1
GAIN: Final = 0.9
"""What is sent compressed has at most this part of its size."""
MAX_MISSES: Final = 5
"""After so many in a row, 2^5 - 1 extents pass untried."""
RATE_WINDOW_S: Final = 1.0
SETTLED_S: Final = 0.5
"""How long to measure the link first."""
FADING: Final = 0.995
"""Of the link's estimated rate, from one look to the next."""
EQUAL_WEIGHT: Final = 4
"""What is equal counts as if so many times of it had been sent: a link is faster than a comparison."""

AUTO, ON, OFF = "auto", "on", "off"


class Packer:
    """`mode` is AUTO, ON (also on a fast link) or OFF."""

    def __init__(self, mode: str = AUTO) -> None:
        self._mode = mode
        self._compressor = zstandard.ZstdCompressor(level=LEVEL)
        self._misses = 0
        self._skip = 0
        self._speed: float | None = None
        """Of the compressor, in bytes a second."""
        self._wire = Meter(RATE_WINDOW_S)
        self._link_rate = 0.0
        self._began_s: float | None = None
        self._looked_s = 0.0

    def look(self, now_s: float, wire_bytes: int, equal_bytes: int) -> None:
        """How much has gone over the link so far, and how much did not have to."""
        passed_bytes = wire_bytes + EQUAL_WEIGHT * equal_bytes
        if self._began_s is None:
            if not passed_bytes:
                return
            self._began_s = now_s
        self._looked_s = now_s
        self._wire.feed(now_s, passed_bytes)
        self._link_rate = max(self._link_rate * FADING, self._wire.rate or 0.0)

    def pack(self, data: memoryview) -> bytes | None:
        """`data` compressed, or None if it is to go as it is."""
        if self._mode == OFF or not (self._mode == ON or self._pays):
            return None
        if self._skip:
            self._skip -= 1
            return None
        start_s = time.perf_counter()
        packed = self._compressor.compress(data)
        speed = len(data) / max(time.perf_counter() - start_s, 1e-9)
        self._speed = speed if self._speed is None else 0.8 * self._speed + 0.2 * speed
        if len(packed) > GAIN * len(data):
            self._misses = min(self._misses + 1, MAX_MISSES)
            self._skip = (1 << self._misses) - 1
            return None
        self._misses = 0
        return packed

    @property
    def _pays(self) -> bool:
        """Whether the compressor keeps up with the link, as far as is known."""
        if self._began_s is None or self._looked_s - self._began_s < SETTLED_S:
            return False
        return self._link_rate < (math.inf if self._speed is None else self._speed)
