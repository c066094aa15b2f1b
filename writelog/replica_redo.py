"""The journal between a replica's applier and its image: extents go into it, reads see it laid over the image.

    applier ──▶ Redo ──▶ IMAGE.redo         until the copy is of one instant again (`commit`)
                     ··▶ IMAGE              then, by a Replay

One worker at a time writes, whatever queued up meanwhile in one go. A request is complete when it is in the file,
a flush when all before it is durable there. Nothing of the image changes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final

from tapcore.driver import Driver, Env, Feature, OpenFlag
from tapcore.errors import ImageError, WritelogError
from tapcore.request import FLUSH, ZEROES, Request, slice_iov
from writelog.replica_apply import Applier
from writelog.replica_redofile import MAX_RECORDS, RECORD, Commit, Extent, RedoFile

logger = logging.getLogger(__name__)

REPLAY_BYTES: Final = 8 << 20
REPLAY_EXTENTS: Final = 4096
"""Of one step of a replay: read, then written."""


class Redo(Driver):
    """Over `image`, the head of an open chain. `limit_bytes` is how long the journal may become."""

    def __init__(self, env: Env, image: Driver, file: RedoFile, limit_bytes: int) -> None:
        super().__init__(env, "", OpenFlag.NONE)
        self.info = image.info.with_changes(features=image.info.features | Feature.ZEROES)
        self.file = file
        self.limit_bytes = limit_bytes
        self.is_full = False
        """Whether it was too long for the last extents."""
        self._image = image
        self._queue: list[Request] = []
        self._batch: list[Request] = []
        self._places: list[int] = []

    def _append(self, request: Request) -> bool:
        self._queue.append(request)
        return False

    queue_write = queue_zeroes = queue_flush = _append

    def submit(self) -> None:
        self._image.submit()
        if not self._batch and self._queue:
            self._batch, self._queue = self._queue, []
            self.env.workers.submit(self._work, self._worked)

    def _work(self) -> None:
        """In a worker."""
        code, added_bytes = 0, 0
        extents = []
        for request in self._batch:
            if request.op != FLUSH:
                is_zero = request.op == ZEROES
                extents.append(Extent(request.offset, request.length, None if is_zero else request.iov))
                added_bytes += RECORD.size + (0 if is_zero else request.length)
        if extents:
            self.is_full = (self.file.end + added_bytes > self.limit_bytes
                            or len(self.file.index) + len(extents) > MAX_RECORDS)
            code, self._places = (errno.ENOSPC, []) if self.is_full else self.file.append(extents)
        if not code and len(extents) < len(self._batch):
            code = self.file.sync()
        for request in self._batch:
            request.error = code

    def _worked(self) -> None:
        batch, self._batch = self._batch, []
        if self._places:
            extents = [request for request in batch if request.op != FLUSH]
            for request, place in zip(extents, self._places, strict=True):
                self.file.index.add(request.offset, request.length, place)
            self._places = []
        for request in batch:
            request.done(request)
        self.submit()

    def queue_read(self, request: Request) -> bool:
        parts = self.file.index.over(request.offset, request.length)
        if not parts:
            return self._image.queue_read(request)
        done, request.done = request.done, lambda _: below()

        def below() -> None:
            request.done = done
            if request.error:
                done(request)
            else:
                self.env.workers.submit(lambda: self._lay_over(request, parts), lambda: done(request))

        if self._image.queue_read(request):
            below()
        return False

    def _lay_over(self, request: Request, parts: list[tuple[int, int, int]]) -> None:
        """In a worker."""
        for offset, length, place in parts:
            views = slice_iov(request.iov, offset - request.offset, length)
            if not place:
                for view in views:
                    view[:] = bytes(len(view))
            elif code := self.file.read(place, views, length):
                request.error = code
                return

    def commit(self, commit: Commit, done: Callable[[int], None]) -> None:
        """All that is in the journal makes one consistent step; `done(errno)` when that is durable. Nothing may be
        queued or under way."""
        assert not self._batch and not self._queue
        outcome = [0]

        def work() -> None:
            outcome[0] = self.file.append_commit(commit)

        self.env.workers.submit(work, lambda: done(outcome[0]))


class Replay:
    """Applies all that a journal holds to `head`, in order, and flushes; then `done(error)`, None if all went
    well. It may be done again, any number of times."""

    def __init__(self, env: Env, file: RedoFile, head: Driver,
                 done: Callable[[WritelogError | None], None]) -> None:
        self._env = env
        self._extents = file.extents()
        self._path = str(file.path)
        self._applier = Applier(head, env.workers)
        self._done = done
        self._step: list[Extent] = []
        self._error: WritelogError | None = None
        self._go_on()

    def stop(self) -> None:
        """End with the step that is under way, and an error."""
        self._error = self._error or ImageError("stopped while the journal was applied", errno=errno.ECANCELED,
                                                path=self._path)

    def _go_on(self) -> None:
        if self._error is not None:
            self._extents.close()
            self._done(self._error)
        else:
            self._env.workers.submit(self._read, self._write)

    def _read(self) -> None:
        """In a worker."""
        self._step, size_bytes = [], 0
        try:
            for extent in self._extents:
                self._step.append(extent)
                size_bytes += extent.length if extent.data is not None else 0
                if size_bytes >= REPLAY_BYTES or len(self._step) >= REPLAY_EXTENTS:
                    break
        except WritelogError as error:
            self._error = error
        except OSError as error:
            self._error = ImageError(f"cannot read the redo journal: {error.strerror}", errno=error.errno,
                                     path=self._path)

    def _write(self) -> None:
        if self._error is not None:
            self._go_on()
        elif not self._step:
            self._applier.flush(self._flushed)
        else:
            for extent in self._step:
                if extent.data is None:
                    self._applier.zero(extent.offset, extent.length, self._wrote)
                else:
                    self._applier.write(extent.offset, extent.data[0], self._wrote)
            self._applier.start()
            self._applier.when_idle(self._go_on)

    def _wrote(self, code: int) -> None:
        if code and self._error is None:
            self._error = ImageError("cannot apply the redo journal to the image", errno=code, path=self._path)

    def _flushed(self, code: int) -> None:
        self._wrote(code)
        if self._error is None:
            self._done(None)
        else:
            self._go_on()
