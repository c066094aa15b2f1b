"""qcow2: internal snapshots of an image that nobody has open: list, create, apply, delete.

    create   the new snapshot shares all that the active disk has, which copies what it writes from now on
    apply    the active disk shares all that the snapshot has; what it had itself is given up
    delete   what no other refers to is given up

Each is one switch from the image before to the image after (rewrite.py). Specification:
https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import errno
import os
import time
from array import array
from dataclasses import dataclass
from typing import Final

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError, UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow2.header import open_to_change
from tapcore.formats.qcow2.layout import MAX_L1_BYTES, MAX_SNAPSHOTS, Header
from tapcore.formats.qcow2.load import load_header
from tapcore.formats.qcow2.rewrite import begin
from tapcore.formats.qcow2.snapshot_table import EXTRA, Entry, load_snapshots
from tapcore.formats.qcow2.walk import Walk

MAX_NAME_BYTES: Final = 255
"""Of a new snapshot; QEMU's programs show no more."""


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot says of itself; times are the host's, but for the guest's `vm_clock_ns`."""

    id: str
    name: str
    date_s: int
    date_ns: int
    vm_clock_ns: int
    vm_state_bytes: int
    disk_bytes: int


def list_snapshots(path: str) -> list[Snapshot]:
    """In the order of the image's table."""
    file = ImageFile.open(path, OpenFlag.RDONLY | OpenFlag.QUERY)
    try:
        header = load_header(file)
        return [_describe(entry, header) for entry in load_snapshots(file, header)[0]]
    finally:
        file.close()


def create_snapshot(path: str, name: str) -> Snapshot:
    """Take a snapshot of the disk as it is. UsageError for a name that cannot be one, or is there already."""
    raw = os.fsencode(name)
    if not 0 < len(raw) <= MAX_NAME_BYTES or b"\0" in raw:
        raise UsageError(f"a snapshot's name has 1 to {MAX_NAME_BYTES} bytes, and no NUL")
    file, header = open_to_change(path)
    try:
        if header.data_file is not None:
            raise ImageError("has an external data file, which goes with no internal snapshot", path=path,
                             errno=errno.EOPNOTSUPP, hint="put an overlay on top of it")
        walk = Walk(file, header)
        if any(raw in (entry.name, entry.id_str) for entry in walk.snapshots):
            raise UsageError(f"there is a snapshot {name!r} already", hint="delete it, or choose another name")
        if len(walk.snapshots) >= MAX_SNAPSHOTS:
            raise ImageError(f"has {MAX_SNAPSHOTS} snapshots, more than that is not possible", path=path,
                             errno=errno.EFBIG)
        walk.run(active=2)
        now_s, now_ns = divmod(time.time_ns(), 10**9)
        entry = Entry(
            l1_table_offset=0, l1_size=header.l1_size, id_str=_free_id(walk.snapshots), name=raw, date_sec=now_s,
            date_nsec=now_ns, vm_clock_nsec=0, vm_state_size=0,
            extra=EXTRA.pack(vm_state_size=0, disk_size=header.size))
        rewrite = begin(walk)
        rewrite.taken = entry
        rewrite.run()
        return _describe(entry, header)
    finally:
        file.close()


def apply_snapshot(path: str, which: str) -> None:
    """Give the disk the content, and the size, that it had when the snapshot `which` (id or name) was taken."""
    file, header = open_to_change(path)
    try:
        walk = Walk(file, header)
        number = _find(walk.snapshots, which)
        entry = walk.snapshots[number]
        size_bytes = header.size if entry.disk_size is None else entry.disk_size
        needed = header.l1_size_needed(size_bytes)
        if size_bytes % 512 or 8 * needed > MAX_L1_BYTES:
            raise ImageError(f"snapshot {which!r}: its disk_size {size_bytes} is absurd", errno=errno.EINVAL,
                             path=path)
        walk.run(active=0, snapshots={number: 2}, bitmaps=0)
        rewrite = begin(walk)
        l1 = walk.load_table(entry.l1_table_offset, entry.l1_size, "the snapshot's L1 table")
        rewrite.l1 = l1 + array("Q", bytes(8 * max(0, needed - len(l1))))
        rewrite.fields |= {"size": size_bytes, "autoclear_features": 0}
        rewrite.run()
    finally:
        file.close()


def delete_snapshot(path: str, which: str) -> None:
    """Give up the snapshot `which` (id or name)."""
    file, header = open_to_change(path)
    try:
        walk = Walk(file, header)
        number = _find(walk.snapshots, which)
        walk.run(snapshots={number: 0})
        rewrite = begin(walk)
        del rewrite.snapshots[number]
        rewrite.run()
    finally:
        file.close()


def _describe(entry: Entry, header: Header) -> Snapshot:
    return Snapshot(
        id=os.fsdecode(entry.id_str), name=os.fsdecode(entry.name), date_s=entry.date_sec, date_ns=entry.date_nsec,
        vm_clock_ns=entry.vm_clock_nsec, vm_state_bytes=entry.vm_state_bytes,
        disk_bytes=header.size if entry.disk_size is None else entry.disk_size)


def _free_id(entries: list[Entry]) -> bytes:
    """The number after the highest one in use."""
    numbers = [int(entry.id_str) for entry in entries if entry.id_str.isdigit() and len(entry.id_str) < 20]
    return b"%d" % (max(numbers, default=0) + 1)


def _find(entries: list[Entry], which: str) -> int:
    raw = os.fsencode(which)
    found = [number for number, entry in enumerate(entries) if raw in (entry.id_str, entry.name)]
    if not found:
        known = ", ".join(f"{os.fsdecode(entry.id_str)} ({os.fsdecode(entry.name)})" for entry in entries[:20])
        raise UsageError(f"there is no snapshot {which!r}", hint=f"there are: {known or 'none'}")
    if len(found) > 1:
        raise UsageError(f"{which!r} is the id or the name of {len(found)} snapshots",
                         hint="name the one you mean by what the others do not have")
    return found[0]
