"""VHD: structures, limits, and the footer and header, parsed and validated.

    fixed          data | footer
    dynamic,       footer (a copy) | header | BAT | batmap, parent locators | blocks, in any order … | footer
    differencing   block: sector bitmap, one bit a sector, the first sector in the highest bit | its data

Specification: https://download.microsoft.com/download/f/f/e/ffef50a5-07dd-4cf8-aaa3-442c0673a029/Virtual%20Hard%20Disk%20Format%20Spec_10_18_06.doc
(names and numbers are its own); the batmap and the field `hidden` are XenServer's:
https://github.com/xapi-project/blktap/blob/master/include/vhd.h. All integers are big-endian.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Final

from tapcore.errors import ImageError
from tapcore.layout import Layout

FOOTER: Final = Layout("VHD footer", ">", """
    cookie:8s features:I file_format_version:I data_offset:Q time_stamp:I creator_application:4s creator_version:I
    creator_host_os:4s original_size:Q current_size:Q cylinders:H heads:B sectors_per_track:B disk_type:I
    checksum:I unique_id:16s saved_state:B hidden:B reserved:426s""", size=512)
HEADER: Final = Layout("VHD dynamic disk header", ">", """
    cookie:8s data_offset:Q table_offset:Q header_version:I max_table_entries:I block_size:I checksum:I
    parent_unique_id:16s parent_time_stamp:I reserved:4s parent_unicode_name:512s parent_locators:192s
    reserved2:256s""", size=1024)
LOCATOR: Final = Layout("VHD parent locator entry", ">", """
    platform_code:4s platform_data_space:I platform_data_length:I reserved:I platform_data_offset:Q""", size=24)
BATMAP: Final = Layout("tapdisk's batmap header", ">", """
    cookie:8s batmap_offset:Q batmap_size:I batmap_version:I checksum:I marker:B""", size=29)

FOOTER_COOKIE: Final = b"conectix"
DISABLED_COOKIE: Final = b"v_poison"
"""Of an image that XenServer has put out of use."""
HEADER_COOKIE: Final = b"cxsparse"
BATMAP_COOKIE: Final = b"tdbatmap"

FIXED: Final = 2
DYNAMIC: Final = 3
DIFFERENCING: Final = 4
TYPE_NAMES: Final = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}

SECTOR_BYTES: Final = 512
SHORT_FOOTER_BYTES: Final = 511
"""Of images made by Virtual PC before 2004."""
UNUSED: Final = 0xFFFFFFFF
"""A BAT entry without a block."""
NO_OFFSET: Final = (1 << 64) - 1
VERSION_1: Final = 0x00010000
FEATURE_RESERVED: Final = 2
"""Always set."""
TAPDISK: Final = b"tap\0"
TAPDISK_VERSION: Final = 0x00010003
BATMAP_VERSION: Final = 0x00010002
NO_ID: Final = bytes(16)
EPOCH_S: Final = 946684800
"""2000-01-01 in UNIX time, where VHD's times begin."""
DEFAULT_BLOCK_BYTES: Final = 2 << 20

MAX_DISK_BYTES: Final = 2040 << 30
MAX_GEOMETRY_SECTORS: Final = 65535 * 16 * 255
MIN_BLOCK_BYTES: Final = 64 << 10
MAX_BLOCK_BYTES: Final = 256 << 20
MAX_BAT_BYTES: Final = 16 << 20
"""Limits: no number of an image is used before it was held against one of them. The table's is the size for blocks
of 512 KiB on the largest disk; it is kept in memory."""

