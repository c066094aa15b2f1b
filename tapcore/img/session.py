"""A loop with chains, and tasks on them.

A task is a generator. It yields what it waits for: a batch of requests that are under way together, each with the
driver that it is for, or a `Lock`. There are as many tasks as requests, or batches, are to be in flight:

    def task(buffer):
        while (piece := (yield from walk.next())) is not None:
            yield [(source, Request(READ, piece.offset, …))]
            …
    session.run(task(buffer) for buffer in buffers)
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self, TypeAlias, TypeVar

from tapcore.chain import Chain, open_chain, parse
from tapcore.driver import VERBS, Driver, Env, OpenFlag
from tapcore.errors import ImageError
from tapcore.imagelock import refuse_readers
from tapcore.loop import Loop
from tapcore.reach import Reach, folders_of_environment
from tapcore.request import OP_NAMES, Request
from tapcore.workers import Workers

logger = logging.getLogger(__name__)

WORKERS: Final = 16
TURN_S: Final = 0.5
INTERRUPTED_S: Final = 5.0
"""How long what is under way may take after an interrupt, before the chains are closed all the same."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Lock:
    """Held by one task at a time: `yield lock`, then `release` in any case, also if it ends at that yield."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.held = False
        self.waiting: deque[Task] = deque()

    def release(self) -> None:
        self.held = bool(self.waiting)
        if self.waiting:
            task = self.waiting.popleft()
            self._session.env.loop.call_soon(lambda: self._session.advance(task))


Batch: TypeAlias = list[tuple[Driver, Request]]
T = TypeVar("T")
Steps: TypeAlias = Generator["Batch | Lock", None, T]
"""A part of a task, that ends with a T."""
Task: TypeAlias = "Steps[None]"


class Session:
    """To be used in a `with` block; what was opened is closed at its end. SIGINT, SIGTERM and SIGHUP meanwhile end
    `run` with a KeyboardInterrupt when nothing is in flight any more, or after INTERRUPTED_S; a second one does at
    once."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="td-img-")
        loop = Loop()
        self.env = Env(loop, Workers(loop, WORKERS), Path(self._folder.name), Reach(folders_of_environment()))
        self._chains: list[Chain] = []
        self._active = 0
        self._failure: BaseException | None = None
        self._running = False
        self._interrupted = self._insisted = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            while self._chains:
                try:
                    self.close(self._chains[-1])
                except Exception as failure:
                    if error is None:
                        raise
                    logger.error("%s", failure)
        finally:
            for number, handler in self._former.items():
                signal.signal(number, handler)
            self.env.workers.close()
            self.env.loop.close()
            self._folder.cleanup()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._running:
            raise KeyboardInterrupt
        self._insisted = self._interrupted
        self._interrupted = True
        self.env.loop.call_threadsafe(lambda: None)

    # Chains

    def open(self, text: str, flags: OpenFlag = OpenFlag.NONE) -> Chain:
        """ChainError if it cannot be opened. Nobody else may have an image open that is opened for writing, not
        even as the parent of another, which a tapdisk would not mind: ImageError."""
        if not flags & (OpenFlag.RDONLY | OpenFlag.QUERY):
            params = parse(text)[-1].params
            if params.startswith(("/", ".")):
                refuse_readers(params)
        chain = open_chain(self.env, text, flags)
        self._chains.append(chain)
        return chain

    def close(self, chain: Chain) -> None:
        """Let a chain end its own work, and close it. Raises what its drivers do."""
        self._chains.remove(chain)
        quiet: list[bool] = []
        chain.quiesce(lambda: quiet.append(True))
        try:
            while not quiet and not self._interrupted:
                self.env.loop.turn(TURN_S)
            if not quiet:
                self.env.loop.run_until(lambda: bool(quiet), INTERRUPTED_S)
        finally:
            chain.close()

    # Tasks

    def run(self, tasks: Iterable[Task]) -> None:
        """Until all tasks have ended. Raises what the first one that failed raised, when the others have ended;
        KeyboardInterrupt after a signal."""
        self._failure = None
        self._running = True
        try:
            for task in list(tasks):
                self._active += 1
                self.advance(task)
            while self._active and not self._interrupted:
                self.env.loop.turn(TURN_S)
            if self._active:
                self._give_up()
        finally:
            self._running = False
        if self._failure is not None:
            raise self._failure
        if self._interrupted:
            raise KeyboardInterrupt

    def _give_up(self) -> None:
        try:
            self.env.loop.run_until(lambda: not self._active or self._insisted, INTERRUPTED_S)
        except TimeoutError:
            logger.warning("interrupted with requests that do not end")
        self._active = 0

    def advance(self, task: Task) -> None:
        """Let `task` go on until it waits, or has ended."""
        while True:
            try:
                if self._failure is not None or self._interrupted:
                    task.close()
                    break
                step = next(task)
            except StopIteration:
                break
            except BaseException as error:
                self._failure = self._failure or error
                break
            if isinstance(step, Lock):
                if step.held:
                    step.waiting.append(task)
                    return
                step.held = True
            elif not self._start(task, step):
                return
        self._active -= 1

    def _start(self, task: Task, batch: Batch) -> bool:
        """Begin a batch: True if it is complete, else the task goes on when it is."""
        left = 1

        def done(_: Request) -> None:
            nonlocal left
            left -= 1
            if not left:
                self.advance(task)

        for driver, request in batch:
            request.done = done
            if not getattr(driver, VERBS[request.op])(request):
                left += 1
        for driver in {id(driver): driver for driver, _ in batch}.values():
            driver.submit()
        left -= 1
        return not left


def ended_well(request: Request, name: str) -> None:
    """ImageError, which names the disk and the offset, if `request` failed."""
    if request.error:
        raise ImageError(f"{OP_NAMES[request.op]} failed: {os.strerror(request.error)}", errno=request.error,
                         path=name, offset=request.offset)
