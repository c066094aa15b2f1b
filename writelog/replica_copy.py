"""A replica's copy: the image, what is known of it, and the redo journal between the two.

    a copy begins            in place: the image is no disk of any instant before the first EPOCH
    it is brought up to date into the journal, IMAGE.redo; or with `in_place` as above
    EPOCH                    commit the journal ─▶ apply it ─▶ flush ─▶ record the epoch ─▶ empty the journal

    found after a crash      image          what is done
    no journal, or an older  as recorded    -
      epoch's
    journal, not committed   consistent     kept: the primary was told that it is durable
    the same, but recorded   inconsistent   applied: it was about to be
      inconsistent
    journal, committed       half applied   applied again

So a consistent copy stays one, or becomes the next, whatever dies and when; or it is recorded to be none, durably,
before the first write that spoils it. All of it runs in the loop's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from tapcore.driver import Driver, Env
from tapcore.errors import ReplicationError, WritelogError, image_error
from writelog.generations import new_id
from writelog.replica_apply import Applier
from writelog.replica_redo import Redo, Replay
from writelog.replica_redofile import HEADER, Commit, RedoFile
from writelog.replica_state import MAX_AT_MS, State, StateStore

logger = logging.getLogger(__name__)

SUFFIX: Final = ".redo"
SPARED_PART: Final = 20
"""Of what is free on the journal's file system, one such part is left to others."""

Done = Callable[[WritelogError | None], None]
"""Called with None if all went well."""


