"""The switch-over of several disks at once: each sync of a group stops at its gate until all have come so far.

    COPYING ──▶ READY ──▶ CONFIRMED ──▶ HANDED_OVER ──▶ PROMOTED
             in sync,   paused, the    the source is   the replica is
             held       last round     fenced          the primary
                        confirmed

A sync tells its gate what it has reached; whoever drives the group says how far they may go. All are paused when
the first is handed over, so what the replicas have is of one moment. All have handed over before any replica is
promoted; up to that moment an abort takes everything back, and so does breaking off, after which the disks are
copied further and it is tried again: they switch all together, or none does. Each sync runs in a thread, their
driver in another.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable
from enum import IntEnum

from tapcore.errors import ReplicationError
from writelog.sync_stop import BrokenOff


class Step(IntEnum):
    COPYING = 0
    READY = 1
    CONFIRMED = 2
    HANDED_OVER = 3
    PROMOTED = 4


class Aborted(ReplicationError):
    """The group does not switch over."""


class Group:
    """The syncs of the disks `names`; `gates` has a gate for each."""

    def __init__(self, names: Iterable[str]) -> None:
        self.changed = threading.Condition()
        self.allowed = Step.READY
        self.aborted: str | None = None
        """Why, if it was."""
        self.broken_off = 0
        """How many switch-overs were."""
        self.reason = BrokenOff("")
        """Why the last one was."""
        self.gates = {name: Gate(self) for name in names}

    def have(self, step: Step) -> bool:
        """Whether all have come as far as `step`."""
        return all(gate.reached >= step for gate in self.gates.values())

    def wait(self, step: Step, timeout_s: float) -> bool:
        """`have(step)`, as soon as it is true; False after `timeout_s`."""
        with self.changed:
            return self.changed.wait_for(lambda: self.have(step), timeout_s)

    def allow(self, step: Step) -> bool:
        """Let all go on to `step`. False, and nothing changes, if one has not reached the step before."""
        with self.changed:
            if self.aborted is not None or not self.have(Step(step - 1)):
                return False
            self.allowed = step
            self._tell()
            return True

    def abort(self, reason: str) -> bool:
        """Have all give up and let their guests go on. False, and nothing changes, if they may promote already."""
        with self.changed:
            if self.allowed >= Step.PROMOTED:
                return False
            self.aborted = self.aborted or reason
            self._tell()
            return True

    def break_off(self, reason: BrokenOff) -> bool:
        """Have all that are in the switch-over let their guests go on, and try again later. False, and nothing
        changes, if there is none, or they may promote already."""
        with self.changed:
            if not Step.READY < self.allowed < Step.PROMOTED:
                return False
            self.allowed = Step.READY
            self.broken_off += 1
            self.reason = reason
            for gate in self.gates.values():
                gate.leave()
            self._tell()
            return True

    def _tell(self) -> None:
        for gate in self.gates.values():
            gate.tell()


class Gate:
    """Of one sync; without a group it is open."""

    def __init__(self, group: Group | None = None) -> None:
        self.reached = Step.COPYING
        self._group = group or ALONE
        self._round: int | None = None
        """Which switch-over the sync takes part in."""
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._has_news = False

    def fileno(self) -> int:
        """Readable when there is something to `check`."""
        return self._fd

    def close(self) -> None:
        """When the sync has ended."""
        with self._group.changed:
            os.close(self._fd)
            self._fd = -1

    def tell(self) -> None:
        """There is something to `check`. Called by the group, which holds its lock."""
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)
            self._has_news = True

    def check(self) -> None:
        """Take in the news. Aborted if the group does not switch over, BrokenOff if the sync is to leave the
        switch-over that it takes part in."""
        if self._has_news:
            self._has_news = False
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._fd)
        if self._group.aborted is not None:
            raise Aborted(self._group.aborted, errno=errno.ECANCELED)
        if self._round is not None and self._round != self._group.broken_off:
            self._round = None
            raise self._group.reason

    def reach(self, step: Step) -> None:
        """The sync is at `step` now, be it further or, when something went wrong, back."""
        with self._group.changed:
            if step <= Step.READY:
                self._round = None
            if self._round in (None, self._group.broken_off):
                self.reached = step
            self._group.changed.notify_all()

    def leave(self) -> None:
        """The switch-over is broken off; the sync will hear of it. Called by the group, which holds its lock."""
        if self._round is not None:
            self.reached = Step.COPYING

    def enter(self) -> bool:
        """Whether the sync is in sync and may switch over; from then on it takes part."""
        with self._group.changed:
            if self.reached < Step.READY or not self.may(Step.CONFIRMED):
                return False
            self._round = self._group.broken_off
            return True

    def step_back(self) -> None:
        """The sync is in sync no more; too late if the switch-over has begun."""
        with self._group.changed:
            if not self.may(Step.CONFIRMED):
                self.reached = Step.COPYING

    def may(self, step: Step) -> bool:
        """Whether the sync may go on to `step`."""
        return self._group.allowed >= step


ALONE = Group(())
ALONE.allowed = Step.PROMOTED
