"""A replica's copy against every crash of its host: image, journal and record together.

The image and the journal are real files whose writes and flushes are recorded; workers work when the test says so.
A crash can come after any of them, also in the middle of making good for the last one, and any sectors of what was
not flushed are lost. Then a copy that was consistent is exactly the disk of its epoch, which is no older than the
last one that the primary was told to be kept; and what it was told to be durable is there.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from recording import SECTOR, Journal, ManualWorkers, RecordingFile

from tapcore.driver import DiskInfo, Driver, Env, Feature, OpenFlag
from tapcore.errors import ReplicationError, WritelogError
from tapcore.loop import Loop
from tapcore.request import Request
from writelog import replica_redofile
from writelog.replica_copy import Copy
from writelog.replica_redofile import HEADER, INDEX_SHIFT, Commit, Extent, Index, RedoFile
from writelog.replica_state import State, StateStore

SECTORS = 48
SIZE_BYTES = SECTORS * SECTOR


class RedoRecordingFile(RecordingFile):
    """One that is made anew begins empty."""

    @classmethod
    def open(cls, path: str, flags: OpenFlag) -> RedoRecordingFile:
        if path.endswith(".new"):
            forget_redo()
        return super().open(path, flags)


def forget_redo() -> None:
    """As the journal's file is removed, durably."""
    journal = RecordingFile.journals["copy.img.redo"]
    journal.add(0)
    journal.add([len(journal.entries)])


class Leaf(Driver):
    """The image; `errors` holds errnos for the next writes."""

    def __init__(self, env: Env, path: Path) -> None:
        super().__init__(env, str(path), OpenFlag.NONE)
        self.info = DiskInfo(SIZE_BYTES, Feature.FLUSH | Feature.ZEROES)
        self.file = RecordingFile.open(str(path), OpenFlag.NONE)
        self.errors: list[int] = []

    def queue_write(self, request: Request) -> bool:
        request.error = self.errors.pop(0) if self.errors else 0
        if not request.error:
            request.error = self.file.write(request.iov, request.offset, request.length)
        return True

    def queue_zeroes(self, request: Request) -> bool:
        request.error = self.file.zeroes(request.offset, request.length, 0)
        return True

    def queue_read(self, request: Request) -> bool:
        request.error = self.file.read_padded(request.iov, request.offset, request.length)
        return True

    def queue_flush(self, request: Request) -> bool:
        request.error = self.file.sync()
        return True


class Store(StateStore):
    """Each record is durable when `store` returns."""

    def __init__(self, state: State, journal: Journal) -> None:
        super().__init__()
        self.state = state
        self.states = [state]
        self._journal = journal

    def store(self, state: State) -> None:
        self._journal.add((len(self.states), b""))
        self.states.append(state)
        super().store(state)

    def at(self, cut: int) -> State:
        """What is found after a crash."""
        return self.states[sum(entry is not None for entry in self._journal.entries[:cut])]


