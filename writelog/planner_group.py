"""The judgement of disks that switch over together: what each sync has seen goes in, what all do comes out.

The disks are paused at the same moment and send their rest over one link. So the pause of the group would take now

    Σ remaining / what all of them send together + what the slowest disk takes besides

and a disk that could switch alone waits, in sync, until all can. A disk that is alone is a group of one. When the
group escalates, first the rate cap goes up, which all share; then the disk that is written to most is slowed down,
step by step, until all that the guest writes is at the floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Final

from tapcore.text import size_text
from writelog.heat import Spread
from writelog.plan import (
    MARGIN,
    RATE_STEP,
    THROTTLE_STEP,
    Action,
    Decision,
    Improvement,
    Limits,
    Meter,
    Outlook,
    converges_s,
    decide,
    settled_pause_s,
)

RATE_WINDOW_S: Final = 2.0
FLOOR_MARGIN: Final = 1.02
SETTLED_AGE_S: Final = 0.3
"""So old may be what the sweeps of all disks are predicted to settle at."""


@dataclass(slots=True)
class Disk:
    """What is known of one. `outlook` is None while its replica, or the disk itself, cannot be reached."""

    outlook: Outlook | None = None
    applied_bytes: int = 0
    is_busy: bool = False
    spread: Spread | None = None
    touch_bytes: float = 0.0
    throttle: float | None = None
    steps: int = 0
    """Of the escalation, as far as this disk's sync has carried them out."""

    @property
    def write_rate(self) -> float:
        """What its guest writes, as far as it may."""
        seen = self.outlook.write_rate if self.outlook is not None else 0.0
        return seen if self.throttle is None else min(seen, self.throttle)


