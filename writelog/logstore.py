"""What one log knows: the bitmaps in shared memory that outlives the process, and the side-car that outlives the
host.

    0       HEADER, one page
    4096    the dirty bitmap, rounded up to a page
    ...     the bitmap of leased ("taken") blocks, as long
    ...     the bitmap of blocks that became clean since the last flush ("released"), as long

One process has it at a time: an flock on the shared memory, which the kernel drops with the process. What is found
at opening is kept if it describes the same disk: size, granularity, and `identity`, which tells two disks apart
whose logs have the same name. Otherwise nothing is known about the disk any more, and every block is dirty.
A log that did not exist starts empty, under a new generation number.

Both carry a random *pairing*. If it is the same, the memory is as exact as when the last process ended, however
that was, and counts. If not, the host was started anew, or the image was elsewhere: then the side-car counts, with
all its hot extents dirty, and what else is marked in the memory besides. Where there was no side-car yet one is
made. The ids (writelog.generations) are in both as well, and in the side-car first: they count there. A change of
ids without the side-car ends the pairing. One that does not know those in memory is older, from a backup maybe:
then `base` is given up.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
from dataclasses import replace
from pathlib import Path

from bitarray import bitarray

from tapcore.errors import LogError
from tapcore.layout import Layout
from tapcore.loop import Loop
from tapcore.text import size_text
from tapcore.workers import Workers
from writelog import sidecar
from writelog.activity import DEFAULT_HOT, Activity, Resume
from writelog.bitmap import SECTOR_BYTES, Bitmap, bitmap_bytes, check_granularity
from writelog.dirtymap import DirtyMap
from writelog.generations import Generations, decode_names, encode_names, new_id
from writelog.logjournal import Journal, Lower
from writelog.shm import (
    SHM_DIR,
    allocate,
    bitmap_name,
    create_shared,
    open_shared,
    remove_stale_regions,
    unlink_shared,
)
from writelog.sidecar import Sectors, Sidecar
from writelog.sidecar_layout import EXTENT_BYTES, SECTOR_BITS, Flag, Record, sector_count

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096
HEADER = Layout(
    "log bitmap header", "<",
    "magic:8s version:I granularity_bytes:I size_bytes:Q generation:Q identity:16s "
    "pairing:Q current:Q base:Q history:64s former:Q", size=144)
MAGIC = b"writelog"
VERSION = 3


class LogStore:
    """The open bitmaps, as a DirtyMap: `map`. `activity` is there if there is a side-car: who writes asks it
    first, and calls `start_journal` before."""

    def __init__(
        self, run_dir: Path, name: str, size_bytes: int, granularity_bytes: int, identity: str,
        sidecar_path: Path | None = None, hot: int = DEFAULT_HOT
    ) -> None:
        """Attach to the bitmaps of the log `name`, or make them, and to the side-car at `sidecar_path`, with at
        most `hot` hot extents.

        LogError if the size is no multiple of a sector, another process has the log, the shared memory is not this
        user's, there is no room for it, or the side-car cannot be used.
        """
        check_granularity(granularity_bytes)
        if size_bytes % SECTOR_BYTES:
            raise LogError(f"a disk of {size_bytes} bytes cannot be logged", errno=errno.EINVAL,
                           hint=f"its size has to be a multiple of {SECTOR_BYTES} bytes")
        self.name = bitmap_name(run_dir, name)
        self.generation = 0
        self.generations = Generations(new_id())
        self.activity: Activity | None = None
        self.journal: Journal | None = None
        self._sidecar: Sidecar | None = None
        self._pairing = 0
        self._wanted = {
            "magic": MAGIC, "version": VERSION, "granularity_bytes": granularity_bytes, "size_bytes": size_bytes,
            "identity": _digest(identity)}
        one_bytes = -(-bitmap_bytes(size_bytes, granularity_bytes) // PAGE_BYTES) * PAGE_BYTES
        self._fd, fresh = _open_locked(self.name)
        try:
            self._prepare(PAGE_BYTES + 3 * one_bytes, fresh)
            memory = memoryview(self._map)
            dirty = Bitmap(memory[PAGE_BYTES:], size_bytes, granularity_bytes)
            taken = Bitmap(memory[PAGE_BYTES + one_bytes :], size_bytes, granularity_bytes)
            released = Bitmap(memory[PAGE_BYTES + 2 * one_bytes :], size_bytes, granularity_bytes)
            kept = self.generation != 0
            if not kept:
                self._start(dirty, (taken, released), fresh)
            for bitmap in (dirty, taken, released):
                bitmap.bits[bitmap.blocks :] = 0
            self.map = DirtyMap(dirty, taken, released)
            if sidecar_path is not None:
                self._join(sidecar_path, kept, hot)
            remove_stale_regions(run_dir, name)
        except BaseException:
            if self._sidecar is not None:
                self._sidecar.close()
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
            self.generations = Generations(found["current"], found["base"], decode_names(found["history"]),
                                           found["former"])
            self._pairing = found["pairing"]
        elif not fresh:
            logger.warning("%s described another disk or was damaged: every block counts as dirty now; "
                           "log:NAME gives a log a name of its own", self.name)

    def _start(self, dirty: Bitmap, others: tuple[Bitmap, ...], fresh: bool) -> None:
        """Give the bitmaps their first content, then the header that makes them valid."""
        self._map[: HEADER.size] = bytes(HEADER.size)
        for bitmap in others:
            if bitmap.bits.any():
                bitmap.bits.setall(0)
        if not fresh:
            dirty.fill()
        self.generation = new_id()
        self._put_header()

    def _put_header(self) -> None:
        names = self.generations
        HEADER.pack_into(self._map, 0, generation=self.generation, pairing=self._pairing, current=names.current,
                         base=names.base, former=names.former, history=encode_names(names.history), **self._wanted)

    # The side-car

    def _join(self, path: Path, kept: bool, hot: int) -> None:
        """Bring memory and side-car together; `kept` says that the memory had something to say."""
        size_bytes, granularity_bytes = self.map.dirty.size_bytes, self.map.dirty.granularity_bytes
        found = Sidecar.open(path)
        record = found.record if found is not None else None
        if found is not None and record is not None and (
                (record.size_bytes, record.granularity_bytes) == (size_bytes, granularity_bytes)):
            self._sidecar = found
            self._attach(found, record, kept)
        else:
            if found is not None:
                logger.warning("%s: described another disk or was damaged: every block counts as dirty now", path)
                found.close()
                self.map.dirty.fill()
            self._pairing = new_id()
            self.generations = self.generations.with_base(0)
            flags = Flag.OPEN | (Flag.EMPTY if found is None else Flag(0))
            first = Record(granularity_bytes, size_bytes, 1, new_id(), flags, self._pairing, self.generation,
                           self.generations, ())
            self._sidecar = Sidecar.create(path, first, self._sectors())
        assert self._sidecar.record is not None
        self.activity = Activity(self.map, self._sidecar.record, hot)
        if record is not None and record.flags & Flag.OPEN:
            self.activity.cleared(0, self.map.blocks)
        self._put_header()

    def _attach(self, found: Sidecar, record: Record, kept: bool) -> None:
        """Take over what a side-car of this disk says, and have it say that it is open."""
        sectors: Sectors = ()
        if kept and self._pairing == record.pairing:
            before, ids = self.generations.base, record.generations
            is_later = before in (ids.current, ids.base, *ids.history)
            self.generations = ids if is_later else ids.with_base(0)
        else:
            if not kept and self.map.dirty.bits.any():
                self.map.dirty.bits.setall(0)
            unusable = found.load(self.map.dirty)
            if record.flags & Flag.OPEN:
                logger.warning("%s: was not closed, the host may have crashed: %s count as dirty in any case, and "
                               "%d of %d sectors are damaged or out of date", found.path,
                               size_text(len(record.hot) * EXTENT_BYTES), unusable, sector_count(self.map.blocks))
            sectors = self._sectors() if kept else ()
            self._pairing = new_id()
            self.generation, self.generations = record.log_generation, record.generations
        opened = replace(record, sequence=record.sequence + 1, flags=record.flags | Flag.OPEN,
                         pairing=self._pairing, generations=self.generations)
        if code := found.write(opened, sectors):
            raise LogError(f"cannot write the side-car: {os.strerror(code)}", errno=code, path=str(found.path))

    def _sectors(self) -> Sectors:
        """All that have a bit set."""
        out, dirty = [], self.map.dirty.bits
        at = dirty.find(1)
        while at >= 0:
            number = at // SECTOR_BITS
            stop = min((number + 1) * SECTOR_BITS, self.map.blocks)
            bits: bitarray = dirty[number * SECTOR_BITS : stop]
            out.append((number, bits.tobytes()))
            at = dirty.find(1, stop)
        return out

    def start_journal(self, loop: Loop, workers: Workers, lower: Lower) -> Journal | None:
        """What makes the activity log durable; None without a side-car."""
        if self.activity is not None:
            assert self._sidecar is not None
            self.journal = Journal(loop, workers, self._sidecar, self.activity, lower)
            self.map.cleared = self.journal.cleared
        return self.journal

    @property
    def sidecar_path(self) -> Path | None:
        return self._sidecar.path if self._sidecar is not None else None

    def change(self, generations: Generations, resume: Resume, *, all_dirty: bool = False) -> None:
        """Make `generations` the ids of this log, durably, then `resume(0)`, or with an errno if that failed. With
        `all_dirty` every block is dirty from then on; they are so in memory already."""
        def landed(code: int) -> None:
            if not code:
                self.generations = generations
                self._put_header()
            resume(code)

        if self.journal is None:
            self._pairing = 0
            landed(0)
        else:
            self.journal.change(generations, landed, all_dirty=all_dirty)

    def set_identity(self, identity: str) -> None:
        """The disk is known by another `identity` from now on. A crash meanwhile makes every block dirty."""
        self._wanted["identity"] = _digest(identity)
        self._put_header()

    def close(self) -> None:
        """Let another process have the log. What it knows stays in the shared memory, and in the side-car."""
        try:
            if self.journal is not None:
                self.journal.close()
            elif self._sidecar is not None:
                self._sidecar.close()
        finally:
            self.journal = self.activity = self._sidecar = None
            del self.map
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            try:
                self._map.close()
            except BufferError:
                logger.debug("%s stays mapped until its last user is gone", self.name)


def _digest(identity: str) -> bytes:
    return hashlib.blake2b(os.fsencode(identity), digest_size=16).digest()


def forget(run_dir: Path, name: str, sidecar_path: Path | None = None) -> bool:
    """Remove the bitmaps of the log `name`, its side-car, and what regions are left of it; False if there are
    none.

    LogError if a process has the log open.
    """
    shared = bitmap_name(run_dir, name)
    removed = sidecar_path is not None and sidecar.remove(sidecar_path)
    if not Path(f"{SHM_DIR}{shared}").exists():
        return removed
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
