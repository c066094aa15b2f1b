"""VHD: what is wrong with an image, and its repair.

    errors    a damaged copy of the footer; a damaged batmap, or one that calls blocks full which are not; BAT
              entries that name no block of the file, or overlap
    leaks     places for blocks in which none is: a crash leaves them at the end of the file

Repaired are the copies, the batmap, and what is leaked at the end of the file.
"""

from __future__ import annotations

from array import array
from heapq import merge

from tapcore.driver import OpenFlag
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tools import Report
from tapcore.formats.vhd.driver import repair_copies
from tapcore.formats.vhd.layout import FIXED, SECTOR_BYTES, UNUSED, Image, round_up
from tapcore.formats.vhd.load import (
    batmap_writes,
    end_of_blocks,
    find_overlaps,
    load_full_blocks,
    load_image,
    load_table,
    metadata_ranges,
    used_entries,
)


def check(path: str, *, repair: bool = False) -> Report:
    """ImageError if the image cannot be opened at all; repairing takes the lock of a writer."""
    file = ImageFile.open(path, OpenFlag.NONE if repair else OpenFlag.RDONLY)
    try:
        return _check(file, repair)
    finally:
        file.close()


def _check(file: ImageFile, repair: bool) -> Report:
    report = Report()
    image = load_image(file)
    table, full = array("I"), bytearray()
    if image.footer.disk_type != FIXED:
        table, full = load_table(file, image), load_full_blocks(file, image)
    for damage in image.damages:
        report.add(damage)
    faults = find_overlaps(image, table, image.end_bytes) if image.header is not None else []
    for fault in faults:
        report.add(fault)
    wrong = _not_full(file, image, table, full) if not faults else []
    for block in wrong:
        report.add(f"the batmap: block {block} is not full")
        full[block] = 0
    leaks_at_end = 0 if image.header is None or file.is_device else _find_leaks(image, table, report)
    if repair and not faults:
        _repair(file, image, full, wrong, report)
        if leaks_at_end:
            _cut(file, image, table)
            report.leaks -= leaks_at_end
            report.repaired += leaks_at_end
    return report


def _not_full(file: ImageFile, image: Image, table: array[int], full: bytearray) -> list[int]:
    header = image.header
    if header is None:
        return []
    wrong = []
    map_bytes = header.block_size // SECTOR_BYTES // 8
    for block, is_full in enumerate(full):
        if is_full and (table[block] == UNUSED or file.load(
                table[block] * SECTOR_BYTES, map_bytes, "a bitmap").count(0xFF) != map_bytes):
            wrong.append(block)
    return wrong


def _find_leaks(image: Image, table: array[int], report: Report) -> int:
    """Counts places for blocks in which none is; returns how many of them are at the end."""
    assert image.header is not None
    stride = image.header.stride_bytes
    blocks = ((entry * SECTOR_BYTES, entry * SECTOR_BYTES + stride) for entry in used_entries(table))
    taken = merge(blocks, sorted((start, end) for start, end, _ in metadata_ranges(image)))
    at = 0
    for start, end in taken:
        if start - at >= stride:
            report.leaks += (start - at) // stride
        at = max(at, end)
    at_end = max(0, image.end_bytes - max(at, end_of_blocks(image, table))) // stride
    report.leaks += at_end
    if report.leaks:
        report.messages.append(f"{report.leaks} places for blocks hold none, {at_end} of them at the end")
    return at_end


def _repair(file: ImageFile, image: Image, full: bytearray, wrong: list[int], report: Report) -> None:
    repaired = len(image.damages) + len(wrong)
    repair_copies(file, image, full)
    if wrong:
        for offset, data in batmap_writes(image, full):
            file.store(offset, data, "the batmap")
        file.sync_or_raise()
    report.errors -= repaired
    report.repaired += repaired


def _cut(file: ImageFile, image: Image, table: array[int]) -> None:
    """Take away what is leaked at the end. Meanwhile the footer's copy at the start is the only one."""
    end = round_up(end_of_blocks(image, table))
    file.truncate(end)
    file.store(end, image.footer.pack(), "the footer")
    file.sync_or_raise()