class GroupPlanner:
    """Of the disks `names`. Each sync's planner comes here with what its disk looks like, and `lock` is held
    meanwhile."""

    def __init__(self, limits: Limits, names: Iterable[str],
                 lock: AbstractContextManager[object] | None = None) -> None:
        self.limits = limits
        self.rate = limits.rate
        """The cap that they share."""
        self.disks = {name: Disk() for name in names}
        self.outlook: Outlook | None = None
        """The group's last one."""
        self._lock = lock or nullcontext()
        self._steps = 0
        self._looks = 0
        """Since the last step: the next one comes when each disk has looked."""
        self._escalated_s = -math.inf
        self._sent = Meter(RATE_WINDOW_S)
        self._busy_s = 0.0
        self._sampled_s: float | None = None
        self._settled: tuple[float, float | None] = -math.inf, None
        """When it was found out, and what."""
        self.start_over()

    def start_over(self) -> None:
        """A sync begins anew: what was predicted means nothing any more."""
        self._improvement = Improvement()
        self._was_first_pass = True

    def set_limits(self, limits: Limits) -> None:
        """From now on these. Each of the planners says so."""
        with self._lock:
            if limits is self.limits:
                return
            self.limits, self.rate = limits, limits.rate
            self._improvement = Improvement()
            self._steps += 1
            if not limits.may_throttle:
                for disk in self.disks.values():
                    disk.throttle = None

    def hold(self) -> None:
        """The switch-over that was decided on is put off: patience begins anew when it would not do any more."""
        with self._lock:
            self._improvement = Improvement()

    def lost(self, name: str) -> None:
        """Nothing is known of that disk until it is looked at again: the others go on, and do not judge."""
        with self._lock:
            self.disks[name].outlook = self.disks[name].throttle = None
            self.start_over()

    def look(self, name: str, now_s: float, outlook: Outlook, applied_bytes: int, is_busy: bool, spread: Spread,
             touch_bytes: float) -> Outlook:
        """What the group looks like to the disk that looks like that."""
        with self._lock:
            disk = self.disks[name]
            disk.outlook, disk.applied_bytes, disk.is_busy = outlook, applied_bytes, is_busy
            disk.spread, disk.touch_bytes = spread, touch_bytes
            self._looks += 1
            self._measure(now_s)
            self.outlook = self._together(now_s, outlook)
            return self.outlook

    def _measure(self, now_s: float) -> None:
        """Only while there is something to send does what was sent tell what the link can carry."""
        before_s = now_s if self._sampled_s is None else self._sampled_s
        self._sampled_s = now_s
        if any(disk.is_busy for disk in self.disks.values()):
            self._busy_s += max(now_s - before_s, 0.0)
            self._sent.feed(self._busy_s, sum(disk.applied_bytes for disk in self.disks.values()))

    def _together(self, now_s: float, own: Outlook) -> Outlook:
        known = [disk.outlook for disk in self.disks.values() if disk.outlook is not None]
        first_pass_done = all(one.first_pass_done for one in known)
        if first_pass_done and self._was_first_pass:
            self._was_first_pass = False
            self._improvement = Improvement()
        fixed_s = max(one.round_trip_s + one.flush_s + one.stalled_s for one in known)
        outlook = replace(
            own,
            first_pass_done=first_pass_done,
            remaining_bytes=sum(one.remaining_bytes for one in known),
            send_rate=self._sent.rate or own.send_rate,
            dirty_rate=sum(one.dirty_rate for one in known),
            write_rate=sum(one.write_rate for one in known),
            round_trip_s=fixed_s - own.stalled_s, flush_s=0.0,
            failed_pauses=max(one.failed_pauses for one in known),
            is_untried=len(known) < len(self.disks) or any(one.is_untried for one in known),
            measures=self.measures(),
            is_slowed=any(disk.throttle is not None for disk in self.disks.values()),
            escalated_s=now_s - self._escalated_s,
        )
        return replace(outlook, unimproved_s=self._improvement.unimproved_s(now_s, outlook.pause_s),
                       best_pause_s=self._best_pause_s(now_s, outlook, fixed_s),
                       converges_s=self._converges_s(outlook, fixed_s),
                       can_escalate=self._can_step(outlook.send_rate))

    def _bytes_after(self, elapsed_s: float) -> float:
        return sum(disk.spread.bytes_after(elapsed_s, disk.touch_bytes) for disk in self.disks.values()
                   if disk.spread is not None)

    def _best_pause_s(self, now_s: float, outlook: Outlook, fixed_s: float) -> float | None:
        if not outlook.send_rate:
            return None
        if now_s - self._settled[0] >= SETTLED_AGE_S:
            self._settled = now_s, settled_pause_s(self._bytes_after, outlook.send_rate, fixed_s)
        return self._settled[1]

    def _converges_s(self, outlook: Outlook, fixed_s: float) -> float:
        if not outlook.is_slowed or not outlook.send_rate:
            return math.inf
        return converges_s(self._bytes_after, outlook.remaining_bytes, outlook.send_rate, fixed_s,
                           self.limits.downtime_s * MARGIN)

    def decide(self, name: str, outlook: Outlook) -> Decision:
        """What a disk's sync does now, whose last look gave that. ESCALATE: its rate and throttle have changed."""
        with self._lock:
            decision = decide(outlook, self.limits)
            disk = self.disks[name]
            if decision.action == Action.ESCALATE and self._looks >= len(self.disks):
                assert outlook.send_rate is not None and self._sampled_s is not None
                self._step(outlook.send_rate)
                self._escalated_s = self._sampled_s
                self._improvement = Improvement()
            if decision.action == Action.GIVE_UP:
                together = " (all disks together)" if len(self.disks) > 1 else ""
                return replace(decision, reason=decision.reason + together)
            if disk.steps != self._steps:
                disk.steps = self._steps
                return Decision(Action.ESCALATE)
            return Decision(Action.COPY) if decision.action == Action.ESCALATE else decision

    # Escalation

    @property
    def _may_send_more(self) -> bool:
        return self.rate is not None and self.limits.max_rate is not None and self.rate < self.limits.max_rate

    def _floor(self, send_rate: float) -> float:
        floor = self.limits.throttle_floor
        return send_rate / 2 if floor is None else floor

    def _can_step(self, send_rate: float | None) -> bool:
        if self._may_send_more:
            return True
        if not self.limits.may_throttle or not send_rate:
            return False
        # The floor may go by what is sent, which is never quite the same.
        return sum(disk.write_rate for disk in self.disks.values()) > FLOOR_MARGIN * self._floor(send_rate)

    def _step(self, send_rate: float) -> None:
        self._steps += 1
        self._looks = 0
        if self._may_send_more:
            assert self.rate is not None and self.limits.max_rate is not None
            self.rate = min(self.rate * RATE_STEP, self.limits.max_rate)
            return
        disks = self.disks.values()
        most = max(disks, key=lambda disk: disk.write_rate)
        others = sum(disk.write_rate for disk in disks) - most.write_rate
        most.throttle = max(most.write_rate * THROTTLE_STEP, self._floor(send_rate) - others, 1.0)

    def measures(self) -> str:
        """What was done so far, for people."""
        parts = [] if self.rate is None else [f"the cap is {size_text(self.rate)}/s"]
        for name, disk in self.disks.items():
            if disk.throttle is not None:
                where = f" on {name}" if len(self.disks) > 1 else ""
                parts.append(f"the guest is slowed down to {size_text(disk.throttle)}/s{where}")
        return ", ".join(parts)

