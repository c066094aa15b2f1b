"""From the start of a server to the first byte that it answers; and of one more disk of a running server."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tapcore.control import ControlClient
from tapcore.nbd.address import NbdAddress
from tapcore.nbd.client import NbdClient
from tools.benchmarks.outcome import OURS, Outcome
from tools.benchmarks.processes import Watched
from tools.benchmarks.qmp import Qmp
from tools.benchmarks.servers import LOG_NAME, Command, nbdkit, qemu_nbd, tapdisk
from tools.benchmarks.subjects import qemu_img
from writelog.logstore import forget

LIMIT_S: Final = 20.0
TRY_S: Final = 0.0005
"""Between tries to connect."""
BLOCK_BYTES: Final = 4096
EXPORT: Final = "bench"
IMAGES: Final = {"raw": ("aio", 1 << 30), "qcow2": ("qcow2", 1 << 40)}
"""By QEMU's name of the format: our driver, and the disk's size."""


@dataclass(frozen=True)
class Row:
    """`running`: the server runs, and gets one more disk."""

    image_format: str
    running: bool

    @property
    def name(self) -> str:
        what = "one more disk of a running server" if self.running else "a server"
        return f"start: {what}, {IMAGES[self.image_format][1] >> 30} GiB {self.image_format}"


ROWS: Final = [Row(image_format, running) for running in (False, True) for image_format in IMAGES]


def measure(rows: list[Row], options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """Milliseconds; the servers by turns, and each once before, so that its program is in the page cache."""
    outcomes = []
    for row in rows:
        driver, size_bytes = IMAGES[row.image_format]
        image = folder / "disk"
        qemu_img("create", "-f", row.image_format, image, size_bytes)
        outcome = Outcome(row.name, "ms")
        with _running_servers(folder, image, row.image_format, driver) if row.running else contextlib.nullcontext(
                _servers(folder, image, row.image_format, driver)) as starts:
            for repetition in range((options.repeat or 5) + 1):
                for name, start in starts.items():
                    figure = start() * 1e3
                    if repetition:
                        outcome.add(name, figure)
        print(f"  {row.name:40} " + ", ".join(f"{name} {outcome.median(name):.1f} ms" for name in starts),
              file=sys.stderr)
        outcomes.append(outcome)
        image.unlink()
    return outcomes


Start = Callable[[], float]
"""Seconds from the order to the first byte."""


def _servers(folder: Path, image: Path, image_format: str, driver: str) -> dict[str, Start]:
    commands = {OURS: tapdisk(f"log:{LOG_NAME}|{driver}:{image}"), "qemu-nbd": qemu_nbd(image, image_format)}
    if image_format == "raw":
        commands["nbdkit file"] = nbdkit(image)
    return {name: partial(_start, command, folder, EXPORT if name == OURS else "")
            for name, command in commands.items()}


def _start(command: Command, folder: Path, export: str) -> float:
    socket = folder / "nbd"
    start_s = time.monotonic()
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command(folder, socket), stdout=quiet, stderr=quiet) as process:
        try:
            _read_first(socket, export, start_s + LIMIT_S)
            return time.monotonic() - start_s
        finally:
            process.terminate()
            process.wait(LIMIT_S)
            socket.unlink(missing_ok=True)
            forget(folder, LOG_NAME)


def _read_first(socket: Path, export: str, deadline_s: float) -> None:
    """SystemExit if nobody answers in time."""
    while True:
        try:
            with NbdClient(NbdAddress(path=str(socket), export=export), structured_replies=False) as client:
                client.read(0, BLOCK_BYTES)
                return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise SystemExit(f"nobody answers at {socket}: {error}") from error
            time.sleep(TRY_S)


@contextlib.contextmanager
def _running_servers(folder: Path, image: Path, image_format: str, driver: str) -> Iterator[dict[str, Start]]:
    """A tapdisk, and a qemu-storage-daemon, each with nothing to do but to open and to close the image."""
    deadline_s = time.monotonic() + 3 * LIMIT_S
    qemu_socket, monitor, socket = folder / "qemu-nbd", folder / "qmp", folder / "nbd"
    ours = Watched("tapdisk", [sys.executable, "-m", "tapcore.tapdisk", "--run-dir", str(folder), "ram:1M"],
                   deadline_s)
    theirs = Watched("qemu-storage-daemon", [
        "qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={qemu_socket}",
        "--chardev", f"socket,id=monitor,path={monitor},server=on,wait=off", "--monitor", "chardev=monitor"],
        deadline_s)
    try:
        ours.read_line()
        while not monitor.exists():
            time.sleep(0.01)
            if theirs.has_ended():
                raise theirs.failure()
        client = ControlClient(next(folder.glob("tapdisk-*.ctl")))
        qmp = Qmp(monitor, deadline_s)

        def open_ours() -> float:
            start_s = time.monotonic()
            client.call("open", chain=f"log:{LOG_NAME}|{driver}:{image}", name=EXPORT, nbd=[f"unix:{socket}"])
            _read_first(socket, EXPORT, deadline_s)
            took_s = time.monotonic() - start_s
            client.call("close", disk=EXPORT, forget=True)
            return took_s

        def open_theirs() -> float:
            start_s = time.monotonic()
            qmp.call("blockdev-add", **{"driver": image_format, "node-name": "disk",
                                        "file": {"driver": "file", "filename": str(image)}})
            qmp.call("block-export-add", **{"type": "nbd", "id": EXPORT, "node-name": "disk", "name": EXPORT})
            _read_first(qemu_socket, EXPORT, deadline_s)
            took_s = time.monotonic() - start_s
            qmp.call("block-export-del", id=EXPORT, mode="hard")
            qmp.wait("BLOCK_EXPORT_DELETED")
            qmp.call("blockdev-del", **{"node-name": "disk"})
            return took_s

        yield {OURS: open_ours, "qemu-storage-daemon": open_theirs}
        client.close()
        qmp.close()
    finally:
        ours.end()
        theirs.end()
        forget(folder, LOG_NAME)
