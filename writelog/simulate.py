"""A sync in made-up time: a disk, a clock and a link that are only numbers, and the real log, backlog and planner.

What a real sync decides, this one decides, for it asks the same modules; so algorithms can be compared in seconds.
The disk is a version number for each block. Each read copies versions, each apply sets them at the replica, and a
run that ends with a switch has equal versions at both ends, or the algorithm has lost a write.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from random import Random
from typing import Final, Protocol

from tapcore.bucket import Bucket
from writelog.backlog import Backlog, Runs, chunk_runs
from writelog.bitmap import SECTOR_BYTES, Bitmap, bitmap_bytes
from writelog.dirtymap import DirtyMap, Lease, Wanted
from writelog.plan import Action, Limits
from writelog.planner import ALONE, Planner, Seen
from writelog.planner_group import GroupPlanner

BLOCK_BYTES: Final = 4096
PIECE_BYTES: Final = 512 << 10
TICK_S: Final = 0.005
LOOK_S: Final = 0.1
LONGEST_S: Final = 3600.0
QUEUE_DEPTH: Final = 64
"""Of the guest."""
MAX_RANGES: Final = 1 << 20


class Load(Protocol):
    """What a guest does: `writes(start_s, stop_s)` gives block numbers and counts, in order."""

    def writes(self, start_s: float, stop_s: float) -> Iterator[tuple[int, int]]: ...


class Idle:
    """Nothing is written."""

    def writes(self, start_s: float, stop_s: float) -> Iterator[tuple[int, int]]:
        return iter(())


class Scattered:
    """Single blocks among `blocks`, `rate` bytes a second: uniform, or by Zipf's law with an exponent. `together`
    of them that are about as popular are neighbours; the rest is scattered. With `moving_s` other blocks are the
    popular ones after so long."""

    def __init__(
        self, blocks: int, rate: float, seed: int, exponent: float = 0.0, moving_s: float = math.inf,
        together: int = 1
    ) -> None:
        self._blocks = blocks // together
        self._together = together
        self._rate = rate / BLOCK_BYTES
        self._random = Random(seed)
        self.moving_s = moving_s
        self._weights = list(accumulate(1 / rank**exponent for rank in range(1, blocks + 1))) if exponent else None
        self._ranks = range(blocks)
        self._factor = _coprime(self._blocks, self._random)

    def writes(self, start_s: float, stop_s: float) -> Iterator[tuple[int, int]]:
        count = int(stop_s * self._rate) - int(start_s * self._rate)
        if self._weights is None:
            ranks = self._random.choices(self._ranks, k=count)
        else:
            ranks = self._random.choices(self._ranks, cum_weights=self._weights, k=count)
        shift = self._shift(start_s)
        for rank in ranks:
            yield self._block(rank, shift), 1

    def rates(self, now_s: float) -> Iterator[tuple[int, float]]:
        """Block numbers, and how many writes a second each gets."""
        shift = self._shift(now_s)
        weights = self._weights or [float(rank) for rank in range(1, len(self._ranks) + 1)]
        for rank, (before, weight) in enumerate(pairwise([0.0, *weights])):
            yield self._block(rank, shift), (weight - before) / weights[-1] * self._rate

    def _shift(self, now_s: float) -> int:
        return int(now_s // self.moving_s) * (self._blocks // 3 + 1) if self.moving_s < math.inf else 0

    def _block(self, rank: int, shift: int) -> int:
        group, place = divmod(rank, self._together)
        return (group * self._factor + shift) % self._blocks * self._together + place


class Rewrite:
    """The first `blocks` of the disk from beginning to end, over and over, 64 KiB at a time."""

    def __init__(self, blocks: int, rate: float) -> None:
        self._blocks = blocks
        self._rate = rate / (16 * BLOCK_BYTES)

    def writes(self, start_s: float, stop_s: float) -> Iterator[tuple[int, int]]:
        for number in range(int(start_s * self._rate), int(stop_s * self._rate)):
            block = number * 16 % self._blocks
            yield block, min(16, self._blocks - block)


def _coprime(blocks: int, random: Random) -> int:
    while True:
        factor = random.randrange(blocks // 3, blocks) | 1
        if math.gcd(factor, blocks) == 1:
            return factor


@dataclass(frozen=True)
class Scene:
    """Where it takes place."""

    size_bytes: int
    link_rate: float
    load: Load
    round_trip_s: float = 0.0005
    flush_s: float = 0.02


@dataclass
class Outcome:
    """What came of a run; `reason` says why there was no switch."""

    switched: bool = False
    reason: str = ""
    equal: bool = False
    elapsed_s: float = 0.0
    sent_bytes: int = 0
    extra_bytes: int = 0
    pause_s: float = 0.0
    predicted_pause_s: float = 0.0
    writes: int = 0
    delayed_writes: int = 0
    lost_writes: int = 0
    """For which the guest's queue had no room."""
    steps: list[str] = field(default_factory=list)
    """Of an escalation."""

    @property
    def delayed_percent(self) -> float:
        """Of the guest's writes: those that had to wait, or that it did not get to."""
        return 100 * (self.delayed_writes + self.lost_writes) / max(self.writes + self.lost_writes, 1)

    @property
    def extra_percent(self) -> float:
        """Of what had to be sent."""
        return 100 * self.extra_bytes / max(self.sent_bytes - self.extra_bytes, 1)


