"""qcow2: is every cluster's refcount the number of references to it? And refcounts made anew.

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import errno
import os
from array import array
from typing import Final

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError
from tapcore.formats.extents import from_big_endian, to_big_endian
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    BITMAP,
    BITMAPS,
    COMPRESSED,
    COPIED,
    DIRTY,
    EXT_BITMAPS,
    FEATURES,
    HEADER_V2,
    INCOMPATIBLE_AT,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOT_EXTRA_BYTES,
    OFFSET_MASK,
    SNAPSHOT,
    Header,
)
from tapcore.formats.qcow2.load import load_header, load_refcounts
from tapcore.formats.qcow2.refcounts import RefcountBlock, Refcounts, clusters_of
from tapcore.formats.qcow2.subclusters import make_mapping
from tapcore.formats.tools import Report

MAX_TABLES_AT_ONCE: Final = 1 << 22
"""References to metadata that one check follows; more are taken for tables that lead to each other."""


def check(path: str) -> Report:
    """What is wrong with the image at `path`; nothing is changed. ImageError if it cannot be opened at all."""
    file = ImageFile.open(path, OpenFlag.RDONLY)
    try:
        header = load_header(file)
        walk = Walk(file, header)
        walk.run()
        walk.compare(load_refcounts(file, header))
        return walk.report
    finally:
        file.close()


class Walk:
    """Counts the references to each cluster, in memory of 4 bytes for each cluster that is near one in use."""

    def __init__(self, file: ImageFile, header: Header) -> None:
        self.file = file
        self.header = header
        self.report = Report()
        self.cluster_bits = header.cluster_bits
        self.per_block = header.refcount_block_entries
        self.clusters = -(-file.size_bytes >> header.cluster_bits)
        self.counts: dict[int, array[int]] = {}
        """By refcount block."""
        self._marks: dict[int, array[int]] = {}
        """By refcount block, the active tables' references: host offset and COPIED flag."""
        self._tables = 0

    def run(self, *, refcount_tables: bool = True) -> None:
        """Count everything but, if so asked, the refcount table and its blocks."""
        header = self.header
        self.refer(0, 1, "the header")
        self._l1(header.l1_table_offset, header.l1_size, "active", active=True)
        self._snapshots()
        if header.autoclear_features & AUTOCLEAR_BITMAPS and EXT_BITMAPS in header.extensions:
            self._bitmaps(header.extensions[EXT_BITMAPS])
        if refcount_tables:
            table_bytes = header.refcount_table_clusters << self.cluster_bits
            self.refer(header.refcount_table_offset, table_bytes, "the refcount table")
            table = from_big_endian("Q", self._load(header.refcount_table_offset, table_bytes))
            for index, entry in enumerate(table):
                if entry:
                    self.refer(entry, header.cluster_bytes, f"refcount block {index}")

    def _load(self, offset: int, length: int) -> bytes:
        return self.file.load(offset, length, "a table")

    def refer(self, offset: int, length: int, what: str) -> bool:
        """Count a reference to each cluster of a range; False, and an error, if it cannot be one."""
        first, last = offset >> self.cluster_bits, offset + length - 1 >> self.cluster_bits
        if offset % self.header.cluster_bytes or last >= self.clusters:
            self.report.add(f"{what}: {offset} is no cluster's offset in the file")
            return False
        for cluster in range(first, last + 1):
            self._count(cluster)
        return True

    def _count(self, cluster: int) -> None:
        index, at = divmod(cluster, self.per_block)
        counts = self.counts.get(index)
        if counts is None:
            counts = self.counts[index] = array("I", bytes(4 * self.per_block))
        counts[at] += 1

    def _mark(self, entry: int) -> None:
        index = ((entry & OFFSET_MASK) >> self.cluster_bits) // self.per_block
        self._marks.setdefault(index, array("Q")).append(entry & (OFFSET_MASK | COPIED))

    def _l1(self, offset: int, size: int, name: str, *, active: bool = False) -> None:
        if not size or not self.refer(offset, 8 * size, f"the L1 table ({name})"):
            return
        for index, entry in enumerate(from_big_endian("Q", self._load(offset, 8 * size))):
            if not entry:
                continue
            what = f"L1 entry {index} ({name})"
            if entry & ~(COPIED | OFFSET_MASK):
                self.report.add(f"{what}: reserved bits of {entry:#x} are set")
            if not entry & OFFSET_MASK or not self.refer(entry & OFFSET_MASK, self.header.cluster_bytes, what):
                continue
            self._tables += 1
            if self._tables > MAX_TABLES_AT_ONCE:
                raise ImageError("has more L2 tables than can be checked", errno=errno.E2BIG, path=self.file.path)
            if active:
                self._mark(entry)
            self._l2(index, entry & OFFSET_MASK, name, active)

    def _l2(self, index: int, offset: int, name: str, active: bool) -> None:
        data = self._load(offset, self.header.cluster_bytes)
        if not any(data):
            return
        mapping = make_mapping(self.header, array("Q"))
        mapping.file_bytes = self.clusters << self.cluster_bits
        for number, entry in enumerate(mapping.entries(from_big_endian("Q", data))):
            if not entry:
                continue
            what = f"L2 entry {number} of L1 entry {index} ({name})"
            try:
                mapping.kind_of(entry, (index << mapping.table_shift) + (number << self.cluster_bits))
            except ImageError as error:
                self.report.add(f"{what}: {error.message}")
                continue
            packed = entry & COMPRESSED
            place = mapping.packed_place(entry) if packed else None
            for cluster in clusters_of(entry, place, self.cluster_bits):
                self._count(cluster)
            if packed and entry & COPIED:
                self.report.add(f"{what}: a compressed cluster is marked as not shared")
            elif active and entry & OFFSET_MASK and not packed:
                self._mark(entry)

    def _snapshots(self) -> None:
        header = self.header
        at = header.snapshots_offset
        for number in range(header.nb_snapshots):
            entry = SNAPSHOT.unpack(self._load(at, SNAPSHOT.size))
            if entry["extra_data_size"] > MAX_SNAPSHOT_EXTRA_BYTES or 8 * entry["l1_size"] > MAX_L1_BYTES:
                raise ImageError(f"snapshot {number}: extra_data_size or l1_size is absurd", path=self.file.path,
                                 offset=at)
            self._l1(entry["l1_table_offset"], entry["l1_size"], f"snapshot {number}")
            at += SNAPSHOT.size + entry["extra_data_size"] + entry["id_str_size"] + entry["name_size"]
            at = -(-at // 8) * 8
        if at > header.snapshots_offset:
            self.refer(header.snapshots_offset, at - header.snapshots_offset, "the snapshot table")

    def _bitmaps(self, extension: bytes) -> None:
        if len(extension) < BITMAPS.size:
            self.report.add("the bitmaps extension is cut short")
            return
        fields = BITMAPS.unpack(extension)
        offset, length = fields["directory_offset"], fields["directory_size"]
        if fields["nb_bitmaps"] > MAX_BITMAPS or not 0 < length <= MAX_BITMAP_DIRECTORY_BYTES:
            self.report.add("the bitmaps extension: nb_bitmaps or the directory's size is absurd")
            return
        if not self.refer(offset, length, "the bitmap directory"):
            return
        directory = self._load(offset, length)
        at = 0
        while at + BITMAP.size <= length:
            entry = BITMAP.unpack(directory, at)
            self._bitmap_table(entry["table_offset"], entry["table_size"])
            at += BITMAP.size + entry["name_size"] + entry["extra_data_size"] + 7 & ~7

    def _bitmap_table(self, offset: int, size: int) -> None:
        if 8 * size > MAX_REFCOUNT_TABLE_BYTES or not self.refer(offset, 8 * size, "a bitmap table"):
            return
        for entry in from_big_endian("Q", self._load(offset, 8 * size)):
            if entry & OFFSET_MASK:
                self.refer(entry & OFFSET_MASK, self.header.cluster_bytes, "a bitmap table's entry")

    def compare(self, refcounts: Refcounts) -> None:
        """Hold the refcounts of the image against what was counted, and the COPIED flags against both."""
        blocks = {index for index, entry in enumerate(refcounts.table) if entry}
        for index in sorted(blocks | set(self.counts)):
            if index in blocks and refcounts.table[index] >> self.cluster_bits < self.clusters:
                data = self._load(refcounts.table[index], self.header.cluster_bytes)
            else:
                data = bytes(self.header.cluster_bytes)
            block = RefcountBlock(data, refcounts.order)
            self._compare_block(index, block)
            for mark in self._marks.get(index, ()):
                refcount = block[((mark & OFFSET_MASK) >> self.cluster_bits) % self.per_block]
                if bool(mark & COPIED) != (refcount == 1):
                    self.report.add(f"the reference to {mark & OFFSET_MASK} has its flag for an unshared cluster "
                                    f"{'set' if mark & COPIED else 'not set'}, but the refcount is {refcount}")

    def _compare_block(self, index: int, block: RefcountBlock) -> None:
        counts = self.counts.get(index) or array("I", bytes(4 * self.per_block))
        first = index * self.per_block
        for at, want in enumerate(counts):
            have = block[at]
            if want != have and (have < want or first + at < self.clusters):
                message = f"cluster {first + at}: refcount {have}, referred to {want} times"
                self.report.add(message, leak=have > want)


def rebuild_refcounts(file: ImageFile, header: Header) -> None:
    """Write a new refcount table with right refcounts behind everything else, switch to it, and clear the dirty
    bit with it. Until then nothing of the image is changed. ImageError if the other tables have errors."""
    walk = Walk(file, header)
    walk.run(refcount_tables=False)
    if walk.report.errors:
        raise ImageError("was not closed, and its tables have errors: " + walk.report.messages[0], path=file.path,
                         hint="repair it with qemu-img check -r all, or open it read-only")
    per_block, cluster_bytes = header.refcount_block_entries, header.cluster_bytes
    start = walk.clusters
    table_clusters = blocks = 0
    while True:
        blocks_needed = -(-(start + blocks + table_clusters) // per_block)
        table_needed = -(-8 * blocks_needed // cluster_bytes)
        if (blocks_needed, table_needed) == (blocks, table_clusters):
            break
        blocks, table_clusters = blocks_needed, table_needed
    if table_clusters * cluster_bytes > MAX_REFCOUNT_TABLE_BYTES:
        raise ImageError("is too long for its refcounts to be rebuilt", errno=errno.EFBIG, path=file.path)
    walk.clusters = start + blocks + table_clusters
    walk.refer(start * cluster_bytes, (blocks + table_clusters) * cluster_bytes, "the new refcount table")
    table = array("Q", bytes(table_clusters * cluster_bytes))
    used = sorted(walk.counts)
    for number, index in enumerate(used):
        block = RefcountBlock(bytes(cluster_bytes), header.refcount_order)
        for at, count in enumerate(walk.counts[index]):
            if count > block.max_value:
                raise ImageError("its clusters have more references than a refcount can say", path=file.path)
            if count:
                block[at] = count
        table[index] = (start + number) * cluster_bytes
        file.store(table[index], block.tobytes(), "a refcount block")
    table_offset = (start + blocks) * cluster_bytes
    file.store(table_offset, to_big_endian(table), "the refcount table")
    if not file.is_device:
        file.truncate(walk.clusters * cluster_bytes)
    file.sync_or_raise()
    file.store(0, _switched_header(file, table_offset, table_clusters), "the header")
    file.sync_or_raise()
    file.size_bytes = os.lseek(file.fd, 0, os.SEEK_END)


def _switched_header(file: ImageFile, table_offset: int, table_clusters: int) -> bytes:
    """The header's first bytes, with another refcount table and without the dirty bit, to be written at once."""
    data = bytearray(file.load(0, INCOMPATIBLE_AT + FEATURES.size, "the header"))
    fields = HEADER_V2.unpack(data)
    fields |= {"refcount_table_offset": table_offset, "refcount_table_clusters": table_clusters}
    data[: HEADER_V2.size] = HEADER_V2.pack(**fields)
    bits = FEATURES.unpack(data, INCOMPATIBLE_AT)["bits"] & ~DIRTY
    FEATURES.pack_into(data, INCOMPATIBLE_AT, bits=bits)
    return bytes(data)
