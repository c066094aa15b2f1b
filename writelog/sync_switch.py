"""The switch-over of a sync: pause the guest, send the rest, have it confirmed, hand the disk over, promote.

The disk is handed over only while the guest is paused, with the log empty, and after the replica has confirmed by
its digest that it has applied and flushed all that was sent. Any failure before lets the guest go on. So does one
after it, until the replica may be told: disks that switch together all hand over before that.

    pause ─▶ send, barrier, until nothing is dirty ─▶ hand over ─▶ promote
    quiesce  send, flush                              the fence    once the gate lets it

An *epoch* is such a pause after which the guest goes on: the replica has the disk of that instant then, and keeps
it, whatever comes, until the next. If it has a journal to do that, the last one must be applied before the disk is
handed over; what is in there by then is kept small by an epoch before that.
"""

from __future__ import annotations

import contextlib
import errno
import math
import time
from typing import Final

from tapcore.errors import ReplicationError, WritelogError
from writelog.sync_control import Wishes
from writelog.sync_copy import MAX_OPEN_PORTIONS
from writelog.sync_gate import Gate, Step
from writelog.sync_hooks import Hooks
from writelog.sync_link import LinkLost
from writelog.sync_report import SWITCHING, Report, Reporter
from writelog.sync_stop import BrokenOff, PauseTooLong, Stopwatch
from writelog.sync_talk import SETTLE_S, Talk
from writelog.wire import (
    Ack,
    Barrier,
    Base,
    Content,
    Digest,
    Epoch,
    Kept,
    Promote,
    Promoted,
    Release,
    Released,
    Verify,
    Welcome,
)

MAX_JOURNAL_BYTES: Final = 64 << 20
"""What the replica may have to apply in the pause of a hand-over."""


