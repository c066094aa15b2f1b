"""qcow: structures, limits, and the header, parsed and validated.

    header | backing file name | L1 table → L2 tables → clusters, in any order

Reference: https://gitlab.com/qemu-project/qemu/-/blob/master/block/qcow.c (names are its own). All integers are
big-endian. qcow does not say of which format the backing file is. What is made here says it behind the name, where
nobody else looks; without that the file is looked at.

tapdisk's variant for Xen has a second header, and may have its L1 table in the order of the machine: little-endian
(tools/blktap/drivers/block-qcow.c of Xen 4.1).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final, NoReturn

from tapcore.errors import ImageError
from tapcore.formats.imagefile import ImageFile
from tapcore.layout import Layout

MAGIC: Final = b"QFI\xfb"
HEADER: Final = Layout("qcow header", ">", """
    magic:4s version:I backing_file_offset:Q backing_file_size:I mtime:I size:Q cluster_bits:B l2_bits:B :2x
    crypt_method:I l1_table_offset:Q""", size=48)
BACKING_AT: Final = 8
BACKING_FIELDS: Final = Layout("header fields of the backing file", ">", "offset:Q size:I", size=12)
XEN_HEADER: Final = Layout("tapdisk's second header", ">", """
    xmagic:4s cksum:I min_cluster_alloc:I flags:I""", size=16)
XEN_MAGIC: Final = b"XEN\xfb"
EXTHDR_L1_BIG_ENDIAN: Final = 2
XEN_L1_ALIGN_BYTES: Final = 4096
BACKING_FORMAT: Final = Layout("backing format, behind the name", ">", "magic:4s format:12s", size=16)
BACKING_FORMAT_MAGIC: Final = b"\0fmt"

COMPRESSED: Final = 1 << 63
"""Of an L2 entry; below it is the length in bytes, as many bits as a cluster's offsets have, and the offset."""

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 16
MIN_L2_BITS: Final = 6
MAX_L2_BITS: Final = 13
MAX_L1_BYTES: Final = 32 << 20
MAX_BACKING_NAME_BYTES: Final = 1023
SECTOR_BYTES: Final = 512


@dataclass
class Header:
    """What the header says, validated."""

    size: int
    cluster_bits: int
    l2_bits: int
    l1_table_offset: int
    backing_file: str | None = None
    backing_format: str | None = None
    """QEMU's name of it, if the image says it."""
    name_range: tuple[int, int] = (0, 0)
    """Where in the file the backing file's name, and its format, begin and end."""
    is_xen: bool = False
    l1_is_little_endian: bool = False

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l2_bytes(self) -> int:
        return 8 << self.l2_bits

    @property
    def table_bytes(self) -> int:
        """What one L2 table maps."""
        return 1 << self.cluster_bits + self.l2_bits

    @property
    def l1_size(self) -> int:
        return -(-self.size >> self.cluster_bits + self.l2_bits)


def load_header(file: ImageFile) -> Header:
    """ImageError names the field that cannot be right or is not supported."""
    path = file.path
    data = file.load(0, HEADER.size + XEN_HEADER.size, "the header")
    if file.size_bytes < HEADER.size or data[:4] != MAGIC:
        _refuse(path, "is not a qcow image: it does not begin with the magic QFI\\xfb", 0)
    fields = HEADER.unpack(data)
    if fields["version"] != 1:
        _refuse(path, f"is version {fields['version']} of qcow, not 1", 4, hint="versions 2 and 3 are qcow2")
    if fields["crypt_method"]:
        name = {1: "AES"}.get(fields["crypt_method"], f"crypt_method {fields['crypt_method']}")
        _refuse(path, f"is encrypted ({name}), which is not supported", 36, errno.EOPNOTSUPP,
                "decrypt it with qemu-img convert")
    header = Header(fields["size"], fields["cluster_bits"], fields["l2_bits"], fields["l1_table_offset"])
    _check_numbers(path, header, file.size_bytes)
    if fields["backing_file_offset"] and fields["backing_file_size"]:
        _load_backing(file, header, fields["backing_file_offset"], fields["backing_file_size"])
    xen = XEN_HEADER.unpack(data, HEADER.size)
    if xen["xmagic"] == XEN_MAGIC and not header.l1_table_offset % XEN_L1_ALIGN_BYTES:
        header.is_xen = True
        header.l1_is_little_endian = not xen["flags"] & EXTHDR_L1_BIG_ENDIAN
    return header


def _refuse(path: str, message: str, offset: int, code: int = errno.EINVAL, hint: str | None = None) -> NoReturn:
    raise ImageError(message, errno=code, path=path, offset=offset, hint=hint)


def _check_numbers(path: str, header: Header, file_bytes: int) -> None:
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        _refuse(path, f"cluster_bits {header.cluster_bits} is not {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}", 32)
    if not MIN_L2_BITS <= header.l2_bits <= MAX_L2_BITS:
        _refuse(path, f"l2_bits {header.l2_bits} is not {MIN_L2_BITS} to {MAX_L2_BITS}", 33)
    if header.size % SECTOR_BYTES or not 0 < header.size < 1 << 62:
        _refuse(path, f"size {header.size} is 0, not a multiple of 512, or absurd", 24)
    if 8 * header.l1_size > MAX_L1_BYTES:
        _refuse(path, f"size {header.size} needs an L1 table of more than 32 MiB", 24, errno.EFBIG)
    at, end = header.l1_table_offset, header.l1_table_offset + 8 * header.l1_size
    if at < HEADER.size or at % 8 or end > -(-file_bytes // SECTOR_BYTES) * SECTOR_BYTES:
        _refuse(path, f"l1_table_offset {at} is not where a table in the file can be", 40)


def _load_backing(file: ImageFile, header: Header, at: int, length: int) -> None:
    if length > MAX_BACKING_NAME_BYTES:
        _refuse(file.path, f"backing_file_size {length} is more than {MAX_BACKING_NAME_BYTES}", 16)
    if at < HEADER.size or at + length > file.size_bytes:
        _refuse(file.path, f"backing_file_offset {at} is outside the file", BACKING_AT)
    data = file.load(at, length + BACKING_FORMAT.size, "the backing file's name")
    name, behind = data[:length], BACKING_FORMAT.unpack(data, length)
    if b"\0" in name:
        _refuse(file.path, "the backing file's name has a NUL byte in it", at)
    header.backing_file = name.decode("utf-8", "surrogateescape")
    header.name_range = at, at + length
    if behind["magic"] == BACKING_FORMAT_MAGIC:
        header.backing_format = behind["format"].rstrip(b"\0").decode("ascii", "replace")
        header.name_range = at, at + length + BACKING_FORMAT.size
