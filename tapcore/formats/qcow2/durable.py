"""qcow2: what makes changes durable: flushes, commits of metadata, and the release of clusters given up.

    given up ─ commit ─▶ no table in the file points at them
             ─ what was under way ends ─▶ space returned to the file system, one reference less

One commit at a time; flushes that wait for it share the next.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Final

from tapcore.errors import ImageError
from tapcore.formats.extents import TableMiss
from tapcore.formats.qcow2.commit import Commit, runs
from tapcore.formats.reader import Resume
from tapcore.request import Request

if TYPE_CHECKING:
    from tapcore.formats.qcow2.driver import Qcow2Driver

logger = logging.getLogger(__name__)

MAX_DROPPED: Final = 4096
"""Clusters given up; with more a commit begins that nobody asked for."""

Steps = Generator[Callable[[], None], None, None]
"""Yields what is to be done in a worker, and goes on in the loop's thread when that is done."""


class Durable:
    """Of one image opened for writing."""

    def __init__(self, driver: Qcow2Driver, l1_offset: int) -> None:
        self._driver = driver
        self._l1_offset = l1_offset
        self._flushes: list[Request] = []
        self._waiting: list[Resume] = []
        self._committing = False
        self._dropped: list[int] = []
        self._leaving: deque[tuple[int, list[int]]] = deque()
        """(the last flight that may use them, clusters): durably given up."""
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

    def drop(self, clusters: range) -> None:
        """One reference of each of these host clusters is given up, in memory."""
        self._dropped += clusters

    def relieve(self) -> None:
        """Begin a commit if there is much to write."""
        driver = self._driver
        if not self._committing and (len(self._dropped) > MAX_DROPPED or driver.mapping.crowded
                                     or driver.refcounts.crowded):
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
        dropped, self._dropped = self._dropped, []
        commit = Commit(driver.mapping, driver.refcounts, self._l1_offset)
        result = [errno.EIO]

        def work() -> None:
            result[0] = errno.EIO if driver.distrusted else commit.run(driver.file)

        def done() -> None:
            self._committing = False
            self._settle(commit, dropped, result[0])
            for request in flushes:
                driver.finish(request, result[0])
            for resume in waiting:
                resume(result[0])
            if self._flushes or self._waiting:
                self._start()
            self.landed()
            driver.submit()
            self._check_idle()

        driver.env.workers.submit(work, done)

    def _settle(self, commit: Commit, dropped: list[int], code: int) -> None:
        if code:
            commit.failed()
            self._dropped[:0] = dropped
            return
        commit.succeeded()
        cluster_bits = self._driver.header.cluster_bits
        for offset, length in commit.moved_from:
            dropped += range(offset >> cluster_bits, offset + length >> cluster_bits)
        if dropped:
            self._leaving.append((self._driver.newest_flight(), dropped))

    # Release

    def _release(self) -> None:
        number, clusters = self._leaving[0]
        if self._driver.flown(number):
            self._leaving.popleft()
            self._releasing = True
            self._step(self._release_steps(clusters))

    def _step(self, steps: Steps) -> None:
        work = next(steps, None)
        if work is not None:
            self._driver.env.workers.submit(work, partial(self._step, steps))
            return
        self._releasing = False
        self.landed()
        self._check_idle()

    def _release_steps(self, clusters: list[int]) -> Steps:
        """Return the space of clusters that nothing else refers to, then take one reference from each."""
        refcounts, file = self._driver.refcounts, self._driver.file
        cluster_bits = self._driver.header.cluster_bits
        try:
            unused = []
            for cluster, count in Counter(clusters).items():
                yield from self._cached(cluster)
                if refcounts.get(cluster) == count:
                    unused.append(cluster)
            if unused:
                holes = list(runs(unused))

                def punch() -> None:
                    for first, count in holes:
                        file.discard(first << cluster_bits, count << cluster_bits)

                yield punch
            for cluster in clusters:
                yield from self._cached(cluster)
                refcounts.release(cluster)
        except ImageError as error:
            self._driver.distrust(error)

    def _cached(self, cluster: int) -> Steps:
        """Until the cluster's refcount is cached. ImageError."""
        while True:
            try:
                self._driver.refcounts.get(cluster)
                return
            except TableMiss as found:
                miss = found
            loaded: list[bytes] = []
            yield partial(self._load, miss, loaded)
            if not loaded:
                raise ImageError(f"cannot read a refcount block: {miss}", offset=miss.host)
            self._driver.refcounts.install(miss, loaded[0])

    def _load(self, miss: TableMiss, loaded: list[bytes]) -> None:
        try:
            loaded.append(self._driver.file.load(miss.host, miss.length, "a refcount block"))
        except ImageError as error:
            logger.error("%s", error)

    # Close

    def finish(self) -> None:
        """Write everything, in this thread, with nothing under way. ImageError if that fails."""
        assert not self._committing and not self._releasing, "closed without quiesce"
        driver = self._driver
        while not driver.distrusted:
            commit = Commit(driver.mapping, driver.refcounts, self._l1_offset)
            dropped, self._dropped = self._dropped, []
            if not dropped and not self._leaving and not any(commit.stages):
                commit.succeeded()
                break
            code = commit.run(driver.file)
            self._settle(commit, dropped, code)
            if code:
                raise ImageError("cannot write the image's tables", errno=code, path=driver.path,
                                 hint="what was not flushed may be lost; the image itself is consistent")
            while self._leaving:
                for work in self._release_steps(self._leaving.popleft()[1]):
                    work()
