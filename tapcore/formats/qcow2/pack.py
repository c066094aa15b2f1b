"""qcow2: a new image whose clusters are compressed, written from front to back.

    header | compressed clusters, one behind the other, and plain ones | an L2 table | … | L1 table | refcounts

A cluster that does not shrink is plain. What holds only zeroes is left out. The header comes last: without it the
file is no image.

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import errno
import os
import zlib
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias

import zstandard

from tapcore.errors import ImageError, UsageError, image_error
from tapcore.formats.extents import to_big_endian
from tapcore.formats.qcow2.create import check_shape, l1_entries, new_header
from tapcore.formats.qcow2.layout import (
    COMPRESSED,
    COMPRESSION_TYPE,
    COMPRESSIONS,
    COPIED,
    MAX_REFCOUNT_TABLE_BYTES,
)
from tapcore.layout import Buffer

SECTOR_BYTES: Final = 512
DEFLATE_WINDOW_BITS: Final = -12
"""The window that QEMU reads with."""
MAX_REFERENCES: Final = (1 << 16) - 1
REFCOUNT_BYTES: Final = 2
Cluster: TypeAlias = bytes | memoryview
THREADS: Final = min(os.cpu_count() or 1, 8)


def pack(cluster: Cluster, compression: str) -> bytes:
    """The compressed bytes of a cluster."""
    if compression == "zstd":
        return zstandard.ZstdCompressor().compress(cluster)
    deflate = zlib.compressobj(wbits=DEFLATE_WINDOW_BITS)
    return deflate.compress(cluster) + deflate.flush()


class PackedImage:
    """A Packer. `unit_bytes` are those of a cluster: all that is written at a time are whole clusters, but for the
    disk's end."""

    def __init__(
        self, path: str, size_bytes: int, *, version: int = 3, cluster_bits: int = 16, compression: str = "zlib"
    ) -> None:
        """UsageError for what no image can be; ImageError if the file exists or cannot be made."""
        check_shape(size_bytes, version, cluster_bits, 8 * REFCOUNT_BYTES, compression)
        if version == 2 and compression != "zlib":
            raise UsageError("qcow2 version 2 has zlib alone")
        self._l1 = array("Q", bytes(8 * l1_entries(size_bytes, cluster_bits)))
        self.path = path
        self.unit_bytes = 1 << cluster_bits
        self._size_bytes = size_bytes
        self._version = version
        self._bits = cluster_bits
        self._compression = compression
        self._table = array("Q", bytes(self.unit_bytes))
        self._table_index = 0
        self._refcounts = array("H", [1])
        self._end = self.unit_bytes
        """Of the file, a cluster's start."""
        self._packed_end = 0
        """Where the next compressed cluster has room, if that is not a cluster's start."""
        self._pool = ThreadPoolExecutor(THREADS, "pack")
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise image_error(error, path, "create the image") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        except BaseException:
            Path(self.path).unlink()
            raise
        else:
            if error is not None:
                Path(self.path).unlink()
        finally:
            self._pool.shutdown()
            os.close(self._fd)

    def write(self, offset: int, data: Buffer) -> None:
        """Offsets go up. ImageError."""
        assert offset % self.unit_bytes == 0
        clusters = list(self._clusters(memoryview(data)))
        packed = self._pool.map(lambda cluster: pack(cluster, self._compression) if any_set(cluster) else b"",
                                clusters)
        for cluster, small in zip(clusters, packed, strict=True):
            if small:
                self._add(offset, cluster, small)
            offset += self.unit_bytes

    def _clusters(self, data: memoryview) -> Iterator[Cluster]:
        for start in range(0, len(data), self.unit_bytes):
            cluster = data[start : start + self.unit_bytes]
            yield cluster if len(cluster) == self.unit_bytes else bytes(cluster).ljust(self.unit_bytes, b"\0")

    def _add(self, offset: int, cluster: Cluster, packed: bytes) -> None:
        number = offset >> self._bits
        index, at = divmod(number, len(self._table))
        if index != self._table_index:
            self._end_table()
            self._table_index = index
        if len(packed) < self.unit_bytes:
            self._table[at] = self._add_packed(packed)
        else:
            host = self._take(self.unit_bytes)
            self._put(host, cluster)
            self._table[at] = host | COPIED

    def _add_packed(self, packed: bytes) -> int:
        """Write a compressed cluster; its L2 entry."""
        length = len(packed)
        room = -self._packed_end % self.unit_bytes
        if room < length and self._packed_end + room == self._end:
            host = self._packed_end
            self._take(length - room, 0)
        else:
            host = self._packed_end if length <= room else self._take(length, 0)
        self._packed_end = host + length
        first, last = host >> self._bits, host + length - 1 >> self._bits
        if self._refcounts[first] == MAX_REFERENCES:
            raise ImageError("more compressed clusters than can be counted share one of the file", path=self.path,
                             errno=errno.EFBIG, hint="choose smaller clusters")
        for cluster in range(first, last + 1):
            self._refcounts[cluster] += 1
        self._put(host, packed)
        sectors = (host + length - 1) // SECTOR_BYTES - host // SECTOR_BYTES
        return COMPRESSED | sectors << 62 - (self._bits - 8) | host

    def _take(self, length: int, references: int = 1) -> int:
        """Whole clusters at the end of the file, with so many references to each."""
        host = self._end
        count = -(-length >> self._bits)
        self._end += count << self._bits
        self._refcounts.extend([references] * count)
        return host

    def _put(self, host: int, data: Buffer) -> None:
        view = memoryview(data)
        try:
            while len(view):
                written = os.pwrite(self._fd, view, host)
                view = view[written:]
                host += written
        except OSError as error:
            raise image_error(error, self.path, "write the image") from error

    def _end_table(self) -> None:
        if any(self._table):
            host = self._take(self.unit_bytes)
            self._put(host, to_big_endian(self._table))
            self._l1[self._table_index] = host | COPIED
            self._table = array("Q", bytes(self.unit_bytes))

    def _finish(self) -> None:
        """The tables, then the header; durable."""
        self._end_table()
        l1_offset = self._take(8 * len(self._l1))
        self._put(l1_offset, to_big_endian(self._l1))
        table_offset, table_clusters = self._put_refcounts()
        header = new_header(
            self._version, self.unit_bytes, None, None, None, size=self._size_bytes, cluster_bits=self._bits,
            l1_size=len(self._l1), l1_table_offset=l1_offset, refcount_table_offset=table_offset,
            refcount_table_clusters=table_clusters, refcount_order=(8 * REFCOUNT_BYTES).bit_length() - 1,
            incompatible_features=COMPRESSION_TYPE if self._compression != "zlib" else 0, compatible_features=0,
            autoclear_features=0, compression_type=COMPRESSIONS.index(self._compression))
        try:
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
            self._put(0, header)
            os.fsync(self._fd)
        except OSError as error:
            raise image_error(error, self.path, "make the image durable") from error

    def _put_refcounts(self) -> tuple[int, int]:
        """The offset of the refcount table, and its length in clusters."""
        per_block = self.unit_bytes // REFCOUNT_BYTES
        blocks = table_clusters = 0
        while True:
            total = len(self._refcounts) + blocks + table_clusters
            needed = -(-total // per_block), -(-8 * blocks // self.unit_bytes)
            if needed == (blocks, table_clusters):
                break
            blocks, table_clusters = needed
        if table_clusters * self.unit_bytes > MAX_REFCOUNT_TABLE_BYTES:
            raise ImageError("the refcount table would be too large", path=self.path, errno=errno.EFBIG,
                             hint="choose larger clusters")
        table_offset = self._take(table_clusters * self.unit_bytes)
        first_block = self._take(blocks * self.unit_bytes)
        places = range(first_block, self._end, self.unit_bytes)
        self._put(table_offset, to_big_endian(array("Q", places)))
        for number, host in enumerate(places):
            block = self._refcounts[number * per_block : (number + 1) * per_block]
            self._put(host, to_big_endian(block).ljust(self.unit_bytes, b"\0"))
        return table_offset, table_clusters


def any_set(cluster: Cluster) -> bool:
    """Is any byte not zero?"""
    zeroes: Buffer = bytearray(len(cluster))  # which compares itself by memcmp
    return zeroes != cluster
