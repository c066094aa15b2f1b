"""vmdk: structures of a sparse extent file, limits, and the header, parsed and validated.

    hosted (KDMV)      header | descriptor | redundant directory, its tables | directory, its tables | grains
    streamOptimized    header | descriptor | grains, tables, directory and footer with a marker before each | end
    vmfsSparse (COWD)  header | directory | tables and grains

Specification: VMware, Virtual Disk Format 5.0 (https://www.vmware.com/support/developer/vddk/vmdk_50_technote.pdf);
field names are its own. All integers are little-endian. The file counts in sectors of 512 bytes.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, Final, NewType, NoReturn

from tapcore.driver import SECTOR_BYTES
from tapcore.errors import ImageError
from tapcore.layout import Layout

Sectors = NewType("Sectors", int)
"""A number of sectors, or a place in a file counted in them."""

MAGIC: Final = b"KDMV"
COWD_MAGIC: Final = b"COWD"
HEADER: Final = Layout("SparseExtentHeader", "<", """
    magic:4s version:I flags:I capacity:Q grainSize:Q descriptorOffset:Q descriptorSize:Q numGTEsPerGT:I
    rgdOffset:Q gdOffset:Q overHead:Q uncleanShutdown:B lineEnds:4s compressAlgorithm:H :433x""", size=512)
UNCLEAN_AT: Final = 72
"""Where uncleanShutdown is."""
COWD_HEADER: Final = Layout("COWDisk_Header", "<", """
    magic:4s version:I flags:I numSectors:I grainSize:I gdOffset:I numGDEntries:I freeSector:I
    :2016x""", size=2048)
MARKER: Final = Layout("metadata marker", "<", "val:Q size:I type:I :496x", size=512)
GRAIN_MARKER: Final = Layout("grain marker", "<", "lba:Q size:I", size=12)

MARKER_EOS: Final = 0
MARKER_GT: Final = 1
MARKER_GD: Final = 2
MARKER_FOOTER: Final = 3
"""Of a marker whose size is 0."""

FLAG_LINE_ENDS: Final = 1 << 0
FLAG_REDUNDANT: Final = 1 << 1
FLAG_ZERO_GRAIN: Final = 1 << 2
FLAG_COMPRESSED: Final = 1 << 16
FLAG_MARKERS: Final = 1 << 17
KNOWN_HIGH_FLAGS: Final = FLAG_COMPRESSED | FLAG_MARKERS
"""Of the upper half: what is not known there must not be ignored."""
LINE_ENDS: Final = b"\n \r\n"
COMPRESSION_DEFLATE: Final = 1

GD_AT_END: Final = (1 << 64) - 1
"""gdOffset of a stream: the footer has the real one."""
FOOTER_BYTES: Final = 3 * SECTOR_BYTES
"""Marker, footer, end of stream."""

GTE_HOLE: Final = 0
GTE_ZERO: Final = 1
GTES_PER_GT: Final = 512
COWD_GTES_PER_GT: Final = 4096
GTE_BYTES: Final = 4

MAX_VERSION: Final = 3
MAX_GRAIN_SECTORS: Final = 4096
MAX_GD_BYTES: Final = 4 << 20
MAX_DESCRIPTOR_BYTES: Final = 1 << 20
MAX_STREAM_METADATA_BYTES: Final = 1 << 30
"""Before the first grain of a stream."""
MAX_SECTORS: Final = 1 << 42
"""Of a disk: 2 PiB. No number of an image is used before it was held against one of these."""


@dataclass(frozen=True)
class Header:
    """What an extent file says of itself, validated; in bytes."""

    version: int
    size_bytes: int
    grain_bytes: int
    gtes_per_gt: int
    gd_offset: int
    rgd_offset: int
    """Of the redundant directory; 0: there is none."""
    metadata_bytes: int
    """What the file begins with, and no grain is in."""
    descriptor_offset: int = 0
    descriptor_bytes: int = 0
    has_zero_grain: bool = False
    compressed: bool = False
    has_markers: bool = False
    unclean: bool = False
    is_cowd: bool = False

    @property
    def table_bytes(self) -> int:
        """Of the file: one grain table."""
        return self.gtes_per_gt * GTE_BYTES

    @property
    def reach_bytes(self) -> int:
        """Of the disk: what one grain table covers."""
        return self.gtes_per_gt * self.grain_bytes

    @property
    def directory_entries(self) -> int:
        return -(-self.size_bytes // self.reach_bytes)

    @property
    def max_packed_bytes(self) -> int:
        """The most that a compressed grain, marker included, can take: deflate adds an eighth at worst."""
        return self.grain_bytes + self.grain_bytes // 8 + self.grain_bytes // 64 + 64 + GRAIN_MARKER.size


def is_extent(data: bytes) -> bool:
    """Does a file that begins with `data` begin with an extent's header?"""
    return data[:4] in (MAGIC, COWD_MAGIC)


