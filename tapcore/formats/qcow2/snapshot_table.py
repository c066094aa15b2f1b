"""qcow2: the table of internal snapshots.

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import Final

from tapcore.errors import ImageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow2.layout import MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA_BYTES, SNAPSHOT, Header
from tapcore.layout import Layout

MAX_SNAPSHOT_TABLE_BYTES: Final = 64 << 20
EXTRA: Final = Layout("known extra data of a snapshot", ">", "vm_state_size:Q disk_size:Q", size=16)


@dataclass(frozen=True)
class Entry:
    """One snapshot, in the specification's names; `id_str`, `name` and `extra` as they stand in the file."""

    l1_table_offset: int
    l1_size: int
    id_str: bytes
    name: bytes
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    extra: bytes

    @property
    def disk_size(self) -> int | None:
        """None if it is not said: the size that the image has."""
        return EXTRA.unpack(self.extra)["disk_size"] if len(self.extra) >= EXTRA.size else None

    @property
    def vm_state_bytes(self) -> int:
        return EXTRA.unpack(self.extra)["vm_state_size"] if len(self.extra) >= EXTRA.size else self.vm_state_size

    def is_complete(self, header: Header) -> bool:
        """Version 3 wants the known extra data."""
        return header.version < 3 or len(self.extra) >= EXTRA.size

    def completed(self, header: Header) -> Entry:
        if self.is_complete(header):
            return self
        known = EXTRA.pack(vm_state_size=self.vm_state_size, disk_size=header.size)
        return replace(self, extra=self.extra + known[len(self.extra) :])

    def with_l1(self, offset: int) -> Entry:
        return replace(self, l1_table_offset=offset)


def load_snapshots(file: ImageFile, header: Header) -> tuple[list[Entry], int]:
    """The entries, and the length of their table in bytes. ImageError names what cannot be right."""
    entries: list[Entry] = []
    start = at = header.snapshots_offset
    for number in range(header.nb_snapshots):
        at = start + -(-(at - start) // 8) * 8
        fields = SNAPSHOT.unpack(file.load(at, SNAPSHOT.size, "the snapshot table"))
        extra_bytes, id_bytes, name_bytes = (
            fields.pop("extra_data_size"), fields.pop("id_str_size"), fields.pop("name_size"))
        if extra_bytes > MAX_SNAPSHOT_EXTRA_BYTES or 8 * fields["l1_size"] > MAX_L1_BYTES:
            raise ImageError(f"snapshot {number}: extra_data_size or l1_size is absurd", errno=errno.EINVAL,
                             path=file.path, offset=at)
        length = extra_bytes + id_bytes + name_bytes
        if at + SNAPSHOT.size + length - start > MAX_SNAPSHOT_TABLE_BYTES or at + length > file.size_bytes:
            raise ImageError(f"snapshot {number}: the snapshot table is too long", errno=errno.EINVAL,
                             path=file.path, offset=at)
        text = file.load(at + SNAPSHOT.size, length, "the snapshot table")
        entries.append(Entry(**fields, extra=text[:extra_bytes], id_str=text[extra_bytes : extra_bytes + id_bytes],
                             name=text[extra_bytes + id_bytes :]))
        at += SNAPSHOT.size + length
    return entries, at - start


def pack_snapshots(entries: list[Entry]) -> bytes:
    """The table. ImageError if it would be too long."""
    parts: list[bytes] = []
    for entry in entries:
        data = SNAPSHOT.pack(
            l1_table_offset=entry.l1_table_offset, l1_size=entry.l1_size, id_str_size=len(entry.id_str),
            name_size=len(entry.name), date_sec=entry.date_sec, date_nsec=entry.date_nsec,
            vm_clock_nsec=entry.vm_clock_nsec, vm_state_size=entry.vm_state_size,
            extra_data_size=len(entry.extra)) + entry.extra + entry.id_str + entry.name
        parts.append(data.ljust(-(-len(data) // 8) * 8, b"\0"))
    table = b"".join(parts)
    if len(table) > MAX_SNAPSHOT_TABLE_BYTES:
        raise ImageError("its snapshot table would be too long", errno=errno.EFBIG)
    return table
