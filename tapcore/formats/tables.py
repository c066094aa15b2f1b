"""A bounded cache of a format's tables, of which the changed ones stay until they were written.

    put ─▶ used, least recently first ─▶ dropped when there are more than `capacity`
             │ change                       ▲
             ▼                              │ settle
           dirty (sectors) ─ take_dirty ─▶ being written ─ put_back ─▶ dirty

However many must stay, some room is left for others: a request needs all of its tables at once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Final, TypeVar

T = TypeVar("T")

SECTOR_BYTES: Final = 512
"""The unit in which changed tables are written: what a disk does not tear."""

MIN_RESERVE: Final = 2
"""Even a small request may lie on the border between two tables."""

MIN_SHARED: Final = 16
"""Tables that each image of a long chain may keep."""

Sectors = dict[int, set[int]]
"""Numbers of a table's sectors, by table."""


class Tables(OrderedDict[int, T]):
    """Tables by index."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.reserve = max(MIN_RESERVE, capacity // 4)
        """So many that are neither changed nor pinned are kept in any case."""
        self.dirty: Sectors = {}
        """Changed sectors."""
        self.pins: Counter[int] = Counter()
        """Tables that changes under way, or a commit, need."""

    def share(self, images: int) -> None:
        """These are the tables of one of so many images of a disk: keep so many fewer that the images of a long
        chain together keep about what two images would."""
        self.capacity = max(min(self.capacity, MIN_SHARED), 2 * self.capacity // images)
        self.reserve = max(MIN_RESERVE, self.capacity // 4)

    def use(self, index: int) -> T | None:
        """The table if it is cached."""
        table = self.get(index)
        if table is not None:
            self.move_to_end(index)
        return table

    def put(self, index: int, table: T) -> None:
        self[index] = table
        self.make_room()

    def make_room(self) -> None:
        """Drop what has not been used for long, has no changes and is not needed by anyone."""
        spare = len(self) - max(self.capacity, len(self.dirty) + len(self.pins) + self.reserve)
        if spare <= 0:
            return
        victims = (index for index in self if index not in self.pins and index not in self.dirty)
        for index in list(islice(victims, spare)):
            del self[index]

    def pin(self, index: int) -> None:
        """Keep the table until it is unpinned as often."""
        self.pins[index] += 1

    def unpin(self, index: int) -> None:
        self.pins[index] -= 1
        if not self.pins[index]:
            del self.pins[index]

    # Changes

    def change(self, index: int, sector: int) -> None:
        """A sector of the table is to be written."""
        sectors = self.dirty.get(index)
        if sectors is None:
            sectors = self.dirty[index] = set()
        sectors.add(sector)

    def change_all(self, index: int, sectors: int) -> None:
        """All of the table, which has so many sectors, is to be written."""
        self.dirty[index] = set(range(sectors))

    @property
    def crowded(self) -> bool:
        """Are there so many changed tables that they should be written?"""
        return 2 * len(self.dirty) > self.capacity

    @property
    def full(self) -> bool:
        """Is there no room for another changed table?"""
        return len(self.dirty) >= self.capacity

    def take_dirty(self) -> Sectors:
        """What is to be written; its tables stay until `settle` or `put_back`."""
        taken, self.dirty = self.dirty, {}
        for index in taken:
            self.pin(index)
        return taken

    def settle(self, taken: Sectors) -> None:
        """They were written."""
        self._unpin_all(taken)
        self.make_room()

    def put_back(self, taken: Sectors) -> None:
        """They were not, and are to be written again."""
        self._unpin_all(taken)
        for index, sectors in taken.items():
            self.dirty.setdefault(index, set()).update(sectors)

    def _unpin_all(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.unpin(index)
