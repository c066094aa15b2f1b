"""qcow2 images for tests of the tools: made and written here, looked at by QEMU's programs."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

from contract.runner import Runner
from support import need

from tapcore.driver import Env, OpenFlag
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.snapshots import apply_snapshot, list_snapshots


def qemu(*command: object) -> str:
    """What a program of QEMU's prints; it must succeed."""
    need(str(command[0]))
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (command, done.stdout + done.stderr)
    return done.stdout


def qemu_verdict(path: Path) -> int:
    """Of qemu-img check. 0: nothing wrong; 3: leaks; 2: errors; 1: it cannot be checked."""
    need("qemu-img")
    command = ["qemu-img", "check", "-f", "qcow2", path.name]
    return subprocess.run(command, cwd=path.parent, capture_output=True, timeout=60).returncode


def scribble(env: Env, path: Path, rng: random.Random, count: int = 12) -> bytes:
    """Random writes, zeroes and discards; what the disk holds then."""
    runner = Runner(env, f"qcow2:{path}")
    for _ in range(count):
        offset = rng.randrange(runner.size // 512) * 512
        length = min(rng.choice((512, 3 * 512, 17 * 512)), runner.size - offset)
        kind = rng.choice(("write", "write", "write", "zeroes", "discard"))
        if kind == "write":
            assert runner.write(offset, rng.randbytes(length)) == 0
        else:
            assert (runner.zeroes if kind == "zeroes" else runner.discard)(offset, length) == 0
    disk = runner.read(0, runner.size)
    runner.close()
    return disk


def content(env: Env, path: Path) -> bytes:
    """All of the disk."""
    runner = Runner(env, f"qcow2:{path}", OpenFlag.RDONLY)
    disk = runner.read(0, runner.size)
    runner.close()
    return disk


def snapshot_contents(env: Env, path: Path) -> dict[str, bytes]:
    """What the disk held at each snapshot, by name."""
    found: dict[str, bytes] = {}
    for snapshot in list_snapshots(str(path)):
        copy = path.with_name("applied.qcow2")
        shutil.copyfile(path, copy)
        apply_snapshot(str(copy), snapshot.id)
        found[snapshot.name] = content(env, copy)
    return found


def assert_clean(path: Path) -> None:
    """Neither this side nor QEMU finds an error or a leak."""
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages
    assert qemu_verdict(path) == 0
