"""qcow2: another image made of the one in the file, and switched to at once.

    new tables, in space that the image in the file does not use │ header │ space given up returned, file cut
                                                                 ▲        ▲ barriers (fdatasync)

The header's fields that lead to all tables lie in its first sector, which is written whole or not at all: before
that write nothing of the image was changed, after it the new image is complete, with exact refcounts and COPIED
flags. A crash leaves the one or the other; its leftovers are in space without a reference or refcount.

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import errno
import os
from array import array
from contextlib import suppress
from itertools import groupby

from tapcore.errors import ImageError
from tapcore.formats.commit import runs
from tapcore.formats.extents import to_big_endian
from tapcore.formats.qcow2.header import write_fields
from tapcore.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    COMPRESSED,
    COPIED,
    DIRTY,
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
)
from tapcore.formats.qcow2.refcounts import RefcountBlock
from tapcore.formats.qcow2.snapshot_table import Entry, pack_snapshots
from tapcore.formats.qcow2.walk import Walk


class Rewrite:
    """Takes a walk that found no error in the tables, and whose `counts` are those of the new image without what
    `count_tables` counts. Set what shall differ, then `run`."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._file = walk.file
        self._counts = walk.counts
        self._cluster_bits = walk.cluster_bits
        self._cluster_bytes = walk.header.cluster_bytes
        self.l1 = walk.l1[:]
        self.tables: dict[int, array[int]] = {}
        """By L1 index, L2 tables that are not in the file, of which nothing but the content is counted."""
        self.snapshots: list[Entry] = [entry.completed(walk.header) for entry in walk.snapshots]
        self.taken: Entry | None = None
        """A new snapshot, of the new active tables."""
        self.fields: dict[str, int] = {}
        """Of the header."""

    def run(self) -> None:
        """ImageError if it cannot be done; then the image is as it was."""
        for index, entry in enumerate(self.l1):
            if entry & OFFSET_MASK or index in self.tables:
                self.l1[index] = self._place_l2(index, entry)
        for index, entry in enumerate(self.l1):
            if entry & OFFSET_MASK:
                alone = self._counts.get((entry & OFFSET_MASK) >> self._cluster_bits) == 1
                self.l1[index] = entry & ~COPIED | (COPIED if alone else 0)
        self._place_l1()
        self._place_snapshots()
        self._place_refcounts()
        self._file.sync_or_raise()
        header = self._walk.header
        kept = header.autoclear_features & AUTOCLEAR_BITMAPS | header.autoclear_kept
        self.fields.setdefault("autoclear_features", kept)
        write_fields(self._file, self.fields)
        self._file.sync_or_raise()
        self._clean()

    def _store(self, data: bytes, what: str) -> int:
        """Write `data` to new clusters; returns the offset."""
        first = self._counts.take(-(-len(data) // self._cluster_bytes))
        self._write(first, data, what)
        return first << self._cluster_bits

    def _write(self, first: int, data: bytes, what: str) -> None:
        whole = data.ljust(-(-len(data) // self._cluster_bytes) * self._cluster_bytes, b"\0")
        self._file.store(first << self._cluster_bits, whole, what)

    def _keep(self, offset: int, length: int) -> None:
        """A table stays where it is."""
        first = offset >> self._cluster_bits
        for cluster in range(first, first + -(-length >> self._cluster_bits)):
            self._counts.add(cluster, 1)

    # Tables

    def _place_l2(self, index: int, entry: int) -> int:
        """The L1 entry, but for its own COPIED flag, of a table with right flags: the present one, or a copy."""
        refs = 2 if self.taken else 1
        host = entry & OFFSET_MASK
        table = self.tables.get(index)
        if table is None:
            table = self._walk.load_table(host, self._cluster_bytes // 8, "an L2 table")
            if not self._set_flags(table):
                return entry
            self._counts.add(host >> self._cluster_bits, -refs)
        else:
            self._set_flags(table)
        first = self._counts.take(1, refs)
        self._write(first, to_big_endian(table), "an L2 table")
        return entry & ~OFFSET_MASK | first << self._cluster_bits

    def _set_flags(self, table: array[int]) -> bool:
        """True if a flag was not right."""
        if self._walk.header.data_file is not None:
            return False
        changed = False
        get, cluster_bits = self._counts.get, self._cluster_bits
        for at in range(0, len(table), 2 if self._walk.header.has_subclusters else 1):
            entry = table[at]
            host = entry & OFFSET_MASK
            if not host or entry & COMPRESSED:
                continue
            alone = get(host >> cluster_bits) == 1
            if bool(entry & COPIED) != alone:
                table[at] = entry ^ COPIED
                changed = True
        return changed

    def _place_l1(self) -> None:
        header = self._walk.header
        if self.taken is not None:
            self.snapshots.append(self.taken.with_l1(self._store(to_big_endian(self.l1), "the snapshot's L1 table")
                                                     if self.l1 else 0))
        if self.l1 == self._walk.l1:
            self._keep(header.l1_table_offset, 8 * header.l1_size)
            return
        self.fields["l1_size"] = len(self.l1)
        self.fields["l1_table_offset"] = self._store(to_big_endian(self.l1), "the L1 table") if self.l1 else 0

    def _place_snapshots(self) -> None:
        header = self._walk.header
        if self.snapshots == self._walk.snapshots:
            self._keep(header.snapshots_offset, self._walk.snapshot_table_bytes)
            return
        self.fields["nb_snapshots"] = len(self.snapshots)
        table = pack_snapshots(self.snapshots)
        self.fields["snapshots_offset"] = self._store(table, "the snapshot table") if table else 0

    # Refcounts

    def _place_refcounts(self) -> None:
        """A block wherever anything is counted, the blocks and the table themselves included."""
        per_block = self._walk.header.refcount_block_entries
        blocks: dict[int, int] = {}
        table_first = table_clusters = 0
        while True:
            missing = {cluster // per_block for cluster, _ in self._counts.used()} - blocks.keys()
            for index in sorted(missing):
                blocks[index] = self._counts.take(1)
            needed = -(-8 * (max(blocks) + 1) >> self._cluster_bits)
            if not missing and needed <= table_clusters:
                break
            if needed > table_clusters:
                for cluster in range(table_first, table_first + table_clusters):
                    self._counts.add(cluster, -1)
                table_first, table_clusters = self._counts.take(needed), needed
        if table_clusters << self._cluster_bits > MAX_REFCOUNT_TABLE_BYTES:
            raise ImageError("is too long for its refcounts to be made anew", errno=errno.EFBIG,
                             path=self._file.path)
        self._write_blocks(blocks, per_block)
        table = array("Q", bytes(table_clusters << self._cluster_bits))
        for index, first in blocks.items():
            table[index] = first << self._cluster_bits
        self._write(table_first, to_big_endian(table), "the refcount table")
        self.fields |= {"refcount_table_offset": table_first << self._cluster_bits,
                        "refcount_table_clusters": table_clusters}

    def _write_blocks(self, blocks: dict[int, int], per_block: int) -> None:
        for index, group in groupby(self._counts.used(), lambda found: found[0] // per_block):
            block = RefcountBlock(bytes(self._cluster_bytes), self._walk.header.refcount_order)
            for cluster, refs in group:
                if refs > block.max_value:
                    raise ImageError(f"cluster {cluster} would have {refs} references, more than a refcount of "
                                     f"{1 << block.order} bits can say", errno=errno.EOVERFLOW,
                                     path=self._file.path, hint="td-img convert makes one with wider refcounts")
                block[cluster % per_block] = refs
            self._write(blocks[index], block.tobytes(), "a refcount block")

    # Afterwards

    def _clean(self) -> None:
        """Return the space that was given up. Best effort: the image is whole without it."""
        for first, count in runs(self._counts.given_up()):
            self._file.discard(first << self._cluster_bits, count << self._cluster_bits)
        if not self._file.is_device:
            end = 0
            for cluster, _ in self._counts.used():
                end = cluster + 1
            with suppress(OSError):
                self._file.truncate(end << self._cluster_bits)
        self._file.size_bytes = os.lseek(self._file.fd, 0, os.SEEK_END)


def begin(walk: Walk) -> Rewrite:
    """Of a walk that was run, if it found no error. ImageError with the first one if it did."""
    if walk.report.errors:
        raise ImageError("its tables have errors: " + walk.report.messages[0], path=walk.file.path,
                         hint="look at it with td-img check; qemu-img check -r all drops such entries")
    walk.count_tables(0)
    rewrite = Rewrite(walk)
    rewrite.fields["incompatible_features"] = walk.header.incompatible_features & ~DIRTY
    return rewrite
