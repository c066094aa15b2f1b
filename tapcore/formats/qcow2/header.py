"""qcow2: changes of the header cluster that a crash does not catch half-done.

A disk writes a sector whole or not at all. Fields of the header are in the first one. Extensions and the backing
file's name may take more; then they are moved in steps, each of which is one sector, or changes what nobody reads:

    1  header │ extensions │ name                          as it is
    2  header │ extensions │ name │ ext'│ name'            the new ones, in room behind
    3  header │ filler ·········· │ ext'│ name'            one sector: an unknown extension skips what was there
    4  header │ filler ext'│ name'│ ext'│ name'            the new ones again, in the filler's payload
    5  header │ ext'│ name'                                one sector

Clusters of 1 and 2 KiB may have no room for that, and a header longer than a sector has none: there all is written
at once, the first sector last.

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import os
from typing import Final

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError, UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.probe import format_name
from tapcore.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    CORRUPT,
    EXT_BACKING_FORMAT,
    EXTENSION,
    HEADER_V2,
    HEADER_V3,
    HEADER_V3_BYTES,
    INCOMPATIBLE_AT,
    MAX_BACKING_NAME_BYTES,
    Header,
)
from tapcore.formats.qcow2.load import load_header
from tapcore.formats.tools import Backing

SECTOR_BYTES: Final = 512
EXT_FILLER: Final = 0x66696C6C
"""Known to nobody, so all pass over it."""


def write_fields(file: ImageFile, fields: dict[str, int]) -> None:
    """Change fields of the header by one write of a sector; a field that the version does not have is left out."""
    sector = bytearray(file.load(0, SECTOR_BYTES, "the header"))
    set_fields(sector, fields)
    file.store(0, bytes(sector), "the header")


def set_fields(header: bytearray, fields: dict[str, int]) -> None:
    """Change fields in the header's bytes."""
    old = HEADER_V2.unpack(header)
    header[: HEADER_V2.size] = HEADER_V2.pack(**old | {key: fields[key] for key in fields if key in old})
    if old["version"] >= 3:
        more = HEADER_V3.unpack(header, HEADER_V2.size)
        more |= {key: fields[key] for key in fields if key in more}
        end = min(more["header_length"], HEADER_V3_BYTES)
        header[HEADER_V2.size : end] = HEADER_V3.pack(**more)[: end - HEADER_V2.size]


def open_to_change(path: str) -> tuple[ImageFile, Header]:
    """The image at `path` for a tool that changes it. ImageError if it is in use, not valid, or marked corrupt."""
    file = ImageFile.open(path, OpenFlag.NONE)
    try:
        header = load_header(file)
        if header.incompatible_features & CORRUPT:
            raise ImageError("the image is marked corrupt", path=path, offset=INCOMPATIBLE_AT,
                             hint="repair it with td-img check --repair")
    except BaseException:
        file.close()
        raise
    return file, header


def set_backing(path: str, backing: Backing | None) -> None:
    """Write another backing file's name and format into the image, or none, without a look at what either holds.
    All other extensions stay, in their order."""
    file, header = open_to_change(path)
    try:
        if backing and header.data_is_raw:
            raise UsageError("its external data file always is what the guest sees: it can have no backing file")
        cluster = file.load(0, header.cluster_bytes, "the header")
        start = HEADER_V2.size
        if header.version >= 3:
            start = HEADER_V3.unpack(cluster, HEADER_V2.size)["header_length"]
        found, end = list_extensions(cluster, start, HEADER_V2.unpack(cluster)["backing_file_offset"])
        name, text = b"", b""
        if backing:
            name, text = os.fsencode(backing.path), format_name(backing.driver).encode()
        if not 0 < len(name) <= MAX_BACKING_NAME_BYTES and backing:
            raise UsageError(f"the backing file's name is empty or too long: {len(name)} bytes")
        new = _pack_extensions(_with_format(found, text))
        if start + len(new) + len(name) > header.cluster_bytes:
            raise UsageError("the header has no room for the backing file's name", hint="choose a shorter path")
        autoclear = header.autoclear_features & AUTOCLEAR_BITMAPS | header.autoclear_kept
        _switch(file, bytearray(cluster), start, end, new, name, autoclear)
    finally:
        file.close()


