"""Drives the syncs of several disks that switch together, as `writelog-sync` with more than one --disk does.

    copying ──▶ all ready ──▶ all paused, the rest sent ──▶ all handed over ──▶ all promoted
                    ▲                   │                         │
                    └───────────────────┴─────────────────────────┘
                       broken off: the guest goes on, and so does the copying

When all disks fit into the downtime budget together, all are paused. When every replica has confirmed the rest of
its disk, all disks are handed over; when all are, the replicas are promoted. Up to that moment whatever goes wrong
is taken back: for good if a sync gives up or the operator cancels, or for another try, if a link drops or it takes
too long. If this process is killed, a child takes back what was handed over (`writelog.sync_guard`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from tapcore.errors import ReplicationError, WritelogError
from writelog.sync_gate import Aborted, Step
from writelog.sync_group import DiskGroup
from writelog.sync_group_report import GroupReport, GroupReporter, downtime_parts, state_of
from writelog.sync_guard import Guard
from writelog.sync_hooks import Hooks
from writelog.sync_report import CONVERGING, SWITCHING
from writelog.sync_stop import BrokenOff, Interrupted, PauseTooLong

POLL_S: Final = 0.05
PAUSED_POLL_S: Final = 0.005
"""While the guest stands still."""
MARKS: Final = {Step.CONFIRMED: "begin", Step.HANDED_OVER: "last round", Step.PROMOTED: "hand over"}
"""What is over when a step is allowed."""


class Together:
    """One run. `interrupted` may be set by a signal handler."""

    def __init__(self, group: DiskGroup, run_dir: Path, reporter: GroupReporter, hooks: Hooks, *,
                 keep_running: bool, verify: bool) -> None:
        self.interrupted = False
        self._group = group
        self._gates = group.gates
        self._run_dir = run_dir
        self._reporter = reporter
        self._hooks = hooks
        self._last_step = Step.HANDED_OVER if keep_running else Step.PROMOTED
        """From which on nothing is taken back."""
        self._verify = verify
        self._guard: Guard | None = None
        self._is_prepared = False
        """The hook before the switch-over was run."""
        self._failure: tuple[str, WritelogError] | None = None
        self._marks: dict[str, float] = {}
        """When the pause began, and when each of its parts was over."""
        self._start_s = time.monotonic()

    def run(self) -> GroupReport:
        """To the end. WritelogError, which names the disk, or Interrupted if there is none: then the guest goes on
        with all disks, unless the replicas were being promoted already, which the error says."""
        outcome: dict[str, Any] | WritelogError = ReplicationError("interrupted")
        group = self._group
        try:
            group.start()
            while not all(disk.has_ended for disk in group.disks.values()):
                group.turn()
                self._look()
                self._go_on()
            report = self._finish()
            outcome = report.figures()
            return report
        except WritelogError as error:
            outcome = error
            raise
        finally:
            self._gates.abort("the sync has ended")
            running = [name for name, disk in group.disks.items() if not disk.join()]
            if self._guard is not None:
                self._guard.close(not running)
            if self._gates.allowed is not Step.PROMOTED:
                self._hooks.undo(group.endpoints)
            group.close(outcome)

    def _look(self) -> None:
        """Tell where it is; give up if there is a reason to."""
        group = self._group
        reporters = {name: disk.reporter for name, disk in group.disks.items()}
        group.state = SWITCHING if self._gates.allowed > Step.READY else state_of(reporters)
        self._reporter.state(group.state)
        self._reporter.moving(time.monotonic() - self._start_s, reporters)
        if self.interrupted or group.wishes.is_cancelled:
            self.interrupted = True
            self._gates.abort("interrupted")
        elif self._failure is None and (failure := group.failure()) is not None:
            self._failure = failure
            self._gates.abort(f"disk {failure[0]!r} has failed")

    def _go_on(self) -> None:
        """One step further, or back, if it is time; else wait a moment."""
        gates = self._gates
        allowed = gates.allowed
        if gates.aborted is not None:
            self._wait(POLL_S)
        elif allowed is self._last_step:
            self._check_kept()
            self._wait(PAUSED_POLL_S)
        elif allowed is Step.READY:
            if not (self._may_begin() and gates.have(Step.READY) and self._begin()):
                self._wait(POLL_S)
        elif (reason := self._why_back()) is not None:
            if gates.break_off(reason):
                self._is_prepared = False
                self._hooks.undo(self._group.endpoints)
                self._reporter.state(CONVERGING, str(reason))
        elif gates.wait(allowed, PAUSED_POLL_S):
            self._allow(Step(allowed + 1))

    def _check_kept(self) -> None:
        """Copies of disks that stay here are to be of one moment: who has to begin anew would have another."""
        for name, gate in self._gates.gates.items():
            if gate.reached < Step.READY and self._last_step is Step.HANDED_OVER:
                self._failure = name, ReplicationError(
                    "its replica was lost before it had kept its copy: those of the others are of another moment",
                    hint="run the sync again")
                self._gates.abort("the copies are not of one moment")

    def _wait(self, limit_s: float) -> None:
        """For something to happen."""
        with self._gates.changed:
            self._gates.changed.wait(limit_s)

    def _may_begin(self) -> bool:
        return self._group.wishes.may_switch and not self._group.wishes.is_paused

    def _begin(self) -> bool:
        """Begin the switch-over. False if a disk is not ready any more when the hook has run."""
        if self._guard is None:
            self._guard = Guard(self._run_dir, self._group.endpoints)
        if not self._is_prepared:
            self._is_prepared = True
            try:
                self._hooks.before(self._group.endpoints)
            except WritelogError as error:
                self._failure = "", error
                self._gates.abort("the hook before the switch-over has failed")
                return True
        return self._allow(Step.CONFIRMED)

    def _allow(self, step: Step) -> bool:
        if step is Step.PROMOTED:
            assert self._guard is not None
            self._guard.promoting()
        now_s = time.monotonic()
        if not self._gates.allow(step):
            return False
        if step is Step.CONFIRMED:
            self._marks.clear()
        self._marks[MARKS[step]] = now_s
        return True

    def _why_back(self) -> BrokenOff | None:
        """Why the switch-over is not to go on now."""
        for name, gate in self._gates.gates.items():
            if gate.reached < Step.READY:
                return BrokenOff(f"disk {name!r} is {self._group.disks[name].reporter.current}")
        paused_s = time.monotonic() - self._marks["begin"]
        if paused_s > self._group.wishes.limits.max_pause_s and not self._verify:
            slow = [name for name, gate in self._gates.gates.items() if gate.reached < self._gates.allowed]
            return PauseTooLong(f"the pause has lasted {paused_s:.1f} s, with {', '.join(slow)} not done")
        return None

    def _finish(self) -> GroupReport:
        """All syncs have ended."""
        group = self._group
        reports = {name: disk.report for name, disk in group.disks.items() if disk.report is not None}
        if len(reports) < len(group.disks):
            self._look()
            raise self._error()
        self._marks["promote" if self._last_step is Step.PROMOTED else "resume"] = time.monotonic()
        if self._last_step is Step.PROMOTED:
            self._hooks.after(group.endpoints)
        return GroupReport(reports, time.monotonic() - self._start_s,
                           downtime_parts(self._marks, list(reports.values())))

    def _error(self) -> Exception:
        """Why there is no end; and what else went wrong with disks that were only to stop."""
        name, first = self._failure or ("", Interrupted())
        problems = [f"disk {other!r}: {error}" for other, disk in self._group.disks.items()
                    if (error := disk.error) is not None and error is not first and not isinstance(error, Aborted)]
        if isinstance(first, Interrupted):
            return ReplicationError("; ".join(["interrupted", *problems])) if problems else first
        message = f"disk {name!r}: {first.message}" if name else first.message
        if self._gates.allowed is Step.PROMOTED:
            promoted = [other for other, disk in self._group.disks.items() if disk.report is not None]
            message += (f"; all disks were handed over, and the replicas of {', '.join(promoted) or 'none'} have "
                        "said that they are promoted")
        return ReplicationError("; ".join([message, *problems]), errno=first.errno, path=first.path,
                                hint=first.hint)
