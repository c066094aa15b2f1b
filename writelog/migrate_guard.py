"""Watches over a writelog-migrate, as its child: if that is killed, the guest is not left standing still.

QEMU stops a guest before the switch-over and waits for its manager, for ever. So this process holds the end of a
pipe. When the other end closes without a word, nothing has been promoted: disks that were handed over are taken
back, QEMU's migration is cancelled, and the guest runs on. One byte says that the point of no return is past, and
another that all is well. What it says it says last: whoever killed its parent may have closed their terminal, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tapcore.errors import WritelogError
from writelog.migrate_check import parse_disks
from writelog.migrate_plan import fate_here, how_to_go_back
from writelog.migrate_qmp import Monitor
from writelog.migrate_undo import Settings, cancel_memory, free_disk

PROMOTING, DONE = b"P", b"D"


class Guard:
    """The child process, as its parent sees it."""

    def __init__(self, monitor: str, run_dir: Path, disks: Mapping[str, str], former: Settings,
                 was_running: bool) -> None:
        command = [sys.executable, "-m", "writelog.migrate_guard", "--qmp", monitor, "--run-dir", str(run_dir),
                   "--former", json.dumps(asdict(former)), *(["--running"] if was_running else []),
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


def undo(monitor: str, run_dir: Path, disks: Mapping[str, str], former: Settings, was_running: bool) -> list[str]:
    """Let the guest run on, as far as possible; what went wrong."""
    problems = []
    for name, endpoint in disks.items():
        try:
            free_disk(run_dir, name, endpoint)
        except WritelogError as error:
            problems.append(str(error))
    try:
        qemu = Monitor(monitor)
        try:
            cancel_memory(qemu, was_running)
            former.apply(qemu)
        finally:
            qemu.close()
    except WritelogError as error:
        problems.append(str(error))
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="writelog-migrate-guard", description=__doc__)
    parser.add_argument("--qmp", required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--former", required=True)
    parser.add_argument("--running", action="store_true")
    parser.add_argument("disks", nargs="+")
    options = parser.parse_args(arguments)
    disks = parse_disks(options.disks)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends after its parent, whoever ends a whole service
    said = b""
    while word := os.read(sys.stdin.fileno(), 1):
        said = word
    if said == DONE:
        return 0
    if said == PROMOTING:
        report = [f"the disks were handed over: {how_to_go_back(disks, True)}"]
    else:
        former = Settings(**json.loads(options.former))
        report = undo(options.qmp, options.run_dir, disks, former, options.running) or [
            f"the migration was cancelled; {fate_here(options.running)}"]
    with contextlib.suppress(OSError):
        for line in ["it was killed", *report]:
            print(f"writelog-migrate: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
