"""Real tapdisk processes for tests."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tapcore.nbd.address import NbdAddress, parse_address
from tapcore.nbd.client import NbdClient
from writelog.shm import SHM_DIR, bitmap_name

START_TIMEOUT_S = 20
KILLED_AT = Path(__file__).with_name("killed_at.py")


def read_line(process: subprocess.Popen[bytes], timeout_s: float = START_TIMEOUT_S) -> str:
    """The next line of a process's standard output; AssertionError if none comes in time."""
    assert process.stdout is not None
    line = bytearray()
    deadline_s = time.monotonic() + timeout_s
    while not line.endswith(b"\n"):
        left_s = deadline_s - time.monotonic()
        assert left_s > 0 and select.select([process.stdout], [], [], left_s)[0], f"no line after {bytes(line)!r}"
        byte = os.read(process.stdout.fileno(), 1)
        if not byte:
            error = process.stderr.read().decode() if process.stderr else ""
            raise AssertionError(f"{process.args!r} ended with {process.wait(10)}: {error}")
        line += byte
    return line.decode()


def forget_logs(run_dir: Path) -> None:
    """Remove the bitmaps of every log that was served from `run_dir`: they outlive their processes."""
    pattern = bitmap_name(run_dir, "ANY").replace("ANY", "*").removeprefix("/")
    for path in SHM_DIR.glob(pattern):
        path.unlink(missing_ok=True)


class Tapdisk:
    """One `tapdisk` process, ready. `chain` is its first argument; `uri` its first disk's."""

    def __init__(self, run_dir: Path, chain: str, *arguments: str, killed_at: str | None = None,
                 prelude: str = "", at: Sequence[str] = ()) -> None:
        """With `killed_at` it is killed at a place in the code: see killed_at.py. `prelude` is Python that is run
        in its process first. `at`: what its command begins with."""
        self.chain = chain
        self.run_dir = run_dir
        program = ["-m", "tapcore.tapdisk"] if killed_at is None else ["-P", str(KILLED_AT), killed_at]
        if prelude:
            program = ["-c", f"{prelude}\nimport sys\nfrom tapcore import tapdisk\nsys.exit(tapdisk.main())"]
        self.process = subprocess.Popen(
            [*at, sys.executable, *program, "--run-dir", str(run_dir), *arguments, chain],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        line = read_line(self.process)
        self.uri = line.split()[-1]
        self.address: NbdAddress = parse_address(self.uri)
        self.name = self.address.export

    @property
    def socket(self) -> str:
        assert self.address.path is not None
        return self.address.path

    @property
    def server_uri(self) -> str:
        """The server, without an export."""
        return NbdAddress(path=self.socket).uri

    def client(self, **options: Any) -> NbdClient:
        return NbdClient(self.uri, **options)

    def stop(self) -> None:
        """End it as an operator would; AssertionError if it fails to."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            _, error = self.process.communicate(timeout=20)
            assert self.process.returncode == 0, error.decode()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)
