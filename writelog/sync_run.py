"""Drives a sync: connect, copy while the guest writes, switch over; go on after a link or a tapdisk was lost.

What to do next is decided in `writelog.plan`; the loop is in `writelog.sync_talk`, the switch-over in
`writelog.sync_switch`.

Never lose a write:
- The log alone says what the replica lacks, under a name for the copy, its *base*. A replica that does not hold
  that copy gets a new one: `fill` marks everything dirty and draws a new base, which the replica records before it
  applies anything. One that holds it gets what is dirty, whichever process was started again meanwhile, after the
  same with another new base: `adopt` draws it.
- An extent is forgotten (committed) only when the replica says that it is durable. Whatever goes wrong before, it
  is dirty again: by `reclaim`, or by the log itself when this process dies.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from dataclasses import asdict
from typing import Any, Final

from tapcore.errors import ControlError, LogError, ReplicationError, WritelogError
from writelog.plan import Action, Limits
from writelog.sync_control import ControlSocket, Follower, Wishes
from writelog.sync_copy import Copier, Shared
from writelog.sync_gate import Gate, Step
from writelog.sync_hooks import Hooks
from writelog.sync_link import LinkLost, Peer
from writelog.sync_pack import AUTO
from writelog.sync_report import CONNECTING, CONVERGING, STALLED, SYNCING, Report, Reporter
from writelog.sync_rounds import Rounds
from writelog.sync_source import Source
from writelog.sync_stop import BrokenOff, Interrupted, PauseTooLong
from writelog.sync_switch import SwitchOver
from writelog.sync_talk import POLL_S, SETTLE_S, Talk
from writelog.wire import VERSION, Base, Hello, Welcome

STALL_TOLD_S: Final = 2.0
"""A replica that applies nothing for so long has stalled."""
FIRST_TRY_S, LONGEST_TRY_S = 0.1, 15.0
"""Before a new try to connect: at first, and at most."""
RENAME_S: Final = 60.0
"""How often a copy gets a new name while it is made."""
DISK_GONE: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.EBADF, errno.ENOTCONN, errno.ESHUTDOWN})
"""What a call to a tapdisk that has ended, or is about to, fails with."""


class Sync:
    """One run for one disk. `interrupted` may be set by a signal handler. `gate`: when it may switch over.
    `shared`: what it has in common with the other syncs of a group, which are steered by the group's `wishes`."""

    def __init__(self, source: Source, peer: Peer, limits: Limits, reporter: Reporter, *,
                 verify: bool = False, keep_running: bool = False, overwrite: bool = False,
                 in_place: bool = False, epoch_s: float = math.inf, compress: str = AUTO, compare: bool = False,
                 verify_every: float | None = None,
                 wishes: Wishes | None = None, hooks: Hooks | None = None, gate: Gate | None = None,
                 shared: Shared | None = None) -> None:
        self.interrupted = False
        self._gate = gate or Gate()
        self._source = source
        self._peer = peer
        self._wishes = wishes or Wishes(limits)
        self._reporter = reporter
        self._report = Report(source.name, peer.endpoint, source.size_bytes)
        self._overwrite = overwrite
        self._in_place = in_place or overwrite
        self._session = os.urandom(16)
        self._is_begun = False
        """Whether the copier knows what the replica lacks."""
        self._has_begun = False
        """Whether it ever did."""
        self._is_welcome = False
        self._compress = compress
        self._shared = shared or Shared(limits, (source.name,))
        self._use(Copier(source, limits, compress, self._shared, compare))
        self._talk = Talk(peer, self._copier, self._gate, self._guard)
        self._switch_over = SwitchOver(self._talk, self._gate, self._wishes, hooks or Hooks(), reporter,
                                       self._report, verify=verify, keep_running=keep_running,
                                       epoch_s=epoch_s)
        self._rounds = Rounds(self._wishes, verify_every,
                              lambda text: reporter.state(reporter.current, text))
        self._start_s = time.monotonic()
        self._control = (Follower(self._wishes, self._heed) if shared is not None else
                         ControlSocket((source.control_path,), self._wishes, self.status, self._heed))
        self._named_s = 0.0
        self._failed_tries = 0
        """To connect, since a connection was last of any use."""
        self._connected_s = 0.0

    def _use(self, copier: Copier) -> None:
        self._copier, self._planner, self._pipeline = copier, copier.planner, copier.pipeline

    def run(self) -> Report:
        """As `_run`, and those who wait at the control socket hear of it."""
        outcome: dict[str, Any] | WritelogError = ReplicationError("interrupted", errno=errno.EINTR)
        try:
            report = self._run()
            outcome = asdict(report)
            return report
        except WritelogError as error:
            outcome = error
            raise
        finally:
            self._control.close(outcome)

    def status(self) -> dict[str, Any]:
        wishes = self._wishes
        return asdict(self._copier.progress()) | {
            "disk": self._source.name, "replica": self._peer.endpoint, "state": self._reporter.current,
            "is_held": wishes.is_held, "is_paused": wishes.is_paused, "downtime": wishes.limits.downtime_s,
            "resumed": self._report.resumed, "epoch": self._report.epoch, "connections": self._report.connections,
            "session": self._session.hex(), "base": f"{self._source.base:016x}",
            "verification": self._rounds.status()}

    def _heed(self) -> None:
        """The operator wants something else."""
        self.interrupted |= self._wishes.is_cancelled
        self._copier.set_limits(self._wishes.limits)

    def _run(self) -> Report:
        """To the end. WritelogError or Interrupted if there is none; then the guest goes on and all that is not
        confirmed is dirty, unless the disk was handed over already, which the error says."""
        try:
            while True:
                try:
                    report = self._try()
                    if report is not None:
                        return report
                except BrokenOff as reason:
                    # Of a disk that was handed over and is between two connections.
                    self._switch_over.take_back(reason)
                    self._talk.hang_up()
        except WritelogError as error:
            if not self._source.handed_over:
                raise
            if not self._gate.may(Step.PROMOTED):
                self._source.take_back(error)
                raise
            raise ReplicationError("the disk was handed over, but the replica did not say that it took over: "
                                   f"{error.message}", errno=error.errno,
                                   hint="its copy is complete and confirmed: end the writelog-replica there, and "
                                        "`writelog-replica promote CHAIN` makes it the disk; or, if that host is "
                                        f"lost, `tap-ctl unpause --force {self._source.name}` goes on here"
                                   ) from error
        finally:
            self._finish()

    def _try(self) -> Report | None:
        """On one connection. None if it was lost, and it is time for the next."""
        try:
            self._connect()
            return self._converge_and_switch()
        except (LinkLost, LogError, ControlError) as error:
            self._mend(error)
        return None

    def _finish(self) -> None:
        self._talk.hang_up()
        # What cannot be undone here is undone by the tapdisk when the source's connections are closed.
        with contextlib.suppress(WritelogError):
            self._source.resume()
        if not self._source.handed_over:
            self._switch_over.undo_hook()
        with contextlib.suppress(WritelogError):
            self._source.reclaim()
        self._source.close()
        self._gate.close()
        self._talk.close()

    # Connections

    def _connect(self) -> None:
        """A new connection, up to its WELCOME."""
        self._reporter.state(STALLED if self._report.connections else CONNECTING)
        link = self._talk.connect()
        source = self._source
        link.greet(Hello(VERSION, self._session, source.size_bytes, source.name, *source.bases(), self._overwrite,
                         self._in_place))
        welcome = self._talk.wait_for(Welcome)
        self._is_welcome = True
        self._connected_s = time.monotonic()
        self._planner.greeted(self._connected_s - link.opened_s)
        self._report.connections += 1
        if not welcome.base:
            self._start_over()
        elif not source.handed_over:
            source.adopt(welcome.base)
            if not self._is_begun:
                self._is_begun = self._has_begun = True
                self._report.resumed |= self._report.connections == 1
                self._copier.begin(False)
        self._name_copy()
        self._pipeline.reset(link, welcome.credit_bytes)
        self._switch_over.greeted(welcome)
        if welcome.is_journaled and self._report.connections == 1:
            self._reporter.state(SYNCING, "the replica keeps its last consistent copy until this one is complete")

    def _name_copy(self) -> None:
        """Tell the replica the copy's new name; what was given back to the log it gets under that."""
        self._named_s = time.monotonic()
        self._talk.send(Base(self._source.base))

    @property
    def _rename_is_due(self) -> bool:
        """A side-car from a backup that was made meanwhile is not to be believed if a crash ends this. It takes a
        moment when nothing is on its way under the former name."""
        return time.monotonic() - self._named_s > RENAME_S

    def _start_over(self) -> None:
        """The replica does not hold this copy: the whole disk is to be sent."""
        if self._source.handed_over:
            raise ReplicationError("the replica was started anew and knows nothing of this copy")
        self._source.fill()
        self._is_begun = self._has_begun = True
        self._copier.begin(True)

    def _mend(self, error: LinkLost | WritelogError) -> None:
        """Make good for a link that was lost, or a tapdisk, or both at once. WritelogError if it is something
        else, or there was no sync yet."""
        if isinstance(error, LinkLost):
            try:
                self._after_loss(error)
                return
            except (LogError, ControlError) as also:
                error = also
        if error.errno not in DISK_GONE or not self._has_begun or self._source.handed_over:
            raise error
        self._wait_for_disk(error)

    def _after_loss(self, lost: LinkLost) -> None:
        """Make good for a connection that dropped; ReplicationError if it never was one."""
        self._switch_over.break_off()
        self._talk.hang_up()
        if not self._report.connections:
            raise ReplicationError(f"{self._peer.endpoint}: {lost}", errno=lost.errno, hint=lost.hint)
        if self._is_welcome:
            self._is_welcome = False
            if self._pipeline.applied_seq or time.monotonic() - self._connected_s > LONGEST_TRY_S:
                self._failed_tries = 0
            self._recover()
        self._back_off(str(lost))

    def _recover(self) -> None:
        """What was on its way is dirty again, and the guest as fast as it can be."""
        if self._source.handed_over:
            return
        self._copier.relax()
        deadline_s = time.monotonic() + SETTLE_S
        while self._pipeline.reads_in_flight:
            if time.monotonic() > deadline_s:
                raise ReplicationError(f"the disk's reads did not end in {SETTLE_S:g} s")
            self._source.log.wait(POLL_S)
            self._talk.take_responses()
        self._pipeline.settle(SETTLE_S)
        self._pipeline.reset(None, 0)
        self._rounds.lost()
        self._copier.give_back()

    def _wait_for_disk(self, error: WritelogError) -> None:
        """The tapdisk is gone, and with it its guest: wait until the disk is served again. Its log knows
        what the replica lacks, or has forgotten, and then it all begins anew."""
        self._source.paused = False
        self._switch_over.break_off()
        self._planner.start_over()
        self._talk.hang_up()
        self._is_welcome = self._is_begun = False
        self._rounds.abandon()
        self._pipeline.settle(SETTLE_S)
        self._source.close()
        while True:
            self._back_off(f"the disk is not served any more: {error.message}")
            try:
                source = self._source.reopen()
                break
            except (LogError, ControlError) as again:
                error = again
        base, former, self._source = self._source.base, self._pipeline, source
        self._use(Copier(source, self._wishes.limits, self._compress, self._shared))
        self._talk.copier = self._copier
        self._pipeline.go_on_counting(former)
        source.base = base
        if base not in source.first_bases:
            # What the replica holds is this sync's own copy: it may be replaced by a new one.
            self._overwrite = True

    def _back_off(self, why: str) -> None:
        """Wait before the next try, longer and longer: a link can come back after hours."""
        wait_s = min(FIRST_TRY_S * 2**self._failed_tries, LONGEST_TRY_S)
        self._failed_tries += 1
        self._reporter.state(STALLED, f"{why}; next try in {wait_s:.2g} s")
        deadline_s = time.monotonic() + wait_s
        while time.monotonic() < deadline_s:
            self._guard()
            time.sleep(POLL_S)

    def _guard(self) -> None:
        """Interrupted, BrokenOff or ReplicationError if there is a reason not to go on."""
        self._gate.check()
        if self._source.handed_over:
            return
        self._control.turn()
        if self.interrupted:
            raise Interrupted
        watch = self._switch_over.watch
        if watch is None:
            self._keep_hold()
        paused_s = time.monotonic() - watch.start_s if watch is not None else None
        if paused_s is None and self._wishes.limits.max_time_s is None:
            return
        remaining_bytes = self._pipeline.todo_bytes + self._pipeline.unacked_bytes
        decision = self._planner.decide_meanwhile(time.monotonic(), paused_s, remaining_bytes)
        if decision.action == Action.GIVE_UP:
            raise ReplicationError(decision.reason, hint=decision.hint)
        if decision.action == Action.RESUME:
            raise PauseTooLong(decision.reason)

    def _keep_hold(self) -> None:
        """PauseTooLong if the guest has gone on without being told to: this process was stopped, perhaps."""
        try:
            self._source.keep_hold()
        except ControlError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            raise PauseTooLong(error.message) from error

    # Copying

    def _converge_and_switch(self) -> Report:
        while True:
            try:
                if self._source.handed_over:
                    self._switch_over.resume()
                else:
                    self._copy()
                    self._switch_over.run()
                break
            except BrokenOff as reason:
                self._switch_over.take_back(reason)
                self._planner.failed_pauses += isinstance(reason, PauseTooLong)
                self._reporter.state(CONVERGING, str(reason))
        return self._finished_report()

    def _finished_report(self) -> Report:
        report = self._report
        report.session, report.base = self._session.hex(), f"{self._source.base:016x}"
        report.handed_over = self._source.handed_over
        report.pause_s = sum(report.pause_parts_s.values())
        report.elapsed_s = time.monotonic() - self._start_s
        self._pipeline.count(report)
        return report

    def _copy(self) -> None:
        """Copy while the guest writes, until the plan says that it is time to switch, and the gate lets it."""
        copier, planner, gate = self._copier, self._planner, self._gate
        while not gate.enter():
            stalled = planner.outlook.stalled_s >= STALL_TOLD_S
            may_switch = self._wishes.may_switch
            copier.is_calm = not may_switch
            self._reporter.state(STALLED if stalled else copier.usual_state(self._wishes, gate))
            if self._rename_is_due:
                if not self._pipeline.open_portions:
                    self._source.adopt(self._source.base)
                    self._name_copy()
            elif not self._wishes.is_paused:
                copier.take_more()
            self._rounds.turn(copier)
            self._talk.pump()
            if not copier.look_is_due:
                continue
            copier.look()
            self._reporter.progress(copier.progress())
            decision = planner.decide()
            if decision.action == Action.SWITCH and not self._wishes.is_paused:
                if self._switch_over.epoch_is_due(may_switch):
                    self._switch_over.epoch()
                elif may_switch:
                    gate.reach(Step.READY)
                    planner.group.hold()
            elif planner.prospect.pause_s > self._wishes.limits.downtime_s:
                gate.step_back()
            if decision.action == Action.ESCALATE:
                copier.escalate()
                self._reporter.state(CONVERGING, planner.group.measures())
            elif decision.action == Action.GIVE_UP and may_switch:
                raise ReplicationError(decision.reason, hint=decision.hint)
