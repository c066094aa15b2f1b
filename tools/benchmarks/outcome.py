"""The figures of one row, and what is made of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Final

OURS: Final = "tapdisk"
MORE_IS_BETTER: Final = frozenset({"IOPS", "MB/s", "% kept"})
"""Units; of others less is better."""


@dataclass
class Outcome:
    """One row: by server, one figure a repetition."""

    row: str
    unit: str
    figures: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Why runs do not count, in a row for those alone."""

    def add(self, server: str, figure: float) -> None:
        self.figures.setdefault(server, []).append(figure)

    def fail(self, server: str, reason: str) -> None:
        self.failures.setdefault(server, []).append(reason)
        self.figures[server] = [float(len(self.failures[server]))]

    def median(self, server: str) -> float:
        return statistics.median(self.figures[server])

    def ratio(self) -> float | None:
        """Ours to the best peer's, above 1 if ours is better; None without both."""
        peers = [self.median(server) for server in self.figures if server != OURS]
        if not peers or OURS not in self.figures or self.failures:
            return None
        ours, best = self.median(OURS), max(peers) if self.unit in MORE_IS_BETTER else min(peers)
        if self.unit not in MORE_IS_BETTER:
            ours, best = best, ours
        return ours / best if best else None

    def spread(self) -> float:
        """Of ours: largest less smallest, as a part of the median."""
        ours = self.figures.get(OURS, [])
        if not ours:
            return 0.0
        return (max(ours) - min(ours)) / self.median(OURS) if self.median(OURS) else 0.0
