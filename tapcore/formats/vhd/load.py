"""VHD: what an image says, read and put together from its copies."""

from __future__ import annotations

import errno
from array import array
from bisect import bisect_right
from itertools import islice, pairwise
from operator import sub
from pathlib import Path
from typing import Final

from bitarray import bitarray

from tapcore.driver import OpenFlag, ParentId
from tapcore.errors import ImageError
from tapcore.formats.extents import from_big_endian
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.vhd import locators
from tapcore.formats.vhd.layout import (
    BATMAP_VERSION,
    DEFAULT_BLOCK_BYTES,
    DIFFERENCING,
    DISABLED_COOKIE,
    FIXED,
    FOOTER,
    HEADER,
    NO_ID,
    SECTOR_BYTES,
    SHORT_FOOTER_BYTES,
    UNUSED,
    BatmapHeader,
    Footer,
    Header,
    Image,
    bad,
    batmap_header_at,
    blocks_of,
    check_footer,
    checksum,
    parse_batmap_header,
    parse_footer,
    parse_header,
    round_up,
)
from tapcore.reach import ANYWHERE, Reach

MAX_FAULTS: Final = 100
OUT_OF_USE: Final = "was put out of use by XenServer: the footer's cookie is v_poison"


def load_image(file: ImageFile) -> Image:
    """The footer, from the end or its copy at the start, the header and the batmap's. ImageError names what cannot
    be right."""
    image = _load_footer(file)
    footer = image.footer
    check_footer(file.path, footer, image.end_bytes)
    if footer.disk_type == FIXED:
        if footer.size_bytes > image.end_bytes:
            raise bad(file.path, f"current_size {footer.size_bytes} is more than the {image.end_bytes} bytes in "
                      "front of the footer: the image was cut short", image.end_bytes + 48)
        return image
    at = footer.data_offset
    if at < SECTOR_BYTES or at % SECTOR_BYTES or at + HEADER.size > file.size_bytes:
        raise bad(file.path, f"data_offset {at:#x} is not the offset of a header in the file", 16)
    header = parse_header(file.path, file.load(at, HEADER.size, "the header"), image, file.size_bytes)
    image.header = header
    if footer.by_tapdisk and header.block_size == DEFAULT_BLOCK_BYTES:
        _load_batmap_header(file, image, header)
    return image


def _load_footer(file: ImageFile) -> Image:
    """The footer at the end; of dynamic and differencing images there is a copy at the start.

    A guest must not be taken for the image: its data are at the start of a fixed image, and may be at the end of
    another one after a crash. So a fixed image's footer is believed at the end alone, and of two different others
    the one at the start.
    """
    path, size = file.path, file.size_bytes
    if size < SHORT_FOOTER_BYTES:
        raise bad(path, f"has no VHD footer: it is {size} bytes long", 0)
    copy, copy_fault = _footer_at(file, 0)
    end = size - FOOTER.size
    last, fault = _footer_at(file, end) if end >= 0 else (None, "")
    if last is None:
        last, short_fault = _footer_at(file, size - SHORT_FOOTER_BYTES)
        fault = fault or short_fault
        end += 1 if last is not None or end < 0 else 0
    if last is not None and (last.disk_type == FIXED or last == copy):
        return Image(last, end_bytes=end)
    if copy is not None and copy.disk_type != FIXED and fault != OUT_OF_USE:
        return Image(copy, end_bytes=size - FOOTER.size if file.is_device else round_up(size),
                     damages=[f"the footer at the end: {fault or 'differs from its copy'}"])
    if last is not None:
        return Image(last, end_bytes=end, damages=[f"the footer's copy at the start: {copy_fault or 'is fixed'}"])
    raise bad(path, fault, end, hint="a VHD ends with a footer, and unless it is fixed begins with a copy of it")


def _footer_at(file: ImageFile, at: int) -> tuple[Footer | None, str]:
    """The footer there; or what is wrong with it."""
    data = file.load(at, min(FOOTER.size, file.size_bytes - at), "the footer")
    if data.startswith(DISABLED_COOKIE):
        return None, OUT_OF_USE
    try:
        return parse_footer(file.path, data, at), ""
    except ImageError as error:
        return None, error.message


