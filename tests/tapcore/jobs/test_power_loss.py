"""Power loss at every point of a job, beside a guest that writes and flushes: the image that is to be opened then
is whole, and holds what was flushed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import cast

import pytest
from contract.runner import Runner
from crashfolder import CrashFolder
from formats_model import History
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from recording import SECTOR, ManualWorkers

from tapcore.disk import Disk
from tapcore.driver import Env, OpenFlag
from tapcore.errors import ImageError
from tapcore.formats.tools import Backing, find_tools
from tapcore.jobs import commit, copying, gate
from tapcore.jobs.commit import Commit
from tapcore.jobs.job import DONE, Job
from tapcore.jobs.snapshot import Snapshot
from tapcore.jobs.stream import Stream
from tapcore.request import FLUSH, WRITE, ZEROES, Request
from tapcore.vbd import Vbd

SIZE = 64 << 10
WINDOW = 8 << 10
CUTS = 70
"""The most that are looked at for one life of a disk."""
MAX_TURNS = 20_000
RECOVERABLE = ("the footer at the end", "the footer's copy at the start")
"""Of a VHD."""

Make = Callable[[Env, Disk, Path], Job]


class Guest:
    """Writes, zeroes and flushes, one at a time, and knows what a crash may leave of it."""

    def __init__(self, vbd: Vbd, world: CrashFolder, disk: bytes, rng: random.Random) -> None:
        self.vbd = vbd
        self.world = world
        self.rng = rng
        self.history = History(bytearray(disk), [(0, disk)])
        self.flying: Request | None = None
        self.requests = 0

    def begin(self) -> None:
        rng, op = self.rng, self.rng.choice((WRITE, WRITE, ZEROES, FLUSH))
        offset = rng.randrange(SIZE // SECTOR) * SECTOR
        length = 0 if op == FLUSH else min(rng.choice((1, 2, 5, 20)) * SECTOR, SIZE - offset)
        data = rng.randbytes(length) if op == WRITE else bytes(length)
        iov = [memoryview(data)] if op == WRITE else []
        self.flying = request = Request(op, offset if length else 0, length, iov, done=self.vbd.request_done)
        request.owner = self
        if op != FLUSH:
            self.history.changes.append((len(self.world.entries), offset, data))
        for complete in self.vbd.submit([request]):
            self.request_done(complete)

    def request_done(self, request: Request) -> None:
        assert request is self.flying and not request.error
        disk, start = self.history.disk, request.offset
        if request.op == FLUSH:
            self.history.flushed.append((len(self.world.entries), bytes(disk)))
        else:
            disk[start : start + request.length] = b"".join(request.iov) or bytes(request.length)
        self.flying = None
        self.requests += 1


class Life:
    """A disk whose images are in `folder`, served while a job works on them, until both have ended."""

    def __init__(self, env: Env, folder: Path, chain: str, disk: bytes, rng: random.Random,
                 monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.rng = rng
        self.workers = ManualWorkers()
        self.env = Env(env.loop, self.workers, env.run_dir)
        self.vbd = Vbd(self.env, "vm")
        self.vbd.open(chain)
        self.world = CrashFolder(folder, monkeypatch)
        self.world.start()
        self.guest = Guest(self.vbd, self.world, disk, rng)

    def turn(self, requests: int) -> None:
        """Whoever's turn it is, does something; the guest as long as it has done no more than `requests`."""
        which = self.rng.randrange(4)
        if which == 0 and self.guest.flying is None and self.guest.requests < requests:
            self.guest.begin()
        elif which == 1:
            self.workers.run(1)
        else:
            self.env.loop.turn(0)

    def until(self, ready: Callable[[], bool], requests: int = 0) -> None:
        for _ in range(MAX_TURNS):
            if ready():
                return
            self.turn(requests)
        raise AssertionError("it does not end")

    def run(self, make: Make) -> int:
        """Entries when the job was over."""
        guest = self.guest
        disk = SimpleNamespace(name="vm", vbd=self.vbd, closing=False)
        self.until(lambda: guest.requests >= 4 and guest.flying is None, 4)
        job = make(self.env, cast(Disk, disk), self.folder)
        job.start()
        self.until(lambda: job.is_over, 25)
        assert job.state == DONE, job.error
        over = len(self.world.entries)
        more = guest.requests + 6
        self.until(lambda: guest.requests >= more and guest.flying is None, more)
        closed: list[bool] = []
        self.vbd.close(lambda: closed.append(True))
        self.until(lambda: bool(closed))
        return over


