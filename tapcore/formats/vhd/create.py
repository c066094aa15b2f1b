"""VHD: a new image, and what of an image is written anew when its size or its parent changes.

    footer | header | BAT | batmap header, batmap | parent locators | footer

It says that tapdisk made it: then everyone takes `current_size` for the disk's size. The batmap goes with blocks
of 2 MiB, as XenServer has it.
"""

from __future__ import annotations

import errno
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Final
from uuid import uuid4

from tapcore.driver import OpenFlag
from tapcore.errors import UsageError, image_error
from tapcore.formats.extents import to_big_endian
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.vhd.layout import (
    DEFAULT_BLOCK_BYTES,
    DIFFERENCING,
    DYNAMIC,
    EPOCH_S,
    FIXED,
    HEADER,
    MAX_BAT_BYTES,
    MAX_BLOCK_BYTES,
    MAX_DISK_BYTES,
    MIN_BLOCK_BYTES,
    NO_ID,
    SECTOR_BYTES,
    UNUSED,
    BatmapHeader,
    Footer,
    Header,
    batmap_header_at,
    blocks_of,
    checksum,
    geometry,
    round_up,
)
from tapcore.formats.vhd.load import load_image
from tapcore.formats.vhd.locators import encode, encode_name, pack_locators

NO_BATMAP_VERSION: Final = 0x00010001
"""tapdisk's version whose images may have no batmap."""
DRIVERS: Final = ("vhd", "vhdsync", "aio", "sync")
"""Drivers of files that can be a VHD's parent."""


@dataclass
class Parent:
    """What a differencing image says of its parent; `path` is relative to the image's folder, or absolute."""

    path: str
    unique_id: bytes
    time_stamp: int


def look_at_parent(image_path: str, path: str, driver: str) -> Parent:
    """The parent at `path` for the image at `image_path`. UsageError, ImageError."""
    if driver not in DRIVERS:
        raise UsageError(f"the parent of a VHD cannot be of the format {driver}", path=path,
                         hint="it is a VHD or raw: convert it, or choose another format for the overlay")
    place = str(Path(image_path).parent / path)
    try:
        modified_s = int(Path(place).stat().st_mtime)
    except OSError as error:
        raise image_error(error, place, "open the parent") from error
    unique_id = NO_ID
    if driver in ("vhd", "vhdsync"):
        file = ImageFile.open(place, OpenFlag.RDONLY | OpenFlag.QUERY)
        try:
            unique_id = load_image(file).footer.unique_id
        finally:
            file.close()
        if unique_id == NO_ID:
            raise UsageError("has no unique id, without which it cannot be a parent", path=place)
    return Parent(path, unique_id, max(0, modified_s - EPOCH_S) & 0xFFFFFFFF)


def check_size(size_bytes: int) -> None:
    """UsageError for a size that no disk of this format has."""
    if size_bytes % SECTOR_BYTES or size_bytes < 0:
        raise UsageError(f"size {size_bytes} is not a multiple of 512 bytes")
    if size_bytes > MAX_DISK_BYTES:
        raise UsageError(f"size {size_bytes} is more than the 2040 GiB of the largest VHD",
                         hint="choose another format: -f qcow2")


def make_footer(disk_type: int, size_bytes: int) -> Footer:
    cylinders, heads, per_track = geometry(size_bytes)
    return Footer(disk_type, size_bytes, size_bytes, uuid4().bytes, cylinders, heads, per_track,
                  time_stamp=int(time()) - EPOCH_S)


def create(path: str, size_bytes: int, *, variant: str = "dynamic", block_bytes: int = DEFAULT_BLOCK_BYTES,
           parent: Parent | None = None) -> None:
    """Make an empty image at `path`, durably. UsageError for what no image can be; ImageError if the file exists
    or cannot be written, and then no new file is left."""
    check_size(size_bytes)
    if variant not in ("fixed", "dynamic"):
        raise UsageError(f"variant {variant!r} is neither fixed nor dynamic")
    if variant == "fixed":
        if parent is not None:
            raise UsageError("a fixed VHD has no parent", hint="leave out variant=fixed")
        _write_new(path, [(size_bytes, make_footer(FIXED, size_bytes).pack())])
        return
    if block_bytes & (block_bytes - 1) or not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES:
        raise UsageError(f"block_size {block_bytes} is not a power of two from 64K to 256M")
    entries = blocks_of(size_bytes, block_bytes)
    if 4 * entries > MAX_BAT_BYTES:
        raise UsageError(f"a disk of {size_bytes} bytes is too large for blocks of {block_bytes} bytes",
                         hint="choose larger blocks")
    footer = make_footer(DIFFERENCING if parent else DYNAMIC, size_bytes)
    has_batmap = block_bytes == DEFAULT_BLOCK_BYTES
    if not has_batmap:
        footer.creator_version = NO_BATMAP_VERSION
    footer.data_offset = SECTOR_BYTES
    table = array("I", [UNUSED]) * entries
    header = Header(0, entries, block_bytes)
    set_parent(header, parent)
    _, data = metadata(header, footer, table, has_batmap=has_batmap, folder=str(Path(path).parent.absolute()),
                       parent=parent)
    end = round_up(SECTOR_BYTES + len(data))
    _write_new(path, [(0, footer.pack()), (SECTOR_BYTES, data), (end, footer.pack())])


def set_parent(header: Header, parent: Parent | None) -> None:
    header.parent_unique_id = parent.unique_id if parent else NO_ID
    header.parent_time_stamp = parent.time_stamp if parent else 0
    header.parent_unicode_name = encode_name(parent.path) if parent else bytes(512)
    header.parent_locators = bytes(192)


def metadata(
    header: Header, footer: Footer, table: array[int], *, has_batmap: bool, folder: str, parent: Parent | None
) -> tuple[Header, bytes]:
    """What lies at the footer's data_offset: the header, completed, and all of it as bytes. The batmap is empty.
    UsageError."""
    start = footer.data_offset
    header.table_offset = start + HEADER.size
    data = to_big_endian(table).ljust(header.table_bytes, b"\xff")
    if has_batmap:
        bits = bytes(round_up(max(1, header.max_table_entries + 7 >> 3)))
        at = batmap_header_at(header) + SECTOR_BYTES
        data += BatmapHeader(at, len(bits) // SECTOR_BYTES, checksum(bits)).pack() + bits
    if parent is not None:
        header.parent_locators, blob = pack_locators(encode(parent.path, folder), start + HEADER.size + len(data))
        data += blob
    return header, header.pack() + data


def _write_new(path: str, writes: list[tuple[int, bytes]]) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        failure = image_error(error, path, "create the image")
        if error.errno == errno.EEXIST:
            failure.hint = "remove it first if it is not needed"
        raise failure from error
    try:
        try:
            for offset, data in writes:
                if os.pwrite(fd, data, offset) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        Path(path).unlink()
        raise image_error(error, path, "write the new image") from error
