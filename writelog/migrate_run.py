"""Drives a migration: a sync for each disk, in a thread, and QEMU's own migration of the memory, by its monitor.

What to do next is in `writelog.migrate_plan`; how far each sync may go is said by its gate (`writelog.sync_gate`).
Never may the guest run at both ends, nor stand still at both: until the first replica is promoted, whatever fails
lets it run on here; from then on its disks are at the destination, those here are fenced, and what fails is told.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tapcore.errors import ReplicationError, WritelogError
from writelog.migrate_check import ENDED_BADLY, STOPPED, UNDER_WAY
from writelog.migrate_memory import Memory, Patience, memory_of
from writelog.migrate_plan import FINAL, NO_RETURN, PAUSED, TABLE, Action, Event, State, fate_here, how_to_go_back
from writelog.migrate_qmp import ANSWER_S, Monitor, MonitorError, Refusal, Silence
from writelog.migrate_report import MigrationReport, MigrationReporter
from writelog.migrate_there import Destination
from writelog.migrate_undo import NOTHING_SET, Settings, status_of, stop_guest, undo_memory
from writelog.sync_gate import Aborted, Step
from writelog.sync_group import DiskGroup
from writelog.sync_group_report import downtime_parts
from writelog.sync_guard import Guard
from writelog.sync_report import STALLED, Report

POLL_S: Final = 0.05
PAUSED_POLL_S: Final = 0.005
"""While the guest stands still."""
HELD_DOWNTIME_MS: Final = 1
MEMORY_POLL_S: Final = 0.2
"""How often to ask for figures."""
MOVING_ANSWER_S: Final = 0.5
SILENT_S: Final = 20.0
"""How long not to ask a QEMU that does not answer."""
PROMOTE_S: Final = 60.0
"""Longest wait for the promotion of replicas that have confirmed all: their link may have dropped just now."""
MOVE_S: Final = 120.0
"""Longest wait for the rest of the memory to be sent, and the guest to start."""
MAX_RECONNECTIONS: Final = 10
"""To a monitor, in one migration."""


class Fault(Exception):
    """Why a migration does not go on."""


@dataclass(frozen=True)
class MemoryMove:
    """How QEMU is to move the memory: where to, with what changed for it and changed back if it does not."""

    uri: str
    settings: Settings
    former: Settings


class Migration:
    """Of one guest with its disks, `group`."""

    def __init__(self, monitor: Monitor, destination: Destination, memory_move: MemoryMove, run_dir: Path,
                 group: DiskGroup, reporter: MigrationReporter, was_running: bool) -> None:
        self._interrupted = False
        self.state = State.DISKS
        self._monitor = monitor
        self._destination = destination
        self._memory_move = memory_move
        self._run_dir = run_dir
        self._reporter = reporter
        self._was_running = was_running
        self._group = group
        self._gates = group.gates
        self._disks = group.disks
        self._guard: Guard | None = None
        self._memory: Memory | None = None
        self._patience = Patience(group.wishes.limits.patience_s, 0.0)
        self._held_s: float | None = None
        self._has_shut_down = False
        self._asked_s = 0.0
        self._start_s = time.monotonic()
        self._marks: dict[str, float] = {}
        """When the guest was stopped, and when each step after that was done."""
        self._state_s = self._start_s
        self._reconnections = 0
        self._fault = ""
        self._warning = ""
        self._actions: dict[Action, Callable[[], None]] = {
            Action.COPY_MEMORY: self._copy_memory, Action.SEND_LAST_ROUND: lambda: self._mark("stop"),
            Action.HAND_OVER: lambda: self._mark("last round"), Action.PROMOTE: lambda: self._mark("hand over"),
            Action.CONTINUE: self._continue, Action.FINISH: self._finish,
            Action.UNDO: self._undo, Action.STRAND: self._strand}

    def run(self) -> MigrationReport:
        """To the end. ReplicationError if the guest does not run at the destination; it says where it is."""
        outcome: dict[str, Any] | WritelogError = ReplicationError("the migration failed")
        try:
            self._reporter.state(self.state.value)
            self._group.start()
            while self.state not in FINAL:
                try:
                    self._go_on(self._next())
                except Fault as fault:
                    self._fault = str(fault)
                    self._go_on(Event.FAULT)
                except Silence as error:
                    if not self._may_be_silent():
                        self._fault = error.message
                        self._go_on(Event.FAULT)
                except MonitorError as error:
                    if isinstance(error, Refusal) or not self._finds_monitor_again():
                        self._fault = error.message
                        self._go_on(Event.FAULT)
            report = self._report()
            outcome = report.figures()
            return report
        except WritelogError as error:
            outcome = error
            raise
        finally:
            self._gates.abort("the migration failed")
            if self._guard is not None:
                self._guard.close(self.state in FINAL)
            if self.state is not State.STRANDED:  # then a sync may still try to have its replica promoted
                for disk in self._disks.values():
                    disk.join()
            self._group.close(outcome)

    def interrupt(self, *_: object) -> None:
        """Give up, if that is still possible. For signal handlers."""
        self._interrupted = True

    @property
    def was_interrupted(self) -> bool:
        """Whether that is why the guest runs on here."""
        return self._interrupted and self.state is State.UNDONE

    def _go_on(self, event: Event | None) -> None:
        if event is None:
            self._reporter.moving(time.monotonic() - self._start_s,
                                  {name: disk.reporter for name, disk in self._disks.items()}, self._memory)
            return
        self.state, action = TABLE[self.state, event]
        self._state_s = time.monotonic()
        self._reporter.state(self.state.value)
        self._actions[action]()

    def _mark(self, name: str) -> None:
        self._marks[name] = time.monotonic()

    # What happens

    def _next(self) -> Event | None:
        """What has happened, if anything did after a short while. Fault or MonitorError if it is a reason not to
        go on."""
        self._group.state = self.state.value
        self._group.turn()
        self._interrupted |= self._group.wishes.is_cancelled
        if self._interrupted and self.state not in NO_RETURN:
            raise Fault("interrupted")
        for name, disk in self._disks.items():
            if disk.error is not None:
                raise Fault(f"disk {name!r}: {disk.error}")
        group, state = self._gates, self.state
        in_state_s = time.monotonic() - self._state_s
        max_pause_s = self._group.wishes.limits.max_pause_s
        if state in PAUSED and time.monotonic() - self._marks["begin"] > max_pause_s:
            raise Fault(f"the guest has stood still for {max_pause_s:g} s, while {self._laggards()}")
        if state is State.DISKS:
            self._take_events(POLL_S)
            return Event.READY if group.have(Step.READY) else None
        if state is State.MEMORY:
            self._hold_memory(not group.have(Step.READY))
            return Event.STOPPED if STOPPED in (self._take_events(POLL_S), self._ask_memory()) else None
        if state is State.LAST_ROUND:
            for name, disk in self._disks.items():
                if disk.reporter.current == STALLED:
                    raise Fault(f"disk {name!r} is {STALLED} just when the guest was stopped")
            group.allow(Step.CONFIRMED)
            return Event.CONFIRMED if self._wait_for(Step.CONFIRMED) else None
        if state is State.HANDING_OVER:
            group.allow(Step.HANDED_OVER)
            return Event.HANDED_OVER if self._wait_for(Step.HANDED_OVER) and self._may_promote() else None
        if state is State.PROMOTING:
            if in_state_s > PROMOTE_S:
                raise Fault(f"a replica could not be promoted for {PROMOTE_S:g} s")
            return Event.PROMOTED if self._wait_for(Step.PROMOTED) else None
        if in_state_s > MOVE_S:
            raise Fault(f"QEMU has not sent the rest of the memory in {MOVE_S:g} s")
        return Event.MOVED if "completed" in (self._take_events(PAUSED_POLL_S), self._ask_memory()) else None

    def _laggards(self) -> str:
        waiting = [f"{name} was {disk.reporter.current}" for name, disk in self._disks.items()
                   if self._gates.gates[name].reached < Step.CONFIRMED]
        return ", ".join(waiting) or "it was handed over"

    def _wait_for(self, step: Step) -> bool:
        """Whether all syncs have come to `step` after a short while."""
        if self._gates.wait(step, PAUSED_POLL_S):
            return True
        self._take_events(0)
        return False

    def _may_promote(self) -> bool:
        """The last look at QEMU before the point of no return. False if a sync was the first to give up."""
        if status_of(self._monitor) != STOPPED:
            raise Fault("QEMU does not wait for the disks any more")
        if complaint := self._destination.complaint(guest_stands=True):
            raise Fault(complaint)
        assert self._guard is not None
        self._guard.promoting()
        return self._gates.allow(Step.PROMOTED)

    def _take_events(self, wait_s: float) -> str:
        """The last status of the migration that QEMU tells of in what happens within `wait_s`; "" if it tells of
        none. Fault if it ended badly, or the guest has."""
        status = ""
        for name, data in self._monitor.events(wait_s):
            if name == "STOP":
                self._marks.setdefault("begin", time.monotonic())
            elif name == "RESUME" and self.state is State.MEMORY:
                self._marks.pop("begin", None)
            elif name == "MIGRATION":
                status = str(data.get("status", ""))
            elif name == "SHUTDOWN" and self.state is not State.MOVING:
                self._has_shut_down = True
                raise Fault("the guest has shut down")
        self._note(status)
        return status

    def _note(self, status: str) -> None:
        """Of QEMU's migration, which has told it, or was asked."""
        if status in ENDED_BADLY:
            raise Fault(self._why_ended(status))
        if status == STOPPED:
            self._marks.setdefault("begin", time.monotonic())

    def _why_ended(self, status: str) -> str:
        why = self._monitor.call("query-migrate").get("error-desc")
        if status == "failed":
            return f"QEMU's migration failed: {why or 'the destination QEMU broke it off'}"
        return "QEMU's migration was cancelled by somebody else"

    def _ask_memory(self) -> str:
        """The status of the migration, if it is time to ask, in case that an event was missed; "" if it is not."""
        now_s = time.monotonic()
        if now_s - self._asked_s < MEMORY_POLL_S:
            return ""
        self._asked_s = now_s
        answer: dict[str, Any] = self._monitor.call("query-migrate")
        self._memory = memory_of(answer) or self._memory
        status = str(answer.get("status", "none"))
        self._note(status)
        if self.state is State.MEMORY:
            if status not in UNDER_WAY:
                raise Fault(f"QEMU's migration is {status}")
            if status != STOPPED and (complaint := self._patience.complaint(now_s, self._memory)):
                raise Fault(complaint)
        return status

    def _hold_memory(self, is_held: bool) -> None:
        """Have QEMU not stop the guest, as far as it can be kept from it, while a disk could not switch: its link
        dropped a moment ago maybe."""
        if is_held == (self._held_s is not None):
            if self._held_s is not None and time.monotonic() - self._held_s > self._group.wishes.limits.patience_s:
                raise Fault(f"{self._laggards()} for too long while the memory was copied")
            return
        self._held_s = time.monotonic() if is_held else None
        limit = HELD_DOWNTIME_MS if is_held else self._memory_move.settings.parameters["downtime-limit"]
        self._monitor.call("migrate-set-parameters", **{"downtime-limit": limit})

    def _may_be_silent(self) -> bool:
        """Whether QEMU need not answer yet: while it sends the last of the memory it does nothing else, and a link
        that carries nothing holds it up. Events come all the same. It is not asked much: with eight commands to do
        it hears no `yank` any more."""
        self._asked_s = time.monotonic() + SILENT_S
        if self.state is State.MEMORY:
            return not self._patience.complaint(time.monotonic(), None)
        return self.state is State.MOVING

    def _finds_monitor_again(self) -> bool:
        """Whether QEMU lives, and only the connection to it was lost. What it was told last it may not have
        heard."""
        self._reconnections += 1
        if self._reconnections > MAX_RECONNECTIONS:
            return False
        try:
            self._monitor.reconnect()
            self._asked_s = 0.0
            status = status_of(self._monitor)
            if self.state is State.MEMORY and status not in UNDER_WAY | ENDED_BADLY:
                self._begin_memory()
            elif self.state is State.MOVING and status == STOPPED:
                with contextlib.suppress(Refusal):  # it has heard it, and is about to
                    self._monitor.call("migrate-continue", state=STOPPED)
        except MonitorError:
            return False
        return True

    # What is done about it

    def _copy_memory(self) -> None:
        if complaint := self._destination.complaint():
            raise Fault(complaint)
        former = json.dumps(asdict(self._memory_move.former))
        self._guard = Guard(self._run_dir, self._group.endpoints, "writelog.migrate_guard",
                            ["--qmp", self._monitor.name, "--former", former,
                             *(["--running"] if self._was_running else [])])
        self._begin_memory()

    def _begin_memory(self) -> None:
        self._patience = Patience(self._group.wishes.limits.patience_s, time.monotonic())
        self._held_s = None
        self._memory_move.settings.apply(self._monitor)
        self._monitor.call("migrate", uri=self._memory_move.uri)

    def _continue(self) -> None:
        self._mark("promote")
        self._monitor.answer_s = MOVING_ANSWER_S
        self._monitor.call("migrate-continue", state=STOPPED)

    def _finish(self) -> None:
        self._mark("move")
        self._monitor.answer_s = ANSWER_S
        if not self._was_running:
            return
        try:
            if self._destination.start():
                self._mark("start")
        except MonitorError as error:
            self._warning = f"it may stand still there, then its QEMU wants a 'cont': {error.message}"

    def _undo(self) -> None:
        """Have the guest run on here."""
        self._gates.abort(self._fault)
        problems: list[str] = []
        try:
            remark = self._undo_memory()
        except WritelogError as error:
            remark = ""
            if not self._has_shut_down:  # and its QEMU with it
                problems.append(str(error))
        for name, disk in self._disks.items():
            if not disk.join():
                problems.append(f"the sync of disk {name!r} does not end")
            elif disk.error and not isinstance(disk.error, Aborted) and str(disk.error) not in self._fault:
                problems.append(str(disk.error))
        fate = "its disks are here" if self._has_shut_down else fate_here(self._was_running)
        raise ReplicationError(f"{self._fault}; {'; '.join(problems) or fate}", hint=remark or None)

    def _undo_memory(self) -> str:
        """As `undo_memory`."""
        former = self._memory_move.former if self._guard is not None else NOTHING_SET
        try:
            return undo_memory(self._monitor, self._was_running, former)
        except MonitorError as error:
            with contextlib.suppress(MonitorError):
                self._monitor.reconnect()
                return undo_memory(self._monitor, self._was_running, former)
            raise ReplicationError(
                f"{error.message}; the disks go on here",
                hint="if QEMU runs, give it 'migrate_cancel' and 'cont', or the guest stands still") from error

    def _strand(self) -> None:
        """After the point of no return: see that it does not run here, and say what is where. If it has arrived at
        the destination, then all is well but for what failed."""
        was_sent = "promote" in self._marks
        with contextlib.suppress(MonitorError):  # its disks are fenced, whatever it does
            stop_guest(self._monitor)
        self._destination.look()
        if was_sent and self._destination.has_the_guest:
            self._warning = self._fault
            self.state = State.DONE
            self._finish()
            return
        promoted = [name for name, gate in self._gates.gates.items() if gate.reached is Step.PROMOTED]
        there = self._destination.told
        raise ReplicationError(
            f"{self._fault}; all disks were handed over, and the replicas of {', '.join(promoted) or 'none'} have "
            f"said that they are promoted{there and '; '}{there}",
            hint=how_to_go_back(self._group.endpoints, was_sent))

    def _report(self) -> MigrationReport:
        reports: list[Report] = []
        for disk in self._disks.values():
            disk.join()
            if disk.report is not None:
                reports.append(disk.report)
        with contextlib.suppress(MonitorError):  # QEMU may have ended
            self._memory = memory_of(self._monitor.call("query-migrate")) or self._memory
        return MigrationReport(reports, self._memory, self._memory_move.uri, time.monotonic() - self._start_s,
                               downtime_parts(self._marks, reports), self._warning)
