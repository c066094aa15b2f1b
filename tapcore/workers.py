"""Threads for what blocks: system calls that leave the GIL while the loop serves others."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from tapcore.loop import Loop

logger = logging.getLogger(__name__)

Work = Callable[[], None]


class Workers:
    """At most `count` threads, started when there is work for them.

    `submit(work, done)` runs `work()` in a thread, then `done()` in the loop's thread. `work` must not raise: it
    keeps its outcome where `done` finds it. Ends of work reach the loop in one wake-up for as many as are ready.

    Where the system has no thread left the work waits for those that there are, or if there is none runs at once:
    it is late then, and not lost.
    """

    def __init__(self, loop: Loop, count: int = 32) -> None:
        self._loop = loop
        self._count = count
        self._queue: SimpleQueue[tuple[Work, Work] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._pending = 0
        self._short_of_threads = False

    def submit(self, work: Work, done: Work) -> None:
        self._pending += 1
        if self._pending > len(self._threads) and len(self._threads) < self._count:
            self._start_thread()
        if self._threads:
            self._queue.put((work, done))
        else:
            self._do(work, done)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=f"worker-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._short_of_threads:
                logger.error("cannot start a thread, go on with %d: %s", len(self._threads), error)
            self._short_of_threads = True
            return
        self._threads.append(thread)

    def close(self) -> None:
        """Let the threads finish what was submitted, and end."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._do(*item)

    def _do(self, work: Work, done: Work) -> None:
        try:
            work()
        except Exception:
            logger.exception("a worker's task failed")
        self._loop.call_threadsafe(lambda: self._finish(done))

    def _finish(self, done: Work) -> None:
        self._pending -= 1
        done()
