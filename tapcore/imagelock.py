"""Locks on image files that QEMU's programs respect, and that respect theirs.

Protocol: https://gitlab.com/qemu-project/qemu/-/blob/master/block/file-posix.c (raw_apply_lock_bytes,
raw_check_lock_bytes), permissions: https://gitlab.com/qemu-project/qemu/-/blob/master/include/block/block-common.h

    byte 100 + p   read-locked by each who uses permission p
    byte 200 + p   read-locked by each who does not let others use permission p

Everyone takes all of its locks first, then looks whether anybody else holds an opposite one, and gives up if so.
They are open file description locks: closing the descriptor, in whatever way, releases them.
"""

from __future__ import annotations

import errno
import fcntl
import os
from enum import IntFlag
from pathlib import Path
from typing import Final

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError, image_error
from tapcore.layout import Layout

RAW_LOCK_PERM_BASE: Final = 100
RAW_LOCK_SHARED_BASE: Final = 200


class Perm(IntFlag):
    """BLK_PERM_* of QEMU. Bit p is lock byte p."""

    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8


_ACTIONS = {
    Perm.CONSISTENT_READ: "read",
    Perm.WRITE: "written",
    Perm.WRITE_UNCHANGED: "rewritten",
    Perm.RESIZE: "resized",
}

FLOCK = Layout("struct flock of fcntl(2)", "=", "type:h whence:h :4x start:q len:q pid:i :4x", size=32)

MAX_HOLDERS_NAMED = 3


def lock_image(fd: int, path: str, flags: OpenFlag) -> None:
    """Lock the image behind `fd` as `flags` ask: a reader for reading, any other for writing too; others may write
    only if SHAREABLE. ImageError, with what holds it as far as can be seen; the caller closes `fd` then."""
    used = Perm.CONSISTENT_READ if flags & OpenFlag.RDONLY else Perm.CONSISTENT_READ | Perm.WRITE
    kept = Perm(0) if flags & OpenFlag.SHAREABLE else Perm.WRITE | Perm.RESIZE
    try:
        for perm in Perm:
            if perm & used:
                _read_lock(fd, RAW_LOCK_PERM_BASE + _bit(perm))
            if perm & kept:
                _read_lock(fd, RAW_LOCK_SHARED_BASE + _bit(perm))
        refused = [perm for perm in Perm if perm & used and _is_held(fd, RAW_LOCK_SHARED_BASE + _bit(perm))]
        opposed = [perm for perm in Perm if perm & kept and _is_held(fd, RAW_LOCK_PERM_BASE + _bit(perm))]
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise image_error(error, path, "lock the image") from error
        refused, opposed = [Perm.CONSISTENT_READ], []
    if refused:
        raise _in_use(fd, path, f"does not let it be {_ACTIONS[refused[-1]]} by others", used)
    if opposed:
        raise _in_use(fd, path, f"has it open to be {_ACTIONS[opposed[0]]}", used)


def claim_image(fd: int, path: str) -> None:
    """Let nobody else read the image of `fd` from now on. ImageError, with nothing changed, if somebody does."""
    byte = _bit(Perm.CONSISTENT_READ)
    try:
        _read_lock(fd, RAW_LOCK_SHARED_BASE + byte)
        if _is_held(fd, RAW_LOCK_PERM_BASE + byte):
            unclaim_image(fd)
            raise _in_use(fd, path, "reads it", Perm.CONSISTENT_READ)
    except OSError as error:
        raise image_error(error, path, "lock the image") from error


def unclaim_image(fd: int) -> None:
    """Undo `claim_image`."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(
        type=fcntl.F_UNLCK, whence=0, start=RAW_LOCK_SHARED_BASE + _bit(Perm.CONSISTENT_READ), len=1, pid=0))


def refuse_readers(path: str) -> None:
    """ImageError if anyone has the image open, though it be to read what lies below another: who changes it would
    change that too. It may not be there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _is_held(fd, RAW_LOCK_PERM_BASE + _bit(Perm.CONSISTENT_READ)):
            raise _in_use(fd, path, "has it open to be read", Perm.CONSISTENT_READ)
    finally:
        os.close(fd)


def _bit(perm: Perm) -> int:
    return perm.bit_length() - 1


def _read_lock(fd: int, start: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(type=fcntl.F_RDLCK, whence=0, start=start, len=1, pid=0))


def _is_held(fd: int, start: int) -> bool:
    """Does anyone else hold a lock on the byte at `start`?"""
    query = FLOCK.pack(type=fcntl.F_WRLCK, whence=0, start=start, len=1, pid=0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query)
    return bool(FLOCK.unpack(answer)["type"] != fcntl.F_UNLCK)


def _in_use(fd: int, path: str, why: str, used: Perm) -> ImageError:
    holders = _holders(fd)
    who = " and ".join(holders) if holders else "another process (tapdisk, a QEMU guest, qemu-nbd or qemu-img)"
    hint = "close it there first"
    if used & Perm.WRITE:
        hint += ", or open this disk read-only"
    return ImageError(f"the image is in use: {who} {why}", errno=errno.EBUSY, path=path, hint=hint)


def _holders(fd: int) -> list[str]:
    """Processes that have the file of `fd` open, as far as /proc shows them, a few at most."""
    try:
        target = Path(f"/proc/self/fd/{fd}").readlink()
    except OSError:
        return []
    own = Path(f"/proc/{os.getpid()}/fd/{fd}")
    holders: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(_leads_to(link, target) for link in (process / "fd").iterdir() if link != own):
                holders.append(f"process {process.name} ({(process / 'comm').read_text().strip()})")
        except OSError:
            continue
    return holders[:MAX_HOLDERS_NAMED]


def _leads_to(link: Path, target: Path) -> bool:
    try:
        return link.readlink() == target
    except OSError:
        return False
