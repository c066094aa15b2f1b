"""Ours and the peers as processes that serve one disk over a UNIX socket."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from writelog.logstore import forget

START_TIMEOUT_S: Final = 20.0
LOG_NAME: Final = "bench"

Command = Callable[[Path, Path], Sequence[str]]
"""(folder, socket) → the command that serves the disk."""


def tapdisk(chain: str) -> Command:
    return lambda folder, socket: [sys.executable, "-m", "tapcore.tapdisk", "--run-dir", str(folder),
                                   "--name", "bench", "--nbd", f"unix:{socket}", chain]


def nbdkit(image: Path) -> Command:
    return lambda folder, socket: ["nbdkit", "-f", "-U", str(socket), "file", str(image)]


def qemu_nbd(image: Path, image_format: str, *options: str) -> Command:
    return lambda folder, socket: ["qemu-nbd", "-f", image_format, "-t", "-e", "16", *options, "-k", str(socket),
                                   str(image)]


@contextlib.contextmanager
def running(name: str, command: Command, folder: Path) -> Iterator[str]:
    """Run a server; yields its NBD URI once it answers. SystemExit if it does not."""
    socket = folder / "nbd"
    with subprocess.Popen(command(folder, socket), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        uri = f"nbd+unix:///?socket={socket}"
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
            socket.unlink(missing_ok=True)
            forget(folder, LOG_NAME)