@dataclass(slots=True)
class _Portion:
    lease: Lease
    chunks: Runs
    total_bytes: int
    pieces_left: int = 0
    durable_s: float = math.inf


@dataclass(slots=True)
class _Piece:
    portion: _Portion
    first: int
    stop: int
    versions: array[int] | None = None
    sent_s: float = 0.0
    applied_s: float = 0.0

    @property
    def length(self) -> int:
        return (self.stop - self.first) * BLOCK_BYTES


class Wire:
    """What the disks of a guest are sent over: a link, and the cap on it."""

    def __init__(self, rate: float, cap: float | None) -> None:
        self.free_s = 0.0
        """When all that was put on it has gone."""
        self.cap = Bucket(cap, 0.0) if cap else None
        self._rate = rate

    def is_shut(self, now_s: float) -> bool:
        return self.cap is not None and self.cap.wait_s(now_s) > 0

    def send(self, now_s: float, length: int) -> float:
        """When so much has arrived."""
        self.free_s = max(self.free_s, now_s) + length / self._rate
        if self.cap is not None:
            self.cap.take(length)
        return self.free_s


class Simulation:
    """One run. `by_heat` False sends in address order; `backlog` in any other. `wire` and `group` are shared with
    the other disks of a guest, of which this one is called `name`."""

    def __init__(self, scene: Scene, limits: Limits, by_heat: bool = True, backlog: Backlog | None = None,
                 wire: Wire | None = None, group: GroupPlanner | None = None, name: str = ALONE) -> None:
        self.outcome = Outcome()
        self.now_s = 0.0
        self._scene = scene
        self._limits = limits
        blocks = scene.size_bytes // BLOCK_BYTES
        length = bitmap_bytes(scene.size_bytes, BLOCK_BYTES)
        self.map = DirtyMap(Bitmap(bytearray(length), scene.size_bytes, BLOCK_BYTES),
                            Bitmap(bytearray(length), scene.size_bytes, BLOCK_BYTES))
        self._touched = self.map.watch()
        self.map.dirty.fill()
        self._disk = array("I", bytes(4 * blocks))
        self._replica = array("I", b"\xff" * (4 * blocks))
        self.backlog = backlog or Backlog(scene.size_bytes, by_heat)
        self.backlog.add_all()
        self.backlog.sort()
        self.planner = Planner(limits, self.backlog, 0.0, group, name)
        self._wire = wire or Wire(scene.link_rate, limits.rate)
        self.planner.greeted(scene.round_trip_s)
        self._todo: deque[_Piece] = deque()
        self._sent: deque[_Piece] = deque()
        self._portions: deque[_Portion] = deque()
        self._throttle: Bucket | None = None
        self._delayed: deque[tuple[int, int]] = deque()
        self._todo_bytes = self._unacked_bytes = self._applied_bytes = self._committed_bytes = 0
        self._written_bytes = self._applied_seq = 0
        self._unsent = self.map.dirty.bits.copy()
        self._unsent_blocks = blocks
        self._asked_s = self._looked_s = 0.0
        self.is_ready = False
        """To switch, as the last look had it."""

    def run(self) -> Outcome:
        """To its end."""
        return run_together([self])[0]

    def tick(self) -> None:
        """A moment of a guest that runs. It may end with a reason, or ready to switch."""
        self.now_s += TICK_S
        self._guest()
        self._hear()
        self._take_more()
        self._feed()
        if self.now_s - self._looked_s >= LOOK_S:
            self._decide()

    # The guest

    def _guest(self) -> None:
        writes = self._scene.load.writes(self.now_s - TICK_S, self.now_s)
        throttle = self._throttle
        if throttle is None:
            while self._delayed:
                self._write(*self._delayed.popleft())
            for block, count in writes:
                self._write(block, count)
            return
        for write in writes:
            if self._delayed or throttle.wait_s(self.now_s):
                # A guest has so many writes under way and waits for them: it does not pile up more.
                if len(self._delayed) < QUEUE_DEPTH:
                    self._delayed.append(write)
                    self.outcome.delayed_writes += 1
                else:
                    self.outcome.lost_writes += 1
            else:
                throttle.take(write[1] * BLOCK_BYTES)
                self._write(*write)
        while self._delayed and not throttle.wait_s(self.now_s):
            throttle.take(self._delayed[0][1] * BLOCK_BYTES)
            self._write(*self._delayed.popleft())

    def _write(self, block: int, count: int) -> None:
        self.map.mark(block * BLOCK_BYTES, count * BLOCK_BYTES)
        for number in range(block, block + count):
            self._disk[number] += 1
        self._written_bytes += count * BLOCK_BYTES
        self.outcome.writes += 1

    # The link and the replica

    def _hear(self) -> None:
        while self._sent and self._sent[0].applied_s + self._scene.round_trip_s <= self.now_s:
            piece = self._sent.popleft()
            assert piece.versions is not None
            self._replica[piece.first : piece.stop] = piece.versions
            self._unacked_bytes -= piece.length
            self._applied_bytes += piece.length
            self._applied_seq += 1
            self.planner.window.answered(self.now_s - piece.sent_s)
            piece.portion.pieces_left -= 1
            if not piece.portion.pieces_left:
                piece.portion.durable_s = self.now_s + self._scene.flush_s
        while self._portions and self._portions[0].durable_s <= self.now_s:
            portion = self._portions.popleft()
            self.map.commit(portion.lease, 0, self.map.blocks)
            self.map.close_lease(portion.lease)
            self.backlog.confirmed(portion.chunks)
            self._committed_bytes += portion.total_bytes

    def _feed(self) -> None:
        window_bytes = self.planner.window_bytes
        while self._todo and self._unacked_bytes < window_bytes:
            if self._wire.is_shut(self.now_s):
                return
            self._send(self._todo.popleft())

    def _send(self, piece: _Piece) -> None:
        """Read it now, and put it on the link."""
        piece.versions = self._disk[piece.first : piece.stop]
        piece.sent_s = self.now_s
        piece.applied_s = self._wire.send(self.now_s, piece.length) + self._scene.round_trip_s / 2
        self._todo_bytes -= piece.length
        self._unacked_bytes += piece.length
        self._sent.append(piece)
        self.outcome.sent_bytes += piece.length
        fresh = self._unsent.count(1, piece.first, piece.stop)
        self._unsent[piece.first : piece.stop] = 0
        self._unsent_blocks -= fresh
        self.outcome.extra_bytes += piece.length - fresh * BLOCK_BYTES

    # The sync

    def _take_more(self) -> None:
        portion_bytes = self.planner.portion_bytes
        while self._todo_bytes < portion_bytes:
            ranges = self.backlog.next(portion_bytes)
            if not ranges:
                if self.now_s - self._asked_s >= 0.05:
                    self._ask()
                return
            blocks = [(offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES) for offset, length in ranges]
            self._take(Wanted(blocks))

    def _take(self, wanted: Wanted | None) -> None:
        lease = self.map.open_lease()
        extents: list[tuple[int, int]] = []
        block = 0
        while block < self.map.blocks:
            found, block = self.map.take(lease, block, self.map.blocks, MAX_RANGES, wanted)
            extents += [(sector * SECTOR_BYTES, count * SECTOR_BYTES)
                        for sector, count in zip(found[::2], found[1::2], strict=True)]
        if not extents:
            self.map.close_lease(lease)
            return
        portion = _Portion(lease, chunk_runs(extents), sum(length for _, length in extents))
        self.backlog.took(portion.chunks)
        self._portions.append(portion)
        self._todo_bytes += portion.total_bytes
        for offset, length in extents:
            for start in range(offset, offset + length, PIECE_BYTES):
                first = start // BLOCK_BYTES
                stop = min(start + PIECE_BYTES, offset + length) // BLOCK_BYTES
                self._todo.append(_Piece(portion, first, stop))
                portion.pieces_left += 1

    def _ask(self) -> None:
        self._asked_s = self.now_s
        self.backlog.touch(self.now_s, self._touched.bits[: self.backlog.chunks],
                           self.planner.outlook.send_rate)
        self._touched.bits.setall(0)

    def _decide(self) -> None:
        if self.now_s - self._asked_s >= self.backlog.sample_s:
            self._ask()
        self._looked_s = self.now_s
        self.planner.look(Seen(
            now_s=self.now_s, dirty_bytes=self.map.dirty.bits.count() * BLOCK_BYTES,
            leased_bytes=self.map.taken.bits.count() * BLOCK_BYTES, todo_bytes=self._todo_bytes,
            unacked_bytes=self._unacked_bytes, applied_bytes=self._applied_bytes, applied_seq=self._applied_seq,
            committed_bytes=self._committed_bytes, written_bytes=self._written_bytes,
            first_pass_done=not self._unsent_blocks, flush_s=self._scene.flush_s, flush_bytes=1))
        decision = self.planner.decide()
        self.is_ready = decision.action == Action.SWITCH
        if decision.action == Action.GIVE_UP:
            self.outcome.reason = decision.reason
        if decision.action == Action.ESCALATE:
            self._escalate()

    def _escalate(self) -> None:
        rate, throttle = self.planner.group.rate, self.planner.throttle
        self.outcome.steps.append(f"{self.now_s:.1f} s: {self.planner.group.measures()}")
        if rate is not None and self._wire.cap is not None:
            self._wire.cap.set_rate(rate, self.now_s)
        if throttle is not None:
            if self._throttle is None:
                self._throttle = Bucket(throttle, self.now_s)
            self._throttle.set_rate(throttle, self.now_s)

    def pause(self) -> None:
        """The guest stands still: there is only the rest to be sent."""
        self.outcome.predicted_pause_s = self.planner.prospect.pause_s
        self._take(None)

    def drain(self) -> bool:
        """A moment of a pause; False when nothing is left to be sent, nor confirmed."""
        self.now_s += TICK_S / 5
        while self._todo and not self._wire.is_shut(self.now_s):
            self._send(self._todo.popleft())
        self._hear()
        if not self._portions and self.map.dirty.bits.any():
            self._take(None)
        return bool(self._portions)

    def end(self, paused_s: float) -> None:
        """With the pause, or without one if it gives up."""
        self.outcome.elapsed_s = self.now_s
        if not self.outcome.reason:
            self.outcome.switched = True
            self.outcome.pause_s = paused_s + self.planner.outlook.round_trip_s
            self.outcome.equal = self._disk == self._replica


def run_together(disks: Sequence[Simulation]) -> list[Outcome]:
    """The disks of a guest to their end, with one switch-over."""
    while not all(disk.is_ready for disk in disks):
        for disk in disks:
            disk.tick()
        if disks[0].now_s >= LONGEST_S:
            disks[0].outcome.reason = f"not done after {LONGEST_S:g} s"
        if reason := next((disk.outcome.reason for disk in disks if disk.outcome.reason), ""):
            for disk in disks:
                disk.outcome.reason = reason
            break
    start_s = disks[0].now_s
    if not disks[0].outcome.reason:
        for disk in disks:
            disk.pause()
        while sum(disk.drain() for disk in disks):
            pass
    for disk in disks:
        disk.end(disk.now_s - start_s)
    return [disk.outcome for disk in disks]
