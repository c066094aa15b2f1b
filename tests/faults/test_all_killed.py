"""tapdisk, writelog-sync and writelog-replica are killed again and again, one or several at a time, at any moment,
while a guest writes.

No acknowledged write is lost, what the replica lacks is dirty, and after a death of the host no more is dirty than
was, was written, and the activity log names. In the end one sync makes the copy equal.

    FAULT_ROUNDS=500 FAULT_SEED=7 pytest tests/faults/test_all_killed.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from faultworld import BLOCK_BYTES, SIZE_BYTES, World
from processes import read_line
from sync_rig import free_port

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "3"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
WAIT_S = 60.0


class Replicated(World):
    """The copy is that of a real replica, made by real syncs."""

    def __init__(self, folder: Path, random: Random) -> None:
        super().__init__(folder, random)
        self.copy_image = folder / "copy.img"
        with self.copy_image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.replica = self.start_replica()
        self.ended = [0, 0]
        """Syncs that were killed or failed, and that came to their end."""

    def start_replica(self) -> subprocess.Popen[bytes]:
        replica = subprocess.Popen([sys.executable, "-m", "writelog.replica", "--insecure-loopback-only",
                                    "--listen", self.endpoint, f"aio:{self.copy_image}"],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        read_line(replica)
        return replica

    def start_sync(self, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "writelog.sync", "--insecure-loopback-only", "--run-dir",
                                 str(self.run_dir), "--peer-timeout", "5", *options, "disk.img", self.endpoint],
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def keep_copying(self, deadline: threading.Event) -> None:
        """Sync after sync, until the tapdisk is gone; syncs and replica die more often."""
        random = Random(self.random.random())
        while not deadline.is_set():
            # In place, so that what the replica confirmed is in its image, and not in a journal beside it.
            sync = self.start_sync("--keep-running", "--in-place", "--downtime", "2")
            for victim in random.choices(("sync", "replica", "nobody"), k=2):
                if deadline.wait(random.uniform(0.2, 1.0)):
                    break
                if victim == "replica":
                    self.kill(self.replica)
                    self.replica = self.start_replica()
                elif victim == "sync":
                    sync.kill()
            if deadline.wait(0.1) and random.random() < 0.5:
                self.kill(self.replica)
            sync.kill()
            self.ended[self.kill(sync) == 0] += 1

    def kill(self, process: subprocess.Popen[bytes]) -> int:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=WAIT_S)
        return process.returncode

    def check(self, host_dies: bool) -> None:
        if self.replica.poll() is not None:
            self.replica = self.start_replica()
        self.copy = bytearray(self.copy_image.read_bytes())
        super().check(host_dies)

    def check_base(self, base: int) -> None:
        """Each sync has another one. All is dirty when the first one begins."""
        if not self.base:
            self.before = set(range(SIZE_BYTES // BLOCK_BYTES))
        self.base = base

    def close(self) -> None:
        self.kill(self.replica)
        super().close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Replicated]:
    world = Replicated(tmp_path, Random(SEED))
    yield world
    world.close()


@pytest.mark.timeout(120 + 15 * ROUNDS)
def test_all_three_killed_again_and_again(world: Replicated) -> None:
    for number in range(ROUNDS):
        print(f"round {number} of seed {SEED}")
        world.run(world.random.uniform(0.5, 1.5), host_dies=world.random.random() < 0.5)
    assert sum(world.ended) >= ROUNDS
    sync = world.start_sync("--verify")
    _, error = sync.communicate(timeout=WAIT_S)
    assert sync.returncode == 0, error
    assert world.copy_image.read_bytes() == world.image.read_bytes()
