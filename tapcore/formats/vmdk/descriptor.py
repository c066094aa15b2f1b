"""vmdk: the descriptor, a text that says what a disk consists of.

    # Disk DescriptorFile
    version=1
    CID=fffffffe                        changed when the disk is written
    parentCID=ffffffff                  the parent's CID when this image was laid over it; ffffffff: no parent
    createType="twoGbMaxExtentSparse"
    parentFileNameHint="base.vmdk"

    # Extent description
    RW 4192256 SPARSE "disk-s001.vmdk"  access, sectors, type, file [, offset in the file in sectors]

    # The Disk Data Base
    ddb.adapterType = "ide"

Specification: VMware, Virtual Disk Format 5.0 (https://www.vmware.com/support/developer/vddk/vmdk_50_technote.pdf).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from tapcore.driver import SECTOR_BYTES
from tapcore.errors import ImageError
from tapcore.formats.probe import leads_inside
from tapcore.formats.vmdk.layout import MAX_DESCRIPTOR_BYTES, MAX_SECTORS, Sectors

NO_PARENT_CID: Final = 0xFFFFFFFF
NO_SECTORS: Final = Sectors(0)
MAX_EXTENTS: Final = 4096
MAX_NAME_BYTES: Final = 1024

FLAT_TYPES: Final = ("FLAT", "VMFS")
SPARSE_TYPES: Final = ("SPARSE", "VMFSSPARSE")

_MAGIC = re.compile(rb"\s*#\s*Disk\s*Descriptor\s*File", re.IGNORECASE)
_ENTRY = re.compile(rb"([A-Za-z][\w.]*)\s*=\s*(.*)")
_EXTENT = re.compile(
    rb'(RW|RDONLY|NOACCESS)\s+(\d{1,20})\s+([A-Z0-9]+)(?:\s+"([^"]*)"(?:\s+(\d{1,20}))?)?(?:\s.*)?')
_CID = re.compile(rb"[0-9a-fA-F]{1,8}")


@dataclass(frozen=True)
class ExtentLine:
    """One extent as the descriptor names it."""

    access: str
    sectors: Sectors
    kind: str
    name: str
    offset_sectors: Sectors = NO_SECTORS


@dataclass
class Descriptor:
    """What a descriptor says, validated."""

    cid: int
    create_type: str
    parent_cid: int = NO_PARENT_CID
    parent_hint: str | None = None
    extents: list[ExtentLine] = field(default_factory=list)
    entries: dict[str, str] = field(default_factory=dict)
    """All that is `key = value`, as it stands there, without the quotes."""
    cid_at: int = 0
    cid_digits: int = 8
    """Where in the text the CID's digits are, and how many."""


def is_descriptor(data: bytes) -> bool:
    """Does a file that begins with `data` seem to be one?"""
    return _MAGIC.match(data) is not None


def parse_descriptor(path: str, data: bytes) -> Descriptor:
    """The descriptor in `data`, which may end with NUL bytes; `path` is the image's. ImageError names the line
    that cannot be right or is not supported."""
    text = data[:MAX_DESCRIPTOR_BYTES].partition(b"\0")[0]
    if not is_descriptor(text):
        _refuse(path, "has no VMDK descriptor: a text that begins with '# Disk DescriptorFile'")
    found = Descriptor(-1, "")
    at = 0
    for number, raw in enumerate(text.splitlines(keepends=True), start=1):
        line = raw.strip()
        if line and not line.startswith(b"#"):
            _parse_line(path, found, number, line, at + raw.index(line))
        at += len(raw)
    entries = found.entries
    if found.cid < 0:
        _refuse(path, "its descriptor has no CID")
    if entries.get("version", "1") not in ("1", "2", "3"):
        _refuse(path, f"its descriptor's version {entries['version']!r} is not supported", errno.EOPNOTSUPP)
    found.create_type = entries.get("createType", "")
    if not found.create_type:
        _refuse(path, "its descriptor has no createType")
    if "parentCID" in entries:
        found.parent_cid = _cid(path, "parentCID", os.fsencode(entries["parentCID"]))
    found.parent_hint = entries.get("parentFileNameHint") or None
    if found.parent_cid != NO_PARENT_CID and found.parent_hint is None:
        _refuse(path, f"its descriptor has the parentCID {found.parent_cid:08x} and no parentFileNameHint",
                hint="name the parent with: td-img rebase -u")
    return found


