"""Verifies a copy while the guest writes and, maybe, a sync goes on: names what differs at the two ends.

    sweep         each 512 KiB by one digest         equal: done
    closer look   4 KiB by 4 KiB, where one is not   dirty, or written to meanwhile: once more, later
                                                     the others: these differ

A block that is neither dirty nor leased, the replica has; so if it differs something else than the guest has
written to one of the images, or one of the disks has lost it. The two ends read it at different times. So a closer
look asks the log first what is dirty or leased, then both ends read, the replica when it has applied all that was
sent before, then the log is asked what was written to since: what is in neither answer stood still at both ends.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from bitarray import bitarray
from bitarray.util import zeros

from tapcore.bucket import Bucket
from tapcore.text import size_text
from writelog.backlog import chunk_runs
from writelog.dirtymap import CHUNK_BYTES
from writelog.hashtree import LEAF_BYTES, Extents
from writelog.sync_copy import MAX_OPEN_PORTIONS, Copier
from writelog.sync_pipeline import PIECE_BYTES, Piece, Portion

MAX_OPEN, MAX_OPEN_COPYING = 64, 16
"""Ranges that both ends read at once; in a sync that copies, too, others wait for them."""
MAX_CLOSE: Final = 32
"""Ranges that are looked at closer at once."""
MAX_LOOKS: Final = 6
"""At a range that the guest writes to, or that is dirty: then it is left out."""
LOOK_AGAIN_S: Final = 0.5
MAX_NAMED: Final = 10_000


@dataclass
class Findings:
    """Of a verification, so far. `differences` are the first MAX_NAMED."""

    size_bytes: int
    checked_bytes: int = 0
    """Of the disk, equal or not."""
    left_out_bytes: int = 0
    """Because they were dirty, or written to, whenever they were looked at: the replica lacks them, or may."""
    differing_bytes: int = 0
    repaired_bytes: int = 0
    differences: Extents = field(default_factory=list)
    rate: float = 0.0
    """In bytes a second."""

    @property
    def is_equal(self) -> bool:
        return self.differing_bytes == self.repaired_bytes

    @property
    def eta_s(self) -> float:
        return (self.size_bytes - self.checked_bytes) / self.rate if self.rate else math.inf

    def __str__(self) -> str:
        text = f"{100 * self.checked_bytes / self.size_bytes:.0f} % of {size_text(self.size_bytes)}"
        if self.rate:
            text += f" at {size_text(self.rate)}/s, {self.eta_s:.0f} s left"
        if self.differing_bytes:
            text += f", {size_text(self.differing_bytes)} differ"
        return text


@dataclass(slots=True)
class Range:
    """To be looked at closer."""

    offset: int
    length: int
    looks: int = 0
    is_repaired: bool = False
    differing: Extents | None = None
    """By the look under way."""


class Verifier:
    """Of one disk, through the pipeline of its sync; wants a `turn` often, and all of the log's `news`.
    `is_copying`: what is dirty now will be sent, and can be looked at then. `repair`: what differs is sent."""

    def __init__(self, copier: Copier, *, is_copying: bool, repair: bool = False,
                 rate: float | None = None) -> None:
        self.found = Findings(copier.source.size_bytes)
        self.is_done = False
        self._copier = copier
        self._is_copying = is_copying
        self._max_open = MAX_OPEN_COPYING if is_copying else MAX_OPEN
        self._repair = repair
        now_s = time.monotonic()
        self._bucket = Bucket(rate, now_s) if rate else None
        self._start_s = self._moved_s = now_s
        self._next = 0
        """Where the sweep is."""
        self._missed: deque[tuple[int, int]] = deque()
        """To be swept again: the connection was lost."""
        self._open: dict[int, int] = {}
        """Ranges of the sweep of which the answer is to come, by offset."""
        self._close: deque[Range] = deque()
        self._looking: list[Range] = []
        self._later: list[Range] = []
        self._look_again_s = 0.0
        self._dirty: set[int] = set()
        """The leaves of the ranges that are looked at that were dirty before."""
        self._touched = zeros(-(-copier.source.size_bytes // CHUNK_BYTES), "little")
        self._to_repair: list[Portion] = []
        self._repairs: list[Portion] = []
        """Sent."""
        copier.on_news = self.news

    def news(self, touched: bitarray) -> None:
        """The chunks that were written to since the last news."""
        self._touched |= touched

    @property
    def stalled_s(self) -> float:
        """How long no answer has come."""
        return time.monotonic() - self._moved_s if self._open or self._looking or self._repairs else 0.0

    def turn(self) -> None:
        """Go on with what can be gone on with."""
        self.found.rate = self.found.checked_bytes / max(time.monotonic() - self._start_s, 1e-3)
        self._go_on_repairing()
        if self._looking:
            if all(one.differing is not None for one in self._looking):
                self._judge()
        elif len(self._close) >= MAX_CLOSE or not self._sweep():
            self._look_closer()

    def lost(self) -> None:
        """The connection is gone, with all questions and repairs under way."""
        self._missed.extend(self._open.items())
        self._open.clear()
        self._to_repair.extend(Portion(0, portion.items, portion.chunks) for portion in self._repairs)
        self._repairs.clear()
        for one in self._looking:
            one.differing = None
        self._close.extend(self._looking)
        self._looking = []

    # The sweep

    def _sweep(self) -> bool:
        """Ask for more; False if the sweep is over."""
        size_bytes = self.found.size_bytes
        while len(self._open) < self._max_open:
            if self._bucket is not None and self._bucket.wait_s(time.monotonic()):
                return True
            if self._missed:
                offset, length = self._missed.popleft()
            elif self._next < size_bytes:
                offset, length = self._next, min(PIECE_BYTES, size_bytes - self._next)
                self._next += length
            else:
                return bool(self._open)
            if self._bucket is not None:
                self._bucket.take(length)
            self._open[offset] = length
            self._copier.pipeline.ask(offset, length, PIECE_BYTES, self._swept)
        return True

    def _swept(self, piece: Piece, differing: Extents) -> None:
        self._moved_s = time.monotonic()
        del self._open[piece.offset]
        if differing:
            self._close.append(Range(piece.offset, piece.length))
        else:
            self.found.checked_bytes += piece.length

    # The closer look

    def _look_closer(self) -> None:
        """Once nothing is under way: then all that is touched is touched after the log was asked."""
        if self._open:
            return
        if not self._close and self._later and time.monotonic() >= self._look_again_s:
            self._close.extend(self._later)
            self._later = []
        if not self._close:
            self.is_done = not (self._later or self._to_repair or self._repairs)
            return
        copier = self._copier
        self._looking = [self._close.popleft() for _ in range(min(MAX_CLOSE, len(self._close)))]
        copier.ask()
        self._touched.setall(0)
        self._moved_s = time.monotonic()
        self._dirty.clear()
        for one in self._looking:
            for offset, length in copier.source.log.peek(one.offset, one.length):
                self._dirty.update(range(offset // LEAF_BYTES, -(-(offset + length) // LEAF_BYTES)))
        for one in self._looking:
            def looked(piece: Piece, differing: Extents, one: Range = one) -> None:
                self._moved_s = time.monotonic()
                one.differing = differing

            copier.pipeline.ask(one.offset, one.length, LEAF_BYTES, looked)

    def _judge(self) -> None:
        """All answers are there."""
        self._copier.ask()
        moved = bitarray(self._touched)
        looked, self._looking = self._looking, []
        for one in looked:
            assert one.differing is not None
            unsettled, differing = self._apart(one.differing, moved)
            unsettled_bytes = sum(length for _, length in unsettled)
            self.found.checked_bytes += 0 if one.is_repaired else one.length - unsettled_bytes
            if one.is_repaired:
                self.found.repaired_bytes += one.length - sum(length for _, length in differing)
            else:
                self._again(one, unsettled)
                self._differ(differing)

    def _apart(self, extents: Extents, moved: bitarray) -> tuple[Extents, Extents]:
        """What differs, leaf by leaf: (what may be on its way, what is not)."""
        unsettled: Extents = []
        differing: Extents = []
        for offset, length in extents:
            for start in range(offset, offset + length, LEAF_BYTES):
                size = min(LEAF_BYTES, offset + length - start)
                is_moving = moved[start // CHUNK_BYTES] or start // LEAF_BYTES in self._dirty
                append(unsettled if is_moving else differing, start, size)
        return unsettled, differing

    def _again(self, one: Range, unsettled: Extents) -> None:
        looks = one.looks + 1
        if unsettled and self._is_copying and looks < MAX_LOOKS:
            self._later.extend(Range(offset, length, looks) for offset, length in unsettled)
            self._look_again_s = time.monotonic() + LOOK_AGAIN_S
            return
        left_out_bytes = sum(length for _, length in unsettled)
        self.found.left_out_bytes += left_out_bytes
        self.found.checked_bytes += left_out_bytes

    def _differ(self, differing: Extents) -> None:
        if not differing:
            return
        found = self.found
        found.differing_bytes += sum(length for _, length in differing)
        for offset, length in differing:
            if len(found.differences) < MAX_NAMED:
                append(found.differences, offset, length)
        if self._repair:
            items = [(False, offset, length) for offset, length in differing]
            self._to_repair.append(Portion(0, items, chunk_runs(differing)))

    # Repairs

    def _go_on_repairing(self) -> None:
        """What was sent and is durable is looked at again."""
        pipeline = self._copier.pipeline
        while self._to_repair and pipeline.open_portions < MAX_OPEN_PORTIONS:
            self._repairs.append(self._to_repair.pop(0))
            self._copier.add(self._repairs[-1])
        for portion in [one for one in self._repairs if pipeline.is_durable(one)]:
            self._moved_s = time.monotonic()
            self._repairs.remove(portion)
            self._close.extend(Range(offset, length, is_repaired=True) for _, offset, length in portion.items)


def append(extents: Extents, offset: int, length: int) -> None:
    """To the last one of `extents` if it goes on there."""
    if extents and sum(extents[-1]) == offset:
        extents[-1] = extents[-1][0], extents[-1][1] + length
    else:
        extents.append((offset, length))