def make_images(env: Env, folder: Path, kind: str, count: int, rng: random.Random) -> tuple[str, bytes]:
    """A chain of `count` images, the top with the highest number, and what the disk holds."""
    disk = bytearray(SIZE)
    for number in range(count):
        path = folder / str(number)
        backing = Backing(str(number - 1), kind) if number else None
        options = {"cluster_size": "1024"} if kind == "qcow2" else {}
        find_tools(kind).create(str(path), SIZE, backing=backing, options=options)
        runner = Runner(env, f"{kind}:{path}")
        for _ in range(4):
            offset = rng.randrange(SIZE // SECTOR) * SECTOR
            data = rng.randbytes(min(SIZE - offset, rng.choice((SECTOR, 3000 // SECTOR * SECTOR, 20 * SECTOR))))
            assert runner.write(offset, data) == 0
            disk[offset : offset + len(data)] = data
        runner.close()
    return f"{kind}:{folder / str(count - 1)}", bytes(disk)


def is_whole(kind: str, path: Path) -> bool:
    """Nothing is wrong with the image but what the next open mends by itself."""
    try:
        report = find_tools(kind).check(str(path))
    except ImageError:
        return False
    mended = all(message.startswith(RECOVERABLE) or "hold none" in message for message in report.messages)
    return not report.errors or (kind == "vhd" and mended)


def look_at(env: Env, kind: str, path: Path, allowed: list[set[bytes]]) -> None:
    for number in range(int(path.name) + 1):
        assert is_whole(kind, path.with_name(str(number))), number
    runner = Runner(env, f"{kind}:{path}", OpenFlag.RDONLY)
    disk = runner.read(0, SIZE)
    runner.close()
    wrong = [at for at in range(0, SIZE, SECTOR) if disk[at : at + SECTOR] not in allowed[at // SECTOR]]
    assert wrong == [], path.name


def go_on(disk: Disk) -> None:
    disk.vbd.resume()


def lay(folder: Path, files: dict[str, bytes]) -> None:
    """Let `folder` hold these files."""
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def play(env: Env, kind: str, count: int, seed: int, make: Make, tops: Callable[[Path, bool], list[str]]) -> None:
    """`tops` says, by the folder that is left and whether the job was over, by what the disk can be opened."""
    rng = random.Random(seed)
    with TemporaryDirectory(dir="/dev/shm") as name:
        folder, crashed = Path(name) / "images", Path(name) / "crashed"
        folder.mkdir()
        crashed.mkdir()
        chain, disk = make_images(env, folder, kind, count, rng)
        with pytest.MonkeyPatch.context() as patch:
            for module, constant in ((gate, "BLOCK_BYTES"), (copying, "BLOCK_BYTES"), (copying, "WINDOW_BYTES")):
                patch.setattr(module, constant, WINDOW)
            patch.setattr(commit, "PAUSE_S", rng.choice((0, 0.02)))
            life = Life(env, folder, chain, disk, rng, patch)
            over = life.run(make)
        cuts = range(len(life.world.entries) + 1)
        for cut in sorted(rng.sample(cuts, min(CUTS, len(cuts)))):
            lay(crashed, life.world.crash(cut, random.Random(cut) if rng.random() < 0.8 else None))
            for top in tops(crashed, cut >= over):
                look_at(env, kind, crashed / top, life.guest.history.allowed(cut))


seeded = settings(max_examples=4, derandomize=True, phases=[Phase.generate],
                  suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 1 << 32)
kinds = pytest.mark.parametrize("kind", ["qcow2", "vhd"])


@kinds
@seeded
@given(seeds)
def test_a_snapshot(env: Env, kind: str, seed: int) -> None:
    """From the moment that it is whole the overlay shows the disk; before that the image does."""
    play(env, kind, 1, seed,
         lambda env, disk, folder: Snapshot(env, disk, go_on, str(folder / "1"), kind, {}),
         lambda left, over: ["1" if over or is_whole(kind, left / "1") else "0"])


@kinds
@seeded
@given(seeds)
def test_a_commit(env: Env, kind: str, seed: int) -> None:
    """The top shows the disk at any time, and the parent once the job is over."""
    play(env, kind, 3, seed,
         lambda env, disk, folder: Commit(env, disk, go_on, None),
         lambda left, over: ["2", "1"] if over else ["2"])


@kinds
@seeded
@given(seeds, st.booleans())
def test_a_stream(env: Env, kind: str, seed: int, with_base: bool) -> None:
    """The top shows the disk at any time."""
    play(env, kind, 3, seed,
         lambda env, disk, folder: Stream(env, disk, go_on, None,
                                          str(folder / "0") if with_base else None),
         lambda left, over: ["2"])
