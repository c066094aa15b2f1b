"""Watches over a writelog-migrate, as its child: if that is killed, the guest is not left standing still.

QEMU stops a guest before the switch-over and waits for its manager, for ever. So this is the guard of the disks
(`writelog.sync_guard`) that cancels QEMU's migration, too: the guest runs on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tapcore.errors import WritelogError
from writelog.migrate_plan import fate_here, how_to_go_back
from writelog.migrate_qmp import Monitor
from writelog.migrate_undo import Settings, undo_memory
from writelog.sync_disks import parse_disks
from writelog.sync_guard import DONE, PROMOTING, free_disks, last_word, tell


def undo(monitor: str, run_dir: Path, disks: Mapping[str, str], former: Settings, was_running: bool) -> list[str]:
    """Let the guest run on, as far as possible; what to tell about it."""
    problems = free_disks(run_dir, disks)
    remark = ""
    try:
        qemu = Monitor(monitor)
        try:
            remark = undo_memory(qemu, was_running, former)
        finally:
            qemu.close()
    except WritelogError as error:
        problems.append(str(error))
    return list(filter(None, [*(problems or [f"the migration was cancelled; {fate_here(was_running)}"]), remark]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="writelog-migrate-guard", description=__doc__)
    parser.add_argument("--qmp", required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--former", required=True)
    parser.add_argument("--running", action="store_true")
    parser.add_argument("disks", nargs="+")
    options = parser.parse_args(arguments)
    disks = parse_disks(options.disks)
    said = last_word()
    if said == DONE:
        return 0
    if said == PROMOTING:
        report = [f"the disks were handed over: {how_to_go_back(disks, True)}"]
    else:
        former = Settings(**json.loads(options.former))
        report = undo(options.qmp, options.run_dir, disks, former, options.running)
    tell("writelog-migrate", report)
    return 1


if __name__ == "__main__":
    sys.exit(main())
