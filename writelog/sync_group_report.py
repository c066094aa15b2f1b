"""What several disks that switch together tell while they are copied, and when that is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from tapcore.text import size_text
from writelog.sync_report import (
    CONNECTING,
    CONVERGING,
    IN_SYNC,
    PAUSED,
    STALLED,
    SWITCHING,
    SYNCING,
    Progress,
    Report,
    Reporter,
)

FURTHEST_LAST = (STALLED, CONNECTING, SYNCING, PAUSED, CONVERGING, IN_SYNC, SWITCHING)
"""A group is where its last disk is."""


class DiskReporter(Reporter):
    """Keeps what one disk's sync tells, for whoever asks, in another thread. `news` are its changes that have a
    reason."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.last: Progress | None = None
        self.news: deque[tuple[str, str]] = deque(maxlen=100)

    def state(self, state: str, detail: str = "") -> None:
        self._state = state
        if detail:
            self.news.append((state, detail))

    def progress(self, progress: Progress) -> None:
        self.last = progress

    def figures(self) -> dict[str, Any]:
        return {"state": self.current} | (asdict(self.last) if self.last is not None else {})

    def __str__(self) -> str:
        last = self.last
        return self.current if last is None else f"{self.current}, remaining {size_text(last.remaining_bytes)}"


def state_of(disks: Mapping[str, DiskReporter]) -> str:
    """Of all together."""
    return min((disk.current for disk in disks.values()), default="",
               key=lambda state: FURTHEST_LAST.index(state) if state in FURTHEST_LAST else 0)


class GroupReporter(Reporter):
    """As `Reporter`, for several disks."""

    def moving(self, elapsed_s: float, disks: Mapping[str, DiskReporter]) -> None:
        """Tell where they are, if it is time."""
        for name, disk in disks.items():
            while disk.news:
                self._news(name, *disk.news.popleft())
        self.tell(
            lambda: {"elapsed_s": elapsed_s, "disks": {name: disk.figures() for name, disk in disks.items()}},
            lambda: "; ".join(f"{name} {disk}" for name, disk in disks.items()))

    def _news(self, name: str, state: str, detail: str) -> None:
        if self._style == "json":
            self._event(disk=name, disk_state=state, detail=detail)
        else:
            self._line(f"{name}: {state}: {detail}")


@dataclass
class GroupReport:
    """What the finished syncs of a group have done. `pause_parts_s` are the parts of the guest's pause, in their
    order: of all disks together."""

    disks: dict[str, Report]
    elapsed_s: float
    pause_parts_s: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        reports = self.disks.values()
        return {"disks": {name: asdict(report) for name, report in self.disks.items()},
                "handed_over": all(report.handed_over for report in reports),
                "sent_bytes": sum(report.sent_bytes for report in reports), "elapsed_s": self.elapsed_s,
                "pause_s": sum(self.pause_parts_s.values()), "pause_parts_s": self.pause_parts_s}

    def lines(self) -> list[str]:
        parts = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in self.pause_parts_s.items())
        sent_bytes = sum(report.sent_bytes for report in self.disks.values())
        pause_s = sum(self.pause_parts_s.values())
        whole = (f"all together: {size_text(sent_bytes)} in {self.elapsed_s:.1f} s, "
                 f"pause {pause_s * 1000:.1f} ms: {parts}")
        return [*(line for report in self.disks.values() for line in report.lines()), whole]


def downtime_parts(marks: dict[str, float], disks: list[Report]) -> dict[str, float]:
    """The parts of the guest's stop, from when each of its steps ended (`marks`, the first is its beginning). The
    last round is split as its slowest disk has it."""
    names = list(marks)
    parts = {name: marks[name] - marks[before] for before, name in pairwise(names)}
    slowest = max(disks, key=lambda disk: sum(_round_of(disk).values()), default=None)
    if slowest is None or "last round" not in parts:
        return parts
    split: dict[str, float] = {}
    for name, seconds in parts.items():
        if name == "last round":
            own = _round_of(slowest)
            split |= {"wake": max(seconds - sum(own.values()), 0.0)} | own
        else:
            split[name] = seconds
    return split


def _round_of(disk: Report) -> dict[str, float]:
    parts_s = disk.pause_parts_s
    return {name: parts_s.get(name, 0.0) for name in ("quiesce", "send", "flush")} | {
        name: parts_s[name] for name in ("epoch", "apply") if name in parts_s}
