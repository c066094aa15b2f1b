"""vmdk: a new image.

    monolithicSparse       NAME.vmdk: header | descriptor | redundant directory, tables | directory, tables
    monolithicFlat         NAME.vmdk: descriptor; NAME-flat.vmdk: the disk
    twoGbMaxExtentSparse   NAME.vmdk: descriptor; NAME-s001.vmdk …: header | redundant directory …, up to 2047 MiB
    twoGbMaxExtentFlat     NAME.vmdk: descriptor; NAME-f001.vmdk …: up to 2047 MiB of the disk
    streamOptimized        NAME.vmdk: an empty stream, which nothing can be written into any more

Specification: VMware, Virtual Disk Format 5.0 (https://www.vmware.com/support/developer/vddk/vmdk_50_technote.pdf).
"""

from __future__ import annotations

import errno
import os
import secrets
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tapcore.driver import SECTOR_BYTES
from tapcore.errors import UsageError, image_error
from tapcore.formats.vmdk.descriptor import NO_PARENT_CID, ExtentLine, render_descriptor
from tapcore.formats.vmdk.layout import (
    FLAG_LINE_ENDS,
    FLAG_REDUNDANT,
    FLAG_ZERO_GRAIN,
    GTE_BYTES,
    GTES_PER_GT,
    HEADER,
    LINE_ENDS,
    MAGIC,
    MAX_GRAIN_SECTORS,
    MAX_SECTORS,
    Sectors,
)
from tapcore.formats.vmdk.mapping import to_little_endian
from tapcore.formats.vmdk.stream import StreamEncoder

SUBFORMATS: Final = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat",
                     "streamOptimized")
ADAPTERS: Final = ("ide", "buslogic", "lsilogic", "legacyESX")
SPLIT_BYTES: Final = 2047 << 20
GRAIN_BYTES: Final = 64 << 10
MAX_PARENT_HINT_BYTES: Final = 1024
DESCRIPTOR_SECTORS: Final = 20
MAX_SPARSE_BYTES: Final = (SECTOR_BYTES << 32) - (1 << 30)
"""Of one extent: its file, tables included, stays below 2 TiB."""


@dataclass(frozen=True)
class Parent:
    """The image that a new one is laid over: as it is to be named, and its CID."""

    hint: str
    cid: int


def create(
    path: str,
    size_bytes: int,
    *,
    subformat: str = "monolithicSparse",
    parent: Parent | None = None,
    zeroed_grain: bool = False,
    adapter_type: str = "ide",
    grain_bytes: int = GRAIN_BYTES,
    split_bytes: int = SPLIT_BYTES,
) -> None:
    """Make an empty image at `path`, durably, with its extents next to it. UsageError for what no image can be;
    ImageError if a file exists or cannot be written, and then no new file is left."""
    _check(size_bytes, subformat, parent, adapter_type, grain_bytes, split_bytes)
    flat, split = subformat.endswith("Flat"), subformat.startswith("two")
    # An extent ends with a whole grain: QEMU (7.2) reads wrongly across the border of one that does not.
    part_bytes = split_bytes - split_bytes % grain_bytes if split else size_bytes
    lines = _extent_lines(path, size_bytes, flat, part_bytes, alone=flat or split)
    descriptor = render_descriptor(
        cid=secrets.randbelow(NO_PARENT_CID), create_type=subformat, extents=lines, size_bytes=size_bytes,
        parent_cid=parent.cid if parent else NO_PARENT_CID, parent_hint=parent.hint if parent else None,
        adapter_type=adapter_type)
    files: dict[str, tuple[Iterable[tuple[int, bytes]], int]] = {}
    if subformat == "streamOptimized":
        data = StreamEncoder(size_bytes, descriptor).finish()
        files[path] = [(0, data)], len(data)
    elif subformat == "monolithicSparse":
        files[path] = sparse_extent(size_bytes, grain_bytes, zeroed_grain, descriptor)
    else:
        for line in lines:
            length = line.sectors * SECTOR_BYTES
            files[str(Path(path).parent / line.name)] = (
                ([], length) if flat else sparse_extent(length, grain_bytes, zeroed_grain))
        files[path] = [(0, descriptor)], len(descriptor)
    _write_new(files)


