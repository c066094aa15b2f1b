"""qcow: a new image, and another backing file for one that is there.

    header | backing file name, its format | L1 table (of zeroes)
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError, UsageError, image_error
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.probe import format_name
from tapcore.formats.qcow.layout import (
    BACKING_AT,
    BACKING_FIELDS,
    BACKING_FORMAT,
    BACKING_FORMAT_MAGIC,
    HEADER,
    MAGIC,
    MAX_BACKING_NAME_BYTES,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_CLUSTER_BITS,
    SECTOR_BYTES,
    Header,
    load_header,
)
from tapcore.formats.tools import Backing

SMALL_CLUSTER_L2_BITS: Final = 12
"""Of clusters below 4 KiB, whose L2 tables would be small otherwise."""


def create(path: str, size_bytes: int, *, backing: Backing | None = None, cluster_bits: int = 12) -> None:
    """Make an empty image at `path`, durably. UsageError for what no image can be; ImageError if the file exists
    or cannot be written, and then no new file is left.

    Over a backing file QEMU writes it rightly only if its clusters have 512 bytes: of a larger one it does not
    copy what a write leaves."""
    if size_bytes % SECTOR_BYTES or size_bytes <= 0:
        raise UsageError(f"size {size_bytes} is 0, or not a multiple of 512 bytes")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise UsageError(f"a cluster of {1 << cluster_bits} bytes is not one of 512 bytes to 64 KiB")
    name = name_of(backing)
    l2_bits = max(cluster_bits - 3, SMALL_CLUSTER_L2_BITS if cluster_bits < 12 else 0)
    l1_at = -(-(HEADER.size + len(name)) // SECTOR_BYTES) * SECTOR_BYTES
    header = Header(size_bytes, cluster_bits, l2_bits, l1_at)
    if 8 * header.l1_size > MAX_L1_BYTES:
        raise UsageError(f"a disk of {size_bytes} bytes is too large for clusters of {header.cluster_bytes} bytes",
                         hint="choose larger clusters, or another format: -f qcow2")
    start = HEADER.pack(
        magic=MAGIC, version=1, backing_file_offset=HEADER.size if name else 0,
        backing_file_size=max(0, len(name) - BACKING_FORMAT.size), mtime=0, size=size_bytes,
        cluster_bits=cluster_bits, l2_bits=l2_bits, crypt_method=0, l1_table_offset=l1_at)
    _write_new(path, start + name, -(-(l1_at + 8 * header.l1_size) // header.cluster_bytes) * header.cluster_bytes)


def name_of(backing: Backing | None) -> bytes:
    """The backing file's name, and its format, as they are written. UsageError."""
    if backing is None:
        return b""
    name = os.fsencode(backing.path)
    if not 0 < len(name) <= MAX_BACKING_NAME_BYTES or b"\0" in name:
        raise UsageError(f"the backing file's name is empty, too long, or has a NUL byte: {len(name)} bytes")
    return name + BACKING_FORMAT.pack(magic=BACKING_FORMAT_MAGIC, format=format_name(backing.driver).encode())


def set_backing(path: str, backing: Backing | None) -> None:
    """Write another backing file's name at the end of the file, then switch to it by one write of the header."""
    name = name_of(backing)
    file = ImageFile.open(path, OpenFlag.NONE)
    try:
        header = load_header(file)
        if header.is_xen:
            raise ImageError("has tapdisk's second header: it is read-only here", errno=errno.EOPNOTSUPP,
                             path=path)
        if name and header.cluster_bytes > SECTOR_BYTES:
            raise ImageError(f"its clusters have {header.cluster_bytes} bytes: over a backing file QEMU loses "
                             "data when it writes to one of more than 512", errno=errno.EOPNOTSUPP, path=path,
                             hint="make a new overlay")
        at = -(-file.size_bytes // header.cluster_bytes) * header.cluster_bytes
        if name:
            file.store(at, name.ljust(header.cluster_bytes, b"\0"), "the backing file's name")
            file.sync_or_raise()
        fields = BACKING_FIELDS.pack(offset=at, size=len(name) - BACKING_FORMAT.size) if name else bytes(12)
        file.store(BACKING_AT, fields, "the header")
        file.sync_or_raise()
    finally:
        file.close()


def _write_new(path: str, data: bytes, length: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        failure = image_error(error, path, "create the image")
        if error.errno == errno.EEXIST:
            failure.hint = "remove it first if it is not needed"
        raise failure from error
    try:
        try:
            os.truncate(fd, length)
            if os.pwrite(fd, data, 0) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        Path(path).unlink()
        raise image_error(error, path, "write the new image") from error
