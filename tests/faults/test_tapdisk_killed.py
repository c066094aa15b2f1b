"""A tapdisk is killed again and again while a guest writes and a client copies.

No acknowledged write is lost, what the copy lacks is dirty, and when only the process died, nothing else is.

    FAULT_ROUNDS=500 FAULT_SEED=7 pytest tests/faults

Half of the time the host "dies" with it: then shared memory is gone too, and the side-car counts. (What was not
flushed is not lost here: that is for tests/writelog/test_activity.py.)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from processes import Tapdisk, forget_logs

from tapcore.errors import WritelogError
from tapcore.nbd.client import NbdError
from tapcore.nbd.wire import NBD_CMD_WRITE
from writelog.client import LogClient
from writelog.sidecar_layout import EXTENT_BYTES

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "6"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
BLOCK_BYTES = 4096
SIZE_BYTES = 256 << 20
HOT = 16
TIMEOUT_S = 20.0
DEPTH = 16


class World:
    """A disk, its copy, and for each block the last write that was acknowledged, and all since."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.image = folder / "disk.img"
        with self.image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        self.copy = bytearray(SIZE_BYTES)
        self.random = random
        self.run_dir = folder / "run"
        self.run_dir.mkdir(mode=0o700)
        self.counter = 0
        self.possible: dict[int, list[bytes]] = {}
        self.base = 0
        self.before = set(range(SIZE_BYTES // BLOCK_BYTES))
        """What was dirty when the last round began."""
        self.tapdisk = self.start()

    def start(self) -> Tapdisk:
        return Tapdisk(self.run_dir, f"log:,hot={HOT}|aio:{self.image}")

    def log(self) -> LogClient:
        return LogClient(self.run_dir / "log__disk.img.ctl", TIMEOUT_S)

    # The guest

    def write(self, deadline: threading.Event) -> None:
        """Write until the tapdisk is gone."""
        under_way: dict[int, tuple[int, bytes]] = {}
        try:
            with self.tapdisk.client(timeout_s=TIMEOUT_S) as guest:
                while True:
                    while len(under_way) < DEPTH:
                        block, data = self._next_write({block for block, _ in under_way.values()})
                        self.possible.setdefault(block, [bytes(BLOCK_BYTES)]).append(data)
                        handle = guest.submit(NBD_CMD_WRITE, block * BLOCK_BYTES, BLOCK_BYTES, data)
                        under_way[handle] = (block, data)
                    handle, error = guest.wait()[:2]
                    assert error == 0
                    block, data = under_way.pop(handle)
                    self.possible[block] = [data]
        except (NbdError, OSError, WritelogError):
            assert deadline.is_set(), "the tapdisk failed by itself"

    def _next_write(self, busy: set[int]) -> tuple[int, bytes]:
        while True:
            extent = self.random.randrange(self.random.choice((8, SIZE_BYTES // EXTENT_BYTES)))
            block = extent * (EXTENT_BYTES // BLOCK_BYTES) + self.random.randrange(40)
            if block not in busy:
                self.counter += 1
                return block, self.counter.to_bytes(8, "little") * (BLOCK_BYTES // 8)

    # The client

    def keep_copying(self, deadline: threading.Event) -> None:
        """Take, read, apply, commit, until the tapdisk is gone."""
        try:
            with self.log() as log:
                if self.base:
                    self.base = log.adopt(self.base)
                else:
                    self.base = log.fill()
                while True:
                    taken = log.get(0, 0, SIZE_BYTES)
                    for offset, data in log.read_extents(taken.extents):
                        self.copy[offset : offset + len(data)] = data
                    log.commit(taken.lease)
        except (WritelogError, OSError):
            assert deadline.is_set(), "the log failed by itself"

    # A round

    def run(self, after_s: float, host_dies: bool) -> None:
        deadline = threading.Event()
        failures: list[BaseException] = []

        def guarded(action: object) -> None:
            try:
                action(deadline)  # type: ignore[operator]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(action,)) for action in (self.write, self.keep_copying)]
        for thread in threads:
            thread.start()
        deadline.wait(after_s)
        deadline.set()
        self.tapdisk.kill()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert not failures, failures
        if host_dies:
            forget_logs(self.run_dir)
        self.tapdisk = self.start()
        self.check(host_dies)

    def check(self, host_dies: bool) -> None:
        image = self.image.read_bytes()
        for block, possible in self.possible.items():
            found = image[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            assert found in possible, f"block {block}: an acknowledged write is lost"
            self.possible[block] = [found]
        with self.log() as log:
            assert self.base in (log.stat().base, log.stat().former)
            dirty = {block for offset, length in log.peek()
                     for block in range(offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES)}
        lacking = {block for block in self.possible
                   if image[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
                   != self.copy[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]}
        assert lacking <= dirty, f"{len(lacking - dirty)} blocks that the copy lacks are not dirty"
        if not host_dies:
            assert dirty <= self.possible.keys() | self.before, "more is dirty than was written"
        self.before = dirty

    def close(self) -> None:
        self.tapdisk.kill()
        forget_logs(self.run_dir)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, Random(SEED))
    yield world
    world.close()


@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_killed_again_and_again(world: World) -> None:
    for number in range(ROUNDS):
        print(f"round {number} of seed {SEED}")
        world.run(world.random.uniform(0.02, 0.4), host_dies=world.random.random() < 0.5)
    assert world.counter > 100 * ROUNDS
