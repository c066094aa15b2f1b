"""Copying a disk as fast as it goes, on one machine: ours beside nbdcopy and QEMU's mirror job."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.benchmarks import disks, runs
from tools.benchmarks.copiers import Copier, Mirror, Nbdcopy, Writelog
from tools.benchmarks.load import LIGHT
from tools.benchmarks.outcome import Outcome
from tools.benchmarks.processes import RunFailed
from tools.benchmarks.runs import Run

FULL_BYTES: Final = 4 << 30
LIMIT_S: Final = 60.0
"""Of one run, and as much again for each 4 GiB."""


@dataclass(frozen=True)
class Row:
    """One disk, one way of sending it. With `guest` a light load runs meanwhile, and is what is measured."""

    disk: str
    encrypted: bool = False
    guest: bool = False

    @property
    def name(self) -> str:
        return f"replicate {self.disk}{', encrypted' * self.encrypted}{', guest' * self.guest}"

    @property
    def copiers(self) -> tuple[type[Copier], ...]:
        return (Writelog, Mirror) if self.guest else (Writelog, Nbdcopy, Mirror)

    def figures(self, run: Run, size_bytes: int) -> dict[tuple[str, str], float]:
        """By what is measured and its unit."""
        if self.guest:
            return {("p50", "ms"): run.latency_ms(50), ("p99", "ms"): run.latency_ms(99),
                    ("p99.9", "ms"): run.latency_ms(99.9)}
        copy = run.copy
        figures = {("speed", "MB/s"): size_bytes / 1e6 / (copy.end_s - copy.start_s),
                   ("CPU", "s/GiB"): copy.cpu_s / (size_bytes / (1 << 30)),
                   ("memory", "MiB"): copy.peak_bytes / (1 << 20)}
        return figures if copy.pause_s == 0 else figures | {("pause", "ms"): copy.pause_s * 1e3}


ROWS: Final = [Row("full"), Row("full", encrypted=True), Row("30 % allocated"), Row("50 % zero"),
               Row("full", guest=True)]


def measure(rows: list[Row], options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """Row by row; the copiers of a row by turns."""
    size_bytes = int(FULL_BYTES * options.scale) >> 20 << 20
    outcomes: dict[str, Outcome] = {}
    for row in rows:
        source = folder / "disk.img"
        disks.make(source, size_bytes, row.disk)
        for _ in range(options.repeat or 3):
            for kind in row.copiers:
                try:
                    run = runs.run(kind, source, LIMIT_S * (1 + options.scale), encrypted=row.encrypted,
                                   load=LIGHT if row.guest else "")
                except RunFailed as failure:
                    fail(outcomes, row.name, kind.name, str(failure))
                    continue
                add(outcomes, row.name, kind.name, row.figures(run, size_bytes))
        source.unlink()
    return list(outcomes.values())


def add(outcomes: dict[str, Outcome], row: str, name: str, figures: dict[tuple[str, str], float]) -> None:
    """One run's figures, each to its outcome."""
    for (what, unit), figure in figures.items():
        outcomes.setdefault(f"{row}: {what}", Outcome(f"{row}: {what}", unit)).add(name, figure)
    shown = ", ".join(f"{what} {figure:,.4g} {unit}" for (what, unit), figure in figures.items())
    print(f"  {row:32} {name:20} {shown}", file=sys.stderr, flush=True)


def fail(outcomes: dict[str, Outcome], row: str, name: str, reason: str) -> None:
    """A run that does not count is told of, in a line of its own."""
    outcomes.setdefault(f"{row}: failed", Outcome(f"{row}: failed", "runs")).fail(name, reason)
    print(f"  {row:32} {name:20} FAILED: {reason}", file=sys.stderr, flush=True)