def _load_batmap_header(file: ImageFile, image: Image, header: Header) -> None:
    """A batmap is a help, not needed to read the image: one that cannot be right is done without."""
    at = batmap_header_at(header)
    if image.footer.creator_version < 0x00010001:
        return
    batmap = parse_batmap_header(file.load(at, SECTOR_BYTES, "the batmap's header"))
    if batmap is None:
        if image.footer.creator_version > 0x00010001:
            image.damages.append("the batmap: its cookie is not tdbatmap")
        return
    needed = round_up(max(1, blocks_of(image.size_bytes, header.block_size) + 7 >> 3))
    start, end = batmap.batmap_offset, batmap.batmap_offset + needed
    if (batmap.batmap_version > BATMAP_VERSION or batmap.batmap_size * SECTOR_BYTES < needed
            or start % SECTOR_BYTES or start < at + SECTOR_BYTES or end > file.size_bytes):
        image.damages.append("the batmap: its header cannot be right")
        return
    image.batmap = batmap


def load_table(file: ImageFile, image: Image) -> array[int]:
    """The BAT, as far as the disk needs it."""
    header = image.header
    assert header is not None
    entries = blocks_of(image.size_bytes, header.block_size)
    return from_big_endian("I", file.load(header.table_offset, 4 * entries, "the BAT"))


def load_full_blocks(file: ImageFile, image: Image) -> bytearray:
    """By block, 1 if the batmap says that all of its sectors are present. Without a batmap that is right, none."""
    header, batmap = image.header, image.batmap
    assert header is not None
    count = blocks_of(image.size_bytes, header.block_size)
    if batmap is None:
        return bytearray(count)
    data = file.load(batmap.batmap_offset, batmap_bytes(image), "the batmap")
    # Version 1.1 took the bytes as signed.
    total = sum(data) if batmap.batmap_version >= BATMAP_VERSION else sum(data) - 256 * sum(b >> 7 for b in data)
    if batmap.checksum != ~total & 0xFFFFFFFF:
        image.damages.append(f"the batmap: its checksum {batmap.checksum:#x} is not the sum of its bytes")
        return bytearray(count)
    bits = bitarray(endian="big")
    bits.frombytes(data)
    return bytearray(bits[:count].unpack()).ljust(count, b"\0")


def batmap_bytes(image: Image) -> int:
    """How much of the batmap is in use, as tapdisk counts it: by the disk's size, whole sectors, at least one. The
    last few blocks of some sizes have no bit in it."""
    return round_up(max(1, image.size_bytes >> 24))


def batmap_writes(image: Image, full: bytearray) -> list[tuple[int, bytes]]:
    """(offset, bytes) that make the batmap say which blocks are full."""
    header, former = image.header, image.batmap
    assert header is not None and former is not None
    bits = bitarray(endian="big")
    bits.pack(bytes(full))
    data = bits.tobytes().ljust(batmap_bytes(image), b"\0")[: batmap_bytes(image)]
    batmap = BatmapHeader(former.batmap_offset, former.batmap_size, checksum(data), marker=former.marker)
    at = batmap_header_at(header)
    if former.batmap_offset == at + SECTOR_BYTES:
        return [(at, batmap.pack() + data)]
    return [(at, batmap.pack()), (former.batmap_offset, data)]


def metadata_ranges(image: Image) -> list[tuple[int, int, str]]:
    """(start, end, name) of what no block may overlap."""
    header = image.header
    assert header is not None
    entries = blocks_of(image.size_bytes, header.block_size)
    at = image.footer.data_offset
    found = [(0, SECTOR_BYTES, "the footer's copy"), (at, at + HEADER.size, "the header"),
             (header.table_offset, header.table_offset + round_up(4 * entries), "the BAT")]
    if image.batmap is not None:
        start = batmap_header_at(header)
        found.append((start, start + SECTOR_BYTES, "the batmap's header"))
        start = image.batmap.batmap_offset
        found.append((start, start + batmap_bytes(image), "the batmap"))
    found += [(locator.data_offset, locator.data_offset + locator.data_length, "a parent locator")
              for locator in locators.parse_locators(header) if image.footer.disk_type == DIFFERENCING]
    return found


