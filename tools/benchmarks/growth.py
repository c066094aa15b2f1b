"""How cost grows: the same rows on larger disks, on more of them, and on longer chains."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.benchmarks import disks, runs
from tools.benchmarks.copiers import Mirror, Writelog
from tools.benchmarks.manydisks import SERVINGS, socket_of
from tools.benchmarks.nbd import uri_at
from tools.benchmarks.outcome import OURS, Outcome
from tools.benchmarks.processes import RunFailed
from tools.benchmarks.replication import fail
from tools.benchmarks.servers import LOG_NAME, qemu_nbd, running, tapdisk
from tools.benchmarks.subjects import DeepQcow2

GIB: Final = 1 << 30
DATA_BYTES: Final = 256 << 20
"""On a disk that is replicated, whatever its size."""
LIMIT_S: Final = 300.0
DEPTH: Final = 16
DEPTH_OF_MANY: Final = 4


@dataclass(frozen=True)
class Row:
    """One place on an axis: `of` is what grows, `at` how far."""

    of: str
    at: int
    unit: str

    @property
    def series(self) -> str:
        return f"growth of {self.of}"

    @property
    def name(self) -> str:
        return f"{self.series}: {self.at}"


SIZE, COPIED, MANY, LAYERS = "size in GiB", "size in GiB, replicated", "number of disks", "chain"
ROWS: Final = [Row(of, at, unit) for of, unit, places in (
    (SIZE, "IOPS", (1, 16, 256, 1024)), (COPIED, "s", (1, 16, 256, 1024)), (MANY, "IOPS", (1, 4, 16, 64)),
    (LAYERS, "IOPS", (1, 2, 4, 7, 10))) for at in places]


def measure(rows: list[Row], options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """Writes at random all over a sparse disk; a copy of a sparse disk; writes to many disks of one process; reads
    of a chain. The servers by turns."""
    outcomes: dict[str, Outcome] = {}
    for row in rows:
        outcomes[row.name] = outcome = Outcome(row.name, row.unit)
        for _ in range(options.repeat or 3 if row.of != COPIED else 1):
            if row.of == COPIED:
                _copy(row, outcome, outcomes, folder)
            elif row.of == LAYERS:
                _read_chain(row, outcome, options, folder)
            else:
                _write_many(row, outcome, options, folder)
            print(f"  {row.name:40} " + ", ".join(f"{name} {figures[-1]:,.4g}"
                                                  for name, figures in outcome.figures.items()), file=sys.stderr)
    return [outcome for outcome in outcomes.values() if outcome.figures]


def _write_many(row: Row, outcome: Outcome, options: argparse.Namespace, folder: Path) -> None:
    count, size_bytes = (1, row.at * GIB) if row.of == SIZE else (row.at, GIB)
    images = [folder / f"disk{number}.img" for number in range(count)]
    for name, serving in SERVINGS.items():
        for image in images:
            disks.make_empty(image, size_bytes)
        with serving(folder, images, True):
            uris = [uri_at(socket_of(folder), f"disk{number}") for number in range(count)]
            outcome.add(name, _iops("randwrite", uris, DEPTH if count == 1 else DEPTH_OF_MANY, size_bytes,
                                    options.seconds))
        for path in folder.iterdir():
            path.unlink()


def _read_chain(row: Row, outcome: Outcome, options: argparse.Namespace, folder: Path) -> None:
    subject = DeepQcow2(folder, options.size_mib << 20, row.at)
    subject.prepare()
    for name, command in {OURS: tapdisk(f"log:{LOG_NAME}|qcow2:{subject.image}"),
                          "qemu-nbd": qemu_nbd(subject.image, "qcow2")}.items():
        with running(name, command, folder) as uri:
            outcome.add(name, _iops("randread", [uri], DEPTH, subject.size_bytes, options.seconds))
    subject.remove()


def _iops(kind: str, uris: list[str], depth: int, size_bytes: int, seconds: float) -> float:
    """Of all together."""
    command = ["fio", "--ioengine=nbd", f"--rw={kind}", "--bs=4096", f"--iodepth={depth}",
               f"--runtime={seconds * 1000:.0f}ms", f"--size={size_bytes}", "--time_based", "--ramp_time=0.5",
               "--randrepeat=0", "--norandommap", "--group_reporting", "--output-format=json"]
    for number, uri in enumerate(uris):
        command += [f"--name=job{number}", f"--uri={uri}"]
    outcome = subprocess.run(command, capture_output=True, check=True, timeout=seconds + 120)
    jobs = json.loads(outcome.stdout[outcome.stdout.index(b"{") :])["jobs"]
    return sum(float(job["read" if kind == "randread" else "write"]["iops"]) for job in jobs)


def _copy(row: Row, outcome: Outcome, outcomes: dict[str, Outcome], folder: Path) -> None:
    source = folder / "disk.img"
    for kind in (Writelog, Mirror):
        disks.make(source, DATA_BYTES, "full")
        with source.open("r+b") as file:
            file.truncate(row.at * GIB)
        try:
            copy = runs.run(kind, source, LIMIT_S).copy
            outcome.add(kind.name, copy.end_s - copy.start_s)
        except RunFailed as failure:
            fail(outcomes, row.name, kind.name, str(failure))
        source.unlink()


def curves(outcomes: list[Outcome]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By series and server: (where on the axis, median) of the rows that were measured."""
    medians = {outcome.row: outcome for outcome in outcomes}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in ROWS:
        if row.name in medians:
            outcome = medians[row.name]
            for server in outcome.figures:
                points = found.setdefault(f"{row.series}, {row.unit}", {}).setdefault(server, [])
                points.append((row.at, outcome.median(server)))
    return found
