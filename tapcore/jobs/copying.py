"""What commit and stream have in common: a pass over the disk that copies, window by window, beside the guest.

    plan     which parts of a range are to be copied or zeroed (pure questions to the images' tables)
    window   part of the disk that is copied with its range locked (tapcore.jobs.gate)

A few windows are under way at a time, as BACKGROUND requests: drivers do them in workers, and between any two of
them the guest has its turn. A rate limit holds back the beginning of windows.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from tapcore.bucket import Bucket
from tapcore.disk import Disk
from tapcore.driver import Driver, Env
from tapcore.errors import ControlError, WritelogError
from tapcore.formats.tools import find_tools
from tapcore.jobs.gate import BLOCK_BYTES, Gate, Lock
from tapcore.jobs.job import Job, Settle
from tapcore.jobs.snapshot import SAME_FORMAT
from tapcore.jobs.steps import Done, Steps, asking, drive
from tapcore.request import BACKGROUND, IS_ZERO, READ, WRITE, ZEROES, Request

WINDOW_BYTES: Final = 8 * BLOCK_BYTES
MAX_WINDOWS: Final = 4
LOOK_BYTES: Final = 1 << 30
"""The most that is asked about at once while looking for what is to be copied."""
_NOTHING: Final = memoryview(bytes(WINDOW_BYTES))

SKIP, COPY, ZERO = 0, 1, 2

Plan = list[tuple[int, int]]
"""(length, SKIP, COPY or ZERO) of consecutive ranges."""


class CopyJob(Job):
    """A subclass says in `plan` what is to be done, and where: from `source` to `target`."""

    gate: Gate
    source: Driver
    target: Driver

    def __init__(self, env: Env, disk: Disk, settle: Settle, rate: int | None) -> None:
        super().__init__(env, disk, settle)
        if rate == 0:
            raise ControlError("at a rate of 0 nothing would ever be copied", errno=errno.EINVAL)
        self.copied_bytes = 0
        self.size_bytes = disk.vbd.info.size_bytes
        self._bucket = Bucket(rate, env.loop.time_s()) if rate else None
        self._rate_is_due = False
        self._at = self.size_bytes
        """Looked at up to here."""
        self._is_looking = False
        self._found: deque[tuple[int, int]] = deque()
        """(offset, end) of what is to be copied."""
        self._windows = 0
        self._failure: WritelogError | None = None
        self._pass_done: Done | None = None

    def _ended(self, error: WritelogError | None) -> None:
        super()._ended(error)
        for drivers in ("gate", "source", "target", "base", "between"):  # closed now, or others' to keep
            self.__dict__.pop(drivers, None)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"total_bytes": self.size_bytes, "done_bytes": self._at,
                                    "copied_bytes": self.copied_bytes}

    def plan(self, offset: int, length: int, plan: Plan) -> Steps[None]:
        """What is to be done from `offset` on, appended to `plan`: at least one range, at most `length` bytes."""
        raise NotImplementedError

    # A pass

    def copy_disk(self, done: Done) -> None:
        """A step: copy what is to be copied."""
        self._at = 0
        self._begin_pass(done)

    def copy_changed(self, done: Done) -> None:
        """A step: copy what the guest has changed since it was copied last."""
        self._found.extend(self.gate.changed_ranges())
        self._begin_pass(done)

    def cancel(self) -> None:
        super().cancel()
        if self._pass_done is not None:
            self._pump()

    def check_cancelled(self) -> None:
        if self.cancelling:
            raise ControlError("it was cancelled", errno=errno.ECANCELED)

    def _begin_pass(self, done: Done) -> None:
        self._failure = None
        self._pass_done = done
        self._pump()

    def _pump(self) -> None:
        """Keep windows under way, or end the pass."""
        if self.cancelling:
            self._failure = self._failure or ControlError("it was cancelled", errno=errno.ECANCELED)
        while self._failure is None and self._found and self._windows < MAX_WINDOWS:
            if self._bucket is not None and (wait_s := self._bucket.wait_s(self.env.loop.time_s())):
                if not self._rate_is_due:
                    self._rate_is_due = True
                    self.env.loop.call_later(wait_s, self._rate_allows)
                return
            offset, end = self._found.popleft()
            stop = min(end, (offset // WINDOW_BYTES + 1) * WINDOW_BYTES)
            if stop < end:
                self._found.appendleft((stop, end))
            if self._bucket is not None:
                self._bucket.take(stop - offset)
            self._windows += 1
            self.gate.lock(offset, stop - offset, self._locked)
        if self._is_looking or self._windows:
            return
        if self._failure is None and self._at < self.size_bytes:
            self._look()
        elif self._pass_done is not None:
            self._found.clear()
            done, self._pass_done = self._pass_done, None
            done(self._failure)

    def _rate_allows(self) -> None:
        self._rate_is_due = False
        if self._pass_done is not None:
            self._pump()

    # Looking

    def _look(self) -> None:
        self._is_looking = True
        found: Plan = []
        length = min(self.size_bytes - self._at, LOOK_BYTES)
        drive(self.plan(self._at, length, found), partial(self._looked, found))

    def _looked(self, found: Plan, error: WritelogError | None) -> None:
        self._is_looking = False
        self._failure = self._failure or error
        self._found.extend(_whole_blocks(self._at, found, self.size_bytes))
        self._at += sum(length for length, _ in found)
        self.env.loop.call_soon(self._pump)

    # Windows

    def _locked(self, lock: Lock) -> None:
        self.gate.unmark(lock)
        drive(self._copy(lock.offset, lock.end), partial(self._copied, lock))

    def _copied(self, lock: Lock, error: WritelogError | None) -> None:
        if error is not None:
            self.gate.changed.mark(lock.offset, lock.end - lock.offset)
            self._failure = self._failure or error
        self._windows -= 1
        self.gate.unlock(lock)
        self.env.loop.call_soon(self._pump)

    def _copy(self, offset: int, end: int) -> Steps[None]:
        while offset < end:
            plan: Plan = []
            yield from self.plan(offset, end - offset, plan)
            for length, action in plan:
                if action == COPY:
                    yield from self._copy_data(offset, length)
                elif action == ZERO:
                    yield asking(self.target, Request(ZEROES, offset, length, flags=BACKGROUND))
                offset += length

    def _copy_data(self, offset: int, length: int) -> Steps[None]:
        data = memoryview(bytearray(length))
        read = Request(READ, offset, length, [data], BACKGROUND)
        read.takes_zero = True
        yield asking(self.source, read)
        self.copied_bytes += length
        if read.flags & IS_ZERO or data == _NOTHING[:length]:
            yield asking(self.target, Request(ZEROES, offset, length, flags=BACKGROUND))
        else:
            yield asking(self.target, Request(WRITE, offset, length, [data], BACKGROUND))


def refuse_internal_snapshots(top: Driver, path: str) -> None:
    """ControlError if the image at `path` has snapshots within: they would be lost, or miss their backing."""
    if find_tools(SAME_FORMAT.get(top.name, top.name)).describe(path).get("snapshots"):
        raise ControlError("has internal snapshots, which would be damaged", errno=errno.EINVAL, path=path,
                           hint="delete them first when the disk is closed: td-img snapshot")


def _whole_blocks(offset: int, plan: Plan, size_bytes: int) -> Iterable[tuple[int, int]]:
    """The ranges that are not skipped, made of whole blocks, those that meet joined."""
    begin = end = -1
    for length, action in plan:
        if action != SKIP:
            first = offset // BLOCK_BYTES * BLOCK_BYTES
            if first > end:
                if begin >= 0:
                    yield begin, end
                begin = first
            end = min(size_bytes, -(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES)
        offset += length
    if begin >= 0:
        yield begin, end