def _check(
    size_bytes: int, subformat: str, parent: Parent | None, adapter_type: str, grain_bytes: int, split_bytes: int
) -> None:
    if size_bytes % SECTOR_BYTES or not 0 < size_bytes <= MAX_SECTORS * SECTOR_BYTES:
        raise UsageError(f"size {size_bytes} is not a multiple of 512 bytes, is 0, or absurd")
    if subformat not in SUBFORMATS:
        raise UsageError(f"subformat {subformat!r} is unknown", hint=f"one of {', '.join(SUBFORMATS)}")
    if adapter_type not in ADAPTERS:
        raise UsageError(f"adapter_type {adapter_type!r} is unknown", hint=f"one of {', '.join(ADAPTERS)}")
    if parent is not None:
        check_parent(parent, subformat)
    sectors = grain_bytes // SECTOR_BYTES
    if grain_bytes % SECTOR_BYTES or sectors & (sectors - 1) or not 8 <= sectors <= MAX_GRAIN_SECTORS:
        raise UsageError(f"a grain of {grain_bytes} bytes is not a power of two of 4 KiB to 2 MiB")
    if split_bytes % SECTOR_BYTES or not grain_bytes <= split_bytes <= SPLIT_BYTES:
        raise UsageError(f"extents of {split_bytes} bytes are not possible")
    if subformat in ("monolithicSparse", "streamOptimized") and size_bytes > MAX_SPARSE_BYTES:
        raise UsageError(f"a disk of {size_bytes} bytes is too large for one sparse extent",
                         hint="choose the subformat twoGbMaxExtentSparse")


def check_parent(parent: Parent, subformat: str) -> None:
    """UsageError if an image of this subformat cannot have this parent."""
    if subformat not in ("monolithicSparse", "twoGbMaxExtentSparse"):
        raise UsageError(f"an image of the subformat {subformat} has no parent", hint="choose monolithicSparse")
    if ('"' in parent.hint or not parent.hint.isprintable()
            or len(os.fsencode(parent.hint)) > MAX_PARENT_HINT_BYTES):
        raise UsageError(f"the parent's name {parent.hint!r} cannot stand in a descriptor", hint="rename it")


def _extent_lines(path: str, size_bytes: int, flat: bool, split_bytes: int, *, alone: bool) -> list[ExtentLine]:
    stem, suffix = Path(path).stem, Path(path).suffix
    lines = []
    for number, start in enumerate(range(0, size_bytes, split_bytes), start=1):
        sectors = Sectors(min(split_bytes, size_bytes - start) // SECTOR_BYTES)
        tail = ""
        if alone:
            tail = "-flat" if split_bytes == size_bytes and flat else f"-{'f' if flat else 's'}{number:03}"
        lines.append(ExtentLine("RW", sectors, "FLAT" if flat else "SPARSE", f"{stem}{tail}{suffix}"))
    if any('"' in line.name or not line.name.isprintable() for line in lines):
        raise UsageError(f"the name {Path(path).name!r} cannot stand in a descriptor", hint="choose another")
    return lines


def sparse_extent(
    size_bytes: int, grain_bytes: int, zeroed_grain: bool, descriptor: bytes = b""
) -> tuple[list[tuple[int, bytes]], int]:
    """An empty sparse extent: what is to be written where, and the file's length."""
    reach_bytes = GTES_PER_GT * grain_bytes
    tables = -(-size_bytes // reach_bytes)
    table_sectors = GTES_PER_GT * GTE_BYTES // SECTOR_BYTES
    directory_sectors = -(-tables * GTE_BYTES // SECTOR_BYTES)
    descriptor_sectors = max(DESCRIPTOR_SECTORS, -(-len(descriptor) // SECTOR_BYTES)) if descriptor else 0
    rgd = 1 + descriptor_sectors
    gd = rgd + directory_sectors + tables * table_sectors
    end = gd + directory_sectors + tables * table_sectors
    grain_sectors = grain_bytes // SECTOR_BYTES
    overhead = -(-end // grain_sectors) * grain_sectors
    header = HEADER.pack(
        magic=MAGIC, version=2 if zeroed_grain else 1,
        flags=FLAG_LINE_ENDS | FLAG_REDUNDANT | (FLAG_ZERO_GRAIN if zeroed_grain else 0),
        capacity=size_bytes // SECTOR_BYTES, grainSize=grain_sectors, descriptorOffset=1 if descriptor else 0,
        descriptorSize=descriptor_sectors, numGTEsPerGT=GTES_PER_GT, rgdOffset=rgd, gdOffset=gd, overHead=overhead,
        uncleanShutdown=0, lineEnds=LINE_ENDS, compressAlgorithm=0)
    writes = [(0, header)]
    if descriptor:
        writes.append((SECTOR_BYTES, descriptor))
    for directory in (rgd, gd):
        first = directory + directory_sectors
        entries = array("I", range(first, first + tables * table_sectors, table_sectors))
        writes.append((directory * SECTOR_BYTES, to_little_endian(entries)))
    return writes, overhead * SECTOR_BYTES


def _write_new(files: dict[str, tuple[Iterable[tuple[int, bytes]], int]]) -> None:
    """The last one leads to the others."""
    made: list[str] = []
    try:
        for path, (writes, length) in files.items():
            _write_file(path, writes, length, made)
    except BaseException:
        for path in made:
            Path(path).unlink()
        raise


def _write_file(path: str, writes: Iterable[tuple[int, bytes]], length: int, made: list[str]) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        failure = image_error(error, path, "create the image")
        if error.errno == errno.EEXIST:
            failure.hint = "remove it first if it is not needed"
        raise failure from error
    made.append(path)
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
        raise image_error(error, path, "write the new image") from error
