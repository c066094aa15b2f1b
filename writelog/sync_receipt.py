"""What a verification has found, for people and for the records: a receipt says what was equal, and when."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tapcore.durablefile import replace_file
from tapcore.errors import ReplicationError
from tapcore.text import size_text
from writelog.sync_report import Report
from writelog.sync_verify import Findings

MAX_LINES: Final = 20
"""Differing extents that are told to people; all are in the JSON."""
EQUAL, DIFFERENT, REPAIRED = "equal", "different", "repaired"


def utc_now() -> str:
    """To the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def outcome_of(found: Findings) -> str:
    if not found.is_equal:
        return DIFFERENT
    return REPAIRED if found.differing_bytes else EQUAL


@dataclass(frozen=True)
class Receipt:
    """`base` names the copy, `session` the run that looked at it; `digest` is what both ends have computed over
    all that they have said about it; empty in a sync that goes on."""

    disk: str
    replica: str
    size_bytes: int
    base: str
    session: str
    digest: str
    outcome: str
    time: str
    left_out_bytes: int = 0
    """The guest was writing there: the replica lacks it, or may."""
    differing_bytes: int = 0
    repaired_bytes: int = 0
    differences: list[dict[str, int]] = field(default_factory=list)

    @classmethod
    def of(cls, report: Report, found: Findings | None = None) -> Receipt:
        """Of a verification, or without `found` of a sync that has compared the paused disk."""
        found = found or Findings(report.size_bytes)
        return cls(report.disk, report.replica, report.size_bytes, report.base, report.session, report.digest,
                   outcome_of(found), utc_now(), found.left_out_bytes, found.differing_bytes, found.repaired_bytes,
                   [{"offset": offset, "length": length} for offset, length in sorted(found.differences)])

    def figures(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        outcome = "equal, after a repair," if self.outcome == REPAIRED else self.outcome
        lines = [f"{self.disk} and its copy at {self.replica}: {outcome} at {self.time}",
                 f"  disk     {size_text(self.size_bytes)}"]
        if self.left_out_bytes:
            lines[-1] += f", but for {size_text(self.left_out_bytes)} that the copy was known to lack"
        if self.differing_bytes:
            repaired = f"; {size_text(self.repaired_bytes)} repaired" if self.repaired_bytes else ""
            lines.append(f"  differ   {size_text(self.differing_bytes)}{repaired}: bytes from, and how many")
            lines += [f"           {one['offset']} {one['length']}" for one in self.differences[:MAX_LINES]]
            if len(self.differences) > MAX_LINES:
                lines.append(f"           and {len(self.differences) - MAX_LINES} more")
        lines.append(f"  copy     {self.base}, by session {self.session}")
        return [*lines, f"  digest   {self.digest}"] if self.digest else lines

    def write(self, path: Path) -> None:
        """As JSON, all of it or nothing. ReplicationError if that cannot be done."""
        try:
            replace_file(path, json.dumps(self.figures(), indent=1).encode() + b"\n")
        except OSError as error:
            raise ReplicationError(f"the receipt cannot be written: {error.strerror}", errno=error.errno,
                                   path=str(path)) from error
