"""qcow2: which clusters of the file are in use, and the allocation of free ones. No I/O.

    cluster number = | refcount table index | index in the refcount block |

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from typing import Final

from tapcore.errors import ImageError
from tapcore.formats.extents import TableMiss, from_big_endian, to_big_endian
from tapcore.formats.qcow2.layout import COPIED, OFFSET_MASK, Header
from tapcore.formats.tables import SECTOR_BYTES, Tables
from tapcore.layout import Buffer

CACHE_BYTES: Final = 16 << 20
"""Of refcount blocks: with clusters of 64 KiB and 16 bits, for 512 GiB of file at a time."""
MIN_CACHED: Final = 4
MAX_METADATA_KNOWN: Final = 1 << 18
"""Clusters of tables that are kept from being allocated, however wrong their refcounts; more are not looked at."""
REFCOUNTS: Final = "refcount block"

_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}


class RefcountBlock:
    """One cluster of refcounts, 1 << `order` bits each. Below 8 bits the first of a byte is in its lowest bits."""

    def __init__(self, data: Buffer, order: int) -> None:
        self.order = order
        self.max_value = (1 << (1 << order)) - 1
        self._wide: array[int] | None = from_big_endian(_TYPECODES[order], data) if order >= 3 else None
        self._narrow = bytearray(data) if order < 3 else bytearray()
        self._per_byte_bits = 3 - order

    def __len__(self) -> int:
        return len(self._wide) if self._wide is not None else len(self._narrow) << self._per_byte_bits

    def __getitem__(self, at: int) -> int:
        if self._wide is not None:
            return self._wide[at]
        shift = (at << self.order) & 7
        return self._narrow[at >> self._per_byte_bits] >> shift & self.max_value

    def __setitem__(self, at: int, value: int) -> None:
        if self._wide is not None:
            self._wide[at] = value
            return
        shift = (at << self.order) & 7
        byte = self._narrow[at >> self._per_byte_bits]
        self._narrow[at >> self._per_byte_bits] = byte & ~(self.max_value << shift) | value << shift

    def find_free(self, start: int) -> int:
        """The first entry from `start` on that is 0; -1 if none is."""
        if self._wide is not None:
            try:
                return self._wide.index(0, start)
            except ValueError:
                return -1
        count, per_byte = len(self), 1 << self._per_byte_bits
        while start < count:
            if not self[start]:
                return start
            start += 1
            if start % per_byte == 0:
                found = _free_byte(self.order).search(self._narrow, start >> self._per_byte_bits)
                start = found.start() << self._per_byte_bits if found else count
        return -1

    def sector(self, number: int) -> bytes:
        """A sector of it, as in the file."""
        if self._wide is None:
            return bytes(self._narrow[SECTOR_BYTES * number : SECTOR_BYTES * (number + 1)])
        per_sector = SECTOR_BYTES // self._wide.itemsize
        return to_big_endian(self._wide[per_sector * number : per_sector * (number + 1)])

    def part(self, at: int, count: int) -> list[int]:
        """`count` refcounts from `at` on; both multiples of 8."""
        if self._wide is not None:
            return self._wide[at : at + count].tolist()
        if not any(self._narrow[at >> self._per_byte_bits : at + count >> self._per_byte_bits]):
            return [0] * count
        return [self[number] for number in range(at, at + count)]

    def tobytes(self) -> bytes:
        return bytes(self._narrow) if self._wide is None else to_big_endian(self._wide)


def _free_byte(order: int) -> re.Pattern[bytes]:
    """Finds a byte in which a refcount of 1 << `order` bits is 0."""
    mask = (1 << (1 << order)) - 1
    free = [byte for byte in range(256) if any(not byte >> shift & mask for shift in range(0, 8, 1 << order))]
    return re.compile(b"[" + b"".join(b"\\x%02x" % byte for byte in free) + b"]")


class Refcounts:
    """The refcount table and its cached blocks. Changed blocks stay until they were written.

    `reserved` are ranges of clusters, (first, end), that are never given out, whatever the refcounts say.
    """

    def __init__(
        self, header: Header, table: array[int], file_bytes: int, reserved: list[tuple[int, int]]
    ) -> None:
        self.order = header.refcount_order
        self.cluster_bits = header.cluster_bits
        self.cluster_bytes = header.cluster_bytes
        self.per_block = header.refcount_block_entries
        self.sector_entries = SECTOR_BYTES * 8 >> header.refcount_order
        self.table = table
        self.table_offset = header.refcount_table_offset
        self.table_dirty: set[int] = set()
        self.moved_from: list[range] = []
        """Clusters of tables that this one replaced since the last commit."""
        self.moved = False
        """The header does not yet say where this table is."""
        self.blocks: Tables[RefcountBlock] = Tables(max(MIN_CACHED, CACHE_BYTES >> header.cluster_bits))
        self.hint = 0
        """No cluster before this one is free, as far as is known."""
        self.file_end = -(-file_bytes // self.cluster_bytes)
        self.fresh_from = self.file_end
        """From this cluster on the file reads as zeroes unless given out since it was opened."""
        self._reserved = reserved
        self._metadata: set[int] = set()

    def protect(self, offsets: Iterable[int]) -> None:
        """Keep clusters of tables from being allocated."""
        for offset in offsets:
            if offset and len(self._metadata) < MAX_METADATA_KNOWN:
                self._metadata.add(offset >> self.cluster_bits)

    def unprotect(self, offset: int) -> None:
        """The table at `offset` is given up."""
        self._metadata.discard(offset >> self.cluster_bits)

    def block(self, index: int) -> RefcountBlock | None:
        """Block `index`, None if there is none. TableMiss; ImageError for a bad table entry."""
        block = self.blocks.use(index)
        if block is not None:
            return block
        host = self.table[index] if index < len(self.table) else 0
        if not host:
            return None
        if host & ~OFFSET_MASK or host % self.cluster_bytes or host >> self.cluster_bits >= self.file_end:
            raise ImageError(f"refcount table entry {index}, {host:#x}: not the offset of a cluster in the file")
        raise TableMiss(REFCOUNTS, index, host, self.cluster_bytes)

    def install(self, miss: TableMiss, data: bytes) -> None:
        if miss.index in self.blocks or self.table[miss.index] != miss.host:
            return
        self.blocks.put(miss.index, RefcountBlock(data, self.order))

    def get(self, cluster: int) -> int:
        """TableMiss, ImageError."""
        index, at = divmod(cluster, self.per_block)
        block = self.block(index)
        return 0 if block is None else block[at]

    def _set(self, block: RefcountBlock, index: int, at: int, value: int) -> None:
        block[at] = value
        self.blocks.change(index, at // self.sector_entries)

    def release(self, cluster: int) -> None:
        """One reference less. TableMiss; ImageError if there was none."""
        index, at = divmod(cluster, self.per_block)
        block = self.block(index)
        if block is None or not block[at]:
            raise ImageError(f"refcount of cluster {cluster}: already 0, though it was in use")
        self._set(block, index, at, block[at] - 1)
        if not block[at] and cluster < self.hint:
            self.hint = cluster

    def allocate(self, count: int) -> tuple[int, int]:
        """(first cluster, how many) of a contiguous run of free clusters, at least one and at most `count`, now
        with a refcount of 1. TableMiss, before anything is changed; ImageError if a table stands on a free one."""
        cluster = self.hint
        while True:
            index, at = divmod(cluster, self.per_block)
            block = self.block(index)
            if block is None:
                block = self._add_block(index)
            at = block.find_free(at)
            if at >= 0:
                break
            cluster = self.hint = (index + 1) * self.per_block
        first = index * self.per_block + at
        got = 0
        while got < count and at < self.per_block and not block[at]:
            self._check_not_metadata(first + got)
            self._set(block, index, at, 1)
            got += 1
            at += 1
        self.hint = first + got
        self.file_end = max(self.file_end, self.hint)
        return first, got

    def take_fresh(self, first: int, count: int) -> bool:
        """Do clusters just given out read as zeroes? From now on they do not."""
        fresh = first >= self.fresh_from
        self.fresh_from = max(self.fresh_from, first + count)
        return fresh

    def _check_not_metadata(self, cluster: int) -> None:
        if cluster in self._metadata or any(first <= cluster < end for first, end in self._reserved):
            raise ImageError(f"refcount of cluster {cluster}: 0, though a table or the header is there")

    def _add_block(self, index: int) -> RefcountBlock:
        """A refcount block for a part of the file that has none; it lies in that part. If the table is too short,
        a longer one, with the blocks that it needs itself, lies behind it."""
        first, blocks, table_clusters = index * self.per_block, 1, 0
        if index >= len(self.table):
            entries_per_cluster = self.cluster_bytes // 8
            wanted = max(index + 1, len(self.table) * 3 // 2)
            while blocks * self.per_block < blocks + table_clusters or not table_clusters:
                blocks = -(-(blocks + table_clusters) // self.per_block)
                table_clusters = -(-max(wanted, index + blocks) // entries_per_cluster)
        for cluster in range(first, first + blocks + table_clusters):
            self._check_not_metadata(cluster)
        if table_clusters:
            self._move_table(first + blocks, table_clusters)
        for number in range(blocks):
            self.table[index + number] = first + number << self.cluster_bits
            self.table_dirty.add((index + number) // 64)
            self.blocks[index + number] = RefcountBlock(bytes(self.cluster_bytes), self.order)
            self.blocks.change_all(index + number, self.cluster_bytes // SECTOR_BYTES)
        self.protect(first + number << self.cluster_bits for number in range(blocks))
        for cluster in range(first, first + blocks + table_clusters):
            self.blocks[cluster // self.per_block][cluster % self.per_block] = 1
        self.file_end = max(self.file_end, first + blocks + table_clusters)
        self.take_fresh(first, blocks + table_clusters)
        self.blocks.make_room()
        return self.blocks[index]

    def _move_table(self, first: int, clusters: int) -> None:
        former = self.table_offset >> self.cluster_bits
        self._reserved = [(start, end) for start, end in self._reserved if start != former]
        self.moved_from.append(range(former, former + (8 * len(self.table) >> self.cluster_bits)))
        self.moved = True
        self.table_offset = first << self.cluster_bits
        self.table.extend([0] * (clusters * self.cluster_bytes // 8 - len(self.table)))
        self.table_dirty = set(range(len(self.table) // 64))
        self._reserved.append((first, first + clusters))


def clusters_of(entry: int, place: tuple[int, int] | None, cluster_bits: int) -> range:
    """The host clusters that an L2 entry holds a reference to; `place` as of `packed_place` if compressed."""
    if place is not None:
        offset, length = place
        return range(offset >> cluster_bits, (offset + length - 1 >> cluster_bits) + 1)
    host = entry & ~COPIED & OFFSET_MASK
    return range(host >> cluster_bits, (host >> cluster_bits) + (1 if host else 0))
