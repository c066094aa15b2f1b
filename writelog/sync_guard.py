"""Watches over a switch-over of several disks, as a child of who drives it: if that is killed, the guest goes on.

Disks that switch together are all handed over before a replica is promoted. A process that dies in between leaves
some that wait for good. So this one holds the end of a pipe. When the other end closes without a word, nothing has
been promoted: disks that were handed over are taken back. One byte says that the point of no return is past, and
another that all is well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from tapcore.control import find_disk
from tapcore.errors import ControlError, WritelogError
from writelog.sync_disks import parse_disks

PROMOTING, DONE = b"P", b"D"
POLL_S: Final = 0.02
SETTLE_S: Final = 10.0
"""Longest wait for a tapdisk to have noticed that who held its disk has gone."""


class Guard:
    """The child process, as its parent sees it: `module`, with `options` of its own."""

    def __init__(self, run_dir: Path, disks: Mapping[str, str], module: str = "writelog.sync_guard",
                 options: Iterable[str] = ()) -> None:
        command = [sys.executable, "-m", module, "--run-dir", str(run_dir), *options,
                   *(f"{name}={endpoint}" for name, endpoint in disks.items())]
        # A session of its own: what interrupts the parent from its terminal must not reach it.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None
        self._fd = self._process.stdin.fileno()

    def promoting(self) -> None:
        """The point of no return."""
        self._say(PROMOTING)

    def close(self, all_is_well: bool) -> None:
        """End it; or, if it is needed, leave it alone with its work."""
        if all_is_well:
            self._say(DONE)
        assert self._process.stdin is not None
        self._process.stdin.close()
        if all_is_well:
            self._process.wait()

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it: then there is none
            os.write(self._fd, word)


def last_word() -> bytes:
    """What the parent said last before it closed the pipe, or died. In the child."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends after its parent, whoever ends a whole service
    said = b""
    while word := os.read(sys.stdin.fileno(), 1):
        said = word
    return said


def tell(program: str, report: Iterable[str]) -> None:
    """What became of a program that was killed; perhaps nobody reads it, for its terminal was closed, too."""
    with contextlib.suppress(OSError):
        for line in ["it was killed", *report]:
            print(f"{program}: {line}", file=sys.stderr)


def free_disks(run_dir: Path, disks: Mapping[str, str]) -> list[str]:
    """Let disks go on whose sync was killed before a replica was told anything; what went wrong."""
    problems = []
    for name, endpoint in disks.items():
        try:
            _free_disk(run_dir, name, endpoint)
        except WritelogError as error:
            problems.append(str(error))
    return problems


def _free_disk(run_dir: Path, name: str, endpoint: str) -> None:
    deadline_s = time.monotonic() + SETTLE_S
    with find_disk(run_dir, name) as control:
        while True:
            info = control.call("info", disk=name)
            if str(info["fenced"]).endswith(f" {endpoint}"):
                control.call("unpause", disk=name, force=True)
                return
            if info["state"] == "running":
                return
            if time.monotonic() > deadline_s:
                raise ControlError(f"disk {name!r} is {info['state']}",
                                   hint=f"tap-ctl unpause {name} lets it go on")
            time.sleep(POLL_S)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="writelog-sync-guard", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("disks", nargs="+")
    options = parser.parse_args(arguments)
    disks = parse_disks(options.disks)
    said = last_word()
    if said == DONE:
        return 0
    if said == PROMOTING:
        unpause = " and ".join(f"tap-ctl unpause --force {name}" for name in disks)
        fate = ("the disks were handed over, and their copies are complete. Where `writelog-replica status IMAGE` "
                "does not say promoted, end the writelog-replica: `writelog-replica promote CHAIN` makes the copy "
                f"the disk; or, if none was written to there, end the replicas, and go on here by {unpause}")
        report = [fate]
    else:
        report = free_disks(options.run_dir, disks) or ["the guest goes on here, with all its disks"]
    tell("writelog-sync", report)
    return 1


if __name__ == "__main__":
    sys.exit(main())
