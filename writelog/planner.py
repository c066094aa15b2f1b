"""The judgement of one sync: what it has seen goes in, what to do comes out. `writelog.plan` has the formulas.

The caller has the clock and does the work, be it a real sync or a simulated one (`writelog.simulate`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from writelog.backlog import Backlog
from writelog.pace import Window
from writelog.plan import (
    Action,
    Decision,
    Escalation,
    Improvement,
    Limits,
    Meter,
    Outlook,
    bytes_a_touch,
    decide,
    flush_estimate_s,
    settled_pause_s,
)

RATE_WINDOW_S: Final = 2.0
"""The rates are means over so long."""
PORTION_S: Final = 0.05
"""What is taken at once is sent in about so long: it is not to become old before it is read."""
MAX_BLIND_BYTES: Final = 1 << 20
"""What may be left for a pause when the replica has not shown yet how fast it is."""
MIN_PORTION_BYTES, MAX_PORTION_BYTES = 1 << 20, 32 << 20
SWITCH_ROUND_TRIPS: Final = 2
"""Of a pause: barrier and promotion."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The totals of a sync at one moment."""

    now_s: float
    dirty_bytes: int
    leased_bytes: int
    """Of the log: dirty, and taken but not confirmed."""
    todo_bytes: int
    """Taken, not sent."""
    unacked_bytes: int
    """Sent, not applied by the replica."""
    applied_bytes: int
    applied_seq: int
    committed_bytes: int
    """Confirmed and forgotten."""
    written_bytes: int
    """By the guest, since whenever."""
    first_pass_done: bool
    """All that was dirty at the beginning was sent once."""
    flush_s: float = 0.0
    flush_bytes: int = 0
    """The replica's last flush: how long it took, and what it covered."""


class Planner:
    """Begins at `start_s`. `backlog` is the sync's."""

    def __init__(self, limits: Limits, backlog: Backlog, start_s: float) -> None:
        self.limits = limits
        self._greeting_s = 0.0
        self.failed_pauses = 0
        self.escalation = Escalation(limits)
        self.window = Window(limits.downtime_s)
        self.outlook = Outlook(0.0, False, backlog.size_bytes, None, 0.0, 0.0, 0.0)
        """The last one."""
        self._backlog = backlog
        self._start_s = start_s
        self._sampled_s = start_s
        self._busy_s = 0.0
        self._moved_s = start_s
        """When the replica was last seen to apply something, or had nothing to."""
        self._moved_seq = 0
        self._escalated_s = -float("inf")
        self._sent = Meter(RATE_WINDOW_S)
        self._written = Meter(RATE_WINDOW_S)
        self.start_over()

    def start_over(self) -> None:
        """The log was filled: what was measured of it means nothing any more."""
        self._dirtied = Meter(RATE_WINDOW_S)
        self._improvement = Improvement()
        self._was_first_pass = True

    def set_limits(self, limits: Limits) -> None:
        """From now on these."""
        throttle = self.escalation.throttle
        self.limits = limits
        self.escalation = Escalation(limits)
        self.escalation.throttle = throttle if limits.may_throttle else None
        self._improvement = Improvement()

    def hold(self) -> None:
        """The switch-over that was decided on is put off: patience begins anew when it would not do any more."""
        self._improvement = Improvement()

    @property
    def window_bytes(self) -> int:
        """How much may be sent and not applied."""
        return self.window.size_bytes(self.outlook.send_rate)

    @property
    def portion_bytes(self) -> int:
        """How much to take at once."""
        rate = self.outlook.send_rate or 0.0
        return min(max(int(rate * PORTION_S), MIN_PORTION_BYTES), MAX_PORTION_BYTES)

    def greeted(self, greeting_s: float) -> None:
        """A replica answered the greeting so long after the connection was begun: at most that is a round trip."""
        self._greeting_s = greeting_s

    def look(self, seen: Seen) -> Outlook:
        """The outlook at a moment, which is kept in `outlook`."""
        now_s = seen.now_s
        if seen.todo_bytes or seen.unacked_bytes:
            # Only while there is something to send does what was sent tell what the link can carry.
            self._busy_s += now_s - self._sampled_s
            self._sent.feed(self._busy_s, seen.applied_bytes)
        self._sampled_s = now_s
        self._dirtied.feed(now_s, seen.dirty_bytes + seen.leased_bytes + seen.committed_bytes)
        self._written.feed(now_s, seen.written_bytes)
        if seen.applied_seq != self._moved_seq or not seen.unacked_bytes:
            self._moved_s, self._moved_seq = now_s, seen.applied_seq
        if seen.first_pass_done and self._was_first_pass:
            self._was_first_pass = False
            self._improvement = Improvement()
        remaining_bytes = seen.dirty_bytes + seen.todo_bytes + seen.unacked_bytes
        pending_bytes = seen.dirty_bytes + seen.leased_bytes
        # What is leased and written again can be taken only after a first barrier.
        barriers = 2 if seen.leased_bytes else 1
        outlook = Outlook(
            elapsed_s=now_s - self._start_s,
            first_pass_done=seen.first_pass_done,
            remaining_bytes=remaining_bytes,
            send_rate=self._sent.rate or None,
            dirty_rate=max(self._dirtied.rate or 0.0, 0.0),
            write_rate=max(self._written.rate or 0.0, 0.0),
            round_trip_s=SWITCH_ROUND_TRIPS * min(self._greeting_s, self.window.shortest_s),
            flush_s=barriers * flush_estimate_s(seen.flush_s, seen.flush_bytes, pending_bytes),
            failed_pauses=self.failed_pauses,
            stalled_s=now_s - self._moved_s,
            is_untried=seen.applied_seq == 0 and (seen.unacked_bytes > 0 or remaining_bytes > MAX_BLIND_BYTES),
            measures=str(self.escalation),
            escalated_s=now_s - self._escalated_s,
        )
        self.outlook = replace(
            outlook, unimproved_s=self._improvement.unimproved_s(now_s, outlook.pause_s),
            best_pause_s=self._best_pause_s(outlook), can_escalate=self.escalation.can_step(outlook.send_rate))
        return self.outlook

    def _best_pause_s(self, outlook: Outlook) -> float | None:
        if not outlook.send_rate:
            return None
        spread = self._backlog.spread
        return settled_pause_s(spread, bytes_a_touch(spread, outlook.write_rate), outlook.send_rate,
                               outlook.round_trip_s + outlook.flush_s)

    def decide(self) -> Decision:
        """What to do now, by the last outlook. For ESCALATE, `escalation` has changed: it is to be carried out."""
        decision = decide(self.outlook, self.limits)
        if decision.action == Action.ESCALATE:
            assert self.outlook.send_rate is not None
            self.escalation.step(self.outlook.write_rate, self.outlook.send_rate)
            self._escalated_s = self._sampled_s
            self._improvement = Improvement()
        return decision

    def decide_meanwhile(self, now_s: float, paused_s: float | None, remaining_bytes: int) -> Decision:
        """Between two looks, in a pause maybe: is there a reason not to go on?"""
        outlook = self.outlook.with_pause(now_s - self._start_s, paused_s, remaining_bytes)
        return decide(outlook, self.limits)