class SwitchOver:
    """Of one sync, tried as often as it takes. `watch` times the pause, while there is one that must not take too
    long; what was done is noted in `report`. While the sync is held, there is an epoch every `epoch_s`."""

    def __init__(self, talk: Talk, gate: Gate, wishes: Wishes, hooks: Hooks, reporter: Reporter, report: Report, *,
                 verify: bool, keep_running: bool, epoch_s: float = math.inf) -> None:
        self.watch: Stopwatch | None = None
        self._talk = talk
        self._gate = gate
        self._wishes = wishes
        self._hooks = hooks
        self._reporter = reporter
        self._report = report
        self._verify = verify
        self._keep_running = keep_running
        self._epoch_s = epoch_s
        self._last_epoch_s = time.monotonic()
        self._is_journaled = False
        self._journal_mark = 0
        """How much had been sent when the replica's journal was empty."""
        self._confirmed = b""
        """The digest of the last barrier."""

    def greeted(self, welcome: Welcome) -> None:
        """A new connection."""
        self._is_journaled = welcome.is_journaled
        self._journal_mark = self._talk.copier.pipeline.sent_bytes - welcome.journal_bytes

    def epoch_is_due(self, before_switch: bool) -> bool:
        """Whether the replica should be given a new copy to keep: it is time, or, before a switch-over, it would
        have too much to apply in the pause."""
        if before_switch:
            journal_bytes = self._talk.copier.pipeline.sent_bytes - self._journal_mark
            return self._is_journaled and not self._keep_running and journal_bytes > MAX_JOURNAL_BYTES
        return time.monotonic() - self._last_epoch_s >= self._epoch_s

    def epoch(self) -> None:
        """A short pause, and the replica has the disk of that instant. Whatever is raised, it is to be broken
        off."""
        self._last_epoch_s = time.monotonic()
        watch = self._pause()
        self._keep(watch)
        self.break_off()
        self.barrier()

    def _pause(self) -> Stopwatch:
        """Hold the guest, and send the rest."""
        watch = self.watch = Stopwatch()
        self._talk.copier.source.pause(self._wishes.limits.max_pause_s)
        watch.lap("quiesce")
        self._drain(watch)
        return watch

    def _keep(self, watch: Stopwatch) -> None:
        """What is confirmed is the replica's copy from now on."""
        self._talk.send(Epoch(self._confirmed, int(time.time() * 1000)))
        kept = self._talk.wait_for(Kept)
        self._report.epoch, self._is_journaled = kept.epoch, kept.is_journaled
        self._journal_mark = self._talk.copier.pipeline.sent_bytes
        watch.lap("epoch")

    def run(self) -> None:
        """From the pause to the end. Whatever is raised, it is to be broken off."""
        source, report = self._talk.copier.source, self._report
        self._hooks.before({source.name: self._talk.peer.endpoint})
        self._reporter.state(SWITCHING)
        watch = self._pause()
        report.pause_parts_s = watch.parts_s
        if not self._keep_running:
            is_journaled = self._is_journaled
            self._keep(watch)  # whoever is lost from here on, `writelog-replica promote` takes the copy
            if is_journaled:
                self.barrier()  # answered when the journal is applied
                watch.lap("apply")
        self.watch = None
        if self._verify:
            self._compare_disks()
            watch.lap("verify")
        self._gate.reach(Step.CONFIRMED)
        self._talk.pump_until(lambda: self._gate.may(Step.HANDED_OVER))
        self._talk.guard()
        if self._keep_running:
            self._keep(watch)
            source.resume()
            watch.lap("resume")
            with contextlib.suppress(LinkLost, WritelogError):  # the copy is confirmed, whatever comes now
                source.adopt(source.base)
                self._talk.send(Base(source.base))  # what was restored from a backup of before is told apart by it
                self._talk.send(Release())
                self._talk.answer(Released)
            self._gate.reach(Step.PROMOTED)
        else:
            self._hand_over()
            watch.lap("hand over")
            self._promote()
            watch.lap("promote")

    def resume(self) -> None:
        """As `run`, on a new connection after one that broke between the hand-over and the promotion. The log was
        empty and the guest stands still: a replica that holds the base has it all."""
        self.barrier()
        self._promote()

    def break_off(self) -> None:
        """The guest goes on here, unless the disk was handed over."""
        self.watch = None
        source = self._talk.copier.source
        if not source.handed_over:
            self._gate.reach(Step.COPYING)
            source.resume()
            self.undo_hook()

    def undo_hook(self) -> None:
        """The guest goes on here."""
        self._hooks.undo({self._talk.copier.source.name: self._talk.peer.endpoint})

    def take_back(self, reason: BrokenOff) -> None:
        """The guest goes on here, even if the disk was handed over: its replica was told nothing."""
        source = self._talk.copier.source
        if source.handed_over:
            source.take_back(ReplicationError(str(reason)))
        self.break_off()

    def _drain(self, watch: Stopwatch) -> None:
        """Of the paused disk: send and have confirmed what is dirty, until nothing is. What is leased when the
        pause begins can be dirty too: it is free to be taken after the first barrier."""
        talk, copier = self._talk, self._talk.copier
        source, pipeline = copier.source, copier.pipeline
        while True:
            cursor = -1
            while cursor:
                portion, cursor = source.take(max(cursor, 0), source.size_bytes)
                if portion is not None:
                    talk.pump_until(lambda: pipeline.open_portions < MAX_OPEN_PORTIONS)
                    copier.add(portion)
            talk.pump_until(lambda: pipeline.is_all_sent)
            watch.lap("send")
            self.barrier()
            watch.lap("flush")
            if not any(source.dirty_bytes()):
                return

    def barrier(self) -> None:
        """Have the replica flush and confirm all that was sent. ReplicationError if the digests differ: then no
        sync may build on this copy."""
        talk, copier = self._talk, self._talk.copier
        expected = copier.pipeline.digest.digest()
        seq = copier.pipeline.next_seq()
        talk.send(Barrier(seq))
        reply = talk.wait_for(Digest)
        while reply.seq != seq:  # the answer to a barrier of a pause that was broken off
            reply = talk.wait_for(Digest)
        if reply.digest != expected:
            raise self._distrust(f"the replica did not apply what was sent: its digest is {reply.digest.hex()}, "
                                 f"the sync's {expected.hex()}")
        copier.pipeline.on_ack(Ack(seq, seq, copier.ack.flush_ns, copier.ack.flush_bytes))
        self._confirmed = expected
        self._report.digest = expected.hex()

    def _distrust(self, problem: str) -> ReplicationError:
        """The copy is not what it is taken for, and what was acknowledged of it is forgotten: the log is to count
        for it no more. What to raise."""
        source = self._talk.copier.source
        try:
            if not source.handed_over:
                source.fill()
        except WritelogError as error:
            return ReplicationError(f"{problem}; and the log cannot be told so: {error.message}",
                                    hint="do not trust the copy: make it anew with --overwrite --compare")
        return ReplicationError(problem, hint="the copy is not to be trusted any more: make it anew with "
                                              "--overwrite --compare, which sends what differs")

    def _compare_disks(self) -> None:
        """Read the whole disk at both ends; ReplicationError if they differ."""
        talk, copier = self._talk, self._talk.copier
        talk.send(Verify())
        copier.pipeline.settle(SETTLE_S)
        own = copier.source.content_digest(talk.hear, talk.guard)
        if talk.wait_for(Content).digest != own:
            raise ReplicationError("the replica's disk differs from the primary's",
                                   hint="`writelog-sync verify` says where, and with --repair sends that again; "
                                        "does another process write to one of the images?")
        self._report.verified = True

    def _hand_over(self) -> None:
        """As `Source.hand_over`. Who wants it broken off waits until it is known what is to be taken back.
        BrokenOff, too, if the guest has gone on by itself."""
        reasons: list[BrokenOff] = []

        def wait() -> None:
            try:
                self._talk.guard()
            except BrokenOff as reason:
                reasons.append(reason)

        try:
            self._talk.copier.source.hand_over(self._talk.peer.endpoint, wait)
        except ReplicationError as error:
            if error.errno == errno.ETIMEDOUT:
                reasons.append(PauseTooLong(error.message))
            else:
                raise
        if reasons:
            raise reasons[0]

    def _promote(self) -> None:
        self._gate.reach(Step.HANDED_OVER)
        self._talk.pump_until(lambda: self._gate.may(Step.PROMOTED))
        self._talk.send(Promote(self._confirmed))
        self._report.export = self._talk.answer(Promoted).export
        self._gate.reach(Step.PROMOTED)
        self._hooks.after({self._talk.copier.source.name: self._talk.peer.endpoint})