def list_extensions(cluster: bytes, at: int, name_at: int) -> tuple[list[tuple[int, bytes]], int]:
    """The extensions from `at` on, and where they, and the name that begins at `name_at`, end."""
    found: list[tuple[int, bytes]] = []
    stop = name_at or len(cluster)
    while at + EXTENSION.size <= stop:
        entry = EXTENSION.unpack(cluster, at)
        at += EXTENSION.size
        if not entry["type"]:
            break
        found.append((entry["type"], cluster[at : at + entry["length"]]))
        at += entry["length"] + 7 & ~7
    name_bytes = HEADER_V2.unpack(cluster)["backing_file_size"] if name_at else 0
    return found, max(at, name_at + name_bytes)


def _with_format(extensions: list[tuple[int, bytes]], text: bytes) -> list[tuple[int, bytes]]:
    """`text` in place of the backing format, first if there was none; no such extension if it is empty."""
    new = [(EXT_BACKING_FORMAT, text)] if text else []
    kinds = [kind for kind, _ in extensions]
    at = kinds.index(EXT_BACKING_FORMAT) if EXT_BACKING_FORMAT in kinds else 0
    rest = [pair for pair in extensions[at:] if pair[0] != EXT_BACKING_FORMAT]
    return extensions[:at] + new + rest


def _pack_extensions(extensions: list[tuple[int, bytes]]) -> bytes:
    parts = [EXTENSION.pack(type=kind, length=len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
             for kind, data in extensions]
    return b"".join(parts) + EXTENSION.pack(type=0, length=0)


def _switch(
    file: ImageFile, cluster: bytearray, start: int, end: int, extensions: bytes, name: bytes, autoclear: int
) -> None:
    """From what is in `cluster`, whose extensions begin at `start` and end, with the name, at `end`."""
    def named(image: bytearray, at: int) -> None:
        set_fields(image, {"backing_file_offset": at if name else 0, "backing_file_size": len(name)})

    new = extensions + name
    final = bytearray(cluster)
    final[start : max(end, start + len(new))] = new.ljust(end - start, b"\0")
    named(final, start + len(extensions))
    set_fields(final, {"autoclear_features": autoclear})
    behind = -(-max(end, start + len(new)) // SECTOR_BYTES) * SECTOR_BYTES
    steps = [final]
    has_room = start + EXTENSION.size <= SECTOR_BYTES and behind + len(new) <= len(cluster)
    if final[SECTOR_BYTES:] != cluster[SECTOR_BYTES:] and has_room:
        room = bytearray(cluster)
        room[behind : behind + len(new)] = new
        filler = bytearray(room)
        length = behind - start - EXTENSION.size
        EXTENSION.pack_into(filler, start, type=EXT_FILLER, length=length)
        named(filler, behind + len(extensions))
        payload = bytearray(final)
        payload[:SECTOR_BYTES] = filler[:SECTOR_BYTES]
        payload[behind : behind + len(new)] = new
        last = bytearray(final)
        last[behind : behind + len(new)] = new
        steps = [room, filler, payload, last, final]
    for step in steps:
        _write_step(file, cluster, step)
        cluster[:] = step


def _write_step(file: ImageFile, before: bytearray, after: bytearray) -> None:
    """Write the sectors that differ, the first one last, and durably."""
    changed = [at for at in range(0, len(before), SECTOR_BYTES)
               if before[at : at + SECTOR_BYTES] != after[at : at + SECTOR_BYTES]]
    for at in changed[1:] + changed[:1]:
        file.store(at, bytes(after[at : at + SECTOR_BYTES]), "the header")
    file.sync_or_raise()
