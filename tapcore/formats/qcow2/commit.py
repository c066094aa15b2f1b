"""qcow2: the order in which changed metadata reaches the file.

    data (already written), refcount blocks | refcount table | header, if that table moved | L2 tables | L1 table
                                            ▲ a barrier (fdatasync) before each stage that has something to write,
                                              and one at the end

Power loss may undo, or half-do, whatever was written since the last barrier. With this order a table never points
at what is not there yet, and nothing that is pointed at has a refcount of 0: at worst clusters are leaked. What is
no longer pointed at loses its reference, and may be used again, only after the last barrier.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

from tapcore.formats.extents import to_big_endian
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow2.layout import OFFSET_MASK, REFCOUNT_TABLE_AT, REFCOUNT_TABLE_FIELDS
from tapcore.formats.qcow2.mapping import SECTOR_ENTRIES, Mapping
from tapcore.formats.qcow2.refcounts import Refcounts

Write = tuple[int, bytes]
"""(offset in the file, data)."""


class Commit:
    """What was changed when it was made, as bytes; `run` writes it, then either `succeeded` or `failed` is due."""

    def __init__(self, mapping: Mapping, refcounts: Refcounts, l1_offset: int) -> None:
        self._mapping = mapping
        self._refcounts = refcounts
        self._l2, mapping.dirty = mapping.dirty, {}
        self._l1, mapping.l1_dirty = mapping.l1_dirty, set()
        self._blocks, refcounts.dirty = refcounts.dirty, {}
        self._table, refcounts.table_dirty = refcounts.table_dirty, set()
        self.moved_from, refcounts.moved_from = refcounts.moved_from, []
        for index in self._l2:
            mapping.pin(index)
        refcounts.pins.update(self._blocks.keys())
        fields = REFCOUNT_TABLE_FIELDS.pack(
            offset=refcounts.table_offset, clusters=8 * len(refcounts.table) >> refcounts.cluster_bits)
        self.stages: list[list[Write]] = [
            list(self._block_writes()),
            list(_array_writes(refcounts.table, refcounts.table_offset, self._table)),
            [(REFCOUNT_TABLE_AT, fields)] if self.moved_from else [],
            [write for index, sectors in self._l2.items()
             for write in _array_writes(mapping.tables[index], mapping.l1[index] & OFFSET_MASK, sectors)],
            list(_array_writes(mapping.l1, l1_offset, self._l1)),
        ]

    def _block_writes(self) -> Iterator[Write]:
        refcounts = self._refcounts
        for index, sectors in self._blocks.items():
            block = refcounts.blocks[index]
            for first, count in runs(sectors):
                data = b"".join(map(block.sector, range(first, first + count)))
                yield refcounts.table[index] + 512 * first, data

    def run(self, file: ImageFile) -> int:
        """Write all of it, durably. Any thread. Returns 0 or an errno."""
        for number, stage in enumerate(self.stages):
            if number and stage:
                code = file.sync()
                if code:
                    return code
            for offset, data in stage:
                code = file.write([memoryview(data)], offset, len(data))
                if code:
                    return code
        return file.sync()

    def succeeded(self) -> None:
        self._unpin()
        self._mapping.make_room()
        self._refcounts.make_room()

    def failed(self) -> None:
        """Everything is to be written again."""
        self._unpin()
        _merge(self._mapping.dirty, self._l2)
        _merge(self._refcounts.dirty, self._blocks)
        self._mapping.l1_dirty |= self._l1
        self._refcounts.table_dirty |= self._table
        self._refcounts.moved_from[:0] = self.moved_from

    def _unpin(self) -> None:
        for index in self._l2:
            self._mapping.unpin(index)
        self._refcounts.pins -= Counter(self._blocks.keys())


def _merge(into: dict[int, set[int]], more: dict[int, set[int]]) -> None:
    for index, sectors in more.items():
        into.setdefault(index, set()).update(sectors)


def _array_writes(values: array[int], offset: int, sectors: Iterable[int]) -> Iterator[Write]:
    """The given sectors of a table of 64-bit entries that begins at `offset`."""
    for first, count in runs(sectors):
        part = values[first * SECTOR_ENTRIES : (first + count) * SECTOR_ENTRIES]
        yield offset + 512 * first, to_big_endian(part)


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Sorted, as (first, count) of neighbours."""
    first, count = 0, 0
    for number in sorted(numbers):
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count