_SIZE_CREATORS: Final = (b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0", b"wa\0\0")
"""Creators whose `current_size` is the disk's size; with all others the geometry says it. As QEMU has it."""


@dataclass
class Footer:
    """What a footer says, in the specification's names."""

    disk_type: int
    current_size: int
    original_size: int
    unique_id: bytes
    cylinders: int
    heads: int
    sectors_per_track: int
    time_stamp: int
    data_offset: int = NO_OFFSET
    creator_application: bytes = TAPDISK
    creator_version: int = TAPDISK_VERSION
    creator_host_os: bytes = bytes(4)
    features: int = FEATURE_RESERVED
    file_format_version: int = VERSION_1
    saved_state: int = 0
    hidden: int = 0
    reserved: bytes = bytes(426)

    @property
    def size_bytes(self) -> int:
        """The disk's size."""
        sectors = self.cylinders * self.heads * self.sectors_per_track
        if sectors == MAX_GEOMETRY_SECTORS or self.creator_application in _SIZE_CREATORS:
            sectors = self.current_size // SECTOR_BYTES
        return sectors * SECTOR_BYTES

    @property
    def by_tapdisk(self) -> bool:
        return self.creator_application == TAPDISK

    def pack(self) -> bytes:
        return _with_checksum(FOOTER, FOOTER_COOKIE, self)


@dataclass
class Header:
    """What the header of a dynamic or differencing image says, in the specification's names."""

    table_offset: int
    max_table_entries: int
    block_size: int
    parent_unique_id: bytes = NO_ID
    parent_time_stamp: int = 0
    parent_unicode_name: bytes = bytes(512)
    parent_locators: bytes = bytes(192)
    data_offset: int = NO_OFFSET
    header_version: int = VERSION_1
    reserved: bytes = bytes(4)
    reserved2: bytes = bytes(256)

    @property
    def bitmap_bytes(self) -> int:
        """Of a block's sector bitmap, which fills whole sectors."""
        return round_up(self.block_size // SECTOR_BYTES // 8)

    @property
    def stride_bytes(self) -> int:
        """What a block takes: its bitmap and its data."""
        return self.bitmap_bytes + self.block_size

    @property
    def table_bytes(self) -> int:
        return round_up(4 * self.max_table_entries)

    def pack(self) -> bytes:
        return _with_checksum(HEADER, HEADER_COOKIE, self)


@dataclass
class BatmapHeader:
    """Where tapdisk's batmap is: one bit a block, set if all of the block's sectors are present."""

    batmap_offset: int
    batmap_size: int
    """In sectors."""
    checksum: int = 0
    batmap_version: int = BATMAP_VERSION
    marker: int = 0

    def pack(self) -> bytes:
        return BATMAP.pack(cookie=BATMAP_COOKIE, **vars(self)).ljust(SECTOR_BYTES, b"\0")


@dataclass
class Image:
    """What an image says of itself, validated."""

    footer: Footer
    header: Header | None = None
    batmap: BatmapHeader | None = None
    end_bytes: int = 0
    """Where the footer at the end begins; without one, where it belongs."""
    damages: list[str] = field(default_factory=list)
    """Copies that are missing or damaged, and were done without."""

    @property
    def size_bytes(self) -> int:
        return self.footer.size_bytes


def round_up(number: int, unit: int = SECTOR_BYTES) -> int:
    return -(-number // unit) * unit


def checksum(data: bytes) -> int:
    """The ones' complement of the sum of bytes."""
    return ~sum(data) & 0xFFFFFFFF


def _with_checksum(layout: Layout, cookie: bytes, values: object) -> bytes:
    fields = dict(vars(values), cookie=cookie, checksum=0)
    return layout.pack(**dict(fields, checksum=checksum(layout.pack(**fields))))


def bad(path: str, message: str, offset: int, code: int = errno.EINVAL, hint: str | None = None) -> ImageError:
    return ImageError(message, errno=code, path=path, offset=offset, hint=hint)


def parse_footer(path: str, data: bytes, offset: int) -> Footer:
    """The footer found at `offset`: 512 bytes, or the 511 of the old kind. ImageError if they are none."""
    fields = FOOTER.unpack(data.ljust(FOOTER.size, b"\0"))
    cookie, wanted = fields.pop("cookie"), fields.pop("checksum")
    if cookie != FOOTER_COOKIE:
        raise bad(path, "has no VHD footer: the cookie is not conectix", offset)
    footer = Footer(**fields)
    # tapdisk once set `hidden` without a new checksum.
    sums = [_sum_of(data, 64)]
    if footer.by_tapdisk:
        sums.append(_sum_of(data[:85] + b"\0" + data[86:], 64))
    if wanted not in sums:
        raise bad(path, f"the footer's checksum {wanted:#x} is not the sum of its bytes", offset + 64)
    return footer


def _sum_of(data: bytes, checksum_at: int) -> int:
    return checksum(data[:checksum_at] + data[checksum_at + 4 :])


def check_footer(path: str, footer: Footer, offset: int) -> None:
    """ImageError names the field that cannot be right or is not supported."""
    if footer.disk_type not in TYPE_NAMES:
        raise bad(path, f"disk_type {footer.disk_type} is not 2 (fixed), 3 (dynamic) or 4 (differencing)",
                  offset + 60)
    if footer.file_format_version >> 16 != 1:
        raise bad(path, f"file_format_version {footer.file_format_version:#x} is not 1.0", offset + 12)
    if footer.size_bytes > MAX_DISK_BYTES:
        raise bad(path, f"current_size {footer.size_bytes} is more than 2040 GiB", offset + 48, errno.EFBIG)
    if footer.by_tapdisk and footer.creator_version <= 1 and footer.disk_type != FIXED:
        raise bad(path, "creator_version 0.1 of tapdisk has bitmaps of another bit order, which is not supported",
                  offset + 32, errno.EOPNOTSUPP)


def parse_header(path: str, data: bytes, image: Image, file_bytes: int) -> Header:
    """The header at the footer's `data_offset`. ImageError names the field that cannot be right."""
    at = image.footer.data_offset
    fields = HEADER.unpack(data)
    if fields.pop("cookie") != HEADER_COOKIE:
        raise bad(path, "has no dynamic disk header: the cookie is not cxsparse", at)
    wanted = fields.pop("checksum")
    if wanted != _sum_of(data, 36):
        raise bad(path, f"the header's checksum {wanted:#x} is not the sum of its bytes", at + 36)
    header = Header(**fields)
    if header.header_version >> 16 != 1:
        raise bad(path, f"header_version {header.header_version:#x} is not 1.0", at + 24)
    block = header.block_size
    if block & (block - 1) or not MIN_BLOCK_BYTES <= block <= MAX_BLOCK_BYTES:
        raise bad(path, f"block_size {block} is not a power of two from 64 KiB to 256 MiB", at + 32)
    needed = blocks_of(image.size_bytes, block)
    if needed > header.max_table_entries:
        raise bad(path, f"max_table_entries {header.max_table_entries} is too small for a disk of "
                  f"{image.size_bytes} bytes", at + 28)
    if 4 * needed > MAX_BAT_BYTES:
        raise bad(path, f"block_size {block} makes a BAT of {needed} entries; {MAX_BAT_BYTES // 4} are supported",
                  at + 32, errno.EFBIG)
    start, end = header.table_offset, header.table_offset + 4 * needed
    if start % SECTOR_BYTES or start < SECTOR_BYTES or end > file_bytes or (start < at + HEADER.size and at < end):
        raise bad(path, f"table_offset {start} is not the offset of a BAT in the file", at + 16)
    return header


def blocks_of(size_bytes: int, block_bytes: int) -> int:
    return -(-size_bytes // block_bytes)


def batmap_header_at(header: Header) -> int:
    """Where tapdisk looks for its batmap: behind the BAT."""
    return header.table_offset + header.table_bytes


def parse_batmap_header(data: bytes) -> BatmapHeader | None:
    fields = BATMAP.unpack(data)
    if fields.pop("cookie") != BATMAP_COOKIE:
        return None
    return BatmapHeader(**fields)


def geometry(size_bytes: int) -> tuple[int, int, int]:
    """(cylinders, heads, sectors per track) for a disk; the specification's appendix. They may give a disk that is
    smaller."""
    sectors = min(-(-size_bytes // SECTOR_BYTES), MAX_GEOMETRY_SECTORS)
    if sectors >= 65535 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    per_track = 17
    tracks = sectors // per_track
    heads = max(4, -(-tracks // 1024))
    if tracks >= heads * 1024 or heads > 16:
        per_track, heads = 31, 16
        tracks = sectors // per_track
    if tracks >= heads * 1024:
        per_track, heads = 63, 16
        tracks = sectors // per_track
    return tracks // heads, heads, per_track
