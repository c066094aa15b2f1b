"""Where a guest writes from end to end, and when it will come to a chunk again.

What is written in the order of addresses is foreseen by that order, not by how often it is written. Right behind
the writer is what will be written again last, if ever, be it a file that is copied once or a journal that goes
round; before it is what will be written next:

    ──── behind: latest first ◀────┤ head ├────▶ ahead: farthest first ────

A run of chunks that one sample finds touched and the sample before did not is a *stretch* of a stream, from which
follow the stream's speed and, if it covers an older stretch, its period. Chunks that are hot are touched by every
sample and are none. A way ahead that the stream never takes costs nothing: it is sent a little later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from bitarray import bitarray
from bitarray.util import zeros

Span = tuple[int, int]
"""Chunks [first, stop)."""

MIN_STRETCH: Final = 8
MAX_STRETCHES: Final = 1024
"""Remembered. A stream has about one a sample; older ones are in no order."""
MAX_NEW_STRETCHES: Final = 128
"""Of one sample; what writes in more places at once is no stream."""
MAX_HEADS: Final = 32
HEAD_S: Final = 2.0
"""A stream that has not gone on for so long has ended."""
MAX_GAP: Final = 8
"""Chunks between two stretches of one stream."""
PIECES: Final = 32
"""Into which a way ahead is cut."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    first: int
    stop: int
    seen_s: float
    period_s: float

    def wait_s(self, now_s: float) -> float:
        return max(self.seen_s + self.period_s - now_s, 0.0)


@dataclass(frozen=True, slots=True)
class _Head:
    """A stream has got to chunk `at`, by `speed` chunks a second."""

    at: int
    speed: float
    seen_s: float


@dataclass(frozen=True, slots=True)
class Foreseen:
    """`span` will be written to after `wait_s`; infinite if not before all is sent, or nobody knows."""

    wait_s: float
    span: Span
    is_ahead: bool


class Streams:
    """On a disk of `chunks` chunks."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.behind = zeros(chunks, "little")
        """Whose last touch was a stream's."""
        self._before = zeros(chunks, "little")
        self._stretches: list[_Stretch] = []
        """The latest first, disjoint; they cover all that is `behind`."""
        self._heads: list[_Head] = []

    def feed(self, now_s: float, interval_s: float, touched: bitarray) -> None:
        """Add the chunks that were written to since the last call, `interval_s` ago."""
        found = runs_of(long_runs(touched & ~self._before))[:MAX_NEW_STRETCHES]
        self._before = touched.copy()
        self.behind &= ~touched
        new = [_Stretch(first, stop, now_s, self._replaced(now_s, first, stop)) for first, stop in found]
        for first, stop in found:
            self.behind[first:stop] = 1
        heads = [head for head in self._heads if now_s - head.seen_s < HEAD_S
                 and not any(-1 <= first - head.at <= MAX_GAP for first, _ in found)]
        heads += [_Head(stop, (stop - first) / interval_s, now_s) for first, stop in found]
        self._heads = heads[-MAX_HEADS:]
        known = new + [stretch for stretch in self._stretches
                       if self.behind.find(1, stretch.first, stretch.stop) >= 0]
        for forgotten in known[MAX_STRETCHES:]:
            self.behind[forgotten.first : forgotten.stop] = 0
        self._stretches = known[:MAX_STRETCHES]

    def _replaced(self, now_s: float, first: int, stop: int) -> float:
        """Cut a new stretch out of the older ones; returns how long ago the latest of them was."""
        kept = []
        period_s = math.inf
        for older in self._stretches:
            if older.stop <= first or stop <= older.first:
                kept.append(older)
                continue
            period_s = min(period_s, now_s - older.seen_s)
            if older.first < first:
                kept.append(replace(older, stop=first))
            if stop < older.stop:
                kept.append(replace(older, first=stop))
        self._stretches = kept
        return period_s

    def foreseen(self, now_s: float, within_s: float) -> list[Foreseen]:
        """In the order in which to send it, if all is sent `within_s`: what is written last comes first."""
        out = []
        for stretch in self._stretches:
            wait_s = stretch.wait_s(now_s)
            out.append(Foreseen(wait_s if wait_s < within_s else math.inf, (stretch.first, stretch.stop), False))
        for head in self._heads:
            stop = int(min(head.at + head.speed * within_s, self.chunks))
            piece = max((stop - head.at) // PIECES, 1)
            for first in range(head.at, stop, piece):
                wait_s = (first - head.at) / head.speed
                out.append(Foreseen(wait_s, (first, min(first + piece, stop)), True))
        out.sort(key=lambda item: -item.wait_s)
        return out


def long_runs(bits: bitarray) -> bitarray:
    """The bits that stand in a run of MIN_STRETCH or more."""
    runs = bits.copy()
    for step in (1, 2, 4):
        runs &= runs >> step
    for step in (4, 2, 1):
        runs |= runs << step
    return runs


def runs_of(bits: bitarray) -> list[Span]:
    """The runs of ones, ascending and apart."""
    runs: list[Span] = []
    stop = 0
    while (first := bits.find(1, stop)) >= 0:
        stop = bits.find(0, first)
        if stop < 0:
            stop = len(bits)
        runs.append((first, stop))
    return runs
