"""Drives a sync: connect, copy while the guest writes, switch over. What to do next is decided in `writelog.plan`.

Never lose a write:
- The log alone says what the replica lacks, under a name for the copy, its *base*. A replica that does not hold
  that copy gets a new one: `fill` marks everything dirty and draws a new base, which the replica records before it
  applies anything. One that holds it gets what is dirty, whichever process was started again meanwhile.
- An extent is forgotten (committed) only when the replica says that it is durable. Whatever goes wrong before, it
  is dirty again: by `reclaim`, or by the log itself when this process dies.
- The disk is handed over only while the guest is paused, with the log empty, and after the replica has confirmed
  by its digest that it has applied and flushed all that was sent. Any failure before lets the guest go on. So
  does one after it, until the replica may be told: disks that switch together all hand over before that.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, TypeVar

import zmq

from tapcore.errors import ControlError, LogError, ReplicationError, WritelogError
from writelog.plan import Action, Limits
from writelog.sync_control import ControlSocket, Wishes
from writelog.sync_copy import MAX_OPEN_PORTIONS, Copier
from writelog.sync_gate import Gate, Step
from writelog.sync_hooks import Hooks
from writelog.sync_link import Link, LinkLost, Peer
from writelog.sync_pack import AUTO
from writelog.sync_report import CONNECTING, CONVERGING, STALLED, SWITCHING, Report, Reporter
from writelog.sync_source import Source
from writelog.sync_stop import Interrupted, PauseTooLong, Stopwatch
from writelog.wire import (
    VERSION,
    Ack,
    Barrier,
    Base,
    Content,
    Digest,
    Failure,
    Hello,
    Message,
    Promote,
    Promoted,
    Refused,
    Release,
    Released,
    Verify,
    Welcome,
)

POLL_S: Final = 0.05
STALL_TOLD_S: Final = 2.0
"""A replica that applies nothing for so long has stalled."""
ROOM_POLL_S: Final = 0.002
"""How often to ask zmq whether it is done with a buffer when there is nothing else to do."""
ANSWER_S: Final = 30.0
"""Longest wait for what a replica answers without delay. It is known to live: it acknowledges meanwhile."""
FIRST_TRY_S, LONGEST_TRY_S = 0.1, 15.0
"""Before a new try to connect: at first, and at most."""
DISK_GONE: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.EBADF, errno.ENOTCONN})
"""What a call to a tapdisk that has ended fails with."""
SETTLE_S: Final = 30.0
"""Longest wait for reads and buffers of a connection that is gone."""

M = TypeVar("M", Welcome, Digest, Content, Promoted, Released)


class Sync:
    """One run for one disk. `interrupted` may be set by a signal handler. `gate`: when it may switch over."""

    def __init__(self, source: Source, peer: Peer, limits: Limits, reporter: Reporter, *,
                 verify: bool = False, keep_running: bool = False, overwrite: bool = False,
                 compress: str = AUTO, wishes: Wishes | None = None, hooks: Hooks | None = None,
                 gate: Gate | None = None) -> None:
        self.interrupted = False
        self._gate = gate or Gate()
        self._source = source
        self._peer = peer
        self._limits = limits
        self._wishes = wishes or Wishes(limits)
        self._hooks = hooks or Hooks()
        self._reporter = reporter
        self._verify = verify
        self._keep_running = keep_running
        self._report = Report(source.name, peer.endpoint, source.size_bytes)
        self._overwrite = overwrite
        self._session = os.urandom(16)
        self._base = 0
        """Of the copy that is being made; 0 before it is known."""
        self._is_begun = False
        """Whether the copier knows what the replica lacks."""
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._link: Link | None = None
        self._is_welcome = False
        self._compress = compress
        self._copier = Copier(source, limits, compress)
        self._planner = self._copier.planner
        self._pipeline = self._copier.pipeline
        self._start_s = time.monotonic()
        self._control = ControlSocket(source.control_path, self._wishes, self._status, self._heed)
        self._replies: dict[type[object], Message] = {}
        """The last answer of each kind that nobody has used yet."""
        self._failed_tries = 0
        """To connect, since the last time it worked."""
        self._watch: Stopwatch | None = None
        """Of the pause, while there is one that must not take too long."""
        self._confirmed = b""
        """The digest of the last barrier."""

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

    def _status(self) -> dict[str, Any]:
        wishes = self._wishes
        return asdict(self._copier.progress()) | {
            "disk": self._source.name, "replica": self._peer.endpoint, "state": self._reporter.current,
            "is_held": wishes.is_held, "is_paused": wishes.is_paused, "downtime": wishes.limits.downtime_s,
            "resumed": self._report.resumed, "connections": self._report.connections}

    def _heed(self) -> None:
        """The operator wants something else."""
        self.interrupted |= self._wishes.is_cancelled
        self._limits = self._wishes.limits
        self._copier.set_limits(self._limits)

    def _run(self) -> Report:
        """To the end. WritelogError or Interrupted if there is none; then the guest goes on and all that is not
        confirmed is dirty, unless the disk was handed over already, which the error says."""
        try:
            while True:
                try:
                    self._connect()
                    return self._converge_and_switch()
                except LinkLost as lost:
                    self._after_loss(lost)
                except (LogError, ControlError) as error:
                    if error.errno not in DISK_GONE or not self._is_begun or self._source.handed_over:
                        raise
                    self._wait_for_disk(error)
        except WritelogError as error:
            if not self._source.handed_over:
                raise
            if not self._gate.may(Step.PROMOTED):
                self._source.take_back(error)
                raise
            raise ReplicationError("the disk was handed over, but the replica did not say that it took over: "
                                   f"{error.message}", errno=error.errno,
                                   hint="its copy is complete and confirmed: open it there; or, if that host is "
                                        "lost, resume the primary by force with tap-ctl") from error
        finally:
            self._finish()

    def _finish(self) -> None:
        if self._link is not None:
            self._link.close()
        # What cannot be undone here is undone by the tapdisk when the source's connections are closed.
        with contextlib.suppress(WritelogError):
            self._source.resume()
        with contextlib.suppress(WritelogError):
            self._source.reclaim()
        self._source.close()
        self._gate.close()
        self._context.destroy(linger=0)

    # Connections

    def _connect(self) -> None:
        """A new connection, up to its WELCOME."""
        self._reporter.state(STALLED if self._report.connections else CONNECTING)
        link = self._link = Link(self._context, self._peer)
        self._replies.clear()
        self._poller = zmq.Poller()
        for pollable in (link.socket, link.monitor, self._source.log.fileno(), self._gate):
            self._poller.register(pollable, zmq.POLLIN)
        base = self._base or self._source.base()
        link.greet(Hello(VERSION, self._session, self._source.size_bytes, self._source.name, base,
                         self._overwrite))
        welcome = self._wait_for(Welcome, ANSWER_S)
        self._is_welcome = True
        self._planner.greeted(time.monotonic() - link.opened_s)
        self._report.connections += 1
        self._failed_tries = 0
        if not welcome.resumed:
            self._start_over()
            link.send(Base(self._base))
        elif not self._is_begun:
            self._source.adopt(base)
            self._base, self._is_begun = base, True
            self._report.resumed |= self._report.connections == 1
            self._copier.begin(False)
        self._pipeline.reset(link, welcome.credit_bytes)

    def _start_over(self) -> None:
        """The replica does not hold this copy: the whole disk is to be sent."""
        if self._source.handed_over:
            raise ReplicationError("the replica was started anew and knows nothing of this copy")
        self._base, self._is_begun = self._source.fill(), True
        self._copier.begin(True)

    def _after_loss(self, lost: LinkLost) -> None:
        """Make good for a connection that dropped; ReplicationError if it never was one."""
        if not self._source.handed_over:
            self._gate.reach(Step.COPYING)
        self._source.resume()
        self._watch = None
        assert self._link is not None
        self._link.close()
        self._link = None
        if not self._report.connections:
            raise ReplicationError(f"{self._peer.endpoint}: {lost}", hint="is writelog-replica running there?")
        if self._is_welcome:
            self._is_welcome = False
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
            self._take_responses()
        self._pipeline.settle(SETTLE_S)
        self._pipeline.reset(None, 0)
        self._copier.give_back()

    def _wait_for_disk(self, error: WritelogError) -> None:
        """The tapdisk is gone, and with it its guest: wait until the disk is served again. Its log knows
        what the replica lacks, or has forgotten, and then it all begins anew."""
        self._watch = None
        self._source.paused = False
        if self._link is not None:
            self._link.close()
            self._link = None
        self._is_welcome = self._is_begun = False
        self._pipeline.settle(SETTLE_S)
        self._source.close()
        while True:
            self._back_off(f"the disk is not served any more: {error.message}")
            try:
                source = self._source.reopen()
                break
            except (LogError, ControlError) as again:
                error = again
        former, self._source = self._pipeline, source
        self._copier = Copier(source, self._limits, self._compress)
        self._planner, self._pipeline = self._copier.planner, self._copier.pipeline
        self._pipeline.go_on_counting(former)
        if source.base() != self._base:
            # What the replica holds is this sync's own copy: it may be replaced by a new one.
            self._base, self._overwrite = 0, True

    def _back_off(self, why: str) -> None:
        """Wait before the next try, longer and longer: a link can come back after hours."""
        wait_s = min(FIRST_TRY_S * 2**self._failed_tries, LONGEST_TRY_S)
        self._failed_tries += 1
        self._reporter.state(STALLED, f"{why}; next try in {wait_s:.2g} s")
        deadline_s = time.monotonic() + wait_s
        while time.monotonic() < deadline_s:
            self._guard()
            time.sleep(POLL_S)

    # Moving

    def _pump(self, wait_s: float = POLL_S) -> None:
        """Send what may be sent; wait at most `wait_s` for something to happen; take in what has come."""
        pipeline = self._pipeline
        self._take_responses()
        pipeline.feed()
        if 0 < pipeline.waits_s < wait_s:
            wait_s = pipeline.waits_s
        if pipeline.waits_for_room:
            wait_s = min(wait_s, ROOM_POLL_S)
        self._poller.poll(max(1, int(wait_s * 1000)))
        self._take_responses()
        self._hear()
        pipeline.feed()
        self._guard()

    def _take_responses(self) -> None:
        if self._source.handed_over:
            return  # the log has done its part: the replica must be promoted even if the tapdisk ends now
        for response in self._source.log.responses():
            self._pipeline.on_read(response)

    def _hear(self) -> None:
        """Take in what the replica has said. LinkLost if it is gone."""
        link = self._link
        assert link is not None
        for message in link.receive():
            if isinstance(message, Ack):
                self._copier.ack = message
                self._pipeline.on_ack(message)
            elif isinstance(message, Refused | Failure):
                raise ReplicationError(f"{self._peer.endpoint}: {message.message}",
                                       errno=getattr(message, "errno", None), hint=message.hint or None)
            else:
                self._replies[type(message)] = message
        link.check()

    def _guard(self) -> None:
        """Interrupted, PauseTooLong or ReplicationError if there is a reason not to go on."""
        self._gate.check()
        if self._source.handed_over:
            return
        self._control.turn()
        if self.interrupted:
            raise Interrupted
        if self._watch is None:
            self._source.keep_hold()
        paused_s = time.monotonic() - self._watch.start_s if self._watch is not None else None
        if paused_s is None and self._limits.max_time_s is None:
            return
        remaining_bytes = self._pipeline.todo_bytes + self._pipeline.unacked_bytes
        decision = self._planner.decide_meanwhile(time.monotonic(), paused_s, remaining_bytes)
        if decision.action == Action.GIVE_UP:
            raise ReplicationError(decision.reason, hint=decision.hint)
        if decision.action == Action.RESUME:
            raise PauseTooLong(decision.reason)

    def _wait_for(self, kind: type[M], limit_s: float = math.inf) -> M:
        """The replica's next answer of a kind, even if it was its last word. LinkLost if it is silent;
        ReplicationError if it has other things to say for `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        while kind not in self._replies:
            if time.monotonic() > deadline_s:
                raise ReplicationError(f"the replica has not answered for {limit_s:g} s, though it is there")
            try:
                self._pump()
            except LinkLost:
                if kind not in self._replies:
                    raise
        answer = self._replies.pop(kind)
        assert isinstance(answer, kind)
        return answer

    def _pump_until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._pump()

    # Copying

    def _converge_and_switch(self) -> Report:
        while not self._source.handed_over:
            self._copy()
            try:
                self._switch()
                break
            except PauseTooLong as reason:
                self._watch = None
                self._gate.reach(Step.COPYING)
                self._source.resume()
                self._planner.failed_pauses += 1
                self._reporter.state(CONVERGING, str(reason))
        else:
            # The connection broke between the hand-over and the promotion. The log was empty and the guest stands
            # still: a replica that holds the base has it all.
            self._barrier()
            self._promote()
        report = self._report
        report.handed_over = self._source.handed_over
        report.pause_s = sum(report.pause_parts_s.values())
        report.digest = self._confirmed.hex()
        report.elapsed_s = time.monotonic() - self._start_s
        self._pipeline.count(report)
        return report

    def _copy(self) -> None:
        """Copy while the guest writes, until the plan says that it is time to switch, and the gate lets it."""
        copier, planner, gate = self._copier, self._planner, self._gate
        while not gate.is_open:
            stalled = planner.outlook.stalled_s >= STALL_TOLD_S
            may_switch = self._wishes.may_switch
            copier.is_calm = not may_switch
            self._reporter.state(STALLED if stalled else copier.usual_state(self._wishes, gate))
            if not self._wishes.is_paused:
                copier.take_more()
            self._pump()
            if not copier.look_is_due:
                continue
            copier.look()
            self._reporter.progress(copier.progress())
            decision = planner.decide()
            if decision.action == Action.SWITCH and may_switch and not self._wishes.is_paused:
                gate.reach(Step.READY)
                planner.hold()
            elif planner.outlook.pause_s > self._limits.downtime_s:
                gate.reach(Step.COPYING)
            if decision.action == Action.ESCALATE:
                copier.escalate()
                self._reporter.state(CONVERGING, str(planner.escalation))
            elif decision.action == Action.GIVE_UP and may_switch:
                raise ReplicationError(decision.reason, hint=decision.hint)

    # Switching

    def _switch(self) -> None:
        """Pause, send the rest, have it confirmed, hand over. Whatever is raised, the guest is to be resumed."""
        self._hooks.before(self._source.name, self._peer.endpoint)
        self._reporter.state(SWITCHING)
        watch = self._watch = Stopwatch()
        self._report.pause_parts_s = watch.parts_s
        self._source.pause(self._limits.max_pause_s)
        watch.lap("quiesce")
        self._drain(watch)
        self._watch = None
        if self._verify:
            self._compare_disks()
            watch.lap("verify")
        if self._keep_running:
            self._source.resume()
            watch.lap("resume")
            with contextlib.suppress(LinkLost, WritelogError):  # the copy is confirmed, whatever comes now
                self._send(Release())
                self._wait_for(Released, ANSWER_S)
        else:
            self._gate.reach(Step.CONFIRMED)
            self._pump_until(lambda: self._gate.may(Step.HANDED_OVER))
            self._source.hand_over(self._peer.endpoint)
            watch.lap("hand over")
            self._promote()
            watch.lap("promote")

    def _drain(self, watch: Stopwatch) -> None:
        """Of the paused disk: send and have confirmed what is dirty, until nothing is. What is leased when the
        pause begins can be dirty too: it is free to be taken after the first barrier."""
        while True:
            cursor = -1
            while cursor:
                portion, cursor = self._source.take(max(cursor, 0), self._source.size_bytes)
                if portion is not None:
                    self._pump_until(lambda: self._pipeline.open_portions < MAX_OPEN_PORTIONS)
                    self._copier.add(portion)
            self._pump_until(lambda: self._pipeline.is_all_sent)
            watch.lap("send")
            self._barrier()
            watch.lap("flush")
            if not any(self._source.dirty_bytes()):
                return

    def _barrier(self) -> None:
        """Have the replica flush and confirm all that was sent. ReplicationError if the digests differ."""
        expected = self._pipeline.digest.digest()
        seq = self._pipeline.next_seq()
        self._send(Barrier(seq))
        reply = self._wait_for(Digest)
        while reply.seq != seq:  # the answer to a barrier of a pause that was broken off
            reply = self._wait_for(Digest)
        if reply.digest != expected:
            raise ReplicationError(f"the replica did not apply what was sent: its digest is {reply.digest.hex()}, "
                                   f"the sync's {expected.hex()}", hint="run the sync again")
        self._pipeline.on_ack(Ack(seq, seq, self._copier.ack.flush_ns, self._copier.ack.flush_bytes))
        self._confirmed = expected

    def _compare_disks(self) -> None:
        """Read the whole disk at both ends; ReplicationError if they differ."""
        self._send(Verify())
        self._pipeline.settle(SETTLE_S)
        own = self._source.content_digest(self._hear, self._guard)
        if self._wait_for(Content).digest != own:
            raise ReplicationError("the replica's disk differs from the primary's",
                                   hint="does another process write to one of the images? then run the sync again")
        self._report.verified = True

    def _promote(self) -> None:
        self._gate.reach(Step.HANDED_OVER)
        self._pump_until(lambda: self._gate.may(Step.PROMOTED))
        self._send(Promote(self._confirmed))
        self._report.export = self._wait_for(Promoted, ANSWER_S).export
        self._gate.reach(Step.PROMOTED)
        self._hooks.after(self._source.name, self._peer.endpoint)

    def _send(self, message: Message) -> None:
        assert self._link is not None
        self._link.send(message)
