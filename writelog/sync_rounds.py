"""Verifications inside a sync that runs: when the operator asks for one, or every so often; at a modest rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from tapcore.text import size_text
from writelog.sync_control import Wishes
from writelog.sync_copy import Copier
from writelog.sync_receipt import outcome_of, utc_now
from writelog.sync_verify import Findings, Verifier

USUAL_RATE: Final = 64 << 20
"""In bytes a second, at both ends, if the operator says nothing."""
MAX_TOLD: Final = 100
"""Differing extents in a status."""


class Rounds:
    """Of one sync. `told(text)` is called when a round has found that the ends differ."""

    def __init__(self, wishes: Wishes, every_s: float | None, told: Callable[[str], None]) -> None:
        self._wishes = wishes
        self._every_s = every_s
        self._told = told
        self._asked = wishes.verifications
        self._verifier: Verifier | None = None
        self._ended_s = time.monotonic()
        self._last: dict[str, Any] | None = None
        self._number = 0
        """Of rounds that have ended."""

    def turn(self, copier: Copier) -> None:
        """Go on with a round, or begin one that is due, when the replica lacks nothing but what is written now."""
        if self._verifier is None:
            if not copier.first_pass_done or not self._is_due:
                return
            wishes = self._wishes
            is_asked, self._asked = self._asked != wishes.verifications, wishes.verifications
            self._verifier = Verifier(copier, is_copying=True, repair=is_asked and wishes.repairs,
                                      rate=wishes.verify_rate or USUAL_RATE)
        self._verifier.turn()
        if self._verifier.is_done:
            self._ended(self._verifier.found)

    @property
    def _is_due(self) -> bool:
        if self._asked != self._wishes.verifications:
            return True
        return self._every_s is not None and time.monotonic() - self._ended_s >= self._every_s

    def lost(self) -> None:
        """The connection is gone."""
        if self._verifier is not None:
            self._verifier.lost()

    def abandon(self) -> None:
        """So is the disk: a round begins anew when it is back."""
        if self._verifier is not None:
            self._verifier = None
            self._asked = -1

    def _ended(self, found: Findings) -> None:
        self._verifier = None
        self._ended_s = time.monotonic()
        self._number += 1
        self._last = {"outcome": outcome_of(found), "time": utc_now(), **figures(found)}
        if found.differing_bytes:
            self._told(f"a verification found that {size_text(found.differing_bytes)} differ, from byte "
                       f"{found.differences[0][0]} on; {size_text(found.repaired_bytes)} were repaired")

    def status(self) -> dict[str, Any]:
        """`ended` rounds, what the last one has found, and where the present one is."""
        running = None if self._verifier is None else figures(self._verifier.found)
        return {"ended": self._number, "last": self._last, "running": running}


def figures(found: Findings) -> dict[str, Any]:
    differences = sorted(found.differences)[:MAX_TOLD]
    return asdict(found) | {
        "differences": [{"offset": offset, "length": length} for offset, length in differences]}