class Rig:
    """A copy in `folder`, begun with `state`, and its host."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self.image, self.redo = folder / "copy.img", folder / "copy.img.redo"
        journals = [Journal() for _ in range(3)]
        for journal in journals:
            journal.others = [other for other in journals if other is not journal]
        self.image_journal, self.redo_journal, record_journal = journals
        RecordingFile.journals = {"copy.img": self.image_journal, "copy.img.redo": self.redo_journal,
                                  "copy.img.redo.new": self.redo_journal}
        RecordingFile.journal = self.image_journal
        self.image_before = self.image.read_bytes()
        self.redo_before = self.redo.read_bytes() if self.redo.exists() else b""
        self.loop = Loop()
        self.workers = ManualWorkers()
        env = Env(self.loop, self.workers)
        self.leaf = Leaf(env, self.image)
        self.store = Store(state, record_journal)
        self.copy = Copy(env, self.leaf, self.store, self.redo)
        self.errors: list[WritelogError | None] = []
        self.is_closed = False

    @property
    def now(self) -> int:
        """How much has happened to the files."""
        return len(self.image_journal.entries)

    def run(self) -> None:
        self.copy.applier.start()
        self.workers.run()

    def recover(self) -> None:
        self.copy.recover(self.errors.append)
        self.run()
        assert self.errors == [None]

    def begin(self, in_place: bool = False) -> None:
        self.copy.begin(in_place, True, self.errors.append)
        self.run()
        assert self.errors.pop() is None

    def apply(self, offset: int, data: bytes | None, length: int) -> list[int]:
        """As a session does; the list has an errno when it has ended."""
        codes: list[int] = []
        self.copy.touched()
        if data is None:
            self.copy.applier.zero(offset, length, codes.append)
        else:
            self.copy.applier.write(offset, memoryview(data), codes.append)
        return codes

    def flush(self) -> int:
        codes: list[int] = []
        self.copy.applier.flush(codes.append)
        self.run()
        return codes[0]

    def read(self) -> bytes:
        """The image, with the journal over it."""
        found, codes = bytearray(SIZE_BYTES), list[int]()
        self.copy.applier.read(0, memoryview(found), codes.append)
        self.run()
        assert codes == [0]
        return bytes(found)

    def bare(self) -> bytes:
        return self.image.read_bytes()

    def crash(self, cut: int, rng: random.Random | None) -> State:
        """The host dies after `cut` events; what its record says then."""
        self.close()
        self.image.write_bytes(self.image_journal.crash(self.image_before, cut, rng))
        redo = self.redo_journal.crash(self.redo_before, cut, rng)
        self.redo.write_bytes(redo)
        if not redo:
            self.redo.unlink()
        return self.store.at(cut)

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self.workers.close()
        self.leaf.file.close()
        if self.copy._redo is not None:
            self.copy._redo.file.close()
        self.loop.close()


class World(RuleBasedStateMachine):
    """`events` are what the primary sent and was told since the host came up, each with when that was."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "copy.img").write_bytes(b"\xee" * SIZE_BYTES)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(RedoFile, "file_type", RedoRecordingFile)
        self.patch.setattr(replica_redofile, "remove_file", self._remove)
        self.epochs: dict[int, bytes] = {}
        self.counter = 0
        self.open(State(7, "vm1"))

    def _remove(self, path: Path) -> None:
        path.unlink()
        forget_redo()

    def open(self, state: State) -> None:
        self.rig = Rig(self.folder, state)
        self.rig.recover()
        self.content = bytearray(self.rig.read())
        self.base_content = bytes(self.content)
        self.base_state = self.rig.copy.state
        self.events: list[tuple[int, str, int, bytes]] = []
        self.in_place = False
        self.rig.begin()

    def teardown(self) -> None:
        self.rig.close()
        self.patch.undo()
        RecordingFile.journals = {}
        shutil.rmtree(self.folder)

    def happens(self, what: str, at: int = 0, data: bytes = b"") -> None:
        self.events.append((self.rig.now, what, at, data))

    # What happens

    @rule(base=st.integers(1, 9))
    def base(self, base: int) -> None:
        """All is sent again, under another name."""
        self.flush()
        if not self.rig.copy.is_journaled:
            self.happens("spoil")
        self.happens("based", 0, self.rig.bare())
        self.rig.copy.based(base, "vm1")
        self.content = bytearray(self.rig.bare())
        assert self.rig.read() == self.content
        for sector in range(0, SECTORS, 6):
            self.extent(sector, 6, False, True)

    @rule(sector=st.integers(0, SECTORS - 1), sectors=st.integers(1, 6), is_zero=st.booleans(), runs=st.booleans())
    def extent(self, sector: int, sectors: int, is_zero: bool, runs: bool) -> None:
        sectors = min(sectors, SECTORS - sector)
        self.counter += 1
        data = bytes(sectors * SECTOR) if is_zero else self.counter.to_bytes(4, "little") * (sectors * SECTOR // 4)
        if not self.rig.copy.is_journaled:
            self.happens("spoil")
        self.happens("write", sector, data)
        self.content[sector * SECTOR : (sector + sectors) * SECTOR] = data
        self.rig.apply(sector * SECTOR, None if is_zero else data, len(data))
        if runs:
            self.rig.run()

    @rule()
    def flush(self) -> None:
        self.rig.run()
        assert self.rig.flush() == 0
        self.happens("durable")
        assert self.rig.read() == self.content

    @rule()
    def epoch(self) -> None:
        self.flush()
        rig = self.rig
        number = rig.copy.state.epoch + 1
        self.epochs[number] = bytes(self.content)
        told: list[WritelogError | None] = []

        def kept(error: WritelogError | None) -> None:
            told.append(error)
            self.happens("kept", number)

        rig.copy.epoch(number, kept)
        rig.run()
        assert told == [None]
        state = rig.copy.state
        assert (state.is_consistent, state.epoch, state.at_ms) == (True, number, number)
        assert rig.bare() == self.content

    @rule(in_place=st.booleans())
    def another_session(self, in_place: bool) -> None:
        self.flush()
        if in_place:
            self.happens("spoil")
        self.rig.begin(in_place)
        assert self.rig.copy.is_journaled <= (not in_place)
        assert self.rig.read() == self.content

    @rule(sector=st.integers(0, SECTORS - 1))
    def spoil_what_an_epoch_made(self, sector: int) -> None:
        self.another_session(True)
        self.epoch()
        self.extent(sector, 1, False, True)

    # How it ends

    @rule(back=st.integers(0, 12) | st.integers(0, 400), seed=st.none() | st.integers(0, 1000))
    def host_dies(self, back: int, seed: int | None) -> None:
        cut = max(0, self.rig.now - back)
        state = self.rig.crash(cut, None if seed is None else random.Random(seed))
        events = [event for event in self.events if event[0] <= cut]
        base_state, base_content = self.base_state, self.base_content
        self.open(state)
        assert self.rig.copy.state.base == state.base, "its journal is missed"
        state = self.rig.copy.state
        is_consistent, epoch = base_state.is_consistent, base_state.epoch
        allowed = [{base_content[at : at + SECTOR]} for at in range(0, SIZE_BYTES, SECTOR)]
        last = [base_content[at : at + SECTOR] for at in range(0, SIZE_BYTES, SECTOR)]
        for _, what, at, data in events:
            if what in ("write", "based"):
                for number in range(len(data) // SECTOR):
                    last[at + number] = data[number * SECTOR : (number + 1) * SECTOR]
                    allowed[at + number].add(last[at + number])
            elif what == "durable":
                allowed = [{sector} for sector in last]
            elif what == "kept":
                is_consistent, epoch = True, at
            elif what == "spoil":
                is_consistent = False
        if is_consistent:
            assert state.is_consistent, "a good copy was spoiled"
        if state.is_consistent:
            assert state.epoch >= epoch
            assert self.rig.bare() == self.epochs[state.epoch], "the copy is no disk of one instant"
        content = bytes(self.content)
        for number in range(SECTORS):
            assert content[number * SECTOR : (number + 1) * SECTOR] in allowed[number], f"sector {number} is lost"


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None,
                              phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A copy at epoch 1, all 0xee."""
    (tmp_path / "copy.img").write_bytes(b"\xee" * SIZE_BYTES)
    monkeypatch.setattr(RedoFile, "file_type", RedoRecordingFile)
    rig = Rig(tmp_path, State(7, "vm1", is_consistent=True, epoch=1))
    rig.recover()
    rig.begin()
    yield rig
    rig.close()
    RecordingFile.journals = {}


def again(rig: Rig) -> Rig:
    """Its host is up again."""
    rig.close()
    return Rig(rig.folder, rig.store.state)


def keep(rig: Rig, at_ms: int) -> list[WritelogError | None]:
    told: list[WritelogError | None] = []
    rig.copy.epoch(at_ms, told.append)
    rig.run()
    return told


def test_a_disk_that_is_full_fails_the_extents_and_spares_the_copy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.apply(0, b"a" * 512, 512)
    rig.run()
    write = RecordingFile.write

    def half(file: RecordingFile, iov: Sequence[memoryview], offset: int, *_: object) -> int:
        write(file, [iov[0]], offset, len(iov[0]))
        return errno.ENOSPC

    with monkeypatch.context() as patch:
        patch.setattr(RedoRecordingFile, "write", half)
        codes = rig.apply(512, b"b" * 512, 512)
        rig.run()
        assert codes == [errno.ENOSPC]
    codes = rig.apply(1024, b"c" * 512, 512)
    assert rig.flush() == 0 and codes == [0]
    assert rig.bare() == b"\xee" * SIZE_BYTES
    assert keep(rig, 5) == [None]
    assert rig.bare() == b"a" * 512 + b"\xee" * 512 + b"c" * 512 + b"\xee" * (SIZE_BYTES - 1536)


def test_an_image_that_cannot_be_written_leaves_the_journal_until_it_can(rig: Rig) -> None:
    rig.apply(0, b"a" * 512, 512)
    assert rig.flush() == 0
    rig.leaf.errors = [errno.EIO]
    assert keep(rig, 5) == [None], "it is safe in the journal"
    assert rig.copy.kept_epoch == 2 and not rig.copy.is_busy
    with pytest.raises(ReplicationError, match="could not apply its redo journal"):
        rig.apply(512, b"b" * 512, 512)
    (error,) = keep(rig, 6)
    assert error is not None
    with pytest.raises(ReplicationError):
        rig.copy.promoted()
    rig.leaf.errors = [errno.EIO]
    rig.copy.begin(False, True, rig.errors.append)
    rig.run()
    assert rig.errors.pop() is not None
    rig.begin()
    assert rig.bare()[:1024] == b"a" * 512 + b"\xee" * 512
    assert (rig.copy.state.epoch, rig.copy.state.at_ms, rig.copy.journal_bytes) == (2, 5, 0)


def test_a_promotion_without_the_primary_drops_the_journal_last(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was acknowledged: who resumes the copy under its old name must not be told that it is there."""
    rig.apply(0, b"a" * 512, 512)
    assert rig.flush() == 0
    monkeypatch.setattr(rig.copy, "_drop_journal", lambda: None)
    assert rig.copy.part() > 512
    other = again(rig)
    other.recover()
    assert not other.redo.exists()
    state = other.copy.state
    assert state.promoted and state.base != 7 and state.history == (7,)
    assert other.read() == b"\xee" * SIZE_BYTES
    other.close()


def test_nothing_goes_into_a_journal_after_a_sync_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows a commit that is perhaps not durable would be cut off when the journal is opened again."""
    journal = RedoFile.create(tmp_path / "journal", 1)
    extent = Extent(0, SECTOR, [memoryview(bytes(SECTOR))])
    assert journal.append([extent])[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(journal._file, "sync", lambda: errno.EIO)
        assert journal.append_commit(Commit(2, 0)) == errno.EIO
    assert journal.append([extent])[0] == errno.EIO
    assert journal.sync() == errno.EIO
    journal.close()


def test_a_journal_that_is_damaged_is_told_and_not_applied_further(rig: Rig, tmp_path: Path) -> None:
    rig.apply(0, b"a" * 512, 512)
    assert rig.flush() == 0
    with rig.redo.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    assert keep(rig, 5) == [None]
    rig.copy.begin(False, True, rig.errors.append)
    rig.run()
    error = rig.errors.pop()
    assert error is not None and "damaged" in str(error) and "--overwrite" in str(error)


@pytest.mark.parametrize("text", [b"", b"garbage" * 9, HEADER.pack(magic=b"wrlgredo", version=2, epoch=1)])
def test_what_is_no_journal_is_left_alone(rig: Rig, text: bytes) -> None:
    rig.redo.write_bytes(text)
    other = again(rig)
    other.copy.recover(other.errors.append)
    other.run()
    assert (other.errors[0] is None) == (not text)
    assert other.redo.read_bytes() == text
    other.close()


def test_a_journal_of_another_epoch_is_none(rig: Rig) -> None:
    rig.apply(0, b"a" * 512, 512)
    assert rig.flush() == 0
    rig.store.state = replace(rig.store.state, epoch=9)
    other = again(rig)
    other.recover()
    assert other.read() == b"\xee" * SIZE_BYTES
    assert other.copy.journal_bytes == 0
    other.close()


def test_the_newest_of_each_range_is_found(rig: Rig) -> None:
    """Also where extents overlap in part, and over the chunks of the index."""
    random_ = random.Random(1)
    index, model = Index(), [0] * 4096
    unit = (1 << INDEX_SHIFT) // 1024
    for number in range(1, 300):
        start = random_.randrange(4096)
        length = min(random_.randrange(1, 1500), 4096 - start)
        index.add(start * unit, length * unit, number << 40)
        model[start : start + length] = [number] * length
    for start in range(0, 4096, 300):
        length = min(700, 4096 - start)
        found = model[:0] + [0] * length
        for offset, size, place in index.over(start * unit, length * unit):
            first = offset // unit - start
            found[first : first + size // unit] = [place >> 40] * (size // unit)
        assert found == model[start : start + length]
