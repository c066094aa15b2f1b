"""The primary, as a sync sees it: the disk over its tapdisk's control socket, and one of its write logs.

Everything here waits for its answer, for a bounded time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from bitarray import bitarray

from tapcore.control import MAX_TIME_S, ControlClient, find_disk
from tapcore.errors import ControlError, LogError, ReplicationError, UsageError, WritelogError
from tapcore.request import OP_NAMES, STATUS_ZERO, WRITE
from writelog.backlog import chunk_runs
from writelog.client import LogClient, Taken
from writelog.sync_control import control_path
from writelog.sync_outcome import Served
from writelog.sync_pipeline import Portion, split
from writelog.wire import VERIFY_CHUNK_BYTES, ContentDigest

T = TypeVar("T")

MAP_MIN_BYTES: Final = 1 << 20
"""Extents shorter than this are read without asking the map: that costs as much."""
MAP_MAX_BYTES: Final = 1 << 30
"""Asked of one call."""
HOLDER_S, HOLDER_POLL_S = 2.0, 0.02
"""How long, and how often, to ask for a log that is held: by the connection of a sync that was killed, maybe."""
HAND_OVER_S: Final = 5.0
"""How long to wait for the answer to a hand-over before it is asked for."""
HOLD_MARGIN_S: Final = 5.0
"""What a hold lasts beyond the pause that is meant: then the tapdisk takes this process for stopped."""


class Source:
    """The disk `name` and its log `log_name` (may be left out if there is one); `first_bases` are what
    the copy may be called that the log counted for. UsageError if there is no such disk or log, ReplicationError
    if another sync has the log."""

    def __init__(self, run_dir: Path, name: str, log_name: str | None = None) -> None:
        self.name = name
        self.paused = False
        self.handed_over = False
        self.base = 0
        """What the copy is called that is being made; 0 before that is known."""
        self._hold_s = self._held_s = 0.0
        """How long a hold lasts, and when it was last asked for."""
        self._run_dir = run_dir
        self._log_name = log_name
        self._leases: set[int] = set()
        self._control: ControlClient = find_disk(run_dir, name)
        self._log: LogClient | None = None
        self._served: Served | None = None
        self._lock_fd = -1
        try:
            info = self._control.call("info", disk=name)
            self._served = Served(run_dir, info)
            if info["fenced"]:
                raise ReplicationError(f"disk {name!r} was {info['fenced']}", errno=errno.EPERM,
                                       hint="its copy is complete: use that; or, if that host is lost, go on here "
                                            f"by force: tap-ctl unpause --force {name}")
            self.size_bytes = int(info["size"])
            self._socket = self._find_log(info["logs"], log_name)
            self._lock()
            self._log = LogClient(self._socket)
            self.first_bases = self.bases()
            if self._log.size_bytes != self.size_bytes:
                raise ReplicationError(f"disk {name!r} has {self.size_bytes} bytes, but its write log covers "
                                       f"{self._log.size_bytes}")
        except BaseException:
            self.close()
            raise

    def _find_log(self, logs: list[dict[str, Any]], name: str | None) -> str:
        names = ", ".join(str(log["name"]) for log in logs)
        if not logs:
            raise UsageError(f"disk {self.name!r} has no write log",
                             hint="open it with one, such as log:|aio:/vm/disk.img")
        found = [log for log in logs if name in (None, log["name"])]
        if not found:
            raise UsageError(f"disk {self.name!r} has no write log called {name!r}", hint=f"it has {names}")
        if len(found) > 1:
            raise UsageError(f"disk {self.name!r} has {len(logs)} write logs", hint=f"choose with --log: {names}")
        return str(found[0]["socket"])

    def _lock(self) -> None:
        """Two syncs of one log would each take what the other needs."""
        path = self._lock_path
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise ReplicationError(f"cannot lock the log: {error.strerror}", errno=error.errno,
                                       path=str(path)) from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.stat().st_ino == os.fstat(fd).st_ino:
                    self._lock_fd = fd
                    return
            except BlockingIOError:
                os.close(fd)
                raise ReplicationError(f"another sync of disk {self.name!r} uses this write log",
                                       errno=errno.EBUSY,
                                       hint="wait for it, or open the disk with a log for each replica") from None
            except FileNotFoundError:
                pass  # its former owner has removed it while it was being locked
            os.close(fd)

    @property
    def _lock_path(self) -> Path:
        return Path(f"{self._socket}.sync")

    def reopen(self) -> Source:
        """The same disk and log, served anew. This one must be closed."""
        return Source(self._run_dir, self.name, self._log_name)

    @property
    def control_path(self) -> Path:
        """Where the sync of this disk and log listens."""
        log_name = Path(self._socket).name.removeprefix("log__").removesuffix(".ctl")
        return control_path(self._run_dir, self.name, log_name)

    @property
    def log(self) -> LogClient:
        assert self._log is not None
        return self._log

    def close(self) -> None:
        """Leave the disk as it is; leases return to the log, and a guest that is held goes on."""
        if self._log is not None:
            self._log.close()
        self._control.close()
        if self._served is not None:
            self._served.close()
        if self._lock_fd >= 0:
            with contextlib.suppress(OSError):
                self._lock_path.unlink()
            os.close(self._lock_fd)
            self._lock_fd = -1

    # The log

    def bases(self) -> tuple[int, int]:
        """What the copy is called that the log counts for, and what it may still be called; 0: there is none."""
        if self.handed_over:
            return self.base, 0
        figures = self.log.stat()
        return figures.base, figures.former

    def adopt(self, held: int) -> None:
        """The replica holds the copy at `held`: it lacks what the log has, no more. It is to be called `base` from
        now on. LogError if the log counts for another one by now."""
        self.base = self._patiently(lambda: self.log.adopt(held))

    def fill(self) -> None:
        """The replica is taken to have nothing; the copy that begins is called `base`."""
        self.base = self._patiently(self.log.fill)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """`ask()`, again while the log is held by a connection that has perhaps just ended."""
        deadline_s = time.monotonic() + HOLDER_S
        while True:
            try:
                return ask()
            except LogError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                    raise
            self.log.wait(HOLDER_POLL_S)

    def dirty_bytes(self) -> tuple[int, int]:
        """(dirty, leased)."""
        figures = self.log.stat()
        block_bytes = figures.granularity_bytes
        return figures.dirty_blocks * block_bytes, figures.leased_blocks * block_bytes

    def take(self, offset: int, length: int) -> tuple[Portion | None, int]:
        """What is dirty in [offset, offset + length), as a portion (None if nothing is), and where to go on; 0 at
        the disk's end.

        First the extents are taken, then the map is asked, and read still later: a write after the taking makes
        its block dirty again, so whatever map and read find of it, it is sent once more.
        """
        end = min(offset + length, self.size_bytes)
        taken = self.log.get(0, offset, end - offset)
        following = taken.next_offset or end
        if following >= self.size_bytes:
            following = 0
        if not taken.extents:
            self.log.commit(taken.lease)
            return None, following
        return self._portion(taken), following

    def take_listed(self, ranges: list[tuple[int, int]]) -> Portion | None:
        """What is dirty of the ranges (offset, length), as `take` does it."""
        taken = self.log.get_listed(ranges)
        if not taken.extents:
            self.log.commit(taken.lease)
            return None
        return self._portion(taken)

    def _portion(self, taken: Taken) -> Portion:
        self._leases.add(taken.lease)
        items = [item for start, size in taken.extents for item in self._items(start, size)]
        return Portion(taken.lease, items, chunk_runs(taken.extents))

    def touched(self) -> bitarray:
        """The chunks that were written to since the last call."""
        return self.log.touched()

    def commit(self, portion: Portion) -> None:
        """The replica has the portion on its disk."""
        self.log.commit(portion.lease)
        self._leases.discard(portion.lease)

    def reclaim(self) -> None:
        """What was taken and not committed is dirty again."""
        while self._leases:
            self.log.reclaim(self._leases.pop())

    def _items(self, offset: int, length: int) -> list[tuple[bool, int, int]]:
        if length < MAP_MIN_BYTES:
            return [(False, offset, length)]
        extents: list[tuple[int, int, bool]] = []
        at, end = offset, offset + length
        while at < end:
            answer = self._control.call("map", disk=self.name, offset=at, length=min(end - at, MAP_MAX_BYTES))
            for start, size, flags in answer["extents"]:
                extents.append((start, size, bool(flags & STATUS_ZERO)))
                at = max(at, start + size)
            if not answer["extents"]:
                break
        return list(split(offset, length, extents))

    def data_bytes(self) -> int:
        """What of the disk does not read as zeroes, by its map."""
        return sum(length for start in range(0, self.size_bytes, MAP_MAX_BYTES)
                   for is_zero, _, length in self._items(start, min(MAP_MAX_BYTES, self.size_bytes - start))
                   if not is_zero)

    def content_digest(self, *meanwhile: Callable[[], None]) -> bytes:
        """Of the whole disk, as the log reads it; each of `meanwhile` is called now and then."""
        content = ContentDigest(self.size_bytes)
        for offset, data in self.log.read_extents([(0, self.size_bytes)]):
            content.set(offset // VERIFY_CHUNK_BYTES, data)
            for action in meanwhile:
                action()
        return content.digest()

    # The guest

    def written_bytes(self) -> int:
        """What the guest has written so far."""
        stats = self._control.call("stats", disk=self.name)["disks"][self.name]
        return int(stats["ops"][OP_NAMES[WRITE]]["bytes"])

    def slow_down(self, rate: float | None) -> None:
        """Let the guest write no more than `rate` bytes a second; None: as fast as it can."""
        self._control.call("throttle", disk=self.name, rate=0 if rate is None else max(1, int(rate)))

    def pause(self, timeout_s: float) -> None:
        """Hold the guest's requests back; nothing is in flight afterwards. ControlError if that takes longer than
        `timeout_s`: then the connection that holds the guest is closed, and it goes on. So it does when the hold
        is not kept up by `keep_hold` and `timeout_s` and a margin have passed."""
        self._hold_s = min(timeout_s + HOLD_MARGIN_S, MAX_TIME_S)
        usual_s, self._control.timeout_s = self._control.timeout_s, timeout_s
        self._hold()
        self._control.timeout_s = usual_s
        self.paused = True

    def keep_hold(self) -> None:
        """Hold a guest that is held for longer. ControlError if it has gone on already."""
        if self.paused and time.monotonic() > self._held_s + self._hold_s / 2:
            self._hold()

    def _hold(self) -> None:
        self._held_s = time.monotonic()
        self._control.call("pause", disk=self.name, hold=True, hold_s=self._hold_s)

    def resume(self) -> None:
        """Let the guest go on, unless the disk was handed over."""
        if self.paused and not self.handed_over:
            self._control.call("unpause", disk=self.name)
            self.paused = False

    def hand_over(self, to: str, meanwhile: Callable[[], None]) -> None:
        """Make the pause permanent: from now on the replica is the primary. If the answer is lost, what became of
        it is found out, and `meanwhile()` called. ReplicationError if the disk was not handed over, or that cannot
        be told; ControlError if the tapdisk ended before."""
        assert self._served is not None
        self._control.timeout_s = HAND_OVER_S
        try:
            self._control.call("handover", disk=self.name, to=to, state=f"{self.base:016x}")
        except WritelogError as error:
            if self._control.is_closed:
                self.paused = False  # this process holds it no more
                if self._served.was_handed_over(to, meanwhile):
                    self.handed_over = True
                    return
                if self._served.has_ended:
                    raise ControlError("the tapdisk ended before the disk was handed over",
                                       errno=errno.ECONNRESET) from error
            raise ReplicationError(f"the primary could not be handed over: {error.message}",
                                   errno=error.errno, hint=error.hint) from error
        self.handed_over = True

    def take_back(self, reason: WritelogError) -> None:
        """Undo a hand-over of which the replica was not told, because of `reason`: the guest goes on here.
        ReplicationError, with the reason, if it does not."""
        try:
            with find_disk(self._run_dir, self.name) as control:  # the former connection is gone, perhaps
                control.call("unpause", disk=self.name, force=True)
        except WritelogError as error:
            raise ReplicationError(f"{reason.message}; disk {self.name!r} stays paused: {error.message}",
                                   errno=error.errno, hint="its replica was not promoted: tap-ctl unpause --force "
                                                           f"{self.name} lets the guest go on") from reason
        self.handed_over = self.paused = False
