"""What is left to send, and in which order: coldest chunks first, by address within a class.

A chunk is *pending* if it may have dirty blocks: it had some at first, or was written to since it was taken. It is
*out* while a portion that holds blocks of it is on its way. Such a chunk is not asked for again: the log would not
give out its leased blocks, and a hot one is written again anyway before the replica has it. Of pending chunks some
may have no dirty block (the write came before the taking, and the news of it later); asking for them costs little.

    the log's touched chunks ──touch()──▶ pending ──next()──▶ took() ──▶ out ──confirmed()──▶
                                             ▲                            └──── give_back() ──┐
                                             └────────────────────────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bitarray import bitarray
from bitarray.util import zeros

from writelog.dirtymap import CHUNK_BYTES
from writelog.heat import SAMPLE_S, Heat, Spread

MORE: Final = bytes(min(count + 1, 255) for count in range(256))
LESS: Final = bytes(max(count - 1, 0) for count in range(256))

Runs = list[tuple[int, int]]
"""Chunks [first, stop), ascending and apart."""


class Backlog:
    """Of a disk of `size_bytes`. `is_by_heat` False ignores the heat: plain address order, for comparison."""

    def __init__(self, size_bytes: int, is_by_heat: bool = True) -> None:
        self.size_bytes = size_bytes
        self.chunks = -(-size_bytes // CHUNK_BYTES)
        self.heat = Heat(self.chunks)
        self._is_by_heat = is_by_heat
        self._pending = zeros(self.chunks, "little")
        self._unsent = zeros(self.chunks, "little")
        """Pending since the beginning."""
        self._out = zeros(self.chunks, "little")
        self._portions = bytearray(self.chunks)
        """How many portions hold blocks of each chunk."""
        self._queues: list[bitarray] = []
        """Of each class, coldest first, what `next` may give out."""
        self._cursors: list[int] = []
        self._fresh = zeros(self.chunks, "little")
        """Touched since the heat was fed last."""
        self._fed_s: float | None = None
        self.spread = Spread([])

    # What changes it

    def add_all(self) -> None:
        self._pending.setall(1)
        self._unsent.setall(1)

    def add(self, extents: Iterable[tuple[int, int]]) -> None:
        """Dirty extents (offset, length) that are known from elsewhere."""
        for first, stop in chunk_runs(extents):
            self._pending[first:stop] = 1
            self._unsent[first:stop] = 1

    def touch(self, now_s: float, touched: bitarray) -> None:
        """The log's news, a bit a chunk. It also sorts."""
        self._pending |= touched
        self._fresh |= touched
        if self._fed_s is None or now_s - self._fed_s >= SAMPLE_S:
            self.heat.feed(now_s, self._fresh)
            self._fed_s = now_s
            self._fresh.setall(0)
            self.spread = self.heat.spread()
        self.sort()

    def sort(self) -> None:
        """Line up what is pending and not out."""
        ready = self._pending & ~self._out
        if self._is_by_heat:
            classes = self.heat.order()
            first, again = ready & self._unsent, ready & ~self._unsent
            self._queues = [mask & first for mask in classes] + [mask & again for mask in classes]
        else:
            self._queues = [ready]
        self._cursors += [0] * (len(self._queues) - len(self._cursors))

    # What it gives out

    @property
    def is_lined_up(self) -> bool:
        """Whether `next` has something."""
        return any(queue.any() for queue in self._queues)

    @property
    def pending_bytes(self) -> int:
        """At most so much is dirty, as far as is known."""
        return self._pending.count() * CHUNK_BYTES

    def next(self, limit_bytes: int) -> list[tuple[int, int]]:
        """The next ranges (offset, length) to take, in address order, of about `limit_bytes`; none if nothing is
        lined up. They are pending no more."""
        chosen = zeros(self.chunks, "little")
        left = -(-limit_bytes // CHUNK_BYTES)
        for number, queue in enumerate(self._queues):
            left -= self._choose(number, queue, left, chosen)
            if left <= 0:
                break
        ranges = []
        for first, stop in _runs_of(chosen):
            self._pending[first:stop] = 0
            self._unsent[first:stop] = 0
            offset = first * CHUNK_BYTES
            ranges.append((offset, min(stop * CHUNK_BYTES, self.size_bytes) - offset))
        return ranges

    def _choose(self, number: int, queue: bitarray, left: int, chosen: bitarray) -> int:
        """Move up to `left` chunks from a queue to `chosen`, going on after the last ones; their number."""
        count = 0
        start = self._cursors[number]
        wrapped = False
        while count < left:
            first = queue.find(1, start)
            if first < 0:
                if wrapped or not start:
                    break
                start, wrapped = 0, True
                continue
            stop = queue.find(0, first, min(first + left - count, self.chunks))
            if stop < 0:
                stop = min(first + left - count, self.chunks)
            queue[first:stop] = 0
            chosen[first:stop] = 1
            count += stop - first
            start = stop
        self._cursors[number] = start
        return count

    def took(self, runs: Runs) -> None:
        """A portion holds blocks of these chunks now."""
        for first, stop in runs:
            self._portions[first:stop] = self._portions[first:stop].translate(MORE)
            self._out[first:stop] = 1

    def confirmed(self, runs: Runs) -> None:
        """A portion with these chunks is at the replica."""
        for first, stop in runs:
            counts = self._portions[first:stop] = self._portions[first:stop].translate(LESS)
            still_out = bitarray(endian="little")
            still_out.pack(bytes(counts))
            self._out[first:stop] = still_out

    def give_back(self) -> None:
        """Every portion was reclaimed: what was out is pending again."""
        self._pending |= self._out
        self._out.setall(0)
        self._portions[:] = bytes(self.chunks)
        self.sort()


def chunk_runs(extents: Iterable[tuple[int, int]]) -> Runs:
    """The chunks that ascending extents (offset, length) touch."""
    runs: Runs = []
    for offset, length in extents:
        first, stop = offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES)
        if runs and first <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(runs[-1][1], stop)
        else:
            runs.append((first, stop))
    return runs


def _runs_of(bits: bitarray) -> Runs:
    runs: Runs = []
    stop = 0
    while (first := bits.find(1, stop)) >= 0:
        stop = bits.find(0, first)
        if stop < 0:
            stop = len(bits)
        runs.append((first, stop))
    return runs
