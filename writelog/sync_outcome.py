"""What became of a hand-over whose answer was lost. The guest stands still, so it is asked until it is known.

    the tapdisk says that it records it       ask again
    it says that the disk is fenced, or not   that is it
    it has ended                              the fence beside the image tells: who has ended writes no more
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tapcore import fence
from tapcore.control import find_disk
from tapcore.errors import ControlError, ReplicationError, WritelogError
from writelog.sync_stop import Interrupted

POLL_S: Final = 0.05
ASK_S: Final = 5.0
"""Longest wait for one answer."""
KNOWN_S: Final = 300.0
"""Longest wait for the outcome: a disk that takes so long to record a line is not waited for."""


class Served:
    """The disk as one tapdisk serves it: `info` is what that said of it."""

    def __init__(self, run_dir: Path, info: dict[str, Any]) -> None:
        self.name = str(info["name"])
        self._run_dir = run_dir
        self._pid = int(info["pid"])
        self._image: str | None = info["image"]
        try:
            self._pid_fd = os.pidfd_open(self._pid)
        except ProcessLookupError:
            raise ControlError(f"the tapdisk {self._pid} has ended", errno=errno.ECONNRESET) from None

    def close(self) -> None:
        if self._pid_fd >= 0:
            os.close(self._pid_fd)
            self._pid_fd = -1

    @property
    def has_ended(self) -> bool:
        """Whether that tapdisk has."""
        return bool(select.select([self._pid_fd], [], [], 0)[0])

    def was_handed_over(self, to: str, meanwhile: Callable[[], None]) -> bool:
        """Whether the disk was handed over to `to`, as soon as that is known; a fence that is there is durable
        then. ReplicationError if it cannot be known, or `meanwhile()`, which is called all the time, has a reason
        not to wait; it says what may be the case."""
        deadline_s = time.monotonic() + KNOWN_S
        while True:
            try:
                known = self._ask(to)
                if known is not None:
                    return known
                meanwhile()
            except (Interrupted, WritelogError) as stop:
                raise self._in_doubt(str(stop) or "interrupted") from stop
            if time.monotonic() > deadline_s:
                raise self._in_doubt(f"there was no answer for {KNOWN_S:g} s")
            time.sleep(POLL_S)

    def _ask(self, to: str) -> bool | None:
        """None if it is not known yet. ImageError if the fence cannot be made durable."""
        has_ended = self.has_ended
        try:
            with find_disk(self._run_dir, self.name, ASK_S) as control:
                info = control.call("info", disk=self.name)
        except WritelogError:
            if not has_ended:
                return None
            return self._image is not None and to in (fence.keep(self._image) or "")
        if info["fenced"]:
            return to in str(info["fenced"])
        # A tapdisk that has just woken up has perhaps not read all yet that this process sent it.
        is_held = f"process {os.getpid()}" in str(info["holder"])
        return None if info["handing_over"] or is_held else False

    def _in_doubt(self, why: str) -> ReplicationError:
        beside = f"; or else whether {self._image}{fence.SUFFIX} is there" if self._image else ""
        return ReplicationError(
            f"{why}; disk {self.name!r} may be fenced: its tapdisk (process {self._pid}) has not said whether the "
            "hand-over was recorded. The replica was not promoted",
            errno=errno.EINPROGRESS,
            hint=f"`tap-ctl info {self.name}` tells once it answers{beside}. If the disk is fenced, "
                 f"`tap-ctl unpause --force {self.name}` lets the guest go on here; if not, it goes on by itself")
