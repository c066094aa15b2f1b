"""The disks fail: the primary's and the replica's, in reads, writes, flushes and zeroes, with errors that come and
go, latencies, short transfers, torn writes; and the side-car's.

What comes and goes the guest does not notice. A sync ends with an error that names it or outlives it, and what the
replica has not got stays dirty. Once the disks are well again one sync makes the copy equal.

    FAULT_ROUNDS=100 FAULT_SEED=7 pytest tests/faults/test_disk.py
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from livewriter import LiveWriter
from processes import Tapdisk, forget_logs, read_line
from sync_rig import SIZE_BYTES, Rig

from tapcore.driver import Env
from tapcore.drivers import aio
from writelog.sidecar import Sidecar

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
BLOCK_BYTES = 4096
WAIT_S = 60.0


class World:
    """A disk of the given chain with its guest, and a replica on request."""

    def __init__(self, env: Env, folder: Path, below_log: str = "", seed: int = SEED) -> None:
        image, self.copy = folder / "disk.img", folder / "copy.img"
        image.write_bytes(Random(seed).randbytes(SIZE_BYTES // 2) + bytes(SIZE_BYTES // 2))
        self.copy.write_bytes(bytes(SIZE_BYTES))
        self.rig = Rig(env, image, f"log:|{below_log}aio:{{path}}", retry_interval_s=0.01)
        self.guest = LiveWriter(self.rig.uri, image.read_bytes(), seed=seed)

    def sync(self, endpoint: str, *options: str) -> int:
        self.guest.wait(20)
        code = self.rig.sync("--keep-running", "--max-pause", "60", "--peer-timeout", "20", *options, "vm1",
                             endpoint)
        self.guest.wait(20)
        return code

    def is_equal_in_the_end(self, endpoint: str) -> None:
        disk, copy = self.guest.stop(), self.copy.read_bytes()
        with self.rig.log() as log:
            dirty = [range(start, start + length) for start, length in log.peek()]
        assert [at for at in range(0, SIZE_BYTES, BLOCK_BYTES)
                if disk[at : at + BLOCK_BYTES] != copy[at : at + BLOCK_BYTES]
                and not any(at in extent for extent in dirty)] == []
        assert 0 in (self.rig.sync("--verify", "--keep-running", "vm1", endpoint) for _ in range(10))
        assert self.copy.read_bytes() == disk


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("op", ["write", "read", "flush", "zeroes"])
def test_the_primarys_errors_come_and_go(
    env: Env, tmp_path: Path, op: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guest's requests are tried again. A sync tells what it cannot: read, or have the disk flushed."""
    world = World(env, tmp_path, f"error:op={op},errno={code},count=10,p=0.2,seed={SEED}|")
    try:
        endpoint = world.rig.replica(f"aio:{world.copy}")
        for _ in range(20):
            if world.sync(endpoint) == 0:
                break
            error = capsys.readouterr().err
            assert {"read": "cannot be read", "flush": "refused clrw"}[op] in error
        world.is_equal_in_the_end(endpoint)
    finally:
        world.rig.close()


