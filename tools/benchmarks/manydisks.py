"""Servers of many disks at once: ours, and qemu-storage-daemon."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from tools.benchmarks.outcome import OURS
from tools.benchmarks.processes import Watched
from tools.benchmarks.qmp import Qmp
from tools.benchmarks.servers import LOG_NAME
from writelog.logstore import forget

LIMIT_S: Final = 300.0
"""From the start of a server to its end."""
GRANULARITY_BYTES: Final = 4096
"""Of what is noted of writes."""

Serving = Callable[[Path, list[Path], bool], AbstractContextManager[Watched]]
"""Serves images, with a note of what is written, as disk0, disk1 … at `socket_of(folder)`."""


def socket_of(folder: Path) -> Path:
    return folder / "nbd"


@contextlib.contextmanager
def ours(folder: Path, images: list[Path], logged: bool) -> Iterator[Watched]:
    """They are always logged."""
    socket = socket_of(folder)
    chains = [f"disk{number}=log:{LOG_NAME}{number}|aio:{image}" for number, image in enumerate(images)]
    process = Watched("tapdisk", [sys.executable, "-m", "tapcore.tapdisk", "--run-dir", str(folder), "--nbd",
                                  f"unix:{socket}", *chains], time.monotonic() + LIMIT_S)
    try:
        for _ in images:
            if not process.read_line():
                raise process.failure()
        yield process
    finally:
        process.end()
        for number in range(len(images)):
            forget(folder, f"{LOG_NAME}{number}")


@contextlib.contextmanager
def theirs(folder: Path, images: list[Path], logged: bool) -> Iterator[Watched]:
    """Logged by a dirty bitmap."""
    socket, monitor = socket_of(folder), folder / "qmp"
    command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={socket}"]
    for number, image in enumerate(images):
        command += ["--blockdev", f"driver=file,node-name=file{number},filename={image}",
                    "--blockdev", f"driver=raw,node-name=raw{number},file=file{number}",
                    "--export", f"type=nbd,id=e{number},node-name=raw{number},name=disk{number},writable=on"]
    deadline_s = time.monotonic() + LIMIT_S
    process = Watched("qemu-storage-daemon", [
        *command, "--chardev", f"socket,id=monitor,path={monitor},server=on,wait=off", "--monitor",
        "chardev=monitor"], deadline_s)
    try:
        while not monitor.exists() or not socket.exists():
            time.sleep(0.01)
            if process.has_ended():
                raise process.failure()
        if logged:
            qmp = Qmp(monitor, deadline_s)
            for number in range(len(images)):
                qmp.call("block-dirty-bitmap-add", node=f"raw{number}", name="log", granularity=GRANULARITY_BYTES)
            qmp.close()
        yield process
    finally:
        process.end()


SERVINGS: Final[dict[str, Serving]] = {OURS: ours, "qemu-storage-daemon": theirs}