class Copy:
    """Of the chain with `head`. `journal` is where its journal may be, None: nowhere; `limit_bytes` how long it
    may become, None: as long as there is room. `on_ready` is called when it `is_busy` no more."""

    def __init__(self, env: Env, head: Driver, store: StateStore, journal: Path | None = None,
                 limit_bytes: int | None = None) -> None:
        self.applier = Applier(head, env.workers)
        self.is_busy = False
        """Nothing more may be given to the applier meanwhile."""
        self._env = env
        self._head = head
        self._store = store
        self._journal = journal
        self._limit_bytes = limit_bytes
        self.on_ready: Callable[[], None] = lambda: None
        self.kept_epoch = store.state.epoch
        """The last one that is safe, though it may be in the journal yet."""
        self._waiters: list[Callable[[], None]] = []
        self._closing = False
        self._in_place = True
        self._redo: Redo | None = None
        self._replay: Replay | None = None
        self._must_replay = False
        """The journal has to be applied before anything else."""

    @property
    def state(self) -> State:
        return self._store.state

    @property
    def record(self) -> Path | None:
        """Where what is known of the image is kept."""
        return self._store.path

    @property
    def is_journaled(self) -> bool:
        return self._redo is not None

    @property
    def journal_bytes(self) -> int:
        """What waits for the next EPOCH."""
        return 0 if self._redo is None else self._redo.file.end - HEADER.size

    # Begin and end

    def recover(self, done: Done) -> None:
        """Once, before anything else: make good for whatever ended the last process."""
        if self._journal is None:
            done(None)
            return
        try:
            file = RedoFile.open(self._journal)
            if file is None:
                self._miss_journal()
            elif self.state.promoted or (file.epoch != self.state.epoch and not self.state.is_consistent):
                file.remove()
                file = None
            elif file.epoch != self.state.epoch:  # it was applied, or is of before
                file.reset(self.state.epoch)
        except WritelogError as error:
            done(error)
            return
        except OSError as error:
            done(image_error(error, str(self._journal), "empty the redo journal"))
            return
        if file is None:
            done(None)
            return
        self._use(file)
        self._must_replay = file.commit is not None or not self.state.is_consistent
        if not self._must_replay:
            done(None)
            return
        logger.warning("applying %d bytes of the redo journal", self.journal_bytes)
        self._replay_all(done)

    def _miss_journal(self) -> None:
        """If there was one, then what it held was acknowledged, and no log has it any more."""
        if self.state.has_journal and not self.state.promoted:
            logger.warning("%s is gone: the copy of disk %r cannot be brought up to date, unless by --overwrite",
                           self._journal, self.state.disk)
            self._store.state = replace(self.state, base=new_id(), has_journal=False)

    def begin(self, in_place: bool, resumed: bool, done: Done) -> None:
        """A sync is about to send. With `in_place` a consistent copy may be spoiled."""
        if self._must_replay:
            self._replay_all(lambda error: done(error) if error else self.begin(in_place, resumed, done))
            return
        self._in_place = in_place
        try:
            if not in_place:
                self._protect()
            elif self._redo is not None and resumed:  # if not, what the journal has is sent again
                self._spoil()
                self._must_replay = True
                self._replay_all(done)
                return
        except WritelogError as error:
            done(error)
        else:
            done(None)

    def _protect(self) -> None:
        """Use a journal from now on, if there is anything to protect. ImageError if there can be none."""
        try:
            if self._redo is not None:
                self._redo.limit_bytes = self._limit(self._redo.file)
            elif self.state.is_consistent and self._journal is not None and not self._in_place:
                self._use(RedoFile.create(self._journal, self.state.epoch))
                self._store.store(replace(self.state, has_journal=True))
        except OSError as error:
            raise image_error(error, str(self._journal), "look at the redo journal") from error

    def close(self, done: Callable[[], None]) -> None:
        """Let what is under way end, then `done()`. A replay goes on another time."""
        self._closing = True
        if self._replay is not None:
            self._replay.stop()
        self.applier.drop_queued()
        self.when_ready(lambda: self._close(done))

    def _close(self, done: Callable[[], None]) -> None:
        if self._redo is not None:
            self._redo.file.close()
            self._redo = None
        done()

    def when_ready(self, action: Callable[[], None]) -> None:
        """`action()` once nothing is under way here."""
        if self.is_busy:
            self._waiters.append(action)
        else:
            self.applier.when_idle(action)

    # The image and the journal

    def renamed(self, base: int, disk: str) -> None:
        """The copy goes by another name from now on. WritelogError if that cannot be recorded."""
        self._store.store(self.state.renamed(base, disk))

    def based(self, base: int, disk: str) -> None:
        """All of the disk is sent, for a copy under a new name. WritelogError if that cannot be recorded."""
        if self._redo is not None and not self._in_place:
            self._store.store(replace(self.state, base=base, disk=disk, history=()))
            self._empty()
        else:
            self._store.store(State(base, disk, epoch=self.state.epoch + 1, at_ms=now_ms()))
            self._drop_journal()

    def touched(self) -> None:
        """An extent is about to go to the applier. WritelogError if it must not, or that cannot be recorded."""
        self._must_not_replay()
        if self._redo is None and self.state.is_consistent:
            self._spoil()

    def _must_not_replay(self) -> None:
        if self._must_replay:
            raise ReplicationError("the replica could not apply its redo journal to its image",
                                   hint="its log tells why; what it confirmed is safe in the journal")

    def _spoil(self) -> None:
        self._store.store(replace(self.state, is_consistent=False, at_ms=now_ms()))

    def epoch(self, at_ms: int, done: Done) -> None:
        """What was applied, and flushed, makes the disk of the instant `at_ms`. `done` when that is so whatever
        happens; with a journal the copy `is_busy` then until that is applied."""
        commit = Commit(self.state.epoch + 1, min(at_ms, MAX_AT_MS))
        redo = self._redo
        try:
            self._must_not_replay()
            if redo is None:
                self._kept(commit)
                self._protect()
        except WritelogError as error:
            done(error)
            return
        if redo is None:
            done(None)
            return
        self.is_busy = True

        def committed(code: int) -> None:
            if code:
                self._ready()
                done(image_error(OSError(code, ""), str(redo.file.path), "commit the redo journal"))
                return
            self._must_replay = True
            self.kept_epoch = commit.epoch
            done(None)
            self._replay_all(self._applied)

        redo.commit(commit, committed)

    def _applied(self, error: WritelogError | None) -> None:
        if error is not None:
            logger.error("%s; the journal is kept, and applied when a sync connects", error)

    def _kept(self, commit: Commit) -> None:
        self._store.store(replace(self.state, is_consistent=True, epoch=commit.epoch, at_ms=commit.at_ms))
        self.kept_epoch = commit.epoch

    def promoted(self) -> None:
        """The disk is the primary. WritelogError if that cannot be recorded, or the journal has what it lacks."""
        if self.journal_bytes:
            raise ReplicationError("the redo journal has extents that no EPOCH came for",
                                   hint="nothing was promoted")
        self._store.store(replace(self.state, promoted=True, has_journal=False))
        self._drop_journal()

    def part(self) -> int:
        """The disk goes on here, as of the last epoch, under a new name: no log knows what it lacks. Returns how
        much was received since, which is left out. WritelogError if that cannot be recorded."""
        left_out_bytes = self.journal_bytes
        self._store.store(replace(self.state.renamed(new_id(), self.state.disk), promoted=True, has_journal=False))
        self._drop_journal()
        return left_out_bytes

    # The journal

    def why_full(self) -> WritelogError | None:
        """What to say of a failed write if the journal was too long for it."""
        if self._redo is None or not self._redo.is_full:
            return None
        return ReplicationError(
            f"the replica's redo journal is full: {self._redo.limit_bytes} bytes", path=str(self._redo.file.path),
            hint="the copy that it protects is whole; make room there or raise --journal-limit, or give that copy "
                 "up with writelog-sync --in-place")

    def _use(self, file: RedoFile) -> None:
        try:
            self._redo = Redo(self._env, self._head, file, self._limit(file))
        except OSError as error:
            file.close()
            raise image_error(error, str(file.path), "look at the redo journal") from error
        self.applier.turn_to(self._redo)

    def _limit(self, file: RedoFile) -> int:
        if self._limit_bytes is not None:
            return self._limit_bytes
        free_bytes = file.free_bytes()
        return file.end + free_bytes - free_bytes // SPARED_PART

    def _drop_journal(self) -> None:
        """What the journal has, the image does not need."""
        redo, self._redo = self._redo, None
        self._must_replay = False
        self.applier.turn_to(self._head)
        if redo is not None:
            redo.file.remove()

    def _empty(self) -> None:
        assert self._redo is not None
        try:
            self._redo.file.reset(self.state.epoch)
        except OSError as error:
            raise image_error(error, str(self._redo.file.path), "empty the redo journal") from error

    def _replay_all(self, done: Done) -> None:
        """Bring the image to where the journal is; then the journal is empty, or if the image is not consistent
        all the same, gone."""
        assert self._redo is not None
        self.is_busy = True

        def replayed(error: WritelogError | None) -> None:
            assert self._redo is not None
            self._replay = None
            try:
                if error is not None:
                    raise error
                if self._redo.file.commit is not None:
                    self._kept(self._redo.file.commit)
                    self._empty()
                else:
                    self._store.store(replace(self.state, has_journal=False))
                    self._drop_journal()
                self._must_replay = False
            except WritelogError as failure:
                error = failure
            self._ready()
            done(error)

        self._replay = Replay(self._env, self._redo.file, self._head, replayed)
        if self._closing:
            self._replay.stop()

    def _ready(self) -> None:
        self.is_busy = False
        waiters, self._waiters = self._waiters, []
        for action in waiters:
            self.when_ready(action)
        self.on_ready()


def now_ms() -> int:
    return int(time.time() * 1000)