def _parse_line(path: str, found: Descriptor, number: int, line: bytes, at: int) -> None:
    match = _ENTRY.fullmatch(line)
    if match is not None:
        key, value = match[1].decode(), match[2].strip()
        if len(value) >= 2 and value[:1] == value[-1:] == b'"':
            value = value[1:-1]
        if key in found.entries:
            return
        found.entries[key] = os.fsdecode(value)
        if key == "CID":
            found.cid = _cid(path, key, value)
            found.cid_at, found.cid_digits = at + match.start(2) + match[2].index(value), len(value)
        return
    match = _EXTENT.fullmatch(line)
    if match is None:
        _refuse(path, f"line {number} of its descriptor is neither an entry nor an extent: {line[:80]!r}")
    if len(found.extents) == MAX_EXTENTS:
        _refuse(path, f"its descriptor has more than {MAX_EXTENTS} extents", errno.E2BIG)
    access, sectors, kind = match[1].decode(), int(match[2]), match[3].decode()
    name, offset = match[4] or b"", int(match[5] or 0)
    if not 0 < sectors <= MAX_SECTORS or offset > MAX_SECTORS or len(name) > MAX_NAME_BYTES:
        _refuse(path, f"line {number} of its descriptor: the extent's size, offset or name is absurd")
    found.extents.append(ExtentLine(access, Sectors(sectors), kind, os.fsdecode(name), Sectors(offset)))


def _cid(path: str, key: str, value: bytes) -> int:
    if _CID.fullmatch(value) is None:
        _refuse(path, f"its descriptor's {key} {value[:20]!r} is not a hexadecimal number of up to 8 digits")
    return int(value, 16)


def _refuse(path: str, message: str, code: int = errno.EINVAL, hint: str | None = None) -> NoReturn:
    raise ImageError(message, errno=code, path=path, hint=hint)


def extent_path(path: str, name: str) -> str:
    """Where the extent `name` of the image at `path` is. ImageError if that is not inside the image's folder: a
    descriptor from elsewhere must not make others read or write what it likes."""
    if not name or "\0" in name:
        _refuse(path, f"its descriptor names an extent {name!r}: that is no file's name")
    folder = Path(path).parent
    place = folder / name
    if name.startswith("/") or ".." in place.parts[len(folder.parts) :] or not leads_inside(place, folder):
        _refuse(path, f"its descriptor names the extent {name!r}, which is outside the image's folder",
                errno.EPERM, hint="bring the extents into the descriptor's folder, and name them without a path")
    return str(place) if place.is_absolute() else f"./{place}"


def render_descriptor(
    *, cid: int, create_type: str, extents: Sequence[ExtentLine], size_bytes: int, parent_cid: int = NO_PARENT_CID,
    parent_hint: str | None = None, adapter_type: str = "ide",
) -> bytes:
    """The text of a new image's descriptor."""
    cylinders, heads, sectors = _geometry(size_bytes, adapter_type)
    lines = ["# Disk DescriptorFile", "version=1", f"CID={cid:08x}", f"parentCID={parent_cid:08x}",
             f'createType="{create_type}"']
    if parent_hint is not None:
        lines.append(f'parentFileNameHint="{parent_hint}"')
    lines += ["", "# Extent description"]
    for extent in extents:
        offset = f" {extent.offset_sectors}" if extent.kind in FLAT_TYPES else ""
        lines.append(f'{extent.access} {extent.sectors} {extent.kind} "{extent.name}"{offset}')
    lines += ["", "# The Disk Data Base", "#DDB", "", 'ddb.virtualHWVersion = "4"',
              f'ddb.geometry.cylinders = "{cylinders}"', f'ddb.geometry.heads = "{heads}"',
              f'ddb.geometry.sectors = "{sectors}"', f'ddb.adapterType = "{adapter_type}"', ""]
    return os.fsencode("\n".join(lines))


def _geometry(size_bytes: int, adapter_type: str) -> tuple[int, int, int]:
    heads, sectors = (16, 63) if adapter_type == "ide" else (255, 63)
    return min(size_bytes // (heads * sectors * SECTOR_BYTES), 65535), heads, sectors


def replace_entries(data: bytes, changes: dict[str, str | None]) -> bytes:
    """The descriptor's text with other values of `changes`' keys (None: without the key); new ones stand behind
    createType."""
    lines: list[bytes] = []
    left = dict(changes)
    for raw in data.partition(b"\0")[0].splitlines():
        match = _ENTRY.fullmatch(raw.strip())
        key = match[1].decode() if match else ""
        if key in changes:
            continue
        lines.append(raw)
        if key == "createType":
            lines += [os.fsencode(f"{key}={value}") for key, value in left.items() if value is not None]
    return b"\n".join(lines) + b"\n"
