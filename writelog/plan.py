"""What a sync does next: figures in, decision out. No I/O, no clock of its own.

A sync copies what is dirty while the guest writes on. The pause that a switch-over would cost now is

    remaining / send rate + round trip + flush of the replica + time for which it has applied nothing

and once that fits the downtime budget, and is short anyway or becomes no shorter, the sync switches.

How short it can become is predicted from the heat of the disk. In a sweep of t seconds over all that is dirty, the
guest writes to bytes(t) = Σ over classes of size·(1 - e^(-rate·t)) again, the rate being that of a block; so the
sweeps settle where

    bytes(t) / send rate + what does not depend on t  =  t

If that is above the budget, or the pause has become no shorter for a while, the sync *escalates*, in small steps:
first its own rate cap goes up, if it has one that may, then the guest's writes are slowed down, to a floor. If
there is nothing left to do, and for `patience_s` nothing has become better, it gives up and says why.

A guest that writes W and is slowed down to w while R bytes are left, over a link of L, loses R·(W - w) / (L - w):
the less the lower w is, if W is above L. So the guest is left alone as long as R becomes less by itself; then one
step follows the other until the sync is predicted to be over in a small part of the time that it has taken. Times
are seconds, rates bytes a second.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from tapcore.text import size_text
from writelog.dirtymap import CHUNK_BYTES
from writelog.heat import Spread

ASSUMED_RATE: Final = 50e6
"""Send rate before any was measured."""
MIN_DOWNTIME_S: Final = 0.001
"""No budget may be less: a pause takes an answer of the replica and its flush at least."""
SHORT_PART: Final = 0.25
"""Of the downtime budget: a pause that need not become shorter."""
MARGIN: Final = 0.95
"""Of the downtime budget: predictions are not exact."""
SETTLED_S: Final = 0.3
"""A prediction that is no better for so long will hardly become better."""
NOTICEABLE: Final = 0.95
"""A prediction is better only if it is below this part of the best one so far."""
MAX_FAILED_PAUSES: Final = 3
HOPELESS_S: Final = 1.0
"""From one step to the next, if the prediction is above the budget."""
LITTLE_GAIN: Final = 0.15
"""Of what is sent: if no more of it makes what is left less, waiting is not worth while."""
HOPEFUL_S: Final = 8.0
"""Without improvement, though the prediction is not above the budget."""
SLOWED_PART: Final = 0.08
"""Of the time of a sync: so long the guest may be slowed down before the next step is taken."""
PROGRESS: Final = 0.99
"""A sweep that leaves more than this part of what the one before left gets nowhere."""
SWEEP_MIN_S, SWEEP_MAX_S, SWEEP_STEP = 0.001, 3600.0, 1.1
RATE_STEP: Final = 1.25
THROTTLE_STEP: Final = 0.9


class Action(Enum):
    COPY = "copy"
    SWITCH = "switch"
    RESUME = "resume"
    """The pause lasts too long: let the guest go on and copy more."""
    ESCALATE = "escalate"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Limits:
    """What the operator asked for."""

    downtime_s: float = 0.3
    patience_s: float = 60.0
    max_pause_s: float = 10.0
    max_time_s: float | None = None
    rate: float | None = None
    """Send no faster."""
    max_rate: float | None = None
    """How far an escalation may raise `rate`."""
    may_throttle: bool = True
    throttle_floor: float | None = None
    """Slow the guest's writes down to this, not further. None: to half of what is sent."""


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
    """It has applied nothing at all: how fast it is nobody knows, nor whether its disk works. Or it does little
    but compare, and how fast the link is nobody knows."""
    paused_s: float | None = None
    best_pause_s: float | None = None
    """What the sweeps are predicted to settle at; None if that is not known."""
    write_rate: float = 0.0
    """What the guest writes, again or not."""
    measures: str = ""
    """What was done about it so far, for people."""
    can_escalate: bool = False
    escalated_s: float = math.inf
    """Since the last step."""
    is_slowed: bool = False
    """The guest is slowed down."""
    converges_s: float = math.inf
    """Until the pause fits, by prediction."""

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
    if outlook.is_untried:
        return Decision(Action.COPY)
    if outlook.pause_s <= limits.downtime_s * MARGIN and (
            outlook.pause_s <= limits.downtime_s * SHORT_PART or outlook.unimproved_s >= SETTLED_S):
        return Decision(Action.SWITCH)
    if not outlook.first_pass_done or outlook.pause_s <= limits.downtime_s:
        return Decision(Action.COPY)
    if outlook.can_escalate and _is_step_due(outlook, limits):
        return Decision(Action.ESCALATE)
    if outlook.unimproved_s > limits.patience_s:
        return Decision(Action.GIVE_UP, f"does not converge: {_figures(outlook)}, no better for "
                                        f"{outlook.unimproved_s:.0f} s",
                        f"allow more with --downtime {outlook.pause_s * 1.2:.2g}, or have the guest write less")
    return Decision(Action.COPY)


def _is_step_due(outlook: Outlook, limits: Limits) -> bool:
    if outlook.is_slowed and outlook.converges_s > SLOWED_PART * outlook.elapsed_s:
        return True
    if outlook.best_pause_s is not None and outlook.best_pause_s > limits.downtime_s:
        gains_little = outlook.dirty_rate > (1 - LITTLE_GAIN) * (outlook.send_rate or 0.0)
        return gains_little and outlook.escalated_s >= HOPELESS_S
    return min(outlook.unimproved_s, outlook.escalated_s) >= HOPEFUL_S


def _figures(outlook: Outlook) -> str:
    text = (f"{size_text(outlook.dirty_rate)}/s are written, {size_text(outlook.send_rate or 0)}/s are sent, "
            f"{size_text(outlook.remaining_bytes)} remain, the pause would take {outlook.pause_s:.2f} s")
    return f"{text}; {outlook.measures}" if outlook.measures else text


def settled_pause_s(bytes_after: Callable[[float], float], send_rate: float, fixed_s: float) -> float:
    """What the sweeps settle at, if a sweep of t seconds leaves `bytes_after(t)`; infinite if at more than
    SWEEP_MAX_S."""
    sweep_s = SWEEP_MIN_S
    while sweep_s < SWEEP_MAX_S:
        if bytes_after(sweep_s) / send_rate + fixed_s <= sweep_s:
            return sweep_s
        sweep_s *= SWEEP_STEP
    return math.inf


def converges_s(bytes_after: Callable[[float], float], left_bytes: float, send_rate: float, fixed_s: float,
                downtime_s: float) -> float:
    """How long it takes until what is left of `left_bytes` fits into a pause, if a sweep of t seconds leaves
    `bytes_after(t)`; infinite if the sweeps get nowhere before."""
    if fixed_s >= downtime_s:
        return math.inf
    elapsed_s = 0.0
    while left_bytes / send_rate + fixed_s > downtime_s:
        sweep_s = left_bytes / send_rate
        elapsed_s += sweep_s
        following_bytes = bytes_after(sweep_s)
        if following_bytes > PROGRESS * left_bytes:
            return math.inf
        left_bytes = following_bytes
    return elapsed_s


def bytes_a_touch(spread: Spread, write_rate: float) -> float:
    """How much of a chunk a touch writes, about: all that is written goes to the chunks that are touched."""
    touch_rate = spread.touch_rate
    return min(write_rate / touch_rate, CHUNK_BYTES) if touch_rate else CHUNK_BYTES


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
