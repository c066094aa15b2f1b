"""qcow2: structures, limits, and the header, parsed and validated.

    cluster 0: header | extensions | backing file name       then in any order, found through the header:
    L1 table → L2 tables → data clusters       refcount table → refcount blocks       snapshot table

Specification: https://www.qemu.org/docs/master/interop/qcow2.html (names and numbers are its own). All integers
are big-endian.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Final, NoReturn

from tapcore.errors import ImageError
from tapcore.layout import Layout

MAGIC: Final = b"QFI\xfb"
HEADER_V2: Final = Layout("qcow2 header, version 2", ">", """
    magic:4s version:I backing_file_offset:Q backing_file_size:I cluster_bits:I size:Q crypt_method:I l1_size:I
    l1_table_offset:Q refcount_table_offset:Q refcount_table_clusters:I nb_snapshots:I snapshots_offset:Q
    """, size=72)
HEADER_V3: Final = Layout("qcow2 header, what version 3 adds", ">", """
    incompatible_features:Q compatible_features:Q autoclear_features:Q refcount_order:I header_length:I
    compression_type:B :7x""", size=40)
HEADER_V3_BYTES: Final = HEADER_V2.size + HEADER_V3.size
MIN_V3_HEADER_BYTES: Final = 104
INCOMPATIBLE_AT: Final = 72
AUTOCLEAR_AT: Final = 88
REFCOUNT_TABLE_AT: Final = 48
"""Where in the header these fields are."""

FEATURES: Final = Layout("a feature bitmask of the header", ">", "bits:Q", size=8)
REFCOUNT_TABLE_FIELDS: Final = Layout("header fields of the refcount table", ">", "offset:Q clusters:I", size=12)
EXTENSION: Final = Layout("header extension", ">", "type:I length:I", size=8)
FEATURE_NAME: Final = Layout("entry of the feature name table", ">", "type:B bit:B name:46s", size=48)
SNAPSHOT: Final = Layout("entry of the snapshot table", ">", """
    l1_table_offset:Q l1_size:I id_str_size:H name_size:H date_sec:I date_nsec:I vm_clock_nsec:Q vm_state_size:I
    extra_data_size:I""", size=40)
BITMAPS: Final = Layout("bitmaps extension", ">", "nb_bitmaps:I :4x directory_size:Q directory_offset:Q", size=24)
BITMAP: Final = Layout("entry of the bitmap directory", ">", """
    table_offset:Q table_size:I flags:I type:B granularity_bits:B name_size:H extra_data_size:I""", size=24)

EXT_END: Final = 0
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_DATA_FILE: Final = 0x44415441

DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
EXTERNAL_DATA: Final = 1 << 2
COMPRESSION_TYPE: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4
SUPPORTED: Final = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2
"""Incompatible features that do not keep an image from being opened."""
LAZY_REFCOUNTS: Final = 1 << 0
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_DATA_RAW: Final = 1 << 1

COMPRESSIONS: Final = ("zlib", "zstd")
"""By compression_type."""

COPIED: Final = 1 << 63
"""Of L1 and L2 entries: the refcount is exactly 1, so the cluster may be written in place."""
COMPRESSED: Final = 1 << 62
ZERO_FLAG: Final = 1
OFFSET_MASK: Final = (1 << 56) - (1 << 9)
"""The host offset in L1, L2 and refcount table entries (the last have more bits, which no file reaches)."""
ENTRY_RESERVED: Final = ~(COPIED | COMPRESSED | ZERO_FLAG | OFFSET_MASK) & ((1 << 64) - 1)

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MIN_SUBCLUSTERS_BITS: Final = 14
"""The cluster_bits that extended L2 entries need."""
MAX_REFCOUNT_ORDER: Final = 6
MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_SNAPSHOTS: Final = 65536
MAX_SNAPSHOT_EXTRA_BYTES: Final = 1024
MAX_BACKING_NAME_BYTES: Final = 1023
MAX_DATA_NAME_BYTES: Final = 1023
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY_BYTES: Final = 64 << 20
"""Limits that QEMU has too; no number of an image is used before it was held against one of them."""

_CRYPT_METHODS = {1: "AES", 2: "LUKS"}


@dataclass
class Header:
    """What the header says, in the specification's names, and validated. Sizes in bytes unless named otherwise."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    compression_type: int = 0
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    """Where the guest's data is, if it is in a file of its own."""
    extensions: dict[int, bytes] = field(default_factory=dict)

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits

    @property
    def refcount_block_entries(self) -> int:
        return 8 * self.cluster_bytes >> self.refcount_order

    @property
    def has_subclusters(self) -> bool:
        return bool(self.incompatible_features & EXTENDED_L2)

    @property
    def data_is_raw(self) -> bool:
        """Must the data file be what the guest sees, also for those who do not look at the tables?"""
        return bool(self.data_file is not None and self.backing_file is None
                    and self.autoclear_features & AUTOCLEAR_DATA_RAW)

    @property
    def autoclear_kept(self) -> int:
        """The autoclear features that every writer here keeps up."""
        return AUTOCLEAR_DATA_RAW if self.data_is_raw else 0

    @property
    def l2_entry_bits(self) -> int:
        """The size of an L2 entry in bytes is 1 << this."""
        return 4 if self.has_subclusters else 3

    def l1_size_needed(self, size_bytes: int | None = None) -> int:
        """Entries of the L1 table that cover the disk, or one of `size_bytes`."""
        covered_bits = 2 * self.cluster_bits - self.l2_entry_bits
        return -(-(self.size if size_bytes is None else size_bytes) >> covered_bits)


