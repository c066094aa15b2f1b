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
    """

    def __init__(self, loop: Loop, count: int = 32) -> None:
        self._loop = loop
        self._count = count
        self._queue: SimpleQueue[tuple[Work, Work] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._pending = 0

    def submit(self, work: Work, done: Work) -> None:
        self._pending += 1
        if self._pending > len(self._threads) and len(self._threads) < self._count:
            thread = threading.Thread(target=self._run, name=f"worker-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._queue.put((work, done))

    def close(self) -> None:
        """Let the threads finish what was submitted, and end."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, done = item
            try:
                work()
            except Exception:
                logger.exception("a worker's task failed")
            self._loop.call_threadsafe(lambda done=done: self._finish(done))  # type: ignore[misc]

    def _finish(self, done: Work) -> None:
        self._pending -= 1
        done()