def parse_header(path: str, data: bytes, file_bytes: int, footer: bytes = b"") -> Header:
    """The header of the extent at `path`; `data` is the file's first 2048 bytes, `footer` its last 1536, which are
    looked at where the header sends one there. ImageError names the field that cannot be right or is not
    supported."""
    if data[:4] == COWD_MAGIC:
        return _parse_cowd(path, data, file_bytes)
    if len(data) < HEADER.size or data[:4] != MAGIC:
        _refuse(path, "is not a sparse extent of a VMDK: it does not begin with the magic KDMV", 0)
    fields = HEADER.unpack(data)
    _check_kind(path, fields, 0)
    at = 0
    if fields["gdOffset"] == GD_AT_END:
        at = file_bytes - FOOTER_BYTES + SECTOR_BYTES
        fields = _footer(path, footer, fields, at)
    return _make(path, fields, file_bytes, at)


def parse_stream_header(path: str, data: bytes) -> tuple[Header, bool]:
    """The header of a stream of which no more than that is known, and whether a footer follows. ImageError."""
    if len(data) < HEADER.size or data[:4] != MAGIC:
        _refuse(path, "is not a sparse extent of a VMDK: it does not begin with the magic KDMV", 0)
    fields = HEADER.unpack(data)
    _check_kind(path, fields, 0)
    if not fields["flags"] & FLAG_MARKERS:
        _refuse(path, f"flags {fields['flags']:#x}: it has no markers, so it is no stream", 8)
    header = _fields(path, fields, 0)
    if not header.metadata_bytes == fields["overHead"] * SECTOR_BYTES <= MAX_STREAM_METADATA_BYTES:
        _refuse(path, f"overHead {fields['overHead']} is too small for the descriptor, or absurd", 64)
    return header, fields["gdOffset"] == GD_AT_END


def _refuse(path: str, message: str, offset: int, code: int = errno.EINVAL, hint: str | None = None) -> NoReturn:
    raise ImageError(message, errno=code, path=path, offset=offset, hint=hint)


def _check_kind(path: str, fields: dict[str, Any], at: int) -> None:
    """Version, flags and what else says how to read the rest."""
    version, flags = fields["version"], fields["flags"]
    if not 1 <= version <= MAX_VERSION:
        _refuse(path, f"version {version}: 1 to {MAX_VERSION} are supported", at + 4)
    unknown = flags >> 16 << 16 & ~KNOWN_HIGH_FLAGS
    if unknown:
        _refuse(path, f"flags {flags:#x}: {unknown:#x} is unknown, and may not be ignored", at + 8,
                errno.EOPNOTSUPP)
    if flags & FLAG_LINE_ENDS and fields["lineEnds"] != LINE_ENDS:
        _refuse(path, f"its line ends {fields['lineEnds']!r} were changed: it was transferred as if it were text",
                at + 73, hint="transfer it again, as binary")
    algorithm = fields["compressAlgorithm"]
    if flags & FLAG_COMPRESSED and algorithm != COMPRESSION_DEFLATE:
        _refuse(path, f"compressAlgorithm {algorithm} is not supported: deflate is 1", at + 77, errno.EOPNOTSUPP)
    if flags & FLAG_MARKERS and not flags & FLAG_COMPRESSED:
        _refuse(path, f"flags {flags:#x}: markers without compressed grains", at + 8)


def _footer(path: str, footer: bytes, header: dict[str, int], at: int) -> dict[str, int]:
    if len(footer) != FOOTER_BYTES:
        _refuse(path, "gdOffset: the directory is at the end of the file, and that is too short for it", 56)
    marker, end = MARKER.unpack(footer), MARKER.unpack(footer, 2 * SECTOR_BYTES)
    if (marker["size"], marker["type"]) != (0, MARKER_FOOTER) or any(end.values()):
        _refuse(path, "has no footer at its end: it is damaged, or was not copied as a whole", at - SECTOR_BYTES)
    fields = HEADER.unpack(footer, SECTOR_BYTES)
    if fields["magic"] != MAGIC:
        _refuse(path, "its footer has no magic", at)
    _check_kind(path, fields, at)
    for name in ("version", "flags", "capacity", "grainSize"):
        if fields[name] != header[name]:
            _refuse(path, f"{name} is {header[name]} in the header and {fields[name]} in the footer", at)
    return fields | {name: header[name] for name in ("descriptorOffset", "descriptorSize")}