def end_of_blocks(image: Image, table: array[int]) -> int:
    """Where the last of metadata and blocks ends."""
    header = image.header
    assert header is not None
    last = max((entry for entry in table if entry != UNUSED), default=-1)
    end = last * SECTOR_BYTES + header.stride_bytes if last >= 0 else 0
    return max(end, header.table_offset + header.table_bytes, *(end for _, end, _ in metadata_ranges(image)))


def used_entries(table: array[int]) -> list[int]:
    """The BAT's entries, sorted."""
    return sorted(entry for entry in table if entry != UNUSED)


def find_overlaps(image: Image, table: array[int], file_bytes: int) -> list[str]:
    """What is wrong with the BAT's entries: blocks that are not in the file, or overlap something else. Not more
    than MAX_FAULTS."""
    header = image.header
    assert header is not None
    used = used_entries(table)
    stride = header.stride_bytes // SECTOR_BYTES
    found: list[str] = []

    def name(entry: int, after: int = -1) -> str:
        return f"BAT entry {table.index(entry, after + 1)}, {entry:#x}"

    for entry in islice(used, bisect_right(used, file_bytes // SECTOR_BYTES - stride), None):
        found.append(f"{name(entry)}: past the end of the file")
        if len(found) == MAX_FAULTS:
            return found
    for start, end, what in metadata_ranges(image):
        first = bisect_right(used, start // SECTOR_BYTES - stride)
        if first < len(used) and used[first] * SECTOR_BYTES < end:
            found.append(f"{name(used[first])}: overlaps {what}")
    if min(map(sub, islice(used, 1, None), used), default=stride) >= stride:
        return found
    for entry, other in pairwise(used):
        if other - entry < stride:
            found.append(f"{name(entry)}: overlaps "
                         f"{name(other, table.index(entry) if entry == other else -1)}")
            if len(found) >= MAX_FAULTS:
                break
    return found


def find_parent(path: str, file: ImageFile, image: Image, driver: str, reach: Reach = ANYWHERE) -> ParentId:
    """Where the parent of the differencing image at `path` is; `driver` is the one for a VHD. The first that its
    locators lead to and that has the right id. ImageError if there is none."""
    header = image.header
    assert header is not None
    tried: list[str] = []
    others: list[str] = []
    is_raw = header.parent_unique_id == NO_ID
    for name in _names(file, header):
        parent = str(Path(path).parent / name)
        if not parent.startswith("/"):
            parent = "./" + parent  # a driver's path begins with one of these
        if parent in tried or not _is_there(parent):
            tried.append(parent)
            continue
        tried.append(parent)
        reach.check(path, parent)
        if is_raw:
            return ParentId("sync" if driver == "vhdsync" else "aio", parent)
        if unique_id(parent) == header.parent_unique_id:
            return ParentId(driver, parent)
        others.append(parent)
    if others:
        raise bad(path, f"its parent's id is {header.parent_unique_id.hex()}, which {', '.join(others)} has not",
               image.footer.data_offset + 40, errno.EINVAL,
                  "restore the parent, or name another with td-img rebase")
    raise bad(path, f"its parent is not there; tried: {', '.join(dict.fromkeys(tried)) or 'it names none'}",
           image.footer.data_offset, errno.ENOENT, "name the parent with td-img rebase")


def _is_there(path: str) -> bool:
    try:
        Path(path).stat()
    except (OSError, ValueError):  # missing, not allowed, too long, not text
        return False
    return True


def _names(file: ImageFile, header: Header) -> list[str]:
    names: list[str] = []
    for locator in locators.parse_locators(header):
        data = file.load(locator.data_offset, locator.data_length, "a parent locator")
        names += locators.candidates(locators.decode(locator.platform_code, data))
    names += locators.candidates(locators.name_of(header))
    return names


def unique_id(path: str) -> bytes | None:
    """The id of the VHD at `path`, None if it is none."""
    try:
        file = ImageFile.open(path, OpenFlag.RDONLY | OpenFlag.QUERY)
    except ImageError:
        return None
    try:
        return load_image(file).footer.unique_id
    except ImageError:
        return None
    finally:
        file.close()
