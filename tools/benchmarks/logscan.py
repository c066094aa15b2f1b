"""What looking at a log costs the loop, beside how it was done first: bit by bit, a bit a sector, in C."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tools.benchmarks.outcome import OURS, Outcome
from writelog.bitmap import SECTOR_BYTES, Bitmap, bitmap_bytes
from writelog.dirtymap import DirtyMap
from writelog.logexport import STEP_RANGES

GRANULARITY_BYTES: Final = 4096
ORIGINAL: Final = "bit by bit in C"
SCAN_SOURCE: Final = Path(__file__).with_name("original_scan.c")


@dataclass(frozen=True)
class Row:
    """Of every `period` blocks of a disk the first `run` are dirty."""

    period: int
    run: int = 1
    size_bytes: int = 1 << 40

    @property
    def name(self) -> str:
        share = f"{100 * self.run / self.period:.3g} %"
        run_kib = self.run * GRANULARITY_BYTES >> 10
        return f"log: {self.size_bytes >> 30} GiB, {share} dirty in runs of {run_kib} KiB"


ROWS: Final = [Row(10_000), Row(100), Row(853, 256)]


def measure(rows: list[Row], options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """Milliseconds of the loop's time to look at, to take, and to clear all of the log; and the longest single
    step of the first two: between two steps guests are served."""
    outcomes: list[Outcome] = []
    scan = folder / "original_scan"
    if rows:
        subprocess.run(["gcc", "-O2", "-o", scan, SCAN_SOURCE], check=True, capture_output=True, timeout=60)
    for row in rows:
        by_verb = {verb: Outcome(f"{row.name}: {verb}", "ms") for verb in ("peek", "take", "clear")}
        longest = Outcome(f"{row.name}: longest step", "ms")
        for _ in range(options.repeat or 3):
            _measure_once(row, by_verb, longest, folder, scan)
        for outcome in [*by_verb.values(), longest]:
            print(f"  {outcome.row:56} {outcome.median(OURS):8.2f} ms", file=sys.stderr)
        outcomes += [*by_verb.values(), longest]
    return outcomes


def _measure_once(row: Row, by_verb: dict[str, Outcome], longest: Outcome, folder: Path, scan: Path) -> None:
    bitmap_size = bitmap_bytes(row.size_bytes, GRANULARITY_BYTES)
    dirty, taken = (Bitmap(bytearray(bitmap_size), row.size_bytes, GRANULARITY_BYTES) for _ in range(2))
    for first in range(row.run):
        dirty.bits[first :: row.period] = 1
    dirty_map = DirtyMap(dirty, taken)
    bits = folder / "bits"
    bits.write_bytes(dirty.memory)
    command = [str(scan), str(dirty.blocks), str(dirty.granularity_bytes // SECTOR_BYTES), str(bits)]
    found = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    extents, original_s, _ = found.split()
    steps_s: list[float] = []
    for verb, step in (("peek", dirty_map.peek), ("take", partial(dirty_map.take, dirty_map.open_lease()))):
        first_step = len(steps_s)
        assert _look_at_all(dirty_map, step, steps_s) >= int(extents)
        by_verb[verb].add(OURS, sum(steps_s[first_step:]) * 1e3)
    longest.add(OURS, max(steps_s) * 1e3)
    dirty.bits[:: row.period] = 1
    start_s = time.perf_counter()
    dirty_map.clear()
    by_verb["clear"].add(OURS, (time.perf_counter() - start_s) * 1e3)
    for outcome in by_verb.values():
        outcome.add(ORIGINAL, float(original_s) * 1e3)
    bits.unlink()


def _look_at_all(dirty_map: DirtyMap, step: Callable[[int, int, int], tuple[list[int], int]],
                 steps_s: list[float]) -> int:
    """How many extents there are; a run that a step ended in counts twice."""
    block = extents = 0
    while block < dirty_map.blocks:
        start_s = time.perf_counter()
        ranges, block = step(block, dirty_map.blocks, STEP_RANGES)
        steps_s.append(time.perf_counter() - start_s)
        extents += len(ranges) // 2
    return extents
