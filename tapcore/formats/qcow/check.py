"""qcow: what is wrong with an image.

    errors    entries that cannot be right; tables or clusters that overlap
    leaks     data, in units of 4 KiB of the file, that belong to nothing: a crash leaves them, and so does a
              compressed cluster that is overwritten

Repaired are leaks: their space is given back, and the file cut where its use ends. With errors nothing is: what
they led to may look leaked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Final

from bitarray import bitarray
from bitarray.util import zeros

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError
from tapcore.formats.commit import runs
from tapcore.formats.extents import DATA, from_big_endian
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow.driver import load_l1
from tapcore.formats.qcow.layout import COMPRESSED, HEADER, Header, load_header
from tapcore.formats.qcow.mapping import Mapping
from tapcore.formats.tools import Report

MAX_CLUSTERS: Final = 1 << 30
"""Of the file: 4 TiB with clusters of 4 KiB, and 256 MiB of memory."""

PAGE_BYTES: Final = 4096


def check(path: str, *, repair: bool = False) -> Report:
    """ImageError if the image cannot be opened at all; repairing takes the lock of a writer."""
    file = ImageFile.open(path, OpenFlag.NONE if repair else OpenFlag.RDONLY)
    try:
        header = load_header(file)
        walk = _Walk(file, header)
        walk.run()
        report = walk.report
        if repair and not report.errors and report.leaks:
            walk.free()
            report.repaired, report.leaks = report.leaks, 0
        return report
    finally:
        file.close()


class _Walk:
    def __init__(self, file: ImageFile, header: Header) -> None:
        self._file = file
        self._header = header
        self._clusters = -(-file.size_bytes >> header.cluster_bits)
        if self._clusters > MAX_CLUSTERS:
            raise ImageError("has more clusters than can be checked", errno=errno.E2BIG, path=file.path)
        self._used: bitarray = zeros(self._clusters)
        """By cluster of the file: something is there."""
        self._whole: bitarray = zeros(self._clusters)
        """… and nothing else may be."""
        self._leaked: list[int] = []
        """Offsets of pages."""
        self.report = Report()

    def run(self) -> None:
        file, header = self._file, self._header
        self._claim(0, HEADER.size, "the header", alone=False)
        self._claim(header.l1_table_offset, 8 * header.l1_size, "the L1 table", alone=False)
        if header.name_range[1]:
            start, end = header.name_range
            self._claim(start, end - start, "the backing file's name", alone=False)
        mapping = Mapping(header, load_l1(file, header))
        mapping.file_bytes = file.size_bytes
        for index, host in enumerate(mapping.l1):
            if host:
                self._table(mapping, index, host)
        self._find_leaks()

    def _table(self, mapping: Mapping, index: int, host: int) -> None:
        what = f"the L2 table of L1 entry {index}"
        if host % 512 or host >= mapping.file_bytes or not mapping.is_free_for(host, self._header.l2_bytes):
            self.report.add(f"L1 entry {index}: {host:#x} is no place for an L2 table")
            return
        if not self._claim(host, self._header.l2_bytes, what):
            return
        table = from_big_endian("Q", self._file.load(host, self._header.l2_bytes, "an L2 table"))
        for number, entry in enumerate(table):
            if not entry:
                continue
            what = f"L2 entry {number} of L1 entry {index}"
            try:
                kind, host = mapping.kind_of(entry, 0)
            except ImageError:
                self.report.add(f"{what}: {entry:#x} is no place for a cluster")
                continue
            if kind == DATA:
                self._claim(host, mapping.unit_bytes, what)
            else:
                self._claim(*mapping.packed_place(entry & ~COMPRESSED), what, alone=False)

    def _claim(self, offset: int, length: int, what: str, *, alone: bool = True) -> bool:
        """False, and an error, if something else is there. What need not be alone in its clusters, or is not
        aligned to them, shares them with others of that kind."""
        bits = self._header.cluster_bits
        alone &= not offset & self._header.cluster_bytes - 1
        first, last = offset >> bits, min(self._clusters, (offset + length - 1 >> bits) + 1)
        taken = self._used if alone else self._whole
        if taken.find(1, first, last) >= 0:
            self.report.add(f"{what}: {offset:#x} is in use by something else")
            return False
        self._used[first:last] = 1
        if alone:
            self._whole[first:last] = 1
        return True

    def _find_leaks(self) -> None:
        bits = self._header.cluster_bits
        at = self._used.find(0)
        while at >= 0:
            end = self._used.find(1, at)
            end = self._clusters if end < 0 else end
            self._leaked += self._data_in(-(-(at << bits) & -PAGE_BYTES), end << bits & -PAGE_BYTES)
            at = self._used.find(0, end) if end < self._clusters else -1
        if self._leaked:
            total = len(self._leaked) * PAGE_BYTES
            self.report.leaks = max(1, total >> bits)
            self.report.messages.append(f"{total} bytes belong to nothing, from {self._leaked[0]:#x} on")

    def _data_in(self, start: int, end: int) -> Iterator[int]:
        """Pages in a range of the file that are not all zeroes."""
        while start < end:
            try:
                data = os.lseek(self._file.fd, start, os.SEEK_DATA)
                hole = os.lseek(self._file.fd, data, os.SEEK_HOLE)
            except OSError:
                return  # no data from here on
            for at in range(data, min(end, hole), PAGE_BYTES):
                if any(self._file.load(at, PAGE_BYTES, "unused space")):
                    yield at
            start = hole

    def free(self) -> None:
        """Give the space of leaks back, and cut the file."""
        file, end = self._file, self._used.find(1, right=True) + 1 << self._header.cluster_bits
        for first, count in runs(at // PAGE_BYTES for at in self._leaked):
            file.discard(first * PAGE_BYTES, count * PAGE_BYTES)
        if not file.is_device and file.size_bytes > end:
            file.truncate(end)
        file.sync_or_raise()
