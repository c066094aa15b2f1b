"""qcow2: a new image.

    header | refcount table | refcount blocks | L1 table (of zeroes)

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import errno
import os
from array import array
from pathlib import Path
from typing import Final

from tapcore.errors import ImageError, UsageError, image_error
from tapcore.formats.extents import to_big_endian
from tapcore.formats.probe import FORMATS, beside
from tapcore.formats.qcow2.layout import (
    AUTOCLEAR_DATA_RAW,
    COMPRESSION_TYPE,
    COMPRESSIONS,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXTENDED_L2,
    EXTENSION,
    EXTERNAL_DATA,
    HEADER_V2,
    HEADER_V3,
    HEADER_V3_BYTES,
    LAZY_REFCOUNTS,
    MAGIC,
    MAX_BACKING_NAME_BYTES,
    MAX_CLUSTER_BITS,
    MAX_DATA_NAME_BYTES,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_SUBCLUSTERS_BITS,
)
from tapcore.formats.qcow2.load import DATA_FILE
from tapcore.formats.qcow2.refcounts import RefcountBlock

REFCOUNT_BITS: Final = (1, 2, 4, 8, 16, 32, 64)


def create(
    path: str,
    size_bytes: int,
    *,
    backing: str | None = None,
    backing_format: str | None = None,
    version: int = 3,
    cluster_bits: int = 16,
    refcount_bits: int = 16,
    lazy_refcounts: bool = False,
    compression: str = "zlib",
    extended_l2: bool = False,
    data_file: str | None = None,
    data_file_raw: bool = False,
) -> None:
    """Make an empty image at `path`, durably. `backing` and `data_file` are written as they are given: relative to
    the image's folder, or absolute; `backing_format` is QEMU's name of its format. The data file is made too, and
    with `data_file_raw` always is what the guest sees. UsageError for what no image can be; ImageError if a file
    exists or cannot be written, and then no new file is left."""
    check_shape(size_bytes, version, cluster_bits, refcount_bits, compression)
    of_version_3 = (lazy_refcounts, extended_l2, data_file, refcount_bits != 16, compression != "zlib")
    if version == 2 and any(of_version_3):
        raise UsageError("qcow2 version 2 has no lazy refcounts, no extended L2 entries, no external data file, "
                         "no refcounts but of 16 bits, and zlib alone")
    if extended_l2 and cluster_bits < MIN_SUBCLUSTERS_BITS:
        raise UsageError(f"extended L2 entries need clusters of {1 << MIN_SUBCLUSTERS_BITS} bytes or more")
    if data_file == "":
        raise UsageError("data_file is no path")
    if data_file_raw and (data_file is None or backing is not None):
        raise UsageError("data_file_raw goes with a data_file, and not with a backing file")
    cluster_bytes = 1 << cluster_bits
    l1_size = l1_entries(size_bytes, cluster_bits, extended_l2=extended_l2)
    per_block = 8 * cluster_bytes // refcount_bits
    table_clusters, blocks, total = _arrange(-(-8 * l1_size // cluster_bytes), per_block, cluster_bytes)
    features = (EXTENDED_L2 * extended_l2 | EXTERNAL_DATA * (data_file is not None)
                | COMPRESSION_TYPE * (compression != "zlib"))
    header = new_header(
        version, cluster_bytes, backing, backing_format, data_file,
        size=size_bytes, cluster_bits=cluster_bits, l1_size=l1_size,
        l1_table_offset=(1 + table_clusters + blocks) * cluster_bytes, refcount_table_offset=cluster_bytes,
        refcount_table_clusters=table_clusters, refcount_order=refcount_bits.bit_length() - 1,
        incompatible_features=features, compatible_features=LAZY_REFCOUNTS * lazy_refcounts,
        autoclear_features=AUTOCLEAR_DATA_RAW * data_file_raw, compression_type=COMPRESSIONS.index(compression))
    first_block = (1 + table_clusters) * cluster_bytes
    table = array("Q", [first_block + number * cluster_bytes for number in range(blocks)])
    writes = [(0, header), (cluster_bytes, to_big_endian(table))]
    for number in range(blocks):
        block = RefcountBlock(bytes(cluster_bytes), refcount_bits.bit_length() - 1)
        for at in range(min(per_block, max(0, total - number * per_block))):
            block[at] = 1
        writes.append((table[number], block.tobytes()))
    if data_file is None:
        _write_new(path, writes, total * cluster_bytes)
        return
    data = beside(path, data_file, DATA_FILE)
    _write_new(data, [], size_bytes)
    try:
        _write_new(path, writes, total * cluster_bytes)
    except ImageError:
        Path(data).unlink()
        raise


def _arrange(l1_clusters: int, per_block: int, cluster_bytes: int) -> tuple[int, int, int]:
    """How many clusters the refcount table has, how many refcount blocks there are, and clusters in all."""
    blocks = table_clusters = 1
    while True:
        total = 1 + table_clusters + blocks + l1_clusters
        needed = -(-total // per_block), -(-8 * blocks // cluster_bytes)
        if needed[0] <= blocks and needed[1] <= table_clusters:
            break
        blocks, table_clusters = max(blocks, needed[0]), max(table_clusters, needed[1])
    if table_clusters * cluster_bytes > MAX_REFCOUNT_TABLE_BYTES:
        raise UsageError("the refcount table would be too large", hint="choose larger clusters")
    return table_clusters, blocks, total


def l1_entries(size_bytes: int, cluster_bits: int, *, extended_l2: bool = False) -> int:
    """Of the L1 table of such a disk. UsageError if it would be too large."""
    l1_size = -(-size_bytes >> (2 * cluster_bits - (4 if extended_l2 else 3)))
    if 8 * l1_size > MAX_L1_BYTES:
        raise UsageError(f"a disk of {size_bytes} bytes is too large for clusters of {1 << cluster_bits} bytes",
                         hint="choose larger clusters")
    return l1_size


def check_shape(size_bytes: int, version: int, cluster_bits: int, refcount_bits: int, compression: str) -> None:
    """UsageError for what no image can be."""
    if size_bytes % 512 or size_bytes < 0:
        raise UsageError(f"size {size_bytes} is not a multiple of 512 bytes")
    if version not in (2, 3):
        raise UsageError(f"qcow2 version {version} is not 2 or 3")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise UsageError(f"cluster_bits {cluster_bits} is not {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")
    if refcount_bits not in REFCOUNT_BITS:
        raise UsageError(f"refcount_bits {refcount_bits} is none of {REFCOUNT_BITS}")
    if compression not in COMPRESSIONS:
        raise UsageError(f"compression {compression!r} is none of {', '.join(COMPRESSIONS)}")


def new_header(
    version: int, cluster_bytes: int, backing: str | None, backing_format: str | None, data_file: str | None,
    **fields: int
) -> bytes:
    if (backing is None) != (backing_format is None):
        raise UsageError("a backing file and its format go together")
    if backing_format is not None and backing_format not in FORMATS:
        raise UsageError(f"unknown backing format {backing_format!r}", hint=f"known formats: {', '.join(FORMATS)}")
    name, data_name = os.fsencode(backing or ""), os.fsencode(data_file or "")
    extensions = b""
    for kind, text in ((EXT_BACKING_FORMAT, (backing_format or "").encode()), (EXT_DATA_FILE, data_name)):
        if text:
            extensions += EXTENSION.pack(type=kind, length=len(text)) + text.ljust(-(-len(text) // 8) * 8, b"\0")
    extensions += EXTENSION.pack(type=0, length=0)
    header_bytes = HEADER_V2.size if version == 2 else HEADER_V3_BYTES
    name_at = header_bytes + len(extensions)
    for what, length, most in (("data", len(data_name), MAX_DATA_NAME_BYTES),
                               ("backing", len(name), MAX_BACKING_NAME_BYTES)):
        if length > most or name_at + len(name) > cluster_bytes:
            raise UsageError(f"the {what} file's name is too long: {length} bytes")
    header = HEADER_V2.pack(
        magic=MAGIC, version=version, backing_file_offset=name_at if name else 0, backing_file_size=len(name),
        crypt_method=0, nb_snapshots=0, snapshots_offset=0,
        **{key: value for key, value in fields.items() if key in HEADER_V2.names})
    if version == 3:
        header += HEADER_V3.pack(
            header_length=header_bytes,
            **{key: value for key, value in fields.items() if key in HEADER_V3.names})
    return header + extensions + name


def _write_new(path: str, writes: list[tuple[int, bytes]], length: int) -> None:
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
            for offset, data in writes:
                if os.pwrite(fd, data, offset) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        Path(path).unlink()
        raise image_error(error, path, "write the new image") from error
