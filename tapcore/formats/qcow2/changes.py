"""qcow2: what changes an image: clusters are taken and given up by refcount, L2 entries changed in memory.

A commit writes, each stage after what it points at is durable:

    refcount blocks | refcount table | header, if that table moved | L2 tables | L1 table

With this order a table never points at what is not there yet, and nothing that is pointed at has a refcount of 0:
at worst clusters are leaked. What is no longer pointed at loses its reference, and may be used again, only after
the commit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from tapcore.errors import ImageError
from tapcore.formats.commit import Commit, Write, array_writes, runs
from tapcore.formats.durable import Steps
from tapcore.formats.extents import DATA, HOLE, ZERO, TableMiss, to_big_endian
from tapcore.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    REFCOUNT_TABLE_AT,
    REFCOUNT_TABLE_FIELDS,
    ZERO_FLAG,
)
from tapcore.formats.qcow2.mapping import Mapping
from tapcore.formats.qcow2.refcounts import Refcounts, clusters_of
from tapcore.formats.tables import SECTOR_BYTES, Sectors
from tapcore.formats.writer import NOWHERE, Unit, Writer
from tapcore.request import DISCARD, NO_HOLE, Request

if TYPE_CHECKING:
    from tapcore.formats.qcow2.driver import Qcow2Driver

logger = logging.getLogger(__name__)


class Qcow2Writer(Writer):
    """Of one image. A unit's `entry` is its new L2 entry, to which its place is added if it has COPIED set.

    Of an image with an external data file, each cluster's place there is that of the guest; it is not counted.
    """

    driver: Qcow2Driver

    def __init__(self, driver: Qcow2Driver) -> None:
        mapping, header = driver.mapping, driver.header
        super().__init__(driver, mapping.tables, unit_bytes=header.cluster_bytes, piece_bytes=header.cluster_bytes,
                         table_bytes=1 << mapping.table_shift)
        self._mapping = mapping
        self._refcounts = driver.refcounts
        self._cluster_bits = header.cluster_bits
        self._has_zero_flag = header.version >= 3
        self._external = mapping.external

    # Plan

    def plan_write(self, guest: int, first: int, last: int) -> int | Unit:
        mapping = self._mapping
        entry = mapping.entry(guest)
        kind, host = mapping.kind_of(entry, guest)
        if kind == DATA and entry & COPIED:
            return host
        kept = kind == ZERO and mapping.has_host(entry) and entry & COPIED
        reads_zero = kind == ZERO or (kind == HOLE and not self.driver.backing_bytes(guest, self.unit_bytes))
        return Unit(guest, guest, self.end_of(guest + self.unit_bytes), host if kept else NOWHERE,
                    reads_zero=reads_zero, entry=COPIED)

    def end_of(self, stop: int) -> int:
        """A data file is not written past the disk's end."""
        return min(stop, self.driver.info.size_bytes) if self._external else stop

    def plan_range(self, request: Request, guest: int, first: int, last: int) -> Unit | None:
        entry = self._mapping.entry(guest)
        kind, _ = self._mapping.kind_of(entry, guest)
        shows_backing = self.driver.backing_bytes(guest, self.unit_bytes) > 0
        if request.op == DISCARD:
            new = self._discarded(entry, kind, shows_backing)
        else:
            new = self._zeroed(entry, kind, shows_backing, request.flags)
        if new == entry:
            return None
        return Unit(guest, first, last, guest if self._external and kind == DATA else NOWHERE, entry=new)

    def _discarded(self, entry: int, kind: int, shows_backing: bool) -> int:
        if not shows_backing:
            return 0
        if kind == HOLE or not self._has_zero_flag:
            return entry
        return ZERO_FLAG

    def _zeroed(self, entry: int, kind: int, shows_backing: bool, flags: int) -> int:
        if not self._has_zero_flag:
            return 0
        if flags & NO_HOLE:
            return entry | ZERO_FLAG if kind in (DATA, ZERO) and self._mapping.has_host(entry) else ZERO_FLAG
        return entry if kind == HOLE and not shows_backing else ZERO_FLAG

    def writes_zeroes(self, request: Request) -> bool:
        return not self._has_zero_flag and (
            bool(request.flags & NO_HOLE) or self.driver.backing_bytes(request.offset, request.length) > 0)

    # Tables, allocate

    def make_table(self, index: int) -> None:
        mapping = self._mapping
        if mapping.is_private(index):
            return
        mapping.table(index)
        first, _ = self._take(1)
        self._refcounts.take_fresh(first, 1)
        self._refcounts.protect([first << self._cluster_bits])
        former = mapping.replace_table(index, first << self._cluster_bits)
        if former:
            self._refcounts.unprotect(former)
            self.durable.drop(clusters_of(former, None, self._cluster_bits))

    def allocate(self, units: list[Unit]) -> None:
        if self._external:
            for unit in units:
                unit.host = unit.guest
            return
        at = 0
        while at < len(units):
            first, count = self._take(len(units) - at)
            fresh = self._refcounts.take_fresh(first, count)
            for number, unit in enumerate(units[at : at + count]):
                unit.host = first + number << self._cluster_bits
                unit.fresh = fresh
            at += count

    def _take(self, count: int) -> tuple[int, int]:
        first, count = self._refcounts.allocate(count)
        self._mapping.grow(self._refcounts.file_end << self._cluster_bits)
        return first, count

    # Map

    def map(self, unit: Unit) -> None:
        new = unit.entry | unit.host if unit.entry & COPIED and unit.host != NOWHERE else unit.entry
        former = self._mapping.set_entry(unit.guest, new)
        if not self._external and ((former ^ new) & OFFSET_MASK or former & COMPRESSED):
            place = self._mapping.packed_place(former) if former & COMPRESSED else None
            self.durable.drop(clusters_of(former, place, self._cluster_bits))

    def give_up(self, unit: Unit) -> None:
        if not self._external:
            self.durable.drop([unit.host >> self._cluster_bits])

    # Commit, release

    @property
    def full(self) -> bool:
        return self.tables.full or self._refcounts.blocks.full

    @property
    def crowded(self) -> bool:
        return self.tables.crowded or self._refcounts.blocks.crowded

    def begin_commit(self) -> Commit:
        moved_from, self._refcounts.moved_from = self._refcounts.moved_from, []
        for clusters in moved_from:
            self.durable.drop(clusters)
        return Qcow2Commit(self._mapping, self._refcounts, self.driver.header.l1_table_offset)

    def release(self, places: list[int]) -> Steps:
        """Return the space of clusters that nothing else refers to, then take one reference from each."""
        refcounts, file = self._refcounts, self.driver.file
        cluster_bits = self._cluster_bits
        unused = []
        for cluster, count in Counter(places).items():
            yield from self._cached(cluster)
            if refcounts.get(cluster) == count:
                unused.append(cluster)
        if unused:
            holes = list(runs(unused))

            def punch() -> None:
                for first, count in holes:
                    file.discard(first << cluster_bits, count << cluster_bits)

            yield punch
        for cluster in places:
            yield from self._cached(cluster)
            refcounts.release(cluster)

    def _cached(self, cluster: int) -> Steps:
        """Until the cluster's refcount is cached. ImageError."""
        while True:
            try:
                self._refcounts.get(cluster)
                return
            except TableMiss as found:
                miss = found
            loaded: list[bytes] = []
            yield partial(self._load, miss, loaded)
            if not loaded:
                raise ImageError(f"cannot read a refcount block: {miss}", offset=miss.host)
            self._refcounts.install(miss, loaded[0])

    def _load(self, miss: TableMiss, loaded: list[bytes]) -> None:
        try:
            loaded.append(self.driver.file.load(miss.host, miss.length, "a refcount block"))
        except ImageError as error:
            logger.error("%s", error)


