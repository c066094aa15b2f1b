"""What was measured, where, and how it is shown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.benchmarks.outcome import Outcome


def show(outcomes: list[Outcome]) -> None:
    """A table of medians, one column a server."""
    servers = list(dict.fromkeys(name for outcome in outcomes for name in outcome.figures))
    table = Table("row", "unit", *servers, "ratio", "spread")
    for outcome in outcomes:
        digits = 0 if outcome.unit in ("IOPS", "MB/s", "runs") else 2 if outcome.unit == "s/GiB" else 1
        figures = [f"{outcome.median(name):,.{digits}f}" if name in outcome.figures else "" for name in servers]
        ratio = outcome.ratio()
        table.add_row(outcome.row, outcome.unit, *figures, "" if ratio is None else f"{ratio:.2f}",
                      f"{outcome.spread():.0%}")
    Console(width=140).print(table)


def write_json(path: Path, outcomes: list[Outcome]) -> None:
    rows = [asdict(outcome) | {"ratio": outcome.ratio()} for outcome in outcomes]
    path.write_text(json.dumps(describe() | {"rows": rows}, indent=2) + "\n")


def describe() -> dict[str, str]:
    """The commit, the machine and the programs."""
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
