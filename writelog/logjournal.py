"""The activity log at work: its steps are carried out in workers, and those that wait for them told.

A step that fails fails those that waited for it: a write to a cold extent does not go down without its intent, and
is tried again like any other write.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import Final, Protocol

from tapcore.errors import LogError
from tapcore.loop import Loop, Timer
from tapcore.workers import Workers
from writelog.activity import Activity, Resume, Step
from writelog.generations import Generations
from writelog.sidecar import Sidecar

logger = logging.getLogger(__name__)

CHECKPOINT_S: Final = 5.0
"""From the clearing of bits to the writing of their sectors."""
DRAIN_S: Final = 30.0
"""How long `close` waits for a step."""


class Lower(Protocol):
    """The disk below the log."""

    def flush(self, done: Callable[[int], None]) -> None:
        """Make durable what was written so far, then `done(0)`, or with an errno."""

    def landed(self) -> None:
        """All that waited for a step have been told."""


class Journal:
    """Of one log."""

    def __init__(
        self, loop: Loop, workers: Workers, sidecar: Sidecar, activity: Activity, lower: Lower
    ) -> None:
        self.activity = activity
        self._loop = loop
        self._workers = workers
        self._sidecar = sidecar
        self._lower = lower
        self._timer: Timer | None = None
        self._checkpoint_is_due = False
        self._idle: list[Callable[[], None]] = []
        self._is_quiet = self._has_failed = False
        self._flush_errno: int | None = None
        """What came of the flush of `quiesce`."""
        self._watch_cleared()

    def submit(self) -> None:
        """Begin a step if somebody waits for one and none is under way."""
        is_wanted = self.activity.is_asked or self._checkpoint_is_due
        if is_wanted and self.activity.step is None and not self._is_quiet:
            self._begin()

    def change(self, generations: Generations, resume: Resume, *, all_dirty: bool = False) -> None:
        """As Activity.change; a step begins by itself."""
        self.activity.change(generations, resume, all_dirty=all_dirty)
        self.submit()

    def cleared(self, first: int, stop: int) -> None:
        """As Activity.cleared; they are written some seconds later."""
        self.activity.cleared(first, stop)
        self._watch_cleared()

    def _watch_cleared(self) -> None:
        if self._timer is None and not self._is_quiet and self.activity.has_cleared:
            self._timer = self._loop.call_later(CHECKPOINT_S, self._checkpoint)

    def _checkpoint(self) -> None:
        self._timer = None
        self._checkpoint_is_due = True
        self.submit()

    # Steps

    def _begin(self) -> None:
        step = self.activity.plan(checkpoint=self._checkpoint_is_due)
        self._checkpoint_is_due = self._checkpoint_is_due and self.activity.has_cleared
        if step is None:
            return
        if step.needs_flush:
            self._lower.flush(lambda code: self._step_ended(code) if code else self._write(step))
        else:
            self._write(step)

    def _write(self, step: Step) -> None:
        result = [errno.EIO]

        def work() -> None:
            result[0] = self._sidecar.write(step.record, step.sectors)

        self._workers.submit(work, lambda: self._step_ended(result[0]))

    def _step_ended(self, code: int) -> None:
        self._tell(code)
        if code:
            self._checkpoint_is_due = False
        self.activity.ended(code)
        self._lower.landed()
        self._watch_cleared()
        self.submit()
        self._check_idle()

    def _tell(self, code: int) -> None:
        if bool(code) != self._has_failed:
            self._has_failed = bool(code)
            if code:
                logger.error("%s: cannot be written: %s; writes to extents that are not in it wait",
                             self._sidecar.path, os.strerror(code))
            else:
                logger.warning("%s: is written again", self._sidecar.path)

    # The end

    def quiesce(self, done: Callable[[], None]) -> None:
        """Begin no more steps; when none is under way flush the level below, which may do no more itself once it
        is asked to quiesce, and then `done()`."""
        def flushed(code: int) -> None:
            self._flush_errno = code
            done()

        self._is_quiet = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._idle.append(lambda: self._lower.flush(flushed))
        self._check_idle()

    def go_on(self) -> None:
        """After `quiesce`."""
        self._is_quiet = False
        self._flush_errno = None
        self._watch_cleared()
        self.submit()

    def close(self) -> None:
        """Do what `quiesce` does unless it was done, write all bits and that the log was closed, and close the
        file, all in this thread. LogError if a step that is under way does not end."""
        try:
            if self._flush_errno is None:
                self.quiesce(lambda: None)
                self._loop.run_until(lambda: self._flush_errno is not None, DRAIN_S)
            code = self._flush_errno or 0
            for step in () if code else self.activity.last_steps():
                code = code or self._sidecar.write(step.record, step.sectors)
            if code:
                self._tell(code)
        except TimeoutError:
            raise LogError(f"a write of the side-car did not end in {DRAIN_S:.0f} s", errno=errno.ETIMEDOUT,
                           path=str(self._sidecar.path)) from None
        finally:
            self._sidecar.close()

    def _check_idle(self) -> None:
        if self._is_quiet and self.activity.step is None:
            idle, self._idle = self._idle, []
            for call in idle:
                call()
