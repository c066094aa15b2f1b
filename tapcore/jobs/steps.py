"""Steps: what a job does, written down in its order, in the loop's thread, though most of it has to be waited for.

    def steps(self) -> Steps[None]:
        yield in_worker(self.env, self._create)          a step is begun, and the function goes on when it is done
        yield asking(driver, Request(FLUSH))             if it failed, its error is raised here

A step is a function that is given `done(error)`, which it calls once, at once or later.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

from tapcore.driver import Driver, Env
from tapcore.errors import ControlError, WritelogError
from tapcore.request import Request

logger = logging.getLogger(__name__)

Done = Callable[[WritelogError | None], None]
Step = Callable[[Done], None]
T = TypeVar("T")
Steps: TypeAlias = Generator[Step, None, T]


def drive(steps: Steps[None], done: Done) -> None:
    """Take all the steps, then `done(error)`."""
    _Drive(steps, done).go_on(None)


class _Drive:
    """A step that is done at once is followed by the next one without a deeper stack."""

    def __init__(self, steps: Steps[None], done: Done) -> None:
        self._steps = steps
        self._done = done
        self._beginning = False
        self._ended: list[WritelogError | None] = []

    def go_on(self, error: WritelogError | None) -> None:
        """The last step has ended."""
        if self._beginning:
            self._ended.append(error)
            return
        while True:
            try:
                step = next(self._steps) if error is None else self._steps.throw(error)
            except StopIteration:
                self._done(None)
                return
            except Exception as failure:
                self._done(as_error(failure))
                return
            self._beginning = True
            try:
                step(self.go_on)
            except Exception as failure:
                self._ended = [as_error(failure)]
            self._beginning = False
            if not self._ended:
                return
            error = self._ended.pop()


def as_error(error: Exception) -> WritelogError:
    if isinstance(error, WritelogError):
        return error
    logger.error("a job's step failed", exc_info=error)
    return ControlError(str(error), errno=error.errno if isinstance(error, OSError) else None)


def in_worker(env: Env, work: Callable[[], object]) -> Step:
    """`work()`, which may block and raise, in a worker."""
    def begin(done: Done) -> None:
        outcome: list[WritelogError | None] = [ControlError("it failed: see the log of the tapdisk")]

        def run() -> None:
            try:
                work()
                outcome[0] = None
            except Exception as error:
                outcome[0] = as_error(error)

        env.workers.submit(run, lambda: done(outcome[0]))

    return begin


def asking(driver: Driver, request: Request) -> Step:
    """One request of the job's own, of `driver`."""
    def begin(done: Done) -> None:
        verbs = (driver.queue_read, driver.queue_write, driver.queue_flush, driver.queue_discard,
                 driver.queue_zeroes, driver.queue_status)
        _queue(driver, verbs[request.op], request, done)

    return begin


def asking_own_status(driver: Driver, request: Request) -> Step:
    """What an image has itself: `ImageDriver.queue_own_status`; all of it where a driver has no such thing."""
    verb: Callable[[Request], bool] = getattr(driver, "queue_own_status", driver.queue_status)
    return lambda done: _queue(driver, verb, request, done)


def _queue(driver: Driver, verb: Callable[[Request], bool], request: Request, done: Done) -> None:
    def ended(request: Request) -> None:
        done(request_error(request, driver) if request.error else None)

    request.done = ended
    is_complete = verb(request)
    driver.submit()
    if is_complete:
        ended(request)


def request_error(request: Request, driver: Driver) -> ControlError:
    return ControlError(f"{request!r}: {os.strerror(request.error)}", errno=request.error, path=driver.path)
