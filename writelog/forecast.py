"""How a sync will go, from the heat of the disk and the speed of the link. Pure: figures in, figures out.

The first pass sends the classes coldest first. A block that is sent with t seconds of it still to come is written
again by its end with probability 1 - e^(-rate·t). What that leaves is sent in a sweep, in which less is written
again, and so on, until what is left fits into the pause, or a sweep leaves no less than the one before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from writelog.dirtymap import CHUNK_BYTES
from writelog.heat import Spread
from writelog.plan import PROGRESS

MAX_SWEEPS: Final = 1000


@dataclass(frozen=True)
class Forecast:
    """`converges`: it switches within the budget, with the guest as fast as it likes."""

    first_bytes: int
    extra_bytes: int
    total_s: float
    pause_s: float
    converges: bool


def together(disks: Iterable[tuple[Spread, float]]) -> Spread:
    """Of several disks, each with what a touch of its chunks writes: of touches that write whole chunks."""
    groups = [(chunks, rate * touch_bytes / CHUNK_BYTES) for spread, touch_bytes in disks
              for chunks, rate in spread.groups]
    return Spread(sorted(groups, key=lambda group: group[1]))


def forecast(first_bytes: int, spread: Spread, touch_bytes: float, send_rate: float, fixed_s: float,
             downtime_s: float) -> Forecast:
    """For `first_bytes` to send at `send_rate`, if each touch of a chunk writes `touch_bytes` and a pause takes
    `fixed_s` at least."""
    elapsed_s = total_s = first_bytes / send_rate
    hot_s = min(spread.chunks * CHUNK_BYTES / send_rate, total_s)
    sent_s, left_bytes = total_s - hot_s, 0.0
    for chunks, rate in spread.groups:
        took_s = hot_s * chunks / spread.chunks
        left_bytes += Spread([(chunks, rate)]).bytes_after(total_s - sent_s - took_s / 2, touch_bytes)
        sent_s += took_s
    extra_bytes = 0.0
    for _ in range(MAX_SWEEPS):
        sweep_s = left_bytes / send_rate
        if sweep_s + fixed_s <= downtime_s:
            return Forecast(first_bytes, int(extra_bytes + left_bytes), elapsed_s, sweep_s + fixed_s, True)
        extra_bytes += left_bytes
        elapsed_s += sweep_s
        following_bytes = spread.bytes_after(sweep_s, touch_bytes)
        if following_bytes > PROGRESS * left_bytes:
            break
        left_bytes = following_bytes
    return Forecast(first_bytes, int(extra_bytes), elapsed_s, left_bytes / send_rate + fixed_s, False)
