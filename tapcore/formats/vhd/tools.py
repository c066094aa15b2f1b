"""VHD: the tools.

What changes the header of an image writes it anew behind the end of the file, and then the footer and its copy,
which say where it is: whenever that is interrupted, the image is the former one or the new one.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final
from uuid import UUID

from bitarray import bitarray

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError, UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tools import Backing, ImageTools, Report
from tapcore.formats.vhd import locators
from tapcore.formats.vhd.check import check
from tapcore.formats.vhd.create import Parent, check_size, create, look_at_parent, metadata, set_parent
from tapcore.formats.vhd.driver import repair_copies
from tapcore.formats.vhd.layout import (
    DIFFERENCING,
    DYNAMIC,
    EPOCH_S,
    MAX_BAT_BYTES,
    NO_ID,
    SECTOR_BYTES,
    TYPE_NAMES,
    UNUSED,
    Footer,
    Image,
    blocks_of,
    geometry,
    round_up,
)
from tapcore.formats.vhd.load import (
    batmap_writes,
    find_overlaps,
    find_parent,
    load_full_blocks,
    load_image,
    load_table,
)
from tapcore.params import size_bytes as parse_size

MAX_GEOMETRY: Final = (65535, 16, 255)
"""With it `current_size` is the disk's size, whatever made the image."""


