"""What makes an image's changes durable: flushes, commits of metadata, and the release of places given up.

    given up ─ commit ─▶ no table in the file points at them
             ─ what was under way ends ─▶ the format's `release`: they may be used again

One commit at a time; flushes that wait for it share the next.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tapcore.errors import ImageError
from tapcore.formats.commit import Commit
from tapcore.formats.reader import Resume
from tapcore.request import Request

if TYPE_CHECKING:
    from tapcore.formats.writer import Writer

MAX_DROPPED: Final = 4096
"""Places given up; with more a commit begins that nobody asked for."""

Steps = Generator[Callable[[], None], None, None]
"""Yields what is to be done in a worker, and goes on in the loop's thread when that is done."""


class Durable:
    """Of one image opened for writing."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._driver = writer.driver
        self._flushes: list[Request] = []
        self._waiting: list[Resume] = []
        self._committing = False
        self._dropped: list[Any] = []
        self._leaving: deque[tuple[int, list[Any]]] = deque()
        """(the last flight that may use them, places): durably given up."""
        self._releasing = False
        self._idle: list[Callable[[], None]] = []

    # Asked for by others

    def flush(self, request: Request) -> None:
        """Complete `request` when all that is complete now is durable; begins with the next `submit`."""
        self._flushes.append(request)

    def submit(self) -> None:
        if self._flushes and not self._committing:
            self._start()

    def wait(self, resume: Resume) -> None:
        """`resume` after a commit."""
        self._waiting.append(resume)
        if not self._committing:
            self._start()

    def drop(self, places: Iterable[Any]) -> None:
        """These are given up, in memory."""
        self._dropped += places

    def relieve(self) -> None:
        """Begin a commit if there is much to write."""
        if not self._committing and (len(self._dropped) > MAX_DROPPED or self._writer.crowded):
            self._start()

    def landed(self) -> None:
        """A flight has ended."""
        if self._leaving and not self._releasing:
            self._release()

    def when_idle(self, done: Callable[[], None]) -> None:
        """`done()` once nothing is under way here."""
        self._idle.append(done)
        self._check_idle()

    def _check_idle(self) -> None:
        if not (self._committing or self._releasing):
            idle, self._idle = self._idle, []
            for done in idle:
                done()

    # Commits

    def _start(self) -> None:
        driver = self._driver
        self._committing = True
        flushes, self._flushes = self._flushes, []
        waiting, self._waiting = self._waiting, []
        commit = self._writer.begin_commit()
        dropped, self._dropped = self._dropped, []
        result = [errno.EIO]

        def work() -> None:
            result[0] = errno.EIO if driver.distrusted else commit.run(driver.file, driver.data)

        def done() -> None:
            self._committing = False
            self._settle(commit, dropped, result[0])
            for request in flushes:
                driver.finish(request, result[0])
            for resume in waiting:
                resume(result[0])
            if (self._flushes or self._waiting) and not self._committing:
                self._start()
            if not result[0]:
                self.relieve()
            self.landed()
            driver.submit()
            self._check_idle()

        driver.env.workers.submit(work, done)

    def _settle(self, commit: Commit, dropped: list[Any], code: int) -> None:
        if code:
            commit.failed()
            self._dropped[:0] = dropped
            return
        commit.succeeded()
        if dropped:
            self._leaving.append((self._driver.newest_flight(), dropped))

    # Release

    def _release(self) -> None:
        number, places = self._leaving[0]
        if self._driver.flown(number):
            self._leaving.popleft()
            self._releasing = True
            self._step(self._writer.release(places))

    def _step(self, steps: Steps) -> None:
        try:
            work = next(steps, None)
        except ImageError as error:
            self._driver.distrust(error)
            work = None
        if work is not None:
            self._driver.env.workers.submit(work, partial(self._step, steps))
            return
        self._releasing = False
        self.landed()
        self._check_idle()

    # Close

    def finish(self) -> None:
        """Write everything, durably, in this thread, with nothing under way. ImageError if that fails."""
        assert not self._committing and not self._releasing, "closed without quiesce"
        driver = self._driver
        data_is_durable = False
        while not driver.distrusted:
            commit = self._writer.begin_commit()
            dropped, self._dropped = self._dropped, []
            if data_is_durable and not dropped and not self._leaving and not any(commit.stages):
                commit.succeeded()
                break
            code = commit.run(driver.file, driver.data)
            data_is_durable = True
            self._settle(commit, dropped, code)
            if code:
                raise ImageError("cannot write the image's tables", errno=code, path=driver.path,
                                 hint="what was not flushed may be lost; the image itself is consistent")
            while self._leaving:
                self._finish_release(self._leaving.popleft()[1])

    def _finish_release(self, places: list[Any]) -> None:
        try:
            for work in self._writer.release(places):
                work()
        except ImageError as error:
            self._driver.distrust(error)
