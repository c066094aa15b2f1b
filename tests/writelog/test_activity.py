"""The log against every crash: what went down and was not confirmed is dirty afterwards, and not much more.

A real log driver over a real side-car file whose writes and flushes are recorded; workers work when the test says
so. The process dies (shared memory stays, each write that was done stays), or the host (shared memory is gone, and
of what was not flushed any sectors are lost).
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule
from processes import forget_logs
from recording import Journal, ManualWorkers, RecordingFile

from tapcore.driver import DiskInfo, Driver, Env, Feature, OpenFlag
from tapcore.drivers.log import Log
from tapcore.loop import Loop
from tapcore.request import WRITE, Request
from writelog.dirtymap import Lease
from writelog.generations import new_id
from writelog.sidecar import Sidecar
from writelog.sidecar_layout import EXTENT_BYTES

BLOCK_BYTES = 64 << 10
EXTENTS = 130
BLOCKS_PER_EXTENT = EXTENT_BYTES // BLOCK_BYTES
SIZE_BYTES = EXTENTS * EXTENT_BYTES - BLOCK_BYTES - 512
BLOCKS = -(-SIZE_BYTES // BLOCK_BYTES)
HOT = 16


class FlakyFile(RecordingFile):
    """Fails its next writes or flushes, as many as `failures` says."""

    failures = 0

    def write(self, iov: Sequence[memoryview], offset: int, length: int, *, fua: bool = False) -> int:
        return self._fails() or super().write(iov, offset, length, fua=fua)

    def sync(self) -> int:
        return self._fails() or super().sync()

    def _fails(self) -> int:
        if FlakyFile.failures == 0:
            return 0
        FlakyFile.failures -= 1
        return errno.EIO


class Leaf(Driver):
    """What reaches it may be on the disk from then on."""

    def __init__(self, env: Env, path: Path, world: World) -> None:
        super().__init__(env, str(path), OpenFlag.NONE)
        self.info = DiskInfo(SIZE_BYTES, Feature.FLUSH)
        self.path = str(path)
        self.world = world
        self.pending: list[Request] = []

    def queue_write(self, request: Request) -> bool:
        self.world.goes_down(request.offset, request.length)
        if request.tries:
            self.pending.append(request)
            return False
        return True

    queue_zeroes = queue_discard = queue_write

    def queue_flush(self, request: Request) -> bool:
        self.world.unflushed = {
            block for pending in self.pending for block in blocks_of(pending.offset, pending.length)}
        return True


def blocks_of(offset: int, length: int) -> range:
    return range(offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1)


class World(RuleBasedStateMachine):
    """`needed` are the blocks that are to be dirty, `version` how often each was written."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.image = self.folder / "disk.img"
        self.image.touch()
        self.run_dir = self.folder / "run"
        self.run_dir.mkdir(mode=0o700)
        self.loop = Loop()
        self.version = [0] * BLOCKS
        self.needed: set[int] = set()
        self.unflushed: set[int] = set()
        """Blocks whose last write the host may take back when it dies; the copy may have it."""
        self.ever: set[int] = set()
        """Blocks that were dirty at some time."""
        self.held: dict[int, dict[int, int]] = {}
        """The blocks of each lease, and their versions when they were taken."""
        self.base = 0
        self.real_type, Sidecar.file_type = Sidecar.file_type, FlakyFile
        FlakyFile.failures = 0
        FlakyFile.journal = Journal()
        self.open()

    def open(self) -> None:
        self.workers = ManualWorkers()
        self.env = Env(self.loop, self.workers, self.run_dir)
        self.leaf = Leaf(self.env, self.image, self)
        self.log = Log(self.env, f",granularity={BLOCK_BYTES},hot={HOT}", OpenFlag.NONE)
        self.log.attach(self.leaf)
        sidecar = self.image.with_name("disk.img.writelog")
        FlakyFile.journal = Journal()
        self.before = sidecar.read_bytes() if sidecar.exists() else b""
        self.log.open()
        if not self.before:
            self.before = sidecar.read_bytes()
            FlakyFile.journal = Journal()
        self.held.clear()

    def teardown(self) -> None:
        FlakyFile.failures = 0
        self._settle_writes()
        self.log.close()
        self.loop.close()
        Sidecar.file_type = self.real_type
        forget_logs(self.run_dir)
        shutil.rmtree(self.folder)

    def dirty(self) -> set[int]:
        return set((self.log._map.dirty.bits | self.log._map.taken.bits).search(1))

    def goes_down(self, offset: int, length: int) -> None:
        for block in blocks_of(offset, length):
            self.unflushed.add(block)
            self.version[block] += 1
            self.needed.add(block)
            self.ever.add(block)

    # What happens

    @rule(block=st.integers(0, BLOCKS - 1), length=st.sampled_from([512, BLOCK_BYTES, 3 * BLOCK_BYTES]),
          late=st.booleans())
    def write(self, block: int, length: int, late: bool) -> None:
        self._write(block * BLOCK_BYTES, length, late)

    @rule(extent=st.integers(0, EXTENTS - 1), extents=st.integers(1, 6), late=st.booleans())
    def write_wide(self, extent: int, extents: int, late: bool) -> None:
        self._write(extent * EXTENT_BYTES, extents * EXTENT_BYTES, late)

    @rule(first=st.integers(0, EXTENTS - 1), late=st.booleans())
    def write_everywhere(self, first: int, late: bool) -> None:
        for extent in range(first, EXTENTS, 7):
            self._write(extent * EXTENT_BYTES, 512, late)
        self.log.submit()

    def _write(self, offset: int, length: int, late: bool) -> None:
        request = Request(WRITE, offset, min(length, SIZE_BYTES - offset), [], done=lambda _: None)
        request.tries = int(late)
        self.log.queue_write(request)

    @rule()
    def submit(self) -> None:
        self.log.submit()

    @rule()
    def end_of_writes(self) -> None:
        pending, self.leaf.pending = self.leaf.pending, []
        for request in pending:
            request.done(request)

    @rule(runs=st.integers(1, 3))
    def work(self, runs: int) -> None:
        for _ in range(runs):
            self.log.submit()
            self.workers.run()

    @rule()
    def work_fails(self) -> None:
        self.log.submit()
        FlakyFile.failures = 1
        self.workers.run()
        FlakyFile.failures = 0

    @rule()
    def checkpoint(self) -> None:
        assert self.log._journal is not None
        self.log._journal._checkpoint()

    @rule(target=leases, start=st.integers(0, BLOCKS - 1), length=st.integers(1, BLOCKS))
    def take(self, start: int, length: int) -> object:
        dirty_map = self.log._map
        lease = dirty_map.open_lease()
        found, _ = dirty_map.take(lease, start, min(start + length, BLOCKS), BLOCKS)
        unit = dirty_map.sectors_per_block
        held = {block: self.version[block] for sector, count in zip(found[::2], found[1::2], strict=True)
                for block in range(sector // unit, -(-(sector + count) // unit))}
        if not held:
            dirty_map.close_lease(lease)
            return multiple()
        self.held[id(lease)] = held
        return lease

    @rule(lease=leases, commit=st.booleans())
    def settle(self, lease: Lease, commit: bool) -> None:
        held = self.held.pop(id(lease), None)
        if held is None:
            return
        dirty_map = self.log._map
        if commit:
            dirty_map.commit(lease, 0, BLOCKS)
            self.needed -= {block for block, version in held.items() if self.version[block] == version}
        dirty_map.close_lease(lease)

    @rule(crash=st.none() | st.integers(0, 4), seed=st.none() | st.integers(0, 1000))
    def fill(self, crash: int | None, seed: int | None) -> None:
        """A full sync begins; the host may crash before it has."""
        codes: list[int] = []
        self.log._map.dirty.fill()
        self.ever.update(range(BLOCKS))
        store = self.log._store
        assert store is not None
        base = new_id()
        store.change(store.generations.with_base(base), codes.append, all_dirty=True)
        if crash is not None:
            self.host_dies(crash, seed)
            return
        while not codes:
            self.workers.run()
        assert codes == [0]
        self.base = base
        self.needed.update(range(BLOCKS))

    # How it ends

    def _drop(self, undone: int) -> None:
        """The process is gone; of the work that waited all but the last `undone` entries were done."""
        entries = FlakyFile.journal.entries
        ended = len(entries)
        for work, _ in self.workers.waiting:
            work()
        store = self.log._store
        assert store is not None and store._sidecar is not None
        self.cut = max(ended, len(entries) - undone)
        self.log._server.close()  # type: ignore[union-attr]
        self.log._journal.quiesce(lambda: None)  # type: ignore[union-attr]
        store._sidecar._file.close()
        fcntl.flock(store._fd, fcntl.LOCK_UN)
        os.close(store._fd)

    @rule(undone=st.integers(0, 4))
    def process_dies(self, undone: int) -> None:
        before = self.dirty()
        self._drop(undone)
        self._leave(None)
        self.open()
        assert self.dirty() == before
        self._check_base()

    @rule(undone=st.integers(0, 4), seed=st.none() | st.integers(0, 1000))
    def host_dies(self, undone: int, seed: int | None) -> None:
        self.ever |= self.dirty()
        hot = set(self.log._hot)
        step = self.log._journal.activity.step  # type: ignore[union-attr]
        hot.update((*step.new, *step.victims) if step is not None else ())
        hot.update(self._recorded())
        unflushed = set(self.unflushed)
        self._drop(undone)
        self._leave(random.Random(seed) if seed is not None else None)
        forget_logs(self.run_dir)
        self.open()
        self.needed |= unflushed
        self.unflushed.clear()
        allowed = self.needed | self.ever
        for extent in hot:
            allowed.update(range(extent * BLOCKS_PER_EXTENT, (extent + 1) * BLOCKS_PER_EXTENT))
        assert self.dirty() <= allowed
        self.ever |= self.dirty()
        assert len(self.log._hot) <= HOT
        self._check_base()

    @rule(first=st.integers(0, 60), steps=st.integers(0, 3), undone=st.integers(1, 3), seed=st.integers(0, 1000))
    def host_dies_while_extents_leave(self, first: int, steps: int, undone: int, seed: int) -> None:
        self.write_everywhere(first, False)
        self.workers.run(steps)
        self.host_dies(undone, seed)

    def _recorded(self) -> tuple[int, ...]:
        sidecar = self.log._store._sidecar  # type: ignore[union-attr]
        assert sidecar is not None and sidecar.record is not None
        return sidecar.record.hot

    def _leave(self, rng: random.Random | None) -> None:
        """The side-car as the crash leaves it."""
        journal = FlakyFile.journal
        self.image.with_name("disk.img.writelog").write_bytes(journal.crash(self.before, self.cut, rng))

    def _check_base(self) -> None:
        store = self.log._store
        assert store is not None
        if store.generations.base not in (0, self.base):
            self.base = store.generations.base  # one that became durable though nobody was told
            self.needed.update(self.dirty())
        assert store.generations.base in (0, self.base)

    def _settle_writes(self) -> None:
        """What a vbd does before it closes its chain."""
        self.work(1)
        while self.log._journal.activity.is_asked:  # type: ignore[union-attr]
            self.work(1)
        self.end_of_writes()

    @rule(reboot=st.booleans())
    def closed_and_opened(self, reboot: bool) -> None:
        self._settle_writes()
        for lease in list(self.log._map.leases.values()):
            self.log._map.close_lease(lease)
        before = self.dirty()
        ended: list[bool] = []
        self.log.quiesce(lambda: ended.append(True))
        self.workers.run()
        assert ended
        self.log.close()
        if reboot:
            forget_logs(self.run_dir)
        self.open()
        assert self.dirty() == before
        assert not self.log._hot

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.needed <= self.dirty()

    @precondition(lambda self: not self.workers.waiting)
    @invariant()
    def the_record_is_what_is_hot(self) -> None:
        assert set(self.log._hot) <= set(self._recorded())


World.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None,
                                   phases=[phase for phase in Phase if phase is not Phase.shrink])
TestWorld = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(World.TestCase)


def test_a_crash_while_extents_leave() -> None:
    """In each step of an eviction, with each half of what was not flushed lost in turn."""
    for seed in range(48):
        world = World()
        try:
            world.write_everywhere(0, False)
            world.workers.run(1)
            world.write_everywhere(3, False)
            world.workers.run(seed % 4)
            step = world.log._journal.activity.step  # type: ignore[union-attr]
            assert step is not None and step.victims
            world.host_dies(1, seed)
            assert world.needed <= world.dirty()
        finally:
            world.teardown()


def test_a_disk_is_flushed_before_the_side_car_says_that_a_copy_has_it() -> None:
    """Else the host's crash takes back what the copy has, and nobody knows that they differ."""
    world = World()
    try:
        world._write(0, 512, False)
        world.work(1)
        dirty_map = world.log._map
        lease = dirty_map.open_lease()
        assert dirty_map.take(lease, 0, BLOCKS, BLOCKS)[0]
        dirty_map.commit(lease, 0, BLOCKS)
        dirty_map.close_lease(lease)
        world.needed.clear()
        for extent in range(1, 2 * HOT):
            world._write(extent * EXTENT_BYTES, 512, False)
            world.work(1)
        assert 0 not in world.log._hot
        world.host_dies(0, None)
        assert world.needed <= world.dirty()
    finally:
        world.teardown()
