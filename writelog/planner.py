"""The judgement of one sync: what it has seen goes in, what to do comes out. `writelog.plan` has the formulas.

The caller has the clock and does the work, be it a real sync or a simulated one (`writelog.simulate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from writelog.backlog import Backlog
from writelog.pace import Window
from writelog.plan import (
    Decision,
    Limits,
    Meter,
    Outlook,
    bytes_a_touch,
    decide,
    flush_estimate_s,
)
from writelog.planner_group import RATE_WINDOW_S, GroupPlanner

PORTION_S: Final = 0.05
"""What is taken at once is sent in about so long: it is not to become old before it is read."""
MAX_BLIND_BYTES: Final = 1 << 20
"""What may be left for a pause when the replica has not shown yet how fast it is."""
MIN_PORTION_BYTES, MAX_PORTION_BYTES = 1 << 20, 32 << 20
ALONE: Final = "the disk"
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
    equal_bytes: int = 0
    """Not sent, because the replica had them already."""


class Planner:
    """Begins at `start_s`. `backlog` is the sync's; `group` are the disks that switch together, of which this is
    the one called `name`."""

    def __init__(self, limits: Limits, backlog: Backlog, start_s: float, group: GroupPlanner | None = None,
                 name: str = ALONE) -> None:
        self.group = group or GroupPlanner(limits, (name,))
        self._name = name
        self._greeting_s = 0.0
        self.failed_pauses = 0
        self.window = Window(limits.downtime_s)
        self.outlook = Outlook(0.0, False, backlog.size_bytes, None, 0.0, 0.0, 0.0)
        """The last one, of this disk."""
        self.prospect = self.outlook
        """The last one of the group, by which it is decided."""
        self._backlog = backlog
        self._start_s = start_s
        self._sampled_s = start_s
        self._busy_s = 0.0
        self._moved_s = start_s
        """When the replica was last seen to apply something, or had nothing to."""
        self._moved_seq = 0
        self._sent = Meter(RATE_WINDOW_S)
        """What the replica has, sent or not."""
        self._applied_bytes = self._link_bytes = 0
        """Sent and applied: at the last look; and without what was while the ends compared."""
        self._was_comparing = False
        self._written = Meter(RATE_WINDOW_S)
        self.start_over()

    def start_over(self) -> None:
        """The log was filled, or the disk or its replica is gone for now: what was measured means nothing any
        more."""
        self._dirtied = Meter(RATE_WINDOW_S)
        self.group.lost(self._name)

    @property
    def throttle(self) -> float | None:
        """What the guest may write to this disk."""
        return self.group.disks[self._name].throttle

    def relax(self) -> None:
        """The guest may write as it likes."""
        self.group.disks[self._name].throttle = None

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
        is_busy = bool(seen.todo_bytes or seen.unacked_bytes)
        if is_busy:
            # Only while there is something to send does what was sent tell what the link can carry.
            self._busy_s += now_s - self._sampled_s
            self._sent.feed(self._busy_s, seen.applied_bytes + seen.equal_bytes)
        self._sampled_s = now_s
        self._dirtied.feed(now_s, seen.dirty_bytes + seen.leased_bytes + seen.committed_bytes)
        self._written.feed(now_s, seen.written_bytes)
        if seen.applied_seq != self._moved_seq or not seen.unacked_bytes:
            self._moved_s, self._moved_seq = now_s, seen.applied_seq
        is_comparing = seen.equal_bytes > 0 and not seen.first_pass_done
        if not is_comparing:
            self._link_bytes += seen.applied_bytes - self._applied_bytes
            if self._was_comparing:
                self._sent = Meter(RATE_WINDOW_S)
        self._applied_bytes, self._was_comparing = seen.applied_bytes, is_comparing
        remaining_bytes = seen.dirty_bytes + seen.todo_bytes + seen.unacked_bytes
        pending_bytes = seen.dirty_bytes + seen.leased_bytes
        # What is leased and written again can be taken only after a first barrier.
        barriers = 2 if seen.leased_bytes else 1
        self.outlook = Outlook(
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
            is_untried=is_comparing or (
                seen.applied_seq == 0 and (seen.unacked_bytes > 0 or remaining_bytes > MAX_BLIND_BYTES)),
        )
        spread = self._backlog.spread
        write_rate = min(self.outlook.write_rate, self.throttle or math.inf)
        # How fast the ends compare says nothing of the link.
        self.prospect = self.group.look(self._name, now_s, self.outlook, self._link_bytes,
                                        is_busy and not is_comparing, spread,
                                        bytes_a_touch(spread, write_rate))
        return self.outlook

    def decide(self) -> Decision:
        """What to do now, by the last outlook. For ESCALATE, `group.rate` and `throttle` have changed: they are to
        be heeded."""
        return self.group.decide(self._name, self.prospect)

    def decide_meanwhile(self, now_s: float, paused_s: float | None, remaining_bytes: int) -> Decision:
        """Between two looks, in a pause maybe: is there a reason not to go on?"""
        outlook = self.outlook.with_pause(now_s - self._start_s, paused_s, remaining_bytes)
        return decide(outlook, self.group.limits)
