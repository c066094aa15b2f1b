"""Ours and its peers by turns on the same image, medians, and ratios.

The servers of a row are measured one after the other, and that again for each repetition, so that what the
machine does meanwhile hits all of them. A ratio is ours to the best peer's: 1.5 means half as good again.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tools.benchmarks import (
    chart,
    crowd,
    growth,
    logscan,
    memory,
    migration,
    nbd,
    replication,
    report,
    start,
)
from tools.benchmarks.outcome import Outcome

Measure = Callable[[list[Any], argparse.Namespace, Path], list[Outcome]]
FAMILIES: Final[Sequence[tuple[Sequence[Any], Measure]]] = (
    (start.ROWS, start.measure), (memory.ROWS, memory.measure), (replication.ROWS, replication.measure),
    (crowd.ROWS, crowd.measure), (migration.ROWS, migration.measure), (logscan.ROWS, logscan.measure),
    (growth.ROWS, growth.measure))
"""Beside those of `nbd`, which need a second folder: rows that have a name, and what measures some of them in a
folder that they leave empty."""

EPILOG = """\
examples:
  tools/bench --quick --rows raw:
  tools/bench --rows qcow2 --repeat 5 --json bench.json
  tools/bench --rows replicate                       4 GiB disks on this machine
  tools/bench --rows growth --curves docs
  tools/bench --rows migrate --scale 0.25            1 GiB disks over 1 Gbit/s; as root
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short repetition of each")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows that have this in their name")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--repeat", type=int, help="repetitions (default 3; of a migration 1)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement (default 3)")
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the disk (default 1024)")
    parser.add_argument("--scale", type=float, default=1.0,
                        help="size of the disk that is replicated or migrated, in parts of 4 GiB (default 1)")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where images are (default tmpfs)")
    parser.add_argument("--disk-folder", type=Path, default=Path("/var/tmp"),
                        help="where images of the direct rows are: on a real disk (default /var/tmp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the ratios")
    parser.add_argument("--curves", type=Path, metavar="FOLDER", help="draw the rows of growth, a file each")
    options = parser.parse_args()
    if options.quick:
        options.repeat, options.seconds, options.size_mib, options.scale = 1, 1.0, 256, 0.25
    if not 0.01 <= options.scale <= 16:
        parser.error("--scale is from 0.01 to 16")
    return options


def main() -> None:
    options = parse_arguments()
    # So that what was started is ended, and what was made is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = [row.name for row in nbd.ROWS] + [row.name for rows, _ in FAMILIES for row in rows]
    if options.list:
        print("\n".join(names))
        return
    if not any(options.rows in name for name in names):
        raise SystemExit(f"no row has {options.rows!r} in its name; --list names them")
    rows = [row for row in nbd.ROWS if options.rows in row.name]
    folders = [Path(tempfile.mkdtemp(prefix="writelog-bench-", dir=folder))
               for folder in (options.folder, options.disk_folder)]
    try:
        outcomes = nbd.measure(rows, options, *folders)
        for family, measure in FAMILIES:
            outcomes += measure([row for row in family if options.rows in row.name], options, folders[0])
    finally:
        for folder in folders:
            shutil.rmtree(folder)
    report.show(outcomes)
    if options.json:
        report.write_json(options.json, outcomes)
    if options.svg:
        chart.write(options.svg, outcomes)
    if options.curves:
        for series, points in growth.curves(outcomes).items():
            chart.write_curves(options.curves / f"{series.replace(' ', '-').replace(',', '')}.svg", series, points)


if __name__ == "__main__":
    main()
