"""How often the chunks of a disk are written, as bitmaps: a sample costs the same however many are hot.

Every chunk has a small counter. Bit k of all the counters together is one bitmap, a *plane*, so that a sample
(what was touched since the last one) is added to all counters by a few bitwise operations, carry by carry, and
all are halved, once in HALF_LIFE_S, by moving the planes down. The position of the highest bit that is set is the
chunk's *class*: 0 is not written lately, each further one twice as often as the one before. 1 TiB has planes of
2 MiB.

Class 0 has nothing but its neighbours to go by: the more chunks of a region were written lately, the sooner the
others will be.

What share of a class every sample finds touched is measured, and from that follows, as writes are independent, how
many of its chunks will be written in the next seconds.
"""

from __future__ import annotations

import math
from typing import Final

from bitarray import bitarray
from bitarray.util import count_and, ones, zeros

from writelog.dirtymap import CHUNK_BYTES

HALF_LIFE_S: Final = 8.0
MIN_SAMPLE_S, MAX_SAMPLE_S = 0.1, 0.5
SAMPLE_PART: Final = 0.01
"""Of the time that a sync takes."""
SAMPLE_S_A_CHUNK: Final = 3e-8
"""So that samples cost a tenth of a processor at most: one of 1 TiB takes 50 ms."""
PLANES: Final = 9
WEIGHT_SHIFT: Final = 3
"""A touch adds 8: it is forgotten after four half-lives. A chunk that every sample finds touched gets to 256."""
REGION_LEVELS: Final = [bytes(255 if warm.bit_count() >= least else 0 for warm in range(256))
                        for least in (1, 2, 4)]
"""A region is 8 chunks, the bits of a byte. For each level: that byte to all ones if so many of them are warm."""
MAX_COUNT: Final = (1 << PLANES) - 1
MAX_SHARE: Final = 0.98
"""What is found touched always is written at least so often."""
FADING_S: Final = 5.0
"""For so long, about, a share is measured."""


def sample_s(chunks: int, run_s: float = 0.0) -> float:
    """Between two samples of a sync that takes `run_s`, about."""
    return min(max(SAMPLE_PART * run_s, SAMPLE_S_A_CHUNK * chunks, MIN_SAMPLE_S), MAX_SAMPLE_S)


class Heat:
    """The counters of `chunks` chunks. `feed` it about every `sample_s`."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self._planes = [zeros(chunks, "little") for _ in range(PLANES)]
        self._classes = self._sorted()
        self._cold = self._cold_parts()
        self._seen = [0.0] * (PLANES + 1)
        self._found = [0.0] * (PLANES + 1)
        """Of each class: chunks that samples saw, and found touched; older ones count less."""
        self._fed_s: float | None = None
        self._halved_s = 0.0
        self._interval_s = sample_s(chunks)

    def feed(self, now_s: float, touched: bitarray) -> None:
        """Add the chunks written to since the last call."""
        if self._fed_s is None:
            self._halved_s = now_s
        else:
            self._interval_s += 0.2 * (now_s - self._fed_s - self._interval_s)
        self._fed_s = now_s
        while now_s - self._halved_s >= HALF_LIFE_S:
            self._halved_s += HALF_LIFE_S
            self._halve()
        self._measure(touched)
        self._add(touched)
        self._classes = self._sorted()
        self._cold = self._cold_parts()

    def _measure(self, touched: bitarray) -> None:
        kept = math.exp(-self._interval_s / FADING_S)
        for number, mask in enumerate(self._classes):
            self._seen[number] = kept * self._seen[number] + mask.count()
            self._found[number] = kept * self._found[number] + count_and(mask, touched)

    def _add(self, touched: bitarray) -> None:
        carry = touched.copy()
        for plane in self._planes[WEIGHT_SHIFT:]:
            overflow = plane & carry
            plane ^= carry
            carry = overflow
            if not carry.any():
                return
        for plane in self._planes:
            plane |= carry

    def _halve(self) -> None:
        lowest = self._planes.pop(0)
        lowest.setall(0)
        self._planes.append(lowest)

    def classes(self) -> list[bitarray]:
        """The chunks of each class, coldest first; not to be changed."""
        return self._classes

    def _sorted(self) -> list[bitarray]:
        rest = ones(self.chunks, "little")
        hottest_first = []
        for plane in reversed(self._planes):
            hottest_first.append(plane & rest)
            rest &= ~plane
        return [rest, *reversed(hottest_first)]

    def cold(self) -> list[bitarray]:
        """Class 0 in parts, those with the coldest neighbours first; not to be changed."""
        return self._cold

    def _cold_parts(self) -> list[bitarray]:
        cold = self._classes[0]
        warm = (~cold).tobytes()
        parts = []
        for level in REGION_LEVELS:
            above = bitarray(endian="little")
            above.frombytes(warm.translate(level))
            above = above[: self.chunks] & cold
            parts.append(cold & ~above)
            cold = above
        return [*parts, cold]

    def rate(self, number: int) -> float:
        """Touches a second of a chunk of a class; more than one between two samples are not seen."""
        if not self._seen[number]:
            return 0.0
        share = self._found[number] / self._seen[number]
        return -math.log1p(-min(share, MAX_SHARE)) / self._interval_s

    def wait_s(self, number: int) -> float:
        """Until a chunk of a class is touched, on average."""
        rate = self.rate(number)
        return 1 / rate if rate else math.inf

    def spread(self) -> Spread:
        """How many chunks there are at each rate."""
        return Spread([(mask.count(), self.rate(number)) for number, mask in enumerate(self._classes)])


class Spread:
    """(chunks, touches a second of each): what the near future looks like if it is like the past."""

    def __init__(self, groups: list[tuple[int, float]]) -> None:
        self.groups = [(chunks, rate) for chunks, rate in groups if chunks and rate]
        """Those that are written to."""
        self.chunks = sum(chunks for chunks, _ in self.groups)

    @property
    def touch_rate(self) -> float:
        """Touches a second, of all chunks."""
        return sum(chunks * rate for chunks, rate in self.groups)

    def bytes_after(self, elapsed_s: float, touch_bytes: float) -> float:
        """How much will have been written to, if each touch writes `touch_bytes` somewhere in its chunk."""
        part = touch_bytes / CHUNK_BYTES
        return sum(chunks * CHUNK_BYTES * -math.expm1(-rate * elapsed_s * part) for chunks, rate in self.groups)
