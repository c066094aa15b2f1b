"""qcow2: everything that an image's tables refer to, counted.

    roots: header | L1 table | snapshot table | L1 table of each snapshot | bitmaps | refcount table
    L1 tables ─▶ each L2 table once, with as many references as lead to it ─▶ clusters

A walk counts two images at once: the one in the file, and the one that shall be, which may have a snapshot more or
less, or a shorter disk. What differs is said to `run`.

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterable, Mapping
from typing import Final

from tapcore.errors import ImageError
from tapcore.formats.extents import from_big_endian
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow2.counts import CHUNK, CHUNK_BITS, MARKED, OLD, UNMARKED, Counts
from tapcore.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    BITMAP,
    BITMAPS,
    COMPRESSED,
    COPIED,
    EXT_BITMAPS,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
    Header,
)
from tapcore.formats.qcow2.refcounts import clusters_of
from tapcore.formats.qcow2.snapshot_table import load_snapshots
from tapcore.formats.qcow2.subclusters import make_mapping
from tapcore.formats.tools import Report

MAX_TABLES: Final = 1 << 20
"""Different L2 tables that one walk follows."""
BITMAP_ENTRY_RESERVED: Final = ~(OFFSET_MASK | 1) & ((1 << 64) - 1)


class Tree:
    """One L2 table, and how many references lead to it."""

    __slots__ = ("active", "index", "new", "old", "what")

    def __init__(self, index: int, what: str) -> None:
        self.index = index
        self.what = what
        self.old = 0
        self.new = 0
        self.active = False


class Walk:
    """One image's references, in `counts`; what is wrong with its tables is in `report`. ImageError if there is
    too much of it, or what leads to it cannot be right."""

    def __init__(self, file: ImageFile, header: Header) -> None:
        self.file = file
        self.header = header
        self.report = Report()
        self.counts = Counts()
        self.cluster_bits = header.cluster_bits
        self.clusters = -(-file.size_bytes >> header.cluster_bits)
        self.l1 = self.load_table(header.l1_table_offset, header.l1_size, "the L1 table")
        self.snapshots, self.snapshot_table_bytes = load_snapshots(file, header)
        self._trees: dict[int, Tree] = {}
        self._mapping = make_mapping(header, array("Q"))
        self._mapping.file_bytes = self.clusters << self.cluster_bits

    def run(
        self, *, active: int = 1, l1_end: int | None = None, snapshots: Mapping[int, int] | None = None,
        bitmaps: int = 1,
    ) -> None:
        """Count everything but the tables that `count_tables` does. How often the image that shall be refers to:
        the `active` L2 tables, those of the L1 table up to the entry `l1_end` alone; the snapshots, by number,
        where that is not once; the bitmaps."""
        self.refer(0, 1, "the header")
        self._grow_trees(self.l1[:l1_end], "active", 1, active, active=True)
        if l1_end is not None:
            self._grow_trees(self.l1[l1_end:], "active", 1, 0, first=l1_end)
        for number, entry in enumerate(self.snapshots):
            refs = (snapshots or {}).get(number, 1)
            what = f"the L1 table of snapshot {number}"
            if entry.l1_size and self.refer(entry.l1_table_offset, 8 * entry.l1_size, what, min(refs, 1)):
                l1 = self.load_table(entry.l1_table_offset, entry.l1_size, what)
                self._grow_trees(l1, f"snapshot {number}", 1, refs)
        if self.header.autoclear_features & AUTOCLEAR_BITMAPS and EXT_BITMAPS in self.header.extensions:
            self._bitmaps(self.header.extensions[EXT_BITMAPS], bitmaps)
        for host, tree in self._trees.items():
            self._follow(host, tree)

    def count_tables(self, refs: int) -> None:
        """Count the active L1 table, the snapshot table, the refcount table and its blocks, `refs` times in the
        image that shall be."""
        header = self.header
        if header.l1_size:
            self.refer(header.l1_table_offset, 8 * header.l1_size, "the L1 table", refs)
        if self.snapshots:
            self.refer(header.snapshots_offset, self.snapshot_table_bytes, "the snapshot table", refs)
        table_bytes = header.refcount_table_clusters << self.cluster_bits
        self.refer(header.refcount_table_offset, table_bytes, "the refcount table", refs)
        for index, entry in enumerate(self.refcount_table()):
            if entry and not entry & 511:
                self.refer(entry, header.cluster_bytes, f"refcount block {index}", refs)
            elif entry:
                self.report.add(f"refcount table entry {index}: reserved bits of {entry:#x} are set")

    def refcount_table(self) -> array[int]:
        entries = self.header.refcount_table_clusters << self.cluster_bits - 3
        return self.load_table(self.header.refcount_table_offset, entries, "the refcount table")

    def load_table(self, offset: int, entries: int, what: str) -> array[int]:
        """A table of 64-bit entries."""
        return from_big_endian("Q", self.file.load(offset, 8 * entries, what))

    def refer(self, offset: int, length: int, what: str, refs: int = 1) -> bool:
        """Count a reference to each cluster of a range; False, and an error, if it cannot be one."""
        first, last = offset >> self.cluster_bits, offset + length - 1 >> self.cluster_bits
        if offset % self.header.cluster_bytes or last >= self.clusters:
            self.report.add(f"{what}: {offset} is no cluster's offset in the file")
            return False
        for cluster in range(first, last + 1):
            self.counts.add(cluster, refs, OLD)
        return True

    # L1 tables

    def _grow_trees(
        self, l1: Iterable[int], name: str, old: int, new: int, *, active: bool = False, first: int = 0
    ) -> None:
        for index, entry in enumerate(l1, first):
            if not entry:
                continue
            host = entry & OFFSET_MASK
            if entry & ~(COPIED | OFFSET_MASK):
                self.report.add(f"L1 entry {index} ({name}): reserved bits of {entry:#x} are set")
            if not host:
                self.report.add(f"L1 entry {index} ({name}): {entry:#x} leads nowhere")
                continue
            tree = self._trees.get(host)
            if tree is None:
                if len(self._trees) >= MAX_TABLES:
                    raise ImageError("has more L2 tables than can be checked", errno=errno.E2BIG,
                                     path=self.file.path)
                tree = self._trees[host] = Tree(index, f"of L1 entry {index} ({name})")
            tree.old += old
            tree.new += new
            if active:
                tree.active = True
                self._mark(host, entry)

    def _mark(self, host: int, entry: int) -> None:
        if host < self._mapping.file_bytes:
            self.counts.add(host >> self.cluster_bits, 0, MARKED if entry & COPIED else UNMARKED)

    # L2 tables

    def _follow(self, host: int, tree: Tree) -> None:
        if not self.refer(host, self.header.cluster_bytes, f"the L2 table {tree.what}", tree.new):
            return
        if self.is_hole(host, self.header.cluster_bytes):
            return
        table = self.load_table(host, self.header.cluster_bytes // 8, "an L2 table")
        if self._mapping.external:
            self._check_external(table, tree)
        self.count_entries(table, tree.what, tree.new, old=True, active=tree.active)

    def is_hole(self, offset: int, length: int) -> bool:
        """Is nothing there but a hole of the file?"""
        if self.file.is_device:
            return False
        try:
            return os.lseek(self.file.fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            return error.errno == errno.ENXIO

    def count_entries(
        self, table: array[int], what: str, refs: int, *, old: bool = False, active: bool = False
    ) -> None:
        """Count what an L2 table refers to, `refs` times; `old`: the image in the file does so too, `active`: in
        its active tables. Clusters of an external data file are not counted."""
        if self._mapping.external:
            return
        mapping, cluster_bits = self._mapping, self.cluster_bits
        chunks, file_bytes = self.counts.chunks, mapping.file_bytes
        not_plain = -1 if self.header.has_subclusters else mapping.not_plain
        old_flag = OLD if old else 0
        marked, unmarked = (MARKED | old_flag, UNMARKED | old_flag) if active else (old_flag, old_flag)
        for number, entry in enumerate(mapping.entries(table)):
            if not entry:
                continue
            host = entry & mapping.host_mask
            if not entry & not_plain and 0 < host < file_bytes:
                cluster = host >> cluster_bits
                chunk = chunks.get(cluster >> CHUNK_BITS)
                if chunk is None:
                    chunk = self.counts.chunk(cluster >> CHUNK_BITS)
                at = cluster & CHUNK - 1
                chunk[at] = chunk[at] + refs | (marked if entry & COPIED else unmarked)
            else:
                self._count_special(entry, f"L2 entry {number} {what}", refs, old_flag, active)

    def _check_external(self, table: array[int], tree: Tree) -> None:
        first = tree.index << self._mapping.table_shift
        for number, entry in enumerate(self._mapping.entries(table)):
            try:
                self._mapping.kind_of(entry, first + (number << self.cluster_bits))
            except ImageError as error:
                self.report.add(f"L2 entry {number} {tree.what}: {error.message}")

    def _count_special(self, entry: int, what: str, refs: int, old_flag: int, active: bool) -> None:
        """A compressed or zero cluster, or an entry that cannot be right."""
        mapping = self._mapping
        try:
            mapping.kind_of(entry, 0)
        except ImageError:
            self.report.add(f"{what}: {entry:#x} has reserved bits, is no cluster's offset, or outside the file")
            return
        packed = entry & COMPRESSED
        if packed and entry & COPIED:
            self.report.add(f"{what}: a compressed cluster is marked as not shared")
        flags = old_flag
        if active and not packed:
            flags |= MARKED if entry & COPIED else UNMARKED
        place = mapping.packed_place(entry) if packed else None
        for cluster in clusters_of(entry, place, self.cluster_bits):
            self.counts.add(cluster, refs, flags)

    # Bitmaps

    def _bitmaps(self, extension: bytes, refs: int) -> None:
        if len(extension) < BITMAPS.size:
            self.report.add("the bitmaps extension is cut short")
            return
        fields = BITMAPS.unpack(extension)
        offset, length = fields["directory_offset"], fields["directory_size"]
        if fields["nb_bitmaps"] > MAX_BITMAPS or not 0 < length <= MAX_BITMAP_DIRECTORY_BYTES:
            self.report.add("the bitmaps extension: nb_bitmaps or the directory's size is absurd")
            return
        if not self.refer(offset, length, "the bitmap directory", refs):
            return
        directory = self.file.load(offset, length, "the bitmap directory")
        at = 0
        while at + BITMAP.size <= length:
            entry = BITMAP.unpack(directory, at)
            self._bitmap_table(entry["table_offset"], entry["table_size"], refs)
            at += BITMAP.size + entry["name_size"] + entry["extra_data_size"] + 7 & ~7

    def _bitmap_table(self, offset: int, size: int, refs: int) -> None:
        if not size:
            return
        if 8 * size > MAX_REFCOUNT_TABLE_BYTES:
            self.report.add(f"a bitmap table of {size} entries is absurd")
        elif self.refer(offset, 8 * size, "a bitmap table", refs):
            for entry in self.load_table(offset, size, "a bitmap table"):
                if entry & BITMAP_ENTRY_RESERVED:
                    self.report.add(f"a bitmap table's entry: reserved bits of {entry:#x} are set")
                elif entry & OFFSET_MASK:
                    self.refer(entry & OFFSET_MASK, self.header.cluster_bytes, "a bitmap table's entry", refs)