def parse_header(path: str, data: bytes, file_bytes: int) -> Header:
    """The header of the image at `path`; `data` is its first cluster, or as much as there is of 2 MiB, and
    `file_bytes` the file's length. ImageError names the field that cannot be right or is not supported."""
    if len(data) < HEADER_V2.size or data[:4] != MAGIC:
        _refuse(path, "is not a qcow2 image: it does not begin with the magic QFI\\xfb", 0)
    fields = HEADER_V2.unpack(data)
    if fields["version"] not in (2, 3):
        _refuse(path, f"is qcow2 version {fields['version']}; versions 2 and 3 are supported", 4)
    if not MIN_CLUSTER_BITS <= fields["cluster_bits"] <= MAX_CLUSTER_BITS:
        _refuse(path, f"cluster_bits {fields['cluster_bits']} is not {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}", 20)
    header_bytes = HEADER_V2.size
    if fields["version"] == 3:
        if len(data) < MIN_V3_HEADER_BYTES:
            _refuse(path, "its version 3 header is cut short", len(data))
        more = HEADER_V3.unpack(data[HEADER_V2.size : HEADER_V3_BYTES].ljust(HEADER_V3.size, b"\0"))
        header_bytes = more.pop("header_length")
        if header_bytes % 8 or not MIN_V3_HEADER_BYTES <= header_bytes <= 1 << fields["cluster_bits"]:
            _refuse(path, f"header_length {header_bytes} is not a multiple of 8 from 104 to the cluster size", 100)
        if header_bytes <= MIN_V3_HEADER_BYTES:
            more["compression_type"] = 0
        fields |= more
    del fields["magic"]
    crypt_method = fields.pop("crypt_method")
    if crypt_method:
        name = _CRYPT_METHODS.get(crypt_method, f"crypt_method {crypt_method}")
        _refuse(path, f"is encrypted ({name}), which is not supported", 32, errno.EOPNOTSUPP,
                hint="decrypt it with qemu-img convert")
    name_at, name_bytes = fields.pop("backing_file_offset"), fields.pop("backing_file_size")
    header = Header(**fields)
    cluster = data[: header.cluster_bytes]
    end = name_at if name_at else len(cluster)
    try:
        header.extensions = _parse_extensions(path, cluster, header_bytes, min(end, len(cluster)))
    finally:
        _check_features(path, header)  # with an unknown feature the extensions may look different
    if name_at:
        header.backing_file = _backing_name(path, cluster, header_bytes, name_at, name_bytes)
        backing_format = header.extensions.get(EXT_BACKING_FORMAT)
        header.backing_format = backing_format.decode("utf-8", "replace") if backing_format else None
    if header.incompatible_features & EXTERNAL_DATA:
        header.data_file = _data_name(path, header)
    _check_numbers(path, header, file_bytes)
    return header


def _refuse(path: str, message: str, offset: int, code: int = errno.EINVAL, hint: str | None = None) -> NoReturn:
    raise ImageError(message, errno=code, path=path, offset=offset, hint=hint)


def _check_features(path: str, header: Header) -> None:
    """Refuse unknown incompatible features, by name if the image has a table of names."""
    bits = header.incompatible_features & ~SUPPORTED
    names: dict[int, str] = {}
    table = header.extensions.get(EXT_FEATURE_NAMES, b"")
    for at in range(0, len(table) - FEATURE_NAME.size + 1, FEATURE_NAME.size):
        entry = FEATURE_NAME.unpack(table, at)
        if entry["type"] == 0 and entry["bit"] < 64 and bits >> entry["bit"] & 1:
            names.setdefault(1 << entry["bit"], entry["name"].rstrip(b"\0").decode("utf-8", "replace"))
    for number in range(64):
        if bits >> number & 1:
            names.setdefault(1 << number, f"incompatible feature bit {number}")
    if names:
        _refuse(path, f"needs what is not supported: {', '.join(sorted(names.values()))}", INCOMPATIBLE_AT,
                errno.EOPNOTSUPP, hint="qemu-img convert makes an image without it")