class Qcow2Commit(Commit):
    """The stages above."""

    def __init__(self, mapping: Mapping, refcounts: Refcounts, l1_offset: int) -> None:
        self._mapping = mapping
        self._refcounts = refcounts
        l2, blocks = mapping.tables.take_dirty(), refcounts.blocks.take_dirty()
        self._l1, mapping.l1_dirty = mapping.l1_dirty, set()
        self._table, refcounts.table_dirty = refcounts.table_dirty, set()
        self._moved, refcounts.moved = refcounts.moved, False
        fields = REFCOUNT_TABLE_FIELDS.pack(
            offset=refcounts.table_offset, clusters=8 * len(refcounts.table) >> refcounts.cluster_bits)
        super().__init__([
            list(self._block_writes(blocks)),
            list(array_writes(refcounts.table, refcounts.table_offset, self._table, to_big_endian)),
            [(REFCOUNT_TABLE_AT, fields)] if self._moved else [],
            [write for index, sectors in l2.items() for write in array_writes(
                mapping.tables[index], mapping.l1[index] & OFFSET_MASK, sectors, to_big_endian)],
            list(array_writes(mapping.l1, l1_offset, self._l1, to_big_endian)),
        ], [(mapping.tables, l2), (refcounts.blocks, blocks)])

    def _block_writes(self, blocks: Sectors) -> Iterator[Write]:
        refcounts = self._refcounts
        for index, sectors in blocks.items():
            block = refcounts.blocks[index]
            for first, count in runs(sectors):
                data = b"".join(map(block.sector, range(first, first + count)))
                yield refcounts.table[index] + SECTOR_BYTES * first, data

    def failed(self) -> None:
        super().failed()
        self._mapping.l1_dirty |= self._l1
        self._refcounts.table_dirty |= self._table
        self._refcounts.moved |= self._moved