class VhdTools(ImageTools):
    name = "vhd"
    qemu_name = "vpc"
    options: ClassVar[Mapping[str, str]] = {
        "variant": "dynamic (the default) or fixed; with a backing file the image is differencing",
        "block_size": "64K to 256M (2M); other programs mostly know 2M alone",
    }

    @classmethod
    def create(
        cls, path: str, size_bytes: int, *, backing: Backing | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        options = options or {}
        parent = look_at_parent(path, backing.path, backing.driver) if backing else None
        create(path, size_bytes, variant=options.get("variant", "dynamic"), parent=parent,
               block_bytes=parse_size("block_size", options.get("block_size", "2M")))

    @classmethod
    def check(cls, path: str, *, repair: bool = False) -> Report:
        return check(path, repair=repair)

    @classmethod
    def describe(cls, path: str) -> dict[str, Any]:
        """The footer's and the header's fields; `locators` as they are written, and `backing`, the file that they
        lead to (None: none is there)."""
        file = ImageFile.open(path, OpenFlag.RDONLY | OpenFlag.QUERY)
        try:
            return _describe(path, file)
        finally:
            file.close()

    @classmethod
    def set_backing(cls, path: str, backing: Backing | None) -> None:
        """Without a backing the image becomes a dynamic one; its id stays."""
        parent = look_at_parent(path, backing.path, backing.driver) if backing else None
        file, image = _open_file(path)
        try:
            if image.header is None:
                raise ImageError("a fixed VHD has no backing file", errno=errno.EINVAL, path=path)
            image.footer.disk_type = DIFFERENCING if parent else DYNAMIC
            _rewrite(file, image, load_table(file, image), parent)
        finally:
            file.close()

    @classmethod
    def accept_backing(cls, path: str) -> None:
        """The time when the parent was modified is written anew, in the header's first sector."""
        file, image = _open(path)
        try:
            header = image.header
            if header is not None and image.footer.disk_type == DIFFERENCING:
                found = find_parent(path, file, image, cls.name)
                header.parent_time_stamp = look_at_parent(path, str(Path(found.params).absolute()),
                                                          found.driver).time_stamp
                file.store(image.footer.data_offset, header.pack()[:SECTOR_BYTES], "the header")
                file.sync_or_raise()
        finally:
            file.close()

    @classmethod
    def resize(cls, path: str, size_bytes: int, *, shrink: bool = False) -> None:
        check_size(size_bytes)
        file, image = _open_file(path)
        try:
            former = image.size_bytes
            if size_bytes < former and not shrink:
                raise UsageError(f"{size_bytes} bytes are fewer than the {former} that it has: the rest would be "
                                 "lost", path=path, hint="say --shrink if that is meant")
            if image.header is None:
                _resize_fixed(file, image, size_bytes)
            elif size_bytes != former:
                _resize_blocks(file, image, size_bytes)
        finally:
            file.close()


def set_hidden(path: str, hidden: bool) -> None:
    """XenServer's mark of an image that is no disk any more, but parent of others alone."""
    file, image = _open(path)
    try:
        image.footer.hidden = int(hidden)
        _store_footers(file, image, image.end_bytes)
    finally:
        file.close()


def _open(path: str) -> tuple[ImageFile, Image]:
    """Opened and whole. ImageError."""
    file = ImageFile.open(path, OpenFlag.NONE)
    try:
        image = load_image(file)
        if image.header is not None:
            full = load_full_blocks(file, image)
            faults = find_overlaps(image, load_table(file, image), image.end_bytes)
            if faults:
                raise ImageError(faults[0], errno=errno.EINVAL, path=path, hint="look at it with td-img check")
            repair_copies(file, image, full)
        return file, image
    except BaseException:
        file.close()
        raise


def _open_file(path: str) -> tuple[ImageFile, Image]:
    """As `_open`, but refuses a block device, at whose end there is no room for more."""
    file, image = _open(path)
    if file.is_device:
        file.close()
        raise ImageError("the size and the backing of a VHD on a block device are not changed here", path=path,
                         errno=errno.EOPNOTSUPP, hint="copy it into a file")
    return file, image


# Description

def _describe(path: str, file: ImageFile) -> dict[str, Any]:
    image = load_image(file)
    footer, header = image.footer, image.header
    described: dict[str, Any] = {
        "variant": TYPE_NAMES[footer.disk_type], "unique_id": str(UUID(bytes=footer.unique_id)),
        "created": _time(footer.time_stamp), "creator_application": _text(footer.creator_application),
        "creator_version": f"{footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}",
        "creator_host_os": _text(footer.creator_host_os),
        "current_size": footer.current_size, "original_size": footer.original_size,
        "geometry": [footer.cylinders, footer.heads, footer.sectors_per_track], "features": footer.features,
        "saved_state": bool(footer.saved_state), "hidden": bool(footer.hidden),
    }
    if header is not None:
        table = load_table(file, image)
        described |= {
            "block_bytes": header.block_size, "blocks": len(table),
            "blocks_allocated": len(table) - table.count(UNUSED), "max_table_entries": header.max_table_entries,
            "table_offset": header.table_offset, "header_offset": footer.data_offset,
            "batmap": image.batmap is not None,
        }
    if footer.disk_type == DIFFERENCING:
        described |= _describe_parent(path, file, image)
    return described | {"damages": image.damages}


def _describe_parent(path: str, file: ImageFile, image: Image) -> dict[str, Any]:
    header = image.header
    assert header is not None
    try:
        backing = find_parent(path, file, image, "vhd").params
    except ImageError:
        backing = None
    return {
        "parent_unique_id": str(UUID(bytes=header.parent_unique_id)), "parent_name": locators.name_of(header),
        "parent_modified": _time(header.parent_time_stamp), "parent_raw": header.parent_unique_id == NO_ID,
        "locators": {
            locator.platform_code.decode(): locators.decode(
                locator.platform_code, file.load(locator.data_offset, locator.data_length, "a parent locator"))
            for locator in locators.parse_locators(header)},
        "backing": backing,
    }


def _text(raw: bytes) -> str:
    return raw.decode("latin-1").rstrip("\0 ")


def _time(stamp: int) -> str:
    return datetime.fromtimestamp(EPOCH_S + stamp, UTC).isoformat()


# Changes

def _store_footers(file: ImageFile, image: Image, end: int) -> None:
    """The footer at `end`, then its copy; each durable before what follows."""
    data = image.footer.pack()
    file.store(end, data, "the footer")
    file.sync_or_raise()
    if image.header is not None:
        file.store(0, data, "the footer's copy")
        file.sync_or_raise()


def _rewrite(file: ImageFile, image: Image, table: array[int], parent: Parent | None) -> None:
    """The header, the BAT and all that goes with them, behind the end of the file; then footers that say so."""
    header = image.header
    assert header is not None
    image.footer.data_offset = round_up(image.end_bytes) + SECTOR_BYTES
    header.max_table_entries = len(table)
    set_parent(header, parent)
    _, data = metadata(header, image.footer, table, has_batmap=image.batmap is not None,
                       folder=str(Path(file.path).parent.absolute()), parent=parent)
    file.store(image.footer.data_offset, data, "the new header")
    file.sync_or_raise()
    _store_footers(file, image, round_up(image.footer.data_offset + len(data)))


def _set_size(footer: Footer, size_bytes: int) -> None:
    footer.current_size = size_bytes
    footer.cylinders, footer.heads, footer.sectors_per_track = geometry(size_bytes)
    if footer.size_bytes != size_bytes:
        footer.cylinders, footer.heads, footer.sectors_per_track = MAX_GEOMETRY
        assert footer.size_bytes == size_bytes


def _resize_fixed(file: ImageFile, image: Image, size_bytes: int) -> None:
    former = image.size_bytes
    _set_size(image.footer, size_bytes)
    _store_footers(file, image, size_bytes)
    if size_bytes > former:
        _zero(file, former, min(size_bytes, image.end_bytes + SECTOR_BYTES) - former)
    file.truncate(size_bytes + SECTOR_BYTES)
    file.sync_or_raise()


def _resize_blocks(file: ImageFile, image: Image, size_bytes: int) -> None:
    header = image.header
    assert header is not None
    parent = _present_parent(file, image, size_bytes) if image.footer.disk_type == DIFFERENCING else None
    entries = blocks_of(size_bytes, header.block_size)
    if 4 * entries > MAX_BAT_BYTES:
        raise UsageError(f"a disk of {size_bytes} bytes is too large for its blocks of {header.block_size} bytes",
                         path=file.path)
    table = load_table(file, image)
    if size_bytes > image.size_bytes:
        _clear_behind_end(file, image, table)
    dropped = [entry for entry in table[entries:] if entry != UNUSED]
    del table[entries:]
    table.extend([UNUSED] * (entries - len(table)))
    _set_size(image.footer, size_bytes)
    _rewrite(file, image, table, parent)
    for entry in dropped:
        file.discard(entry * SECTOR_BYTES, header.stride_bytes)


def _present_parent(file: ImageFile, image: Image, size_bytes: int) -> Parent:
    """The parent that the image has. ImageError if it would show in a disk of another size."""
    header = image.header
    assert header is not None
    found = find_parent(file.path, file, image, "vhd")
    if size_bytes > image.size_bytes and _size_of(found.driver, found.params) > image.size_bytes:
        raise ImageError("its parent is larger than it, and would show in what is added", path=file.path,
                         errno=errno.EOPNOTSUPP, hint="convert it, and resize the copy")
    folder = Path(file.path).parent.absolute()
    place = Path(found.params).absolute()
    name = str(place.relative_to(folder) if place.is_relative_to(folder) else place)
    return Parent(name, header.parent_unique_id, header.parent_time_stamp)


def _clear_behind_end(file: ImageFile, image: Image, table: array[int]) -> None:
    """In the block in which the disk ends, sectors behind it become zero and absent."""
    header = image.header
    assert header is not None
    block, within = divmod(image.size_bytes, header.block_size)
    if not within or table[block] == UNUSED:
        return
    if image.batmap is not None:
        for offset, data in batmap_writes(image, bytearray(len(table))):
            file.store(offset, data, "the batmap")
        file.sync_or_raise()
    at = table[block] * SECTOR_BYTES
    bitmap = bitarray(endian="big")
    bitmap.frombytes(file.load(at, header.bitmap_bytes, "a bitmap"))
    bitmap[within // SECTOR_BYTES :] = 0
    file.store(at, bitmap.tobytes(), "a bitmap")
    _zero(file, at + header.bitmap_bytes + within, header.block_size - within)
    file.sync_or_raise()


def _zero(file: ImageFile, offset: int, length: int) -> None:
    code = file.zeroes(offset, length, 0)
    if code:
        raise ImageError(f"cannot zero what is added: {os.strerror(code)}", errno=code, path=file.path,
                         offset=offset)


def _size_of(driver: str, path: str) -> int:
    file = ImageFile.open(path, OpenFlag.RDONLY | OpenFlag.QUERY)
    try:
        return file.size_bytes if driver in ("aio", "sync") else load_image(file).size_bytes
    finally:
        file.close()
