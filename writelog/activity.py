"""The activity log: which extents may be written to, so that a crash of the host loses no mark.

    cold ──wait──▶ hot ──least recently written──▶ leaving ──▶ cold
          a step       its bits are in the same step's sectors,
                       its number still in the same step's record

Bits in memory are exact; those in the side-car (writelog.sidecar_layout) are not written for each mark. Instead, a
write to a *cold* extent waits until a record that names the extent is durable, and one to a *hot* extent goes at
once. After a crash the hot extents are dirty, and for the rest the sectors are right:

- An extent leaves the record in a step after the one that made its bits durable; from the moment the bits are
  looked at for that, writes to it wait again.
- A bit is cleared in memory when a client has confirmed its block, and in the side-car some seconds later: until
  then a crash has the block sent once more. A cleared bit that is written early can hide no write: its extent is
  hot in a durable record before anything is written to it. But the disk is flushed first: else a crash could take
  back what the copy has, and nobody would know.
- A request of very many extents does not go through the record: its bits are set, in memory and in the side-car,
  before it goes down, and no client can take them while it is under way.

A *step* is one write of sectors and record and one flush; there is one at a time, and all that waits shares the
next. This module decides what is in a step and does no I/O; `writelog.logjournal` carries it out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final, NamedTuple

from bitarray.util import zeros

from writelog.dirtymap import DirtyMap
from writelog.generations import Generations, new_id
from writelog.sidecar_layout import MAX_HOT, SECTOR_BITS, Flag, Record, blocks_of_extent, sector_count

DEFAULT_HOT: Final = 1200
MIN_HOT: Final = 16
SPARE_SHARE: Final = 8
"""One of so many hot extents is kept free for the next step."""
MAX_CLEARED_SECTORS: Final = 128
"""Sectors with nothing but cleared bits in one step."""

Resume = Callable[[int], None]
"""Called with 0, or the errno with which the step failed."""


class Waiter(NamedTuple):
    """A request that waits for its extents [first, last]."""

    first: int
    last: int
    resume: Resume


@dataclass
class Step:
    """What is to be made durable at once, and what follows from it."""

    record: Record | None
    sectors: list[tuple[int, bytes]]
    new: list[int] = field(default_factory=list)
    victims: dict[int, int] = field(default_factory=dict)
    """The extents that leave, and when they were last written to."""
    resumes: list[Resume] = field(default_factory=list)
    needs_flush: bool = False
    """The level below has to be flushed first: the step says of blocks that were written that a copy has them."""


class Activity:
    """Of one log. `hot` maps the numbers of the extents that may be written to to the step of their last write,
    which is for who writes to set: `hot[extent] = activity.now`."""

    def __init__(self, dirty_map: DirtyMap, record: Record, capacity: int = DEFAULT_HOT) -> None:
        """`record` is what is durable. `capacity` is how many extents are hot at most, from MIN_HOT to MAX_HOT."""
        assert MIN_HOT <= capacity <= MAX_HOT
        self.hot: dict[int, int] = dict.fromkeys(record.hot, 0)
        self.now = 1
        self.spare = max(2, capacity // SPARE_SHARE)
        """Also what a request may need at most to be let in by way of the record."""
        self._map = dirty_map
        self._record = record
        self._capacity = capacity
        self._waiting: deque[Waiter] = deque()
        self._wide: list[Waiter] = []
        self._cleared = zeros(sector_count(dirty_map.blocks), "little")
        """Sectors that may have other bits than memory, for no hot extent's sake."""
        self._change: tuple[Record, list[Resume]] | None = None
        self.step: Step | None = None
        """The one under way."""

    # Asked for by others

    @property
    def is_asked(self) -> bool:
        """Somebody waits for a step."""
        return bool(self._waiting or self._wide or self._change)

    @property
    def has_cleared(self) -> bool:
        return bool(self._cleared.any())

    def is_hot(self, first: int, last: int) -> bool:
        """Whether all of the extents [first, last] may be written to. If so they count as written to just now."""
        hot = self.hot
        if last - first >= len(hot) or not all(extent in hot for extent in range(first, last + 1)):
            return False
        for extent in range(first, last + 1):
            hot[extent] = self.now
        return True

    def is_wide(self, first: int, last: int) -> bool:
        return last - first >= self.spare

    def wait(self, first: int, last: int, resume: Resume) -> None:
        """`resume` when the extents are hot. Of a wide request: when its bits are durable; the caller has set them
        in memory, and they cannot be taken."""
        (self._wide if self.is_wide(first, last) else self._waiting).append(Waiter(first, last, resume))

    def cleared(self, first: int, stop: int) -> None:
        """Bits of the blocks [first, stop) were cleared."""
        if stop > first:
            self._cleared[first // SECTOR_BITS : (stop - 1) // SECTOR_BITS + 1] = 1

    def change(self, generations: Generations, resume: Resume, *, all_dirty: bool = False) -> None:
        """Have the record say `generations`. With `all_dirty` also that every block is dirty, as they are in
        memory already."""
        under_way = self.step.record if self.step else None
        record, resumes = self._change or (under_way or self._record, [])
        record = replace(record, generations=generations)
        if all_dirty:
            record = replace(record, epoch=new_id(), flags=record.flags & ~Flag.EMPTY)
            self._cleared.setall(0)
        self._change = (record, [*resumes, resume])

    # Steps

    def plan(self, *, checkpoint: bool = False) -> Step | None:
        """The next step, which is under way from now on; None if there is nothing to do. With `checkpoint` it has
        some of the sectors with cleared bits."""
        assert self.step is None
        admitted, new = self._admit()
        victims = self._choose(len(new), {extent for waiter in admitted
                                          for extent in range(waiter.first, waiter.last + 1)})
        wide, self._wide = self._wide, []
        numbers = {number for extent in victims for number in self._sectors(extent, extent)}
        numbers.update(number for waiter in wide for number in self._sectors(waiter.first, waiter.last))
        if checkpoint:
            numbers.update(islice(self._cleared.search(1), MAX_CLEARED_SECTORS))
        change, self._change = self._change, None
        resumes = [waiter.resume for waiter in (*admitted, *wide)] + (change[1] if change else [])
        if not (numbers or new or resumes):
            return None
        record = change[0] if change else self._record if new or victims else None
        needs_flush = change is not None or any(self._cleared[number] for number in numbers)
        for number in numbers:
            self._cleared[number] = 0
        for extent in victims:
            del self.hot[extent]
        if record is not None:
            record = replace(record, sequence=self._record.sequence + 1, hot=(*self.hot, *victims, *new))
        sectors = [(number, self._bits(number)) for number in sorted(numbers)]
        self.step = Step(record, sectors, new, victims, resumes, needs_flush)
        return self.step

    def ended(self, code: int) -> None:
        """The step under way is durable, or with an errno not: then nothing has changed."""
        step = self.step
        assert step is not None
        self.step = None
        self.now += 1
        if code:
            self.hot.update(step.victims)
            for number, _ in step.sectors:
                self._cleared[number] = 1
            if step.record is not None and step.record.epoch != self._record.epoch:
                self._cleared.setall(1)
        else:
            self.hot.update(dict.fromkeys(step.new, self.now))
            if step.record is not None:
                self._record = step.record
        for resume in step.resumes:
            resume(code)

    def last_steps(self) -> Iterator[Step]:
        """The steps of a clean end of a disk that was flushed, each to be carried out before the next one is asked
        for: all bits, then a record that says so. Nothing may be written meanwhile, nor come after them; a change
        of ids that nobody was told of is dropped."""
        assert self.step is None and not self._waiting and not self._wide
        numbers = set(self._cleared.search(1))
        numbers.update(number for extent in self.hot for number in self._sectors(extent, extent))
        if numbers:
            yield Step(None, [(number, self._bits(number)) for number in sorted(numbers)])
        yield Step(replace(self._record, sequence=self._record.sequence + 1, hot=(),
                           flags=self._record.flags & ~Flag.OPEN), [])

    def _admit(self) -> tuple[list[Waiter], list[int]]:
        """Those that wait, as far as there is room for their extents, and these extents."""
        admitted: list[Waiter] = []
        new: dict[int, None] = {}
        room = self._capacity - len(self.hot)
        while self._waiting:
            waiter = self._waiting[0]
            cold = [extent for extent in range(waiter.first, waiter.last + 1)
                    if extent not in self.hot and extent not in new]
            if len(new) + len(cold) > room:
                break
            new.update(dict.fromkeys(cold))
            admitted.append(self._waiting.popleft())
        return admitted, list(new)

    def _choose(self, new: int, needed: set[int]) -> dict[int, int]:
        """The extents that have to leave so that there is room to spare."""
        surplus = len(self.hot) + new - (self._capacity - self.spare)
        if surplus <= 0:
            return {}
        free = sorted((item for item in self.hot.items() if item[0] not in needed), key=lambda item: item[1])
        return dict(free[:surplus])

    def _sectors(self, first: int, last: int) -> range:
        """The numbers of the sectors that have bits of the extents [first, last]."""
        low, _ = blocks_of_extent(first, self._record)
        _, high = blocks_of_extent(last, self._record)
        return range(low // SECTOR_BITS, (min(high, self._map.blocks) - 1) // SECTOR_BITS + 1)

    def _bits(self, number: int) -> bytes:
        first = number * SECTOR_BITS // 8
        dirty, taken = (bitmap.memory[first : first + SECTOR_BITS // 8]
                        for bitmap in (self._map.dirty, self._map.taken))
        seen = int.from_bytes(dirty, "little") | int.from_bytes(taken, "little")
        return seen.to_bytes(len(dirty), "little")
