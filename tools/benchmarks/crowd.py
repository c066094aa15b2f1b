"""Many disks at once on one machine, each copied while its guest works: ours beside QEMU's mirror job."""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.benchmarks import disks, runs
from tools.benchmarks.copiers import Copier, Mirror, Writelog
from tools.benchmarks.load import LIGHT
from tools.benchmarks.outcome import Outcome
from tools.benchmarks.processes import RunFailed
from tools.benchmarks.replication import FULL_BYTES, LIMIT_S, add, fail
from tools.benchmarks.runs import Run

COPIERS: Final[tuple[type[Copier], ...]] = (Writelog, Mirror)


@dataclass(frozen=True)
class Row:
    disks: int

    @property
    def name(self) -> str:
        return f"replicate {self.disks} disks, guests"


ROWS: Final = [Row(8)]


def measure(rows: list[Row], options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """The copiers by turns, each with processes of its own for each disk; together the disks are as large as one
    of the other rows."""
    outcomes: dict[str, Outcome] = {}
    for row in rows:
        size_bytes = max(int(FULL_BYTES * options.scale) // row.disks >> 20, 1) << 20
        sources = [folder / f"disk{number}" / "disk.img" for number in range(row.disks)]
        for source in sources:
            source.parent.mkdir()
            disks.make(source, size_bytes, "full")
        for _ in range(options.repeat or 3):
            for kind in COPIERS:
                try:
                    copies = _copy_all(kind, sources, LIMIT_S * (1 + options.scale))
                except RunFailed as failure:
                    fail(outcomes, row.name, kind.name, str(failure))
                    continue
                add(outcomes, row.name, kind.name, _figures(copies, size_bytes))
        for source in sources:
            source.unlink()
            source.parent.rmdir()
    return list(outcomes.values())


def _copy_all(kind: type[Copier], sources: list[Path], limit_s: float) -> list[Run]:
    with ThreadPoolExecutor(len(sources)) as pool:
        return list(pool.map(lambda source: runs.run(kind, source, limit_s, load=LIGHT), sources))


def _figures(copies: list[Run], size_bytes: int) -> dict[tuple[str, str], float]:
    """Of all together; of latencies and pauses the median of the guests."""
    took_s = max(run.copy.end_s for run in copies) - min(run.copy.start_s for run in copies)
    return {("speed", "MB/s"): len(copies) * size_bytes / 1e6 / took_s,
            ("CPU", "s/GiB"): sum(run.copy.cpu_s for run in copies) / (len(copies) * size_bytes / (1 << 30)),
            ("guests' IOPS", "% kept"): statistics.median(run.kept_percent() for run in copies),
            ("guests' p99", "ms"): statistics.median(run.latency_ms(99) for run in copies),
            ("pause", "ms"): statistics.median(run.copy.pause_s * 1e3 for run in copies)}
