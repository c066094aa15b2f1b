"""What disks cost in memory: one more that is idle, and the log of a large one."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tapcore.nbd.address import NbdAddress
from tapcore.nbd.client import NbdClient
from tapcore.nbd.wire import NBD_CMD_WRITE
from tools.benchmarks import disks
from tools.benchmarks.manydisks import GRANULARITY_BYTES, LIMIT_S, SERVINGS, Serving, socket_of
from tools.benchmarks.outcome import Outcome

MIB: Final = 1 << 20
SMALL_BYTES, LARGE_BYTES = 1 << 30, 1 << 40
MANY: Final = 17
STRIDE_BYTES: Final = 128 << 20
"""A page of a bitmap with that granularity: writes so far apart leave none of it untouched."""


@dataclass(frozen=True)
class Row:
    """What is compared is the memory of a server with the first and with the second of `disks`."""

    title: str
    disks: tuple[tuple[int, int], tuple[int, int]]
    """(how many, size in bytes) of each."""
    logged: bool = False
    """Whether what is written is noted, and something is written all over the disk."""

    @property
    def name(self) -> str:
        return f"memory: {self.title}"


ROWS: Final = [Row("one more idle disk", ((1, SMALL_BYTES), (MANY, SMALL_BYTES))),
               Row("log of 1 TiB, written all over", ((1, SMALL_BYTES), (1, LARGE_BYTES)), logged=True)]


def measure(rows: list[Row], options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """MiB, of what is in memory of the server's own and shared with nobody else but clients of its log."""
    outcomes = []
    for row in rows:
        outcome = Outcome(row.name, "MiB")
        for _ in range(options.repeat or 3):
            for name, serving in SERVINGS.items():
                few, many = (_resident_bytes(serving, row, *wanted, folder) for wanted in row.disks)
                more = max(row.disks[1][0] - row.disks[0][0], 1)
                outcome.add(name, (many - few) / more / MIB)
        shown = ", ".join(f"{name} {outcome.median(name):.1f} MiB" for name in outcome.figures)
        print(f"  {row.name:40} {shown}", file=sys.stderr)
        outcomes.append(outcome)
    return outcomes


def _resident_bytes(serving: Serving, row: Row, count: int, size_bytes: int, folder: Path) -> int:
    """Of a server with so many disks, each of which was read from."""
    images = [folder / f"disk{number}.img" for number in range(count)]
    for image in images:
        disks.make_empty(image, size_bytes)
    try:
        with serving(folder, images, row.logged) as process:
            for number in range(count):
                address = NbdAddress(path=str(socket_of(folder)), export=f"disk{number}")
                with NbdClient(address, structured_replies=False, timeout_s=LIMIT_S) as client:
                    client.read(0, GRANULARITY_BYTES)
                    if row.logged:
                        _write_all_over(client)
            return process.resident_bytes()
    finally:
        for path in folder.iterdir():
            path.unlink()


def _write_all_over(client: NbdClient) -> None:
    data = bytes(range(256)) * (GRANULARITY_BYTES // 256)
    for offset in range(0, client.size_bytes, STRIDE_BYTES):
        client.submit(NBD_CMD_WRITE, offset, GRANULARITY_BYTES, data)
        while client.in_flight >= 64:
            client.wait()
    while client.in_flight:
        client.wait()
