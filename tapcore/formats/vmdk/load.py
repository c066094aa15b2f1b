"""vmdk: what opening an image reads: its descriptor, its extents' headers and directories."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from tapcore.driver import SECTOR_BYTES, OpenFlag
from tapcore.errors import ImageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.vmdk.descriptor import (
    FLAT_TYPES,
    SPARSE_TYPES,
    Descriptor,
    ExtentLine,
    extent_path,
    is_descriptor,
    parse_descriptor,
)
from tapcore.formats.vmdk.layout import (
    COWD_HEADER,
    FOOTER_BYTES,
    GTE_BYTES,
    MAX_DESCRIPTOR_BYTES,
    Header,
    is_extent,
    parse_header,
)
from tapcore.formats.vmdk.mapping import from_little_endian

OpenFile = Callable[[str, OpenFlag], ImageFile]

_IN_ONE_FILE = ("monolithicSparse", "streamOptimized")
_CREATE_TYPES = (*_IN_ONE_FILE, "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs",
                 "vmfsSparse", "custom")


@dataclass
class Image:
    """The image's own file, open, and what it says. Either the file is the only extent, with the descriptor inside
    (`header`), or it is the descriptor, and `descriptor.extents` are other files."""

    file: ImageFile
    descriptor: Descriptor
    descriptor_at: int = 0
    """Where in the file the descriptor is."""
    descriptor_room_bytes: int = 0
    header: Header | None = None

    @property
    def size_bytes(self) -> int:
        if self.header is not None:
            return self.header.size_bytes
        return sum(line.sectors for line in self.descriptor.extents) * SECTOR_BYTES


def load_image(file: ImageFile) -> Image:
    """What the file at the image's path says. ImageError if that cannot be right or is not supported."""
    start = file.load(0, min(COWD_HEADER.size, file.size_bytes), "the header")
    if is_extent(start):
        header = load_header(file)
        if not header.descriptor_bytes:
            raise ImageError("is one extent of a VMDK, without a descriptor of its own", path=file.path,
                             errno=errno.EINVAL, hint="name the descriptor: the small .vmdk file next to it")
        text = file.load(header.descriptor_offset, header.descriptor_bytes, "the descriptor")
        image = Image(file, parse_descriptor(file.path, text), header.descriptor_offset, header.descriptor_bytes,
                      header)
    elif is_descriptor(start):
        if file.size_bytes > MAX_DESCRIPTOR_BYTES:
            raise ImageError(f"its descriptor is longer than {MAX_DESCRIPTOR_BYTES} bytes", path=file.path,
                             errno=errno.E2BIG)
        text = file.load(0, file.size_bytes, "the descriptor")
        image = Image(file, parse_descriptor(file.path, text), 0, MAX_DESCRIPTOR_BYTES)
        _check_extents(file.path, image.descriptor)
    else:
        raise ImageError("is not a VMDK: it begins neither with a descriptor nor with the magic KDMV",
                         path=file.path, errno=errno.EINVAL, offset=0)
    create_type, known = image.descriptor.create_type, _IN_ONE_FILE if image.header else _CREATE_TYPES
    if create_type not in known or (image.header and len(image.descriptor.extents) > 1):
        raise ImageError(f"its createType {create_type!r} is not supported in a file of this kind", path=file.path,
                         errno=errno.EOPNOTSUPP,
                         hint=f"supported: {', '.join(known)}; convert it where it comes from")
    if any(key.startswith("encryption.") for key in image.descriptor.entries):
        raise ImageError("is encrypted, which is not supported", path=file.path, errno=errno.EOPNOTSUPP,
                         hint="decrypt it where it comes from")
    return image


def _check_extents(path: str, descriptor: Descriptor) -> None:
    if not descriptor.extents:
        raise ImageError("its descriptor names no extent", path=path, errno=errno.EINVAL)
    names, known = set(), FLAT_TYPES + SPARSE_TYPES
    for number, line in enumerate(descriptor.extents, start=1):
        if line.kind not in known:
            raise ImageError(f"extent {number} of its descriptor is of the type {line.kind}, which is not "
                             "supported", path=path, errno=errno.EOPNOTSUPP,
                             hint=f"supported: {', '.join(known)}; convert it where it comes from")
        if line.access == "NOACCESS":
            raise ImageError(f"extent {number} of its descriptor may not be read: NOACCESS", path=path,
                             errno=errno.EACCES)
        if line.kind in SPARSE_TYPES and line.offset_sectors:
            raise ImageError(f"extent {number} of its descriptor: a sparse extent has no offset", path=path,
                             errno=errno.EINVAL)
        names.add(line.name)
    if len(names) < len(descriptor.extents):
        raise ImageError("its descriptor names one file for two extents", path=path, errno=errno.EINVAL)


def load_header(file: ImageFile) -> Header:
    """The header of the sparse extent in `file`. ImageError."""
    start = file.load(0, min(COWD_HEADER.size, file.size_bytes), "the header")
    footer = b""
    if file.size_bytes > FOOTER_BYTES:
        footer = file.load(file.size_bytes - FOOTER_BYTES, FOOTER_BYTES, "the footer")
    return parse_header(file.path, start, file.size_bytes, footer)


def load_directory(file: ImageFile, header: Header, offset: int) -> array[int]:
    """The grain directory at `offset`."""
    length = header.directory_entries * GTE_BYTES
    return from_little_endian(file.load(offset, length, "the grain directory"))


def open_sparse(image: Image, line: ExtentLine, flags: OpenFlag, open_file: OpenFile) -> tuple[ImageFile, Header]:
    """The file of a sparse extent that the descriptor names, open, and its header. ImageError."""
    file = open_file(extent_path(image.file.path, line.name), flags)
    try:
        header = load_header(file)
        size_bytes = line.sectors * SECTOR_BYTES
        if not size_bytes <= header.size_bytes < size_bytes + header.grain_bytes:
            raise ImageError(f"has a capacity of {header.size_bytes} bytes, but the descriptor says {size_bytes}",
                             path=file.path, errno=errno.EINVAL, offset=12)
    except BaseException:
        file.close()
        raise
    return file, header
