"""Processes of a benchmark: started, watched for CPU time and memory, and ended, whatever happens."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

START_TIMEOUT_S: Final = 30.0
END_TIMEOUT_S: Final = 20.0
TICKS: Final = os.sysconf("SC_CLK_TCK")


class RunFailed(Exception):
    """A run that does not count; `str()` says why."""


@dataclass(frozen=True)
class Usage:
    """CPU seconds of a process so far, and the largest that it has been in memory."""

    cpu_s: float
    peak_bytes: int


class Watched:
    """A process with its output in a pipe. `deadline_s` of time.monotonic(): no read waits longer."""

    def __init__(self, name: str, command: Sequence[str], deadline_s: float) -> None:
        self.name = name
        self._deadline_s = deadline_s
        self._peak_bytes = 0
        self._rest = b""
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def usage(self) -> Usage:
        """Also of one that has ended but was not waited for."""
        pid = self._process.pid
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        self._peak_bytes = max(self._peak_bytes, self._status_bytes("VmHWM"))
        return Usage((int(fields[11]) + int(fields[12])) / TICKS, self._peak_bytes)

    def resident_bytes(self) -> int:
        """What it has in memory now."""
        return self._status_bytes("VmRSS")

    def _status_bytes(self, name: str) -> int:
        """0 of a process that has ended."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
        return 0

    def has_ended(self) -> bool:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return self._process.returncode is not None or os.waitid(os.P_PID, self._process.pid, flags) is not None

    def read_line(self) -> bytes:
        """The next line of its output, empty at the end. RunFailed if none comes in time."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
                raise RunFailed("not done in time")
            data = os.read(fd, 65536)
            if not data:
                return b""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def run_to_end(self) -> Usage:
        """Wait for it; RunFailed if it fails or takes too long."""
        while not self.has_ended():
            if time.monotonic() > self._deadline_s:
                raise RunFailed("not done in time")
            self.usage()
            time.sleep(0.01)
        usage = self.usage()
        if self._process.wait():
            raise self.failure()
        return usage

    def failure(self) -> RunFailed:
        """What it said when it failed."""
        self._process.kill()
        _, error = self._process.communicate()
        return RunFailed(f"{self.name} failed: {error.decode(errors='replace').strip()[-400:]}")

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """By SIGTERM, or harder."""
        if self._process.returncode is None:
            self.terminate()
        try:
            self._process.communicate(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
