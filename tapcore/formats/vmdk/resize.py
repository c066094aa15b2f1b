"""vmdk: a larger disk.

    flat      the file grows ─▶ the descriptor says so
    sparse    larger directories behind the end of the file, where there is no room for more entries
              ─▶ the header, one sector, has the new size and leads to them ─▶ the descriptor follows

Each step is durable before the next: a crash leaves the former size or the new one. Tables for what was added are
made when the extent is first opened for writing.
"""

from __future__ import annotations

import errno
import re
from array import array

from tapcore.driver import SECTOR_BYTES, OpenFlag
from tapcore.errors import ImageError, UsageError, image_error
from tapcore.formats.extents import DATA
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.vmdk.create import MAX_SPARSE_BYTES
from tapcore.formats.vmdk.descriptor import FLAT_TYPES, NO_PARENT_CID, extent_path
from tapcore.formats.vmdk.layout import GTE_BYTES, HEADER, MAX_GD_BYTES, MAX_SECTORS, Header
from tapcore.formats.vmdk.load import Image, load_directory, load_image
from tapcore.formats.vmdk.mapping import Mapping, from_little_endian, to_little_endian
from tapcore.formats.vmdk.rewrite import rewrite

_LINE = re.compile(rb"^(\s*RW\s+)(\d+)(\s)", re.MULTILINE)


def resize(path: str, size_bytes: int) -> None:
    """UsageError for a size that is not possible; ImageError if this image cannot be made larger."""
    file = ImageFile.open(path, OpenFlag.NONE)
    try:
        image = load_image(file)
        _check(image, size_bytes)
        if size_bytes == image.size_bytes:
            return
        if image.header is not None:
            _grow_sparse(file, image.header, size_bytes)
        else:
            _grow_flat(image, size_bytes)
        sectors = b"%d" % (size_bytes // SECTOR_BYTES)
        rewrite(image, lambda text: _LINE.sub(lambda match: match[1] + sectors + match[3], text))
    finally:
        file.close()


def _check(image: Image, size_bytes: int) -> None:
    path, header, lines = image.file.path, image.header, image.descriptor.extents
    if size_bytes % SECTOR_BYTES or not 0 < size_bytes <= MAX_SECTORS * SECTOR_BYTES:
        raise UsageError(f"size {size_bytes} is not a multiple of 512 bytes, is 0, or absurd", path=path)
    if size_bytes < image.size_bytes:
        raise UsageError(f"a VMDK is not made smaller than it is, {image.size_bytes} bytes", path=path,
                         hint="td-img convert into a new image instead")
    if image.descriptor.parent_cid != NO_PARENT_CID:
        raise ImageError("has a parent, so it is not made larger", path=path, errno=errno.EOPNOTSUPP,
                         hint="td-img convert makes one image of both")
    if header is None and (len(lines) != 1 or lines[0].kind not in FLAT_TYPES or lines[0].offset_sectors):
        raise ImageError("consists of several extents, or one that cannot be made larger", path=path,
                         errno=errno.EOPNOTSUPP, hint="td-img convert into a new image instead")
    if header is not None:
        length = -(-size_bytes // header.reach_bytes) * GTE_BYTES
        if header.compressed:
            raise ImageError("is streamOptimized: it is written once", path=path, errno=errno.EOPNOTSUPP,
                             hint="td-img convert into a new image instead")
        if size_bytes > MAX_SPARSE_BYTES or length > MAX_GD_BYTES:
            raise UsageError(f"a disk of {size_bytes} bytes is too large for one sparse extent", path=path,
                             hint="td-img convert -o subformat=twoGbMaxExtentSparse into a new image")


def _grow_flat(image: Image, size_bytes: int) -> None:
    path = extent_path(image.file.path, image.descriptor.extents[0].name)
    file = ImageFile.open(path, OpenFlag.NONE)
    try:
        if file.is_device:
            raise ImageError("is a block device: its size is not changed here", path=path, errno=errno.EOPNOTSUPP)
        # What is behind the disk's end is not zeroes for certain.
        file.truncate(image.size_bytes)
        file.truncate(size_bytes)
        file.sync_or_raise()
    except OSError as error:
        raise image_error(error, path, f"make the file {size_bytes} bytes long") from error
    finally:
        file.close()


def _grow_sparse(file: ImageFile, header: Header, size_bytes: int) -> None:
    _zero_rest(file, header)
    fields = HEADER.unpack(file.load(0, HEADER.size, "the header"))
    copies = {"gdOffset": header.gd_offset}
    if header.rgd_offset:
        copies["rgdOffset"] = header.rgd_offset
    had, needs = (-(-size // header.reach_bytes) * GTE_BYTES for size in (header.size_bytes, size_bytes))
    room = -(-had // SECTOR_BYTES) * SECTOR_BYTES
    place = -(-file.size_bytes // header.grain_bytes) * header.grain_bytes
    for name, offset in copies.items():
        if needs <= room:
            file.store(offset + had, bytes(needs - had), "the grain directory")
            continue
        entries = load_directory(file, header, offset) + array("I", bytes(needs - had))
        file.store(place, to_little_endian(entries), "a larger grain directory")
        fields[name] = place // SECTOR_BYTES
        place += -(-needs // SECTOR_BYTES) * SECTOR_BYTES
    try:
        if needs > room:
            file.truncate(-(-place // header.grain_bytes) * header.grain_bytes)
    except OSError as error:
        raise image_error(error, file.path, "make the file longer") from error
    file.sync_or_raise()
    fields["capacity"] = size_bytes // SECTOR_BYTES
    file.store(0, HEADER.pack(**fields), "the header")
    file.sync_or_raise()


def _zero_rest(file: ImageFile, header: Header) -> None:
    """What the last grain has behind the disk's end becomes part of the disk."""
    rest = -header.size_bytes % header.grain_bytes
    directory = load_directory(file, header, header.gd_offset)
    if not rest or not directory[-1]:
        return
    mapping = Mapping(header, directory, file.size_bytes)
    data = file.load(directory[-1] * SECTOR_BYTES, header.table_bytes, "a grain table")
    last = header.size_bytes - 1
    entry = from_little_endian(data)[last >> mapping.grain_bits & mapping.index_mask]
    kind, host = mapping.kind_of(entry, last)
    if kind == DATA:
        file.store(host + header.grain_bytes - rest, bytes(rest), "the last grain")
        file.sync_or_raise()
