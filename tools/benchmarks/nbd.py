"""fio over NBD: random and sequential reads and writes of each subject, all its servers by turns."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tools.benchmarks.outcome import Outcome
from tools.benchmarks.servers import running
from tools.benchmarks.subjects import SUBJECTS, Subject


@dataclass(frozen=True)
class Row:
    """One fio job on one subject. `block_bytes`; `connections` processes, each with `depth` requests in flight."""

    subject: str
    kind: str
    block_bytes: int
    depth: int
    connections: int = 1

    @property
    def name(self) -> str:
        many = f" x{self.connections}" if self.connections > 1 else ""
        return f"{self.subject}: {self.kind} {self.block_bytes >> 10}K depth {self.depth}{many}"

    @property
    def unit(self) -> str:
        return "IOPS" if self.block_bytes < 65536 else "MB/s"


_ALL = [(kind, 4096, depth, connections) for kind in ("randread", "randwrite")
        for depth, connections in ((1, 1), (16, 1), (64, 1), (16, 4))]
_ALL += [("read", 1 << 20, 16, 1), ("write", 1 << 20, 16, 1)]
_SHORT = [job for job in _ALL if job[3] == 1]
_COSTS = [("randwrite", 4096, depth, 1) for depth in (1, 16, 64)]
ROWS = [Row(subject, *job) for subject, jobs in (
    ("raw", _ALL), ("log's cost", _COSTS), ("side-car's cost", _COSTS), ("direct", _SHORT),
    ("cold", [job for job in _SHORT if "read" in job[0]]), ("qcow2", _ALL), ("qcow2, unallocated", _SHORT),
    ("qcow2, chain of 10", [job for job in _SHORT if "read" in job[0]])) for job in jobs]


def measure(rows: Iterable[Row], options: argparse.Namespace, folder: Path, disk_folder: Path) -> list[Outcome]:
    """The subjects one after the other: in `folder`, or those that are to be on a real disk in `disk_folder`."""
    outcomes: list[Outcome] = []
    for name, jobs in groupby(rows, lambda row: row.subject):
        subject = SUBJECTS[name](disk_folder if name in ("direct", "cold") else folder, options.size_mib << 20)
        outcomes += _measure_subject(subject, list(jobs), options)
        subject.remove()
    return outcomes


def _measure_subject(subject: Subject, rows: list[Row], options: argparse.Namespace) -> list[Outcome]:
    outcomes = {row.name: Outcome(row.name, row.unit) for row in rows}
    subject.prepare()
    for repetition in range(options.repeat or 3):
        for name, command in subject.servers().items():
            if repetition == 0:
                with running(name, command, subject.folder) as uri:
                    check_data(name, uri)
            for group in [[row] for row in rows] if subject.fresh else [rows]:
                if subject.fresh:
                    subject.remove()
                    subject.prepare()
                with running(name, command, subject.folder) as uri:
                    for row in group:
                        subject.before_job()
                        figure = fio(row, uri, options.seconds, subject)
                        outcomes[row.name].add(name, figure)
                        print(f"  {row.name:40} {name:12} {figure:12,.0f} {row.unit}", file=sys.stderr)
    return list(outcomes.values())


def fio(row: Row, uri: str, seconds: float, subject: Subject) -> float:
    """IOPS, or MB/s for large blocks. On a fresh image each block is written once at most: then the job ends with
    the disk's end, if that comes sooner."""
    command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={row.kind}",
               f"--bs={row.block_bytes}", f"--iodepth={row.depth}", f"--numjobs={row.connections}",
               "--group_reporting", f"--runtime={seconds * 1000:.0f}ms", f"--size={subject.size_bytes}",
               "--randrepeat=0", "--output-format=json"]
    command += ["--ramp_time=0"] if subject.fresh and "write" in row.kind else ["--ramp_time=0.5", "--time_based"]
    outcome = subprocess.run(command, capture_output=True, check=True, timeout=seconds + 60)
    # fio puts its warnings in front of the JSON.
    job = json.loads(outcome.stdout[outcome.stdout.index(b"{") :])["jobs"][0]
    side = job["read" if "read" in row.kind else "write"]
    return float(side["iops"]) if row.unit == "IOPS" else side["bw_bytes"] / 1e6


def uri_at(socket: Path, export: str) -> str:
    return f"nbd+unix:///{export}?socket={socket}"


def check_data(name: str, uri: str) -> None:
    """Write a pattern at random and verify it: a server that answers wrongly is not fast."""
    command = ["fio", "--name=check", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-128k",
               "--iodepth=16", "--size=32m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
               "--verify_state_save=0"]
    outcome = subprocess.run(command, capture_output=True, check=False, timeout=120)
    if outcome.returncode:
        raise SystemExit(f"{name} answers wrongly:\n{outcome.stdout.decode()}{outcome.stderr.decode()}")