def _fields(path: str, fields: dict[str, int], at: int) -> Header:
    """What can be checked without the rest of the file."""
    grain, capacity = fields["grainSize"], fields["capacity"]
    if grain & (grain - 1) or not 1 <= grain <= MAX_GRAIN_SECTORS:
        _refuse(path, f"grainSize {grain} is not a power of two up to {MAX_GRAIN_SECTORS} sectors", at + 20)
    if not 0 < capacity <= MAX_SECTORS:
        _refuse(path, f"capacity {capacity} is 0 or absurd", at + 12)
    if fields["numGTEsPerGT"] != GTES_PER_GT:
        _refuse(path, f"numGTEsPerGT {fields['numGTEsPerGT']} is not {GTES_PER_GT}", at + 44)
    if fields["descriptorSize"] * SECTOR_BYTES > MAX_DESCRIPTOR_BYTES:
        _refuse(path, f"descriptorSize {fields['descriptorSize']} is more than {MAX_DESCRIPTOR_BYTES} bytes",
                at + 36)
    flags = fields["flags"]
    descriptor_end = fields["descriptorOffset"] + fields["descriptorSize"] if fields["descriptorSize"] else 0
    return Header(
        version=fields["version"], size_bytes=capacity * SECTOR_BYTES, grain_bytes=grain * SECTOR_BYTES,
        gtes_per_gt=GTES_PER_GT, gd_offset=fields["gdOffset"] * SECTOR_BYTES,
        rgd_offset=fields["rgdOffset"] * SECTOR_BYTES if flags & FLAG_REDUNDANT else 0,
        metadata_bytes=max(1, fields["overHead"], descriptor_end) * SECTOR_BYTES,
        descriptor_offset=fields["descriptorOffset"] * SECTOR_BYTES,
        descriptor_bytes=fields["descriptorSize"] * SECTOR_BYTES, has_zero_grain=bool(flags & FLAG_ZERO_GRAIN),
        compressed=bool(flags & FLAG_COMPRESSED), has_markers=bool(flags & FLAG_MARKERS),
        unclean=bool(fields["uncleanShutdown"]))


def _make(path: str, fields: dict[str, int], file_bytes: int, at: int) -> Header:
    header = _fields(path, fields, at)
    if header.descriptor_bytes and not _inside(header.descriptor_offset, header.descriptor_bytes, file_bytes):
        _refuse(path, f"descriptorOffset {fields['descriptorOffset']} is not in the file", at + 28)
    if header.metadata_bytes > file_bytes + header.grain_bytes:
        _refuse(path, f"overHead {fields['overHead']} is more than the file has: it was cut short", at + 64)
    _check_directory(path, header, file_bytes, "gdOffset", header.gd_offset, at + 56)
    if header.rgd_offset or (fields["flags"] & FLAG_REDUNDANT and not header.compressed):
        _check_directory(path, header, file_bytes, "rgdOffset", header.rgd_offset, at + 48)
    return header


def _check_directory(path: str, header: Header, file_bytes: int, name: str, offset: int, at: int) -> None:
    length = header.directory_entries * GTE_BYTES
    if length > MAX_GD_BYTES:
        _refuse(path, f"capacity: {header.size_bytes} bytes in grains of {header.grain_bytes} need more than "
                f"{MAX_GD_BYTES} bytes of directory", at)
    if not _inside(offset, length, file_bytes):
        _refuse(path, f"{name} {offset // SECTOR_BYTES} is not the place of a directory in the file", at)


def _inside(offset: int, length: int, file_bytes: int) -> bool:
    return offset >= SECTOR_BYTES and offset + length <= file_bytes


def _parse_cowd(path: str, data: bytes, file_bytes: int) -> Header:
    if len(data) < COWD_HEADER.size:
        _refuse(path, "its header is cut short", len(data))
    fields = COWD_HEADER.unpack(data)
    grain = fields["grainSize"]
    if fields["version"] != 1:
        _refuse(path, f"version {fields['version']} of a vmfsSparse extent: 1 is supported", 4)
    if grain & (grain - 1) or not 1 <= grain <= MAX_GRAIN_SECTORS:
        _refuse(path, f"grainSize {grain} is not a power of two up to {MAX_GRAIN_SECTORS} sectors", 16)
    if not fields["numSectors"]:
        _refuse(path, "numSectors is 0", 12)
    header = Header(
        version=1, size_bytes=fields["numSectors"] * SECTOR_BYTES, grain_bytes=grain * SECTOR_BYTES,
        gtes_per_gt=COWD_GTES_PER_GT, gd_offset=fields["gdOffset"] * SECTOR_BYTES, rgd_offset=0,
        metadata_bytes=COWD_HEADER.size, is_cowd=True)
    if fields["numGDEntries"] < header.directory_entries:
        _refuse(path, f"numGDEntries {fields['numGDEntries']} is too small for the disk", 24)
    _check_directory(path, header, file_bytes, "gdOffset", header.gd_offset, 20)
    return header
