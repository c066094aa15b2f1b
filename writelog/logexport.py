"""What version 1 messages move through the export area of a region, both ways (docs/protocol.md)."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Generator
from typing import Final

from tapcore.errors import LogError
from writelog.bitmap import SECTOR_BYTES
from writelog.dirtymap import CHUNK_BYTES, DirtyMap, Wanted
from writelog.shm import DISK_RANGE, EXPORT_BYTES, MAX_LISTED, MAX_RANGES, Region

STEP_RANGES: Final = 4096
"""Ranges looked for between two looks at the clock."""
MAX_RANGE_SECTORS: Final = 0xFFFFFFFF
CHUNK_SECTORS: Final = CHUNK_BYTES // SECTOR_BYTES


def export_ranges(
    region: Region, step: Callable[[int, int, int], tuple[list[int], int]], start: int, stop: int
) -> Generator[None, None, tuple[int, int]]:
    """Fill the export area with the ranges that `step` (`peek` or `take` of a DirtyMap) finds in the blocks
    [start, stop). Returns how many they are, and the block to go on from when the area is full."""
    area = region.export
    ranges = 0
    last_sector = last_count = 0
    while start < stop and ranges < MAX_RANGES:
        found, start = step(start, stop, min(STEP_RANGES, MAX_RANGES - ranges))
        if found and ranges and found[0] == last_sector + last_count \
                and last_count + found[1] <= MAX_RANGE_SECTORS:
            ranges -= 1
            found[0], found[1] = last_sector, last_count + found[1]
        if found:
            last_sector, last_count = found[-2:]
            at = ranges * DISK_RANGE.size
            ranges += len(found) // 2
            area[at : ranges * DISK_RANGE.size] = memoryview(array("Q", found)).cast("B")
        yield
    if ranges < MAX_RANGES:
        DISK_RANGE.pack_into(area, ranges * DISK_RANGE.size, sector=0, count=0)
    return ranges, start


def listed(dirty_map: DirtyMap, count: int, region: Region) -> Wanted:
    """The `count` ranges in the export area, which the client can change meanwhile: they are copied first."""
    if not 0 < count <= MAX_LISTED:
        raise LogError(f"{count} ranges", errno=errno.EINVAL)
    ranges: list[tuple[int, int]] = []
    last = 0
    for sector, sectors in DISK_RANGE.struct.iter_unpack(bytes(region.export[: count * DISK_RANGE.size])):
        first, stop = dirty_map.outer_blocks(sector, sectors)
        if not (last <= first < stop and sector + sectors <= dirty_map.sectors):
            raise LogError(f"range of {sectors} sectors at {sector}", errno=errno.EINVAL)
        ranges.append((first, stop))
        last = stop
    return Wanted(ranges)


def export_touched(dirty_map: DirtyMap, sector: int, region: Region) -> tuple[int, int]:
    """Move the bits of the chunks written to, from `sector` on, into the export area: their number, and the sector
    to go on from, or 0."""
    if sector % (8 * CHUNK_SECTORS) or (sector and sector >= dirty_map.sectors):
        raise LogError(f"chunks from sector {sector}", errno=errno.EINVAL)
    touched = dirty_map.watch()
    start = sector // CHUNK_SECTORS
    end = min(touched.blocks, start + 8 * EXPORT_BYTES)
    memory = touched.memory[start >> 3 : (end + 7) >> 3]
    region.export[: len(memory)] = memory
    memory[:] = bytes(len(memory))
    return end - start, end * CHUNK_SECTORS if end < touched.blocks else 0
