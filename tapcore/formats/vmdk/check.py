"""vmdk: is every grain where one entry says, and do both copies of the tables say the same?

Specification: VMware, Virtual Disk Format 5.0 (https://www.vmware.com/support/developer/vddk/vmdk_50_technote.pdf).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from typing import Final

from tapcore.driver import SECTOR_BYTES, OpenFlag
from tapcore.errors import ImageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tools import Report
from tapcore.formats.vmdk.descriptor import SPARSE_TYPES, ExtentLine, extent_path
from tapcore.formats.vmdk.layout import GTE_BYTES, GTE_HOLE, Header
from tapcore.formats.vmdk.load import Image, load_directory, load_image, open_sparse
from tapcore.formats.vmdk.mapping import Mapping, from_little_endian, to_little_endian, unpack_grain
from tapcore.formats.vmdk.tables import mark_open

_FREE, _GRAIN, _METADATA = range(3)
MAX_UNALIGNED: Final = 1 << 20
"""Grains that do not begin at a multiple of their size, of which overlaps are looked for."""


def check(path: str, *, repair: bool = False) -> Report:
    """What is wrong with the image at `path`; nothing is changed without `repair`. ImageError if it cannot be
    opened at all."""
    flags = OpenFlag.NONE if repair else OpenFlag.RDONLY
    file = ImageFile.open(path, flags)
    report = Report()
    try:
        image = load_image(file)
        if image.header is not None:
            _check_extent(file, image.header, report)
        for line in [] if image.header is not None else image.descriptor.extents:
            _check_line(image, line, flags, report)
    finally:
        file.close()
    return report


def _check_line(image: Image, line: ExtentLine, flags: OpenFlag, report: Report) -> None:
    try:
        if line.kind in SPARSE_TYPES:
            file, header = open_sparse(image, line, flags, ImageFile.open)
        else:
            file, header = ImageFile.open(extent_path(image.file.path, line.name), flags), None
    except ImageError as error:
        report.add(str(error))
        return
    try:
        end = (line.offset_sectors + line.sectors) * SECTOR_BYTES
        if header is not None:
            _check_extent(file, header, report)
        elif file.size_bytes < end:
            report.add(f"{file.path}: has {file.size_bytes} bytes, but the descriptor needs {end}")
    finally:
        file.close()


def _check_extent(file: ImageFile, header: Header, report: Report) -> None:
    walk = Walk(file, header, report)
    walk.run()
    if not file.read_only:
        if header.unclean and not report.errors:
            mark_open(file, False)
        file.sync_or_raise()


class Walk:
    """Looks at every table of one extent, in memory of a byte for each grain of its file; repairs what it finds if
    the file is open for writing."""

    def __init__(self, file: ImageFile, header: Header, report: Report) -> None:
        self.file = file
        self.header = header
        self.report = report
        self.directory = load_directory(file, header, header.gd_offset)
        self.redundant = load_directory(file, header, header.rgd_offset) if header.rgd_offset else None
        self.mapping = Mapping(header, self.directory, file.size_bytes)
        self._units = bytearray(-(-file.size_bytes // header.grain_bytes))
        """By unit of a grain's size, what is there."""
        self._unaligned = array("Q")

    def run(self) -> None:
        header = self.header
        self._take(0, header.metadata_bytes)
        length = header.directory_entries * GTE_BYTES
        for offset in (header.gd_offset, header.rgd_offset):
            if offset:
                self._take(offset, length)
        for index in range(len(self.directory)):
            table = self._table(index)
            if table is not None:
                self._grains(index, table)
        self._overlaps()
        if not header.compressed and not header.is_cowd and not self.report.errors:
            self._leaks()

    def _take(self, offset: int, length: int) -> None:
        """This range of the file is metadata."""
        unit_bytes = self.header.grain_bytes
        for unit in range(offset // unit_bytes, min(len(self._units), -(-(offset + length) // unit_bytes))):
            self._units[unit] = _METADATA

    # Tables

    def _table(self, index: int) -> array[int] | None:
        """The table, the better one of both copies; None if there is none."""
        one = self._load(self.directory[index])
        if self.redundant is None:
            if one is None and self.directory[index]:
                self.report.add(f"grain directory entry {index}, {self.directory[index]}: no table in the file")
            return one
        two = self._load(self.redundant[index])
        if not self.directory[index] and not self.redundant[index]:
            return None
        if one is None or two is None:
            return self._mend_directory(index, one, two)
        if one != two:
            one = self._mend_table(index, one, two)
        return one

    def _load(self, entry: int) -> array[int] | None:
        offset, length = entry * SECTOR_BYTES, self.header.table_bytes
        if not entry or offset + length > len(self._units) * self.header.grain_bytes:
            return None
        self._take(offset, length)
        return from_little_endian(self.file.load(offset, length, "a grain table"))

    def _mend_directory(self, index: int, one: array[int] | None, two: array[int] | None) -> array[int] | None:
        assert self.redundant is not None
        which = "the redundant grain directory" if two is None else "the grain directory"
        table = two if one is None else one
        self.report.add(f"entry {index} of {which} has no table in the file"
                        + (", and neither has the other" if table is None else ""))
        if table is None or self.file.read_only or self._bad_entries(index, table):
            return table
        end = -(-self.file.length_now() // self.header.grain_bytes) * self.header.grain_bytes
        self.file.store(end, to_little_endian(table), "a grain table")
        self.file.truncate(end + self.header.grain_bytes)
        self.file.sync_or_raise()
        base = self.header.rgd_offset if two is None else self.header.gd_offset
        entry = to_little_endian(array("I", [end // SECTOR_BYTES]))
        self.file.store(base + index * GTE_BYTES, entry, "the grain directory")
        (self.redundant if two is None else self.directory)[index] = end // SECTOR_BYTES
        self._repaired()
        return table

    def _mend_table(self, index: int, one: array[int], two: array[int]) -> array[int]:
        assert self.redundant is not None
        better, place = one, self.redundant[index]
        if self._bad_entries(index, one) and not self._bad_entries(index, two):
            better, place = two, self.directory[index]
        self.report.add(f"grain table {index} and its redundant copy differ", leak=self.header.unclean)
        if not self.file.read_only and not self._bad_entries(index, better):
            self.file.store(place * SECTOR_BYTES, to_little_endian(better), "a grain table")
            self._repaired(leak=self.header.unclean)
        return better

    def _repaired(self, count: int = 1, *, leak: bool = False) -> None:
        self.report.repaired += count
        if leak:
            self.report.leaks -= count
        else:
            self.report.errors -= count

    def _bad_entries(self, index: int, table: array[int]) -> list[str]:
        """The first of what cannot be right."""
        for at, entry in enumerate(table):
            if entry:
                try:
                    self.mapping.kind_of(entry, (index << self.mapping.table_bits) + at * self.header.grain_bytes)
                except ImageError as error:
                    return [error.message]
        return []

    # Grains

    def _grains(self, index: int, table: array[int]) -> None:
        if not any(table):
            return
        header, mapping = self.header, self.mapping
        absent = 0
        for at, entry in enumerate(table):
            if not entry:
                continue
            guest = (index << mapping.table_bits) + at * header.grain_bytes
            try:
                host = mapping.kind_of(entry, guest)[1]
            except ImageError as error:
                self.report.add(error.message)
                if entry >= mapping.end_sector:
                    table[at] = GTE_HOLE
                    absent += 1
                continue
            if header.compressed:
                self._packed(guest, host)
            elif guest >= header.size_bytes:
                self.report.add(f"grain table entry {entry} of guest offset {guest}: that is past the disk's end",
                                leak=True)
            elif host:
                self._grain(guest, host)
        if absent and not self.file.read_only:
            self._forget(index, table, absent)

    def _forget(self, index: int, table: array[int], count: int) -> None:
        """Write the table without grains that are not in the file: it was cut short, and their data is lost."""
        for copy in (self.directory, self.redundant):
            if copy is not None and self._load(copy[index]) is not None:
                self.file.store(copy[index] * SECTOR_BYTES, to_little_endian(table), "a grain table")
        self._repaired(count)

    def _grain(self, guest: int, host: int) -> None:
        unit, within = divmod(host, self.header.grain_bytes)
        if within:
            if len(self._unaligned) < MAX_UNALIGNED:
                self._unaligned.append(host)
        elif self._units[unit]:
            self.report.add(f"the grain of guest offset {guest}, at {host}, is used by something else too")
        else:
            self._units[unit] = _GRAIN

    def _overlaps(self) -> None:
        unit_bytes, last = self.header.grain_bytes, -1
        taken = bytes(self._units) if self._unaligned else b""
        for host in sorted(self._unaligned):
            first = host // unit_bytes
            if host < last or _GRAIN in taken[first : first + 2]:
                self.report.add(f"the grain at {host} is used by something else too")
            last = host + unit_bytes
            for unit in range(first, min(first + 2, len(self._units))):
                self._units[unit] = _GRAIN

    def _packed(self, guest: int, host: int) -> None:
        place, length = self.mapping.packed_place(host)
        try:
            lba, _ = unpack_grain(self.header, self.file.load(place, length, "a grain"))
        except ImageError as error:
            self.report.add(f"the grain of guest offset {guest}, at {host}: {error.message}")
            return
        if lba is not None and lba * SECTOR_BYTES != guest:
            self.report.add(f"the grain of guest offset {guest}, at {host}: its marker says that it is for sector "
                            f"{lba}")

    def _leaks(self) -> None:
        """Space that nothing points at. What is a hole in the file takes none."""
        unit_bytes = self.header.grain_bytes
        for unit in self._unused():
            self.report.add(f"{unit_bytes} bytes at {unit * unit_bytes} are in use by nothing", leak=True)
            if not self.file.read_only:
                self.file.discard(unit * unit_bytes, unit_bytes)
                self._repaired(leak=True)

    def _unused(self) -> Iterator[int]:
        unit_bytes, offset = self.header.grain_bytes, 0
        unit = self._units.find(_FREE)
        while unit >= 0:
            if unit * unit_bytes >= offset:
                offset = self._next_data(unit * unit_bytes)
            if offset < (unit + 1) * unit_bytes:
                yield unit
            unit = self._units.find(_FREE, max(unit + 1, offset // unit_bytes))

    def _next_data(self, offset: int) -> int:
        """Where the file has data from `offset` on; far behind its end if nowhere."""
        try:
            return os.lseek(self.file.fd, offset, os.SEEK_DATA)
        except OSError:
            return len(self._units) * self.header.grain_bytes
