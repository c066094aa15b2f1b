"""A disk whose tapdisk is killed under load, with a checker: what was acknowledged is there, what the copy lacks
is dirty, and nothing else is but what may be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

from processes import Tapdisk, forget_logs

from tapcore.errors import WritelogError
from tapcore.nbd.client import NbdError
from tapcore.nbd.wire import NBD_CMD_WRITE
from writelog.client import LogClient
from writelog.sidecar_layout import EXTENT_BYTES

BLOCK_BYTES = 4096
SIZE_BYTES = 256 << 20
HOT = 16
TIMEOUT_S = 20.0
DEPTH = 16


class World:
    """A disk, its copy, and for each block the last write that was acknowledged, and all since."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.folder = folder
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
        self.is_renaming = False
        """Whether the log may have another base already, whose name its client has not heard."""
        self.before = set(range(SIZE_BYTES // BLOCK_BYTES))
        """What was dirty when the last round began."""
        self.written: set[int] = set()
        """Since then."""
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
                        self.written.add(block)
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
                self.is_renaming = True
                self.base = log.adopt(self.base) if self.base else log.fill()
                self.is_renaming = False
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

        def guarded(action: Callable[[threading.Event], None]) -> None:
            try:
                action(deadline)
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
            self.check_base(log.stat().base)
            dirty = {block for offset, length in log.peek()
                     for block in range(offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES)}
        lacking = {block for block in self.possible
                   if image[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
                   != self.copy[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]}
        assert lacking <= dirty, f"{len(lacking - dirty)} blocks that the copy lacks are not dirty"
        more = dirty - self.written - self.before
        if host_dies:
            extents = {block // (EXTENT_BYTES // BLOCK_BYTES) for block in more}
            assert len(extents) <= HOT, f"{len(extents)} extents besides what was written: more than are hot"
        else:
            assert more <= self.possible.keys(), f"{len(more)} more blocks are dirty than were written"
        self.before, self.written = dirty, set()

    def check_base(self, base: int) -> None:
        assert base == self.base or (self.is_renaming and base)

    def close(self) -> None:
        self.tapdisk.kill()
        forget_logs(self.run_dir)
