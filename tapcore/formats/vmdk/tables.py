"""vmdk: the two copies of directory and tables: both there, and in step, before an extent is written.

    redundant directory ─▶ redundant tables ─┐
                                             ├─▶ grains
    directory ───────────▶ tables ───────────┘     (this one is read)
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections.abc import Iterator
from typing import Final

from tapcore.driver import SECTOR_BYTES
from tapcore.errors import ImageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.vmdk.layout import GTE_HOLE, GTE_ZERO, UNCLEAN_AT, Header
from tapcore.formats.vmdk.load import load_directory
from tapcore.formats.vmdk.mapping import from_little_endian, to_little_endian

logger = logging.getLogger(__name__)

MAX_TABLES_AT_ONCE: Final = 512
HINT: Final = "repair it with td-img check --repair, or open it read-only"


def prepare_for_writing(file: ImageFile, header: Header) -> tuple[array[int], array[int] | None]:
    """The directory and the redundant one (None: the extent has none), with a table of their own in every entry:
    those that are missing are made. Of an extent that was not closed the redundant tables are brought in step.
    ImageError for what contradicts itself: it is not written then."""
    directory = load_directory(file, header, header.gd_offset)
    redundant = load_directory(file, header, header.rgd_offset) if header.rgd_offset else None
    copies = [directory] if redundant is None else [directory, redundant]
    _check_entries(file, header, copies)
    _check_grains(file, header, directory)
    if 0 in directory:
        _make_tables(file, header, directory, redundant)
    if redundant is not None and header.unclean:
        logger.warning("%s: was not closed; its redundant grain tables are brought in step", file.path)
        for place, data in _differing(file, header, directory, redundant):
            _check_table(file, header, place, data)
            file.store(place, data, "a grain table")
        file.sync_or_raise()
        mark_open(file, False)
        file.sync_or_raise()
    return directory, redundant


def _check_entries(file: ImageFile, header: Header, copies: list[array[int]]) -> None:
    end = file.size_bytes // SECTOR_BYTES * SECTOR_BYTES - header.table_bytes
    for name, entries in zip(("directory", "redundant directory"), copies, strict=False):
        for index, entry in enumerate(entries):
            if entry and not SECTOR_BYTES <= entry * SECTOR_BYTES <= end:
                raise ImageError(f"grain {name} entry {index}, {entry}, is not the place of a grain table",
                                 path=file.path, errno=errno.EINVAL, hint=HINT)
    used = [entry for entries in copies for entry in entries if entry]
    if len(set(used)) != len(used):
        raise ImageError("its grain directories have two entries for one grain table", path=file.path,
                         errno=errno.EINVAL, hint=HINT)
    if len(copies) == 2 and any(bool(one) != bool(two) for one, two in zip(*copies, strict=True)):
        raise ImageError("its grain directories contradict each other: one has tables that the other has not",
                         path=file.path, errno=errno.EINVAL, hint=HINT)


def _check_grains(file: ImageFile, header: Header, directory: array[int]) -> None:
    """Refuse an extent that was cut short: grains that it lacks would be found where new ones are appended."""
    end = -(-file.size_bytes // SECTOR_BYTES)
    for first, tables in _neighbours(header, directory):
        data = file.load(first * SECTOR_BYTES, tables * header.table_bytes, "grain tables")
        if data != bytes(len(data)) and max(from_little_endian(data)) >= end:
            raise ImageError("its grain tables name grains behind the file's end: it was cut short, or is damaged",
                             path=file.path, errno=errno.EINVAL, offset=first * SECTOR_BYTES, hint=HINT)


def _neighbours(header: Header, directory: array[int]) -> Iterator[tuple[int, int]]:
    """The tables as (first sector, number of those that follow each other), not too many at once."""
    step = header.table_bytes // SECTOR_BYTES
    first, tables = 0, 0
    for entry in directory:
        if tables and entry == first + tables * step and tables < MAX_TABLES_AT_ONCE:
            tables += 1
            continue
        if tables:
            yield first, tables
        first, tables = entry, bool(entry)
    if tables:
        yield first, tables


def _check_table(file: ImageFile, header: Header, place: int, data: bytes) -> None:
    """A table of nonsense must not overwrite what may be its only good copy."""
    lowest = GTE_ZERO + 1 if header.has_zero_grain else GTE_HOLE + 1
    first, end = header.metadata_bytes // SECTOR_BYTES, -(-file.size_bytes // SECTOR_BYTES)
    for entry in from_little_endian(data):
        if entry >= lowest and not first <= entry < end:
            raise ImageError(f"was not closed, and its grain tables have errors: {entry} is no grain's place",
                             path=file.path, errno=errno.EINVAL, offset=place, hint=HINT)


def _make_tables(file: ImageFile, header: Header, directory: array[int], redundant: array[int] | None) -> None:
    """Empty tables behind everything else, durable before the directories point at them."""
    at = -(-file.size_bytes // header.grain_bytes) * header.grain_bytes
    step = -(-header.table_bytes // SECTOR_BYTES)
    sector = at // SECTOR_BYTES
    for index, entry in enumerate(directory):
        if entry:
            continue
        directory[index] = sector
        sector += step
        if redundant is not None:
            redundant[index] = sector
            sector += step
    if sector >= 1 << 32:
        raise ImageError("is too long to get more grain tables", path=file.path, errno=errno.EFBIG)
    file.size_bytes = -(-sector * SECTOR_BYTES // header.grain_bytes) * header.grain_bytes
    file.truncate(file.size_bytes)
    file.sync_or_raise()
    if redundant is not None:
        file.store(header.rgd_offset, to_little_endian(redundant), "the redundant grain directory")
    file.store(header.gd_offset, to_little_endian(directory), "the grain directory")
    file.sync_or_raise()


def _differing(
    file: ImageFile, header: Header, directory: array[int], redundant: array[int]
) -> Iterator[tuple[int, bytes]]:
    """(place of the redundant table, the table) where the copies differ. ImageError if one cannot be read."""
    for one, two in zip(directory, redundant, strict=True):
        data = file.load(one * SECTOR_BYTES, header.table_bytes, "a grain table")
        if data != file.load(two * SECTOR_BYTES, header.table_bytes, "a redundant grain table"):
            yield two * SECTOR_BYTES, data


def mark_open(file: ImageFile, is_open: bool) -> None:
    """Write uncleanShutdown; durable after a sync. ImageError."""
    file.store(UNCLEAN_AT, bytes([is_open]), "the header")
