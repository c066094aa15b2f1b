"""The bitmaps of one log in shared memory that outlives the process.

    0       HEADER, one page
    4096    the dirty bitmap, rounded up to a page
    ...     the bitmap of leased ("taken") blocks, as long

One process has it at a time: an flock on the shared memory, which the kernel drops with the process. What is found
at opening is kept if it describes the same disk: size, granularity, and `identity`, which tells two disks apart
whose logs have the same name. Otherwise nothing is known about the disk any more, and every block is dirty.
A log that did not exist starts empty, under a new generation number.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
from pathlib import Path

from tapcore.errors import LogError
from tapcore.layout import Layout
from writelog.bitmap import SECTOR_BYTES, Bitmap, bitmap_bytes, check_granularity
from writelog.dirtymap import DirtyMap
from writelog.shm import (
    SHM_DIR,
    allocate,
    bitmap_name,
    create_shared,
    open_shared,
    remove_stale_regions,
    unlink_shared,
)

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096
HEADER = Layout(
    "log bitmap header", "<",
    "magic:8s version:I granularity_bytes:I size_bytes:Q generation:Q identity:16s :16x", size=64)
MAGIC = b"writelog"
VERSION = 1


class LogStore:
    """The open bitmaps, as a DirtyMap: `map`."""

    def __init__(
        self, run_dir: Path, name: str, size_bytes: int, granularity_bytes: int, identity: str
    ) -> None:
        """Attach to the bitmaps of the log `name`, or make them.

        LogError if the size is no multiple of a sector, another process has the log, the shared memory is not this
        user's, or there is no room for it.
        """
        check_granularity(granularity_bytes)
        if size_bytes % SECTOR_BYTES:
            raise LogError(f"a disk of {size_bytes} bytes cannot be logged", errno=errno.EINVAL,
                           hint=f"its size has to be a multiple of {SECTOR_BYTES} bytes")
        self.name = bitmap_name(run_dir, name)
        self.generation = 0
        self._wanted = {
            "magic": MAGIC, "version": VERSION, "granularity_bytes": granularity_bytes, "size_bytes": size_bytes,
            "identity": _digest(identity)}
        one_bytes = -(-bitmap_bytes(size_bytes, granularity_bytes) // PAGE_BYTES) * PAGE_BYTES
        self._fd, fresh = _open_locked(self.name)
        try:
            self._prepare(PAGE_BYTES + 2 * one_bytes, fresh)
            memory = memoryview(self._map)
            dirty = Bitmap(memory[PAGE_BYTES:], size_bytes, granularity_bytes)
            taken = Bitmap(memory[PAGE_BYTES + one_bytes :], size_bytes, granularity_bytes)
            if self.generation == 0:
                self._start(dirty, taken, fresh)
            dirty.bits[dirty.blocks :] = 0
            taken.bits[taken.blocks :] = 0
            self.map = DirtyMap(dirty, taken)
            remove_stale_regions(run_dir, name)
        except BaseException:
            if fresh:
                unlink_shared(self.name)
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            raise

    def _prepare(self, size_bytes: int, fresh: bool) -> None:
        """Map the object; `generation` is not 0 afterwards if its content can be kept."""
        usable = not fresh and os.fstat(self._fd).st_size == size_bytes
        if not usable:
            os.ftruncate(self._fd, 0)
        allocate(self._fd, size_bytes, self.name)
        self._map = mmap.mmap(self._fd, size_bytes)
        found = HEADER.unpack(self._map)
        if usable and all(found[field] == value for field, value in self._wanted.items()):
            self.generation = found["generation"]
        elif not fresh:
            logger.warning("%s described another disk or was damaged: every block counts as dirty now; "
                           "log:NAME gives a log a name of its own", self.name)

    def _start(self, dirty: Bitmap, taken: Bitmap, fresh: bool) -> None:
        """Give the bitmaps their first content, then the header that makes them valid."""
        self._map[: HEADER.size] = bytes(HEADER.size)
        taken.bits.setall(0)
        if not fresh:
            dirty.fill()
        self.generation = int.from_bytes(os.urandom(8), "little") | 1
        HEADER.pack_into(self._map, 0, generation=self.generation, **self._wanted)

    def set_identity(self, identity: str) -> None:
        """The disk is known by another `identity` from now on. A crash meanwhile makes every block dirty."""
        self._wanted["identity"] = _digest(identity)
        HEADER.pack_into(self._map, 0, generation=self.generation, **self._wanted)

    def close(self) -> None:
        """Let another process have the log. What it knows stays in the shared memory."""
        del self.map
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        try:
            self._map.close()
        except BufferError:
            logger.debug("%s stays mapped until its last user is gone", self.name)


def _digest(identity: str) -> bytes:
    return hashlib.blake2b(os.fsencode(identity), digest_size=16).digest()


def forget(run_dir: Path, name: str) -> bool:
    """Remove the bitmaps of the log `name` and what regions are left of it; False if there are none.

    LogError if a process has the log open.
    """
    shared = bitmap_name(run_dir, name)
    if not Path(f"{SHM_DIR}{shared}").exists():
        return False
    fd, _ = _open_locked(shared)
    try:
        remove_stale_regions(run_dir, name)
        unlink_shared(shared)
    finally:
        os.close(fd)
    return True


def _open_locked(name: str) -> tuple[int, bool]:
    """The descriptor of the object `name`, which now has this process's lock, and whether it is new."""
    while True:
        try:
            fd, fresh = create_shared(name), True
        except FileExistsError:
            try:
                fd, fresh = open_shared(name), False
            except FileNotFoundError:
                continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if Path(f"{SHM_DIR}{name}").stat().st_ino == os.fstat(fd).st_ino:
                return fd, fresh
        except BlockingIOError:
            os.close(fd)
            raise LogError(f"the log {name} is in use by another tapdisk", errno=errno.EBUSY,
                           hint="close it there, or give this one another name: log:NAME") from None
        except FileNotFoundError:
            logger.debug("%s was removed while it was being opened", name)
        os.close(fd)
