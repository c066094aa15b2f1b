"""The figures of one row, and what is made of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Final

OURS: Final = "tapdisk"


@dataclass
class Outcome:
    """One row: by server, one figure a repetition. Of "ms" less is better, of other units more."""

    row: str
    unit: str
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, server: str, figure: float) -> None:
        self.figures.setdefault(server, []).append(figure)

    def median(self, server: str) -> float:
        return statistics.median(self.figures[server])

    def ratio(self) -> float | None:
        """Ours to the best peer's, above 1 if ours is better; None without a peer."""
        peers = [self.median(server) for server in self.figures if server != OURS]
        if not peers:
            return None
        if self.unit == "ms":
            return min(peers) / self.median(OURS)
        return self.median(OURS) / max(peers)

    def spread(self) -> float:
        """Of ours: largest less smallest, as a part of the median."""
        ours = self.figures[OURS]
        return (max(ours) - min(ours)) / self.median(OURS) if self.median(OURS) else 0.0