def _parse_extensions(path: str, cluster: bytes, at: int, end: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while at + EXTENSION.size <= end:
        entry = EXTENSION.unpack(cluster, at)
        kind, length = entry["type"], entry["length"]
        if kind == EXT_END:
            break
        if length > end - at - EXTENSION.size:
            _refuse(path, f"header extension {kind:#x} is {length} bytes long, more than there is room for", at)
        found.setdefault(kind, cluster[at + EXTENSION.size : at + EXTENSION.size + length])
        at += EXTENSION.size + (length + 7 & ~7)
    return found


def _backing_name(path: str, cluster: bytes, header_bytes: int, at: int, length: int) -> str | None:
    if length > MAX_BACKING_NAME_BYTES:
        _refuse(path, f"backing_file_size {length} is more than {MAX_BACKING_NAME_BYTES}", 16)
    if at < header_bytes or at + length > len(cluster):
        _refuse(path, f"backing_file_offset {at} is outside the first cluster", 8)
    raw = cluster[at : at + length]
    if b"\0" in raw:
        _refuse(path, "the backing file's name has a NUL byte in it", at)
    return raw.decode("utf-8", "surrogateescape") or None


def _data_name(path: str, header: Header) -> str:
    raw = header.extensions.get(EXT_DATA_FILE, b"")
    if not raw:
        _refuse(path, "has an external data file, but does not say which", INCOMPATIBLE_AT)
    if len(raw) > MAX_DATA_NAME_BYTES or b"\0" in raw:
        _refuse(path, f"the external data file's name has {len(raw)} bytes, or a NUL byte in it", INCOMPATIBLE_AT)
    if header.nb_snapshots:
        _refuse(path, "has an external data file and internal snapshots, which do not go together", 60)
    return raw.decode("utf-8", "surrogateescape")


def _check_numbers(path: str, header: Header, file_bytes: int) -> None:
    cluster_bytes = header.cluster_bytes
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        _refuse(path, f"refcount_order {header.refcount_order} is more than {MAX_REFCOUNT_ORDER}", 96)
    compression, is_other = header.compression_type, bool(header.incompatible_features & COMPRESSION_TYPE)
    if compression >= len(COMPRESSIONS) or bool(compression) != is_other:
        _refuse(path, f"compression_type {compression} is unknown, or its feature bit does not fit", 104)
    if header.has_subclusters and header.cluster_bits < MIN_SUBCLUSTERS_BITS:
        _refuse(path, f"cluster_bits {header.cluster_bits} is less than {MIN_SUBCLUSTERS_BITS}, which extended L2 "
                "entries need", 20)
    if header.size % 512 or header.size > 1 << 62:
        _refuse(path, f"size {header.size} is not a multiple of 512, or absurd", 24)
    if header.l1_size * 8 > MAX_L1_BYTES:
        _refuse(path, f"l1_size {header.l1_size} is more than {MAX_L1_BYTES // 8}", 36)
    if header.l1_size < header.l1_size_needed():
        _refuse(path, f"l1_size {header.l1_size} is too small for a disk of {header.size} bytes", 36)
    if not 0 < header.refcount_table_clusters <= MAX_REFCOUNT_TABLE_BYTES >> header.cluster_bits:
        _refuse(path, f"refcount_table_clusters {header.refcount_table_clusters} is 0 or more than 8 MiB", 56)
    if header.nb_snapshots > MAX_SNAPSHOTS:
        _refuse(path, f"nb_snapshots {header.nb_snapshots} is more than {MAX_SNAPSHOTS}", 60)
    refcount_table_bytes = header.refcount_table_clusters << header.cluster_bits
    for name, at, offset, length in (
        ("l1_table_offset", 40, header.l1_table_offset, 8 * header.l1_size),
        ("refcount_table_offset", 48, header.refcount_table_offset, refcount_table_bytes),
        ("snapshots_offset", 64, header.snapshots_offset, header.nb_snapshots * SNAPSHOT.size),
    ):
        if length and (offset == 0 or offset % cluster_bytes or offset + length > file_bytes + cluster_bytes):
            _refuse(path, f"{name} {offset} is not the offset of a cluster in the file", at)
