"""Moving a disk that is written to over a link of 1 Gbit/s, ours beside QEMU's mirror job.

The loads are those of `writelog-sync simulate`. The disk has 4 GiB at scale 1; link and loads have the same speed
at any scale, so that a smaller disk is the harder case: more of it changes while it is copied. Ours is encrypted,
as it always is between hosts; QEMU's job is not.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.benchmarks import disks, runs
from tools.benchmarks.copiers import BlockingMirror, Copier, Mirror, Writelog
from tools.benchmarks.link import Link, limited_link
from tools.benchmarks.outcome import OURS, Outcome
from tools.benchmarks.processes import RunFailed
from tools.benchmarks.replication import FULL_BYTES, add, fail
from tools.benchmarks.runs import GuestProcess, Run
from writelog.simulate import BLOCK_BYTES

COPIERS: Final[tuple[type[Copier], ...]] = (Writelog, Mirror, BlockingMirror)
PATIENCE: Final = 3.0
"""A run that takes so many times what the link needs for the disk is given up."""
FIXED_LIMIT_S: Final = 30.0
THERE_S: Final = 60.0
"""How long the guest writes at the target before its disk goes back, at scale 1."""


@dataclass(frozen=True)
class Row:
    """`load` is one of LOADS; empty for an idle disk."""

    title: str
    disk: str
    load: str = ""

    @property
    def name(self) -> str:
        return f"migrate {self.title}"

    def figures(self, run: Run, noise_bytes: int, link: Link) -> dict[tuple[str, str], float]:
        copy = run.copy
        floor_s = noise_bytes / link.payload_rate
        figures = {("data", "% of disk"): 100 * run.sent_bytes / noise_bytes,
                   ("time", "% of floor"): 100 * (copy.end_s - copy.start_s) / floor_s,
                   ("downtime", "ms"): copy.pause_s * 1e3}
        if self.load:
            figures |= {("guest's IOPS", "% kept"): run.kept_percent(), ("guest's p99", "ms"): run.latency_ms(99)}
        return figures


BACK: Final = Row("back after zipf 40 MiB/s", "full", "zipf")
ROWS: Final = [Row("idle", "full"), Row("idle, 30 % allocated", "30 % allocated"),
               Row("zipf 40 MiB/s", "full", "zipf"), Row("zipf 90 MiB/s, moving", "full", "moving"),
               Row("rewrite 60 MiB/s", "full", "rewrite"), Row("uniform 1.25 x link", "full", "uniform"), BACK]


def measure(rows: list[Row], options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """Row by row; the copiers of a row by turns."""
    size_bytes = int(FULL_BYTES * options.scale) >> 20 << 20
    outcomes: dict[str, Outcome] = {}
    if not rows:
        return []
    with limited_link() as link:
        limit_s = FIXED_LIMIT_S + PATIENCE * size_bytes / link.payload_rate
        for row in rows:
            source = folder / "disk.img"
            noise_bytes = disks.make(source, size_bytes, row.disk)
            for _ in range(options.repeat or 1):
                if row is BACK:
                    _measure_back(outcomes, source, options.scale, limit_s, link)
                    continue
                for kind in COPIERS:
                    try:
                        run = runs.run(kind, source, limit_s, load=row.load, link=link)
                    except RunFailed as failure:
                        fail(outcomes, row.name, kind.name, str(failure))
                        continue
                    add(outcomes, row.name, kind.name, row.figures(run, noise_bytes, link))
            source.unlink()
    return list(outcomes.values())


def _measure_back(outcomes: dict[str, Outcome], source: Path, scale: float, limit_s: float, link: Link) -> None:
    """A disk is handed over, its guest writes at the target for a while, and it is handed over back: how much more
    is sent than was changed. QEMU's job has no memory of the way there, and would send the disk."""
    there_s = THERE_S * scale
    try:
        with runs.prepared(Writelog, source, 2 * limit_s + there_s, link) as copier:
            assert isinstance(copier, Writelog)
            copier.sync()
            copier.turn_round()
            guest = GuestProcess(copier.place, BACK.load, link.payload_rate, copier.place.guest_there)
            try:
                time.sleep(there_s)
                guest.stop()
                trace = guest.finish()
            finally:
                guest.end()
            changed_bytes = trace.changed_blocks * BLOCK_BYTES
            before_bytes = link.sent_bytes(link.target)
            copy = copier.sync()
            sent_bytes = link.sent_bytes(link.target) - before_bytes
            disks.must_be_equal(copier.place.source, copier.place.target)
    except RunFailed as failure:
        fail(outcomes, BACK.name, OURS, str(failure))
        return
    floor_s = changed_bytes / link.payload_rate
    add(outcomes, BACK.name, OURS, {
        ("data", "% of changes"): 100 * sent_bytes / changed_bytes,
        ("time", "% of floor"): 100 * (copy.end_s - copy.start_s) / floor_s,
        ("downtime", "ms"): copy.pause_s * 1e3})
    add(outcomes, BACK.name, "a full copy",
        {("data", "% of changes"): 100 * source.stat().st_size / changed_bytes})
