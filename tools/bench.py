"""The benchmark: our server and its peers by turns on the same file, medians, and ratios.

The servers of a row are measured one after the other, and that again for each repetition, so that what the
machine does meanwhile hits all of them. A ratio is ours divided by the best peer's: 1.5 means half as much again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from writelog.bitmap import Bitmap, bitmap_bytes
from writelog.dirtymap import DirtyMap
from writelog.logconn import STEP_RANGES
from writelog.logstore import forget

START_TIMEOUT_S = 20.0
OURS = "log:|aio:"


@dataclass(frozen=True)
class FioRow:
    """One fio job over NBD. `block_bytes`; `connections` processes, each with `depth` requests in flight."""

    name: str
    kind: str
    block_bytes: int
    depth: int
    connections: int = 1

    @property
    def unit(self) -> str:
        return "IOPS" if self.block_bytes < 65536 else "MB/s"


FIO_ROWS = [
    FioRow(f"{kind} {block_bytes >> 10}K depth {depth}" + (f" x{connections}" if connections > 1 else ""),
           kind, block_bytes, depth, connections)
    for kind, block_bytes, depth, connections in [
        ("randread", 4096, 1, 1), ("randread", 4096, 16, 1), ("randread", 4096, 64, 1), ("randread", 4096, 16, 4),
        ("randwrite", 4096, 1, 1), ("randwrite", 4096, 16, 1), ("randwrite", 4096, 64, 1),
        ("randwrite", 4096, 16, 4), ("read", 1 << 20, 16, 1), ("write", 1 << 20, 16, 1),
    ]
]


@dataclass
class Outcome:
    """The figures of one row: by server, one figure a repetition."""

    row: str
    unit: str
    figures: dict[str, list[float]] = field(default_factory=dict)

    def median(self, server: str) -> float:
        return statistics.median(self.figures[server])

    def ratio(self) -> float | None:
        peers = [self.median(server) for server in self.figures if server != OURS]
        return self.median(OURS) / max(peers) if peers else None


@contextlib.contextmanager
def server(name: str, image: Path, folder: Path) -> Iterator[str]:
    """Run the server `name` on `image`; yields the NBD URI once it answers."""
    path = folder / "nbd"
    commands = {
        OURS: [sys.executable, "-m", "tapcore.tapdisk", "--run-dir", str(folder), "--name", "bench",
               "--nbd", f"unix:{path}", f"log:bench|aio:{image}"],
        "nbdkit file": ["nbdkit", "-f", "-U", str(path), "file", str(image)],
        "qemu-nbd": ["qemu-nbd", "-f", "raw", "-t", "-e", "16", "-k", str(path), str(image)],
    }
    with subprocess.Popen(commands[name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        uri = f"nbd+unix:///?socket={path}"
        try:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False).returncode:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    assert process.stderr is not None
                    process.kill()
                    raise SystemExit(f"{name} did not start: {process.stderr.read().decode()}")
                time.sleep(0.02)
            yield uri
        finally:
            process.terminate()
            process.wait(20)
            path.unlink(missing_ok=True)
            forget(folder, "bench")


def fio(row: FioRow, uri: str, seconds: float, size_bytes: int) -> float:
    """IOPS, or MB/s for large blocks."""
    command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={row.kind}",
               f"--bs={row.block_bytes}", f"--iodepth={row.depth}", f"--numjobs={row.connections}",
               "--group_reporting", "--time_based",
               f"--runtime={seconds}", "--ramp_time=0.5", f"--size={size_bytes}", "--randrepeat=0",
               "--output-format=json"]
    outcome = subprocess.run(command, capture_output=True, check=True, timeout=seconds + 60)
    # fio puts its warnings in front of the JSON.
    job = json.loads(outcome.stdout[outcome.stdout.index(b"{") :])["jobs"][0]
    side = job["read" if "read" in row.kind else "write"]
    return float(side["iops"]) if row.unit == "IOPS" else side["bw_bytes"] / 1e6


def check_data(name: str, uri: str) -> None:
    """Write a pattern at random and verify it: a server that answers wrongly is not fast."""
    command = ["fio", "--name=check", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-128k",
               "--iodepth=16", "--size=32m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
               "--verify_state_save=0"]
    outcome = subprocess.run(command, capture_output=True, check=False, timeout=120)
    if outcome.returncode:
        raise SystemExit(f"{name} answers wrongly:\n{outcome.stdout.decode()}{outcome.stderr.decode()}")


def measure_fio(rows: list[FioRow], options: argparse.Namespace, folder: Path) -> list[Outcome]:
    image = folder / "disk.img"
    size_bytes = options.size_mib << 20
    with image.open("wb") as file:
        for _ in range(options.size_mib):
            file.write(os.urandom(1 << 20))
    outcomes = {row.name: Outcome(row.name, row.unit) for row in rows}
    for repetition in range(options.repeat):
        for name in (OURS, "nbdkit file", "qemu-nbd"):
            with server(name, image, folder) as uri:
                if repetition == 0:
                    check_data(name, uri)
                for row in rows:
                    figure = fio(row, uri, options.seconds, size_bytes)
                    outcomes[row.name].figures.setdefault(name, []).append(figure)
                    print(f"  {row.name:28} {name:12} {figure:12,.0f} {row.unit}", file=sys.stderr)
    return list(outcomes.values())


def measure_scans(options: argparse.Namespace) -> list[Outcome]:
    """Milliseconds of the loop's time to look at, and to take, all of a 1 TiB log, and the longest single step of
    it: between two steps guests are served."""
    size_bytes, granularity_bytes = 1 << 40, 4096
    outcomes = []
    for share in (0.0001, 0.001, 0.01):
        rows = {verb: Outcome(f"log: {verb} 1 TiB, {share:.2%} dirty", "ms") for verb in ("peek", "take")}
        longest = Outcome(f"log: longest step at {share:.2%} dirty", "ms")
        for _ in range(options.repeat):
            dirty, taken = (Bitmap(bytearray(bitmap_bytes(size_bytes, granularity_bytes)), size_bytes,
                                   granularity_bytes) for _ in range(2))
            dirty.bits[:: int(1 / share)] = 1
            wanted = dirty.bits.count()
            dirty_map = DirtyMap(dirty, taken)
            steps_s: list[float] = []
            for verb, outcome in rows.items():
                step = dirty_map.peek if verb == "peek" else partial(dirty_map.take, dirty_map.open_lease())
                block = found = 0
                first_step = len(steps_s)
                while block < dirty_map.blocks:
                    start_s = time.perf_counter()
                    ranges, block = step(block, dirty_map.blocks, STEP_RANGES)
                    steps_s.append(time.perf_counter() - start_s)
                    found += len(ranges) // 2
                assert found == wanted
                outcome.figures.setdefault(OURS, []).append(sum(steps_s[first_step:]) * 1e3)
            longest.figures.setdefault(OURS, []).append(max(steps_s) * 1e3)
        outcomes += [*rows.values(), longest]
    return outcomes


def show(outcomes: list[Outcome]) -> None:
    servers = list(dict.fromkeys(name for outcome in outcomes for name in outcome.figures))
    table = Table("row", "unit", *servers, "ratio", "spread")
    for outcome in outcomes:
        figures = [f"{outcome.median(name):,.1f}" if outcome.unit == "ms" else f"{outcome.median(name):,.0f}"
                   if name in outcome.figures else "" for name in servers if name in outcome.figures]
        figures += [""] * (len(servers) - len(figures))
        ours = outcome.figures[OURS]
        ratio = outcome.ratio()
        table.add_row(outcome.row, outcome.unit, *figures, "" if ratio is None else f"{ratio:.2f}",
                      f"{(max(ours) - min(ours)) / outcome.median(OURS):.0%}" if outcome.median(OURS) else "")
    Console(width=120).print(table)


def describe() -> dict[str, str]:
    """What was measured, and where."""
    def first_line(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]

    return {
        "commit": first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "host": f"{os.cpu_count()} cores, {platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "nbdkit": first_line("nbdkit", "--version"),
        "qemu": first_line("qemu-nbd", "--version"),
        "fio": first_line("fio", "--version"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  tools/bench --quick --rows randread --json bench.json")
    parser.add_argument("--quick", action="store_true", help="one short repetition: about two minutes")
    parser.add_argument("--rows", default="", help="only rows whose name has this text")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement (default 3)")
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the disk (default 1024)")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where the disk is (default tmpfs)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.quick:
        options.repeat, options.seconds, options.size_mib = 1, 1.5, 512
    return options


def main() -> None:
    options = parse_arguments()
    rows = [row for row in FIO_ROWS if options.rows in row.name]
    scans: Callable[[argparse.Namespace], list[Outcome]] | None = None
    if options.rows in "log: peek take":
        scans = measure_scans
    if not rows and scans is None:
        raise SystemExit(f"no row has {options.rows!r} in its name: {', '.join(row.name for row in FIO_ROWS)}")
    folder = Path(tempfile.mkdtemp(prefix="writelog-bench-", dir=options.folder))
    try:
        outcomes = measure_fio(rows, options, folder) if rows else []
    finally:
        shutil.rmtree(folder)
    if scans is not None:
        outcomes += scans(options)
    show(outcomes)
    if options.json:
        report = describe() | {"rows": [asdict(outcome) | {"ratio": outcome.ratio()} for outcome in outcomes]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
