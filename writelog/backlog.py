"""What is left to send, and in which order: what the guest will write to last comes first.

Chunks that are not written to come first, by address; then those of streams (`writelog.streams`) and the classes
of heat (`writelog.heat`), by the time in which each is expected to be written to again. What was never sent comes
before what was, in the same order.

A chunk is *pending* if it may have dirty blocks: it had some at first, or was written to since it was taken. It is
*out* while a portion that holds blocks of it is on its way. Such a chunk is not asked for again: the log would not
give out its leased blocks, and a hot one is written again anyway before the replica has it. Of pending chunks some
may have no dirty block (the write came before the taking, and the news of it later); asking for them costs little.

    the log's touched chunks ──touch()──▶ pending ──next()──▶ took() ──▶ out ──confirmed()──▶
                                             ▲                            └──── give_back() ──┐
                                             └────────────────────────────────────────────────┘
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from bitarray import bitarray
from bitarray.util import zeros

from writelog.dirtymap import CHUNK_BYTES
from writelog.heat import PLANES, Heat, Spread, sample_s
from writelog.streams import Foreseen, Span, Streams, runs_of

MORE: Final = bytes(min(count + 1, 255) for count in range(256))
LESS: Final = bytes(max(count - 1, 0) for count in range(256))

MAX_KEYS: Final = 32
"""Of the queues of one line."""

Runs = list[tuple[int, int]]
"""Chunks [first, stop), ascending and apart."""


@dataclass(slots=True)
class _Queue:
    """Chunks that may be given out. With `spans`, those in them and in their order; else by address, from where
    the queue with the same `key` stopped."""

    bits: bitarray
    key: int
    spans: list[Span] | None = None


class Backlog:
    """Of a disk of `size_bytes`. `is_by_heat` False ignores the heat: plain address order, for comparison."""

    def __init__(self, size_bytes: int, is_by_heat: bool = True) -> None:
        self.size_bytes = size_bytes
        self.chunks = -(-size_bytes // CHUNK_BYTES)
        self.heat = Heat(self.chunks)
        self.sample_s = sample_s(self.chunks)
        """How often to `touch` it, about."""
        self._is_by_heat = is_by_heat
        self._pending = zeros(self.chunks, "little")
        self._unsent = zeros(self.chunks, "little")
        """Pending since the beginning."""
        self._out = zeros(self.chunks, "little")
        self._portions = bytearray(self.chunks)
        """How many portions hold blocks of each chunk."""
        self.streams = Streams(self.chunks)
        self._foreseen: list[Foreseen] = []
        self._behind, self._ahead = zeros(self.chunks, "little"), zeros(self.chunks, "little")
        """Of `_foreseen`; what they both leave goes by heat."""
        self._queues: list[_Queue] = []
        """What `next` may give out, in this order."""
        self._cursors: dict[int, int] = {}
        self._fresh = zeros(self.chunks, "little")
        """Touched since the heat was fed last."""
        self._began_s = 0.0
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

    def touch(self, now_s: float, touched: bitarray, send_rate: float | None = None) -> None:
        """The log's news, a bit a chunk. It also sorts."""
        self._pending |= touched
        self._fresh |= touched
        if self._fed_s is None or now_s - self._fed_s >= self.sample_s:
            self._feed(now_s, send_rate)
        self.sort()

    def _feed(self, now_s: float, send_rate: float | None) -> None:
        if self._fed_s is None:
            self._began_s, interval_s = now_s, self.sample_s
        else:
            interval_s = now_s - self._fed_s
        rest_s = self.pending_bytes / send_rate if send_rate else math.inf
        if send_rate:
            self.sample_s = sample_s(self.chunks, now_s - self._began_s + rest_s)
        self._fed_s = now_s
        self.heat.feed(now_s, self._fresh)
        self.spread = self.heat.spread()
        self.streams.feed(now_s, interval_s, self._fresh)
        self._fresh.setall(0)
        self._foreseen = self.streams.foreseen(now_s, rest_s)
        self._ahead.setall(0)
        for item in self._foreseen:
            if item.is_ahead:
                self._ahead[item.span[0] : item.span[1]] = 1
        self._ahead &= self.heat.classes()[0] | self.streams.behind
        self._behind = self.streams.behind & ~self._ahead

    def sort(self) -> None:
        """Line up what is pending and not out."""
        ready = self._pending & ~self._out
        if self._is_by_heat:
            queues = self._lined_up(ready & self._unsent, 0) + self._lined_up(ready & ~self._unsent, MAX_KEYS)
            self._queues = [queue for queue in queues if queue.bits.any()]
        else:
            self._queues = [_Queue(ready, 0)]

    def _lined_up(self, ready: bitarray, first_key: int) -> list[_Queue]:
        behind, ahead = ready & self._behind, ready & self._ahead
        by_heat = ready & ~(behind | ahead)
        queues = [_Queue(by_heat & mask, first_key + number)
                  for number, mask in enumerate(self.heat.cold(), PLANES + 1)]
        wait_s = math.inf
        done = 0
        for number, mask in islice(enumerate(self.heat.classes()), 1, None):
            wait_s = min(wait_s, self.heat.wait_s(number))
            while done < len(self._foreseen) and self._foreseen[done].wait_s >= wait_s:
                self._append(queues, self._foreseen[done], behind, ahead)
                done += 1
            queues.append(_Queue(by_heat & mask, first_key + number))
        for item in self._foreseen[done:]:
            self._append(queues, item, behind, ahead)
        return queues

    @staticmethod
    def _append(queues: list[_Queue], item: Foreseen, behind: bitarray, ahead: bitarray) -> None:
        bits = ahead if item.is_ahead else behind
        if queues[-1].spans is None or queues[-1].bits is not bits:
            queues.append(_Queue(bits, 0, []))
        spans = queues[-1].spans
        assert spans is not None
        spans.append(item.span)

    # What it gives out

    @property
    def is_lined_up(self) -> bool:
        """Whether `next` has something."""
        return any(queue.bits.any() for queue in self._queues)

    @property
    def pending_bytes(self) -> int:
        """At most so much is dirty, as far as is known."""
        return self._pending.count() * CHUNK_BYTES

    def next(self, limit_bytes: int) -> list[tuple[int, int]]:
        """The next ranges (offset, length) to take, in address order, of about `limit_bytes`; none if nothing is
        lined up. They are pending no more."""
        chosen = zeros(self.chunks, "little")
        left = -(-limit_bytes // CHUNK_BYTES)
        for queue in self._queues:
            left -= self._choose(queue, left, chosen)
            if left <= 0:
                break
        ranges = []
        for first, stop in runs_of(chosen):
            self._pending[first:stop] = 0
            self._unsent[first:stop] = 0
            offset = first * CHUNK_BYTES
            ranges.append((offset, min(stop * CHUNK_BYTES, self.size_bytes) - offset))
        return ranges

    def _choose(self, queue: _Queue, left: int, chosen: bitarray) -> int:
        """Move up to `left` chunks from a queue to `chosen`; their number."""
        if queue.spans is None:
            start = self._cursors.get(queue.key, 0)
            spans = [(start, self.chunks), (0, start)]
        else:
            spans = queue.spans
        count = 0
        for first, stop in spans:
            while count < left and (first := queue.bits.find(1, first, stop)) >= 0:
                limit = min(first + left - count, stop)
                end = queue.bits.find(0, first, limit)
                end = limit if end < 0 else end
                queue.bits[first:end] = 0
                chosen[first:end] = 1
                count += end - first
                first = end
                if queue.spans is None:
                    self._cursors[queue.key] = end
            if count >= left:
                break
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
