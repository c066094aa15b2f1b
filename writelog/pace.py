"""How much of a sync may be under way, and how fast it may go. No I/O, no clock of its own.

What is sent and not yet applied by the replica waits somewhere in between: the longer that queue, the older is
what the replica gets, and the longer is the pause, in which it has to empty. So the window is what the link can
carry in twice the time in which an answer comes, or in a part of the downtime budget, if that is more.
"""

from __future__ import annotations

import math
from typing import Final

MIN_WINDOW_BYTES: Final = 2 << 20
FIRST_WINDOW_BYTES: Final = 8 << 20
"""Before any rate was measured."""
BUDGET_PART: Final = 0.25
MIN_QUEUE_S, MAX_QUEUE_S = 0.02, 0.1


class Window:
    """Learns from answers how many bytes to have under way, for a `downtime_s` in seconds."""

    def __init__(self, downtime_s: float) -> None:
        self._queue_s = min(max(downtime_s * BUDGET_PART, MIN_QUEUE_S), MAX_QUEUE_S)
        self.shortest_s = math.inf
        """The least that an answer took: a round trip, or little more."""

    def answered(self, latency_s: float) -> None:
        """An extent was applied `latency_s` after it was sent."""
        self.shortest_s = min(self.shortest_s, latency_s)

    def size_bytes(self, rate: float | None) -> int:
        """At a measured rate in bytes a second; None before there is one."""
        if rate is None or self.shortest_s == math.inf:
            return FIRST_WINDOW_BYTES
        return max(MIN_WINDOW_BYTES, int(rate * max(self._queue_s, 2 * self.shortest_s)))
