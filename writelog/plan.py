"""What a sync does next: figures in, decision out. No I/O, no clock of its own.

A sync copies what is dirty while the guest writes on. The pause that a switch-over would cost now is predicted as

    remaining / send rate + round trip + flush of the replica + time for which it has applied nothing

and once that fits the downtime budget, and is short anyway or becomes no shorter, the sync switches. If the
prediction has not become better for `patience_s`, it never will: the guest writes as fast as the link carries, and
the sync gives up and says so. Times are seconds, rates bytes a second.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from tapcore.text import size_text

ASSUMED_RATE: Final = 50e6
"""Send rate before any was measured."""
SHORT_PAUSE_S: Final = 0.02
"""A pause that need not become shorter."""
SETTLED_S: Final = 0.3
"""A prediction that is no better for so long will hardly become better."""
NOTICEABLE: Final = 0.95
"""A prediction is better only if it is below this part of the best one so far."""
MAX_FAILED_PAUSES: Final = 3


class Action(Enum):
    COPY = "copy"
    SWITCH = "switch"
    RESUME = "resume"
    """The pause lasts too long: let the guest go on and copy more."""
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Limits:
    """What the operator asked for."""

    downtime_s: float = 0.3
    patience_s: float = 60.0
    max_pause_s: float = 10.0
    max_time_s: float | None = None


@dataclass(frozen=True)
class Outlook:
    """What is known of a running sync. `remaining_bytes`: dirty, or taken and not yet applied by the replica.
    `flush_s` is what a flush of the remaining bytes would take, `unimproved_s` how long ago the prediction was at
    its best. `paused_s` is None while the guest runs."""

    elapsed_s: float
    first_pass_done: bool
    remaining_bytes: int
    send_rate: float | None
    dirty_rate: float
    round_trip_s: float
    flush_s: float
    failed_pauses: int = 0
    """Switch-overs that were broken off because they took too long."""
    unimproved_s: float = 0.0
    stalled_s: float = 0.0
    """How long the replica has applied nothing of what it was sent."""
    is_untried: bool = False
    """It has applied nothing at all: how fast it is nobody knows, nor whether its disk works."""
    paused_s: float | None = None

    def with_unimproved(self, unimproved_s: float) -> Outlook:
        return replace(self, unimproved_s=unimproved_s)

    def with_pause(self, elapsed_s: float, paused_s: float | None, remaining_bytes: int) -> Outlook:
        """The same at a later time, of which only so much is known."""
        return replace(self, elapsed_s=elapsed_s, paused_s=paused_s, remaining_bytes=remaining_bytes)

    @property
    def pause_s(self) -> float:
        """The predicted length of the pause."""
        send_s = self.remaining_bytes / (self.send_rate or ASSUMED_RATE)
        return send_s + self.round_trip_s + self.flush_s + self.stalled_s

    @property
    def eta_s(self) -> float | None:
        """Until the remaining bytes are sent; None if the guest writes as fast as they go."""
        gain = (self.send_rate or ASSUMED_RATE) - self.dirty_rate
        return self.remaining_bytes / gain if gain > 0 else None


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str = ""
    hint: str = ""


def decide(outlook: Outlook, limits: Limits) -> Decision:
    """What to do now."""
    if limits.max_time_s is not None and outlook.elapsed_s > limits.max_time_s:
        return Decision(Action.GIVE_UP, f"not done after {limits.max_time_s:g} s: {_figures(outlook)}",
                        "allow more with --max-time, or a longer pause with --downtime")
    if outlook.paused_s is not None:
        if outlook.paused_s > limits.max_pause_s:
            return Decision(Action.RESUME, f"the pause has lasted {outlook.paused_s:.1f} s, with "
                                           f"{size_text(outlook.remaining_bytes)} still to send")
        return Decision(Action.COPY)
    if outlook.failed_pauses >= MAX_FAILED_PAUSES:
        return Decision(Action.GIVE_UP, f"{outlook.failed_pauses} switch-overs took longer than "
                                        f"{limits.max_pause_s:g} s: {_figures(outlook)}",
                        "allow more with --max-pause, or see what slows the replica down")
    if outlook.stalled_s > limits.patience_s:
        return Decision(Action.GIVE_UP, f"the replica has applied nothing for {outlook.stalled_s:.0f} s, with "
                                        f"{size_text(outlook.remaining_bytes)} to go",
                        "see what its disk does, or wait longer with --patience")
    if not outlook.first_pass_done or outlook.is_untried:
        return Decision(Action.COPY)
    if outlook.pause_s <= limits.downtime_s and (
            outlook.pause_s <= SHORT_PAUSE_S or outlook.unimproved_s >= SETTLED_S):
        return Decision(Action.SWITCH)
    if outlook.unimproved_s > limits.patience_s:
        return Decision(Action.GIVE_UP, f"does not converge: {_figures(outlook)}, no better for "
                                        f"{outlook.unimproved_s:.0f} s",
                        f"allow more with --downtime {outlook.pause_s * 1.2:.2g}, or have the guest write less")
    return Decision(Action.COPY)


def _figures(outlook: Outlook) -> str:
    return (f"{size_text(outlook.dirty_rate)}/s are written, {size_text(outlook.send_rate or 0)}/s are sent, "
            f"{size_text(outlook.remaining_bytes)} remain, the pause would take {outlook.pause_s:.2f} s")


def flush_estimate_s(last_flush_s: float, last_flush_bytes: int, pending_bytes: int) -> float:
    """What a flush of `pending_bytes` takes, after one of `last_flush_bytes` took `last_flush_s`: in proportion
    for fewer bytes, the same for more, since much of a flush does not depend on how much it covers."""
    if last_flush_bytes <= 0:
        return last_flush_s
    return last_flush_s * min(1.0, pending_bytes / last_flush_bytes)


class Improvement:
    """Since when has the predicted pause not become noticeably shorter?"""

    def __init__(self) -> None:
        self._best_s: float | None = None
        self._since_s = 0.0

    def unimproved_s(self, now_s: float, pause_s: float) -> float:
        """Seconds since the best prediction before this one, `pause_s` at `now_s`; 0 if this one is better."""
        if self._best_s is None or pause_s < self._best_s * NOTICEABLE:
            self._best_s = pause_s
            self._since_s = now_s
        return now_s - self._since_s


class Meter:
    """The rate at which a growing total grows, over the last `window_s` of the clock it is fed with."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, float]] = deque()

    def feed(self, clock_s: float, total: float) -> None:
        samples = self._samples
        samples.append((clock_s, total))
        while len(samples) > 2 and samples[1][0] <= clock_s - self._window_s:
            samples.popleft()

    @property
    def rate(self) -> float | None:
        """A second; None before anything was measured."""
        if not self._samples:
            return None
        (start_s, start_total), (end_s, end_total) = self._samples[0], self._samples[-1]
        return (end_total - start_total) / (end_s - start_s) if end_s > start_s else None