@pytest.mark.parametrize(("op", "code", "text"), [
    ("write", "EIO", "cannot write"), ("write", "ENOSPC", "No space left"), ("flush", "EIO", "cannot flush"),
    ("zeroes", "ENOSPC", "No space left"), ("read", "EIO", "read its disk back"),
])
def test_the_replicas_errors_come_and_go(
    env: Env, tmp_path: Path, op: str, code: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(env, tmp_path)
    try:
        endpoint = world.rig.replica(f"error:op={op},errno={code},after=2,count={ROUNDS}|aio:{world.copy}")
        codes: list[int] = []
        while not codes or codes[-1]:
            codes.append(world.sync(endpoint, "--verify"))
            error = capsys.readouterr().err
            assert codes[-1] == 0 or text in error
            assert len(codes) <= ROUNDS + 1
        assert 1 in codes
        world.is_equal_in_the_end(endpoint)
    finally:
        world.rig.close()


@pytest.mark.parametrize("which", ["primary", "replica"])
def test_latencies_of_seconds(env: Env, tmp_path: Path, which: str) -> None:
    """They take time, and nothing else."""
    slow = "delay:flush=1000,write=5,jitter=5|"
    world = World(env, tmp_path, slow if which == "primary" else "")
    try:
        endpoint = world.rig.replica(f"{slow if which == 'replica' else ''}aio:{world.copy}")
        assert world.rig.sync("--keep-running", "--downtime", "20", "--max-pause", "60", "vm1", endpoint) == 0
        world.is_equal_in_the_end(endpoint)
    finally:
        world.rig.close()


class Files:
    """Stands in for os.preadv and os.pwritev: transfers are cut short, or torn and said to have failed."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.short_of = 0.0
        self.tears_left = 0
        self.done = 0
        self._lock = threading.Lock()

    def _part(self, iov: Any, length: int) -> list[memoryview]:
        part = []
        for view in iov:
            part.append(memoryview(view)[:length])
            length -= len(part[-1])
        return [view for view in part if len(view)]

    def transfer(self, call: Any, fd: int, iov: Any, offset: int, flags: int, may_tear: bool) -> int:
        whole = sum(len(view) for view in iov)
        with self._lock:
            is_short = whole > 1 and self.random.random() < self.short_of
            tears = is_short and may_tear and self.tears_left > 0
            length = self.random.randrange(1, whole) if is_short else whole
            self.tears_left -= tears
            self.done += is_short
        count = int(call(fd, self._part(iov, length), offset, flags))
        if tears:
            raise OSError(errno.EIO, "torn")
        return count

    def preadv(self, fd: int, iov: Any, offset: int, flags: int = 0) -> int:
        return self.transfer(REAL_PREADV, fd, iov, offset, flags, False)

    def pwritev(self, fd: int, iov: Any, offset: int, flags: int = 0) -> int:
        return self.transfer(REAL_PWRITEV, fd, iov, offset, flags, True)


REAL_PREADV, REAL_PWRITEV = os.preadv, os.pwritev


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    files = Files(Random(SEED))
    for owner, prefix in ((os, ""), (aio, "_")):
        monkeypatch.setattr(owner, f"{prefix}preadv", files.preadv)
        monkeypatch.setattr(owner, f"{prefix}pwritev", files.pwritev)
    yield files
    files.short_of = 0


@pytest.mark.parametrize("tears", [0, 5])
def test_short_and_torn_transfers(env: Env, tmp_path: Path, files: Files, tears: int) -> None:
    """Of both images. A torn write has failed: it is done again, by the primary at once, for the replica by the
    next sync."""
    world = World(env, tmp_path)
    try:
        endpoint = world.rig.replica(f"aio:{world.copy}")
        files.tears_left, files.short_of = tears, 0.2
        for _ in range(tears + 1):
            if world.sync(endpoint) == 0:
                break
        else:
            raise AssertionError("it never ends well")
        world.guest.wait(50)
        files.short_of = 0
        assert files.done > 10 and files.tears_left == 0
        world.is_equal_in_the_end(endpoint)
    finally:
        world.rig.close()


def test_a_side_car_that_cannot_be_written_for_a_while(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = Sidecar.write, [20]

    def failing(*arguments: Any) -> int:
        left[0] -= 1
        return errno.ENOSPC if left[0] > 0 and left[0] % 3 else write(*arguments)

    world = World(env, tmp_path)
    try:
        monkeypatch.setattr(Sidecar, "write", failing)
        endpoint = world.rig.replica(f"aio:{world.copy}")
        for _ in range(20):
            if world.sync(endpoint) == 0:
                break
        world.guest.wait(100)
        left[0] = 0
        world.is_equal_in_the_end(endpoint)
    finally:
        world.rig.close()


def test_a_real_file_that_may_not_be_written_for_a_while(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk of the replica: a sync ends and says why; the next one goes on."""
    image, copy, run_dir = tmp_path / "disk.img", tmp_path / "copy.img", tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    for path in (image, copy):
        path.write_bytes(bytes(SIZE_BYTES))
    tapdisk = Tapdisk(run_dir, f"log:|aio:{image}")
    replica = subprocess.Popen([sys.executable, "-m", "writelog.replica", "--insecure-loopback-only", "--listen",
                                "tcp://127.0.0.1:0", f"aio:{copy}"], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    endpoint = read_line(replica).split()[-1]

    def sync() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "writelog.sync", "--insecure-loopback-only", "--run-dir",
                               str(run_dir), "--keep-running", "disk.img", endpoint], capture_output=True,
                              text=True, timeout=WAIT_S)

    def limit(process: subprocess.Popen[bytes], size_bytes: int) -> None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))

    try:
        guest = LiveWriter(tapdisk.uri, bytes(SIZE_BYTES), seed=SEED)
        guest.wait(50)
        limit(replica, SIZE_BYTES // 2)
        failed = sync()
        assert failed.returncode == 1 and "cannot write" in failed.stderr
        guest.wait(50)
        limit(replica, resource.RLIM_INFINITY)
        disk = guest.stop()
        assert sync().returncode == 0
        assert copy.read_bytes() == disk
    finally:
        replica.kill()
        replica.communicate(timeout=WAIT_S)
        tapdisk.kill()
        forget_logs(run_dir)
