"""What a daemon says on standard error is written by a thread: who does not read it must not stop a guest.

What is said while nobody reads is kept up to a limit; how much was left out is told when it goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
from typing import Final

MAX_WAITING: Final = 1000
LAST_WORDS_S: Final = 1.0
"""How long a process that ends waits for its last messages to be written."""
STDERR_FD: Final = 2


class Writer(logging.Handler):
    """Writes messages to a descriptor in a thread of its own, which begins with the first one. Not through
    `sys.stderr`: that has a lock, for which the others would wait."""

    def __init__(self, fd: int = STDERR_FD) -> None:
        super().__init__()
        self._fd = fd
        self._waiting: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._left_out = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(self.format(record))
        except queue.Full:
            self._left_out += 1
        if self._thread.ident is None:
            self._thread.start()
            atexit.register(self.end)

    def end(self) -> None:
        """Write what is there, as far as it is taken."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=LAST_WORDS_S)
            self._thread.join(LAST_WORDS_S)

    def _run(self) -> None:
        while (text := self._waiting.get()) is not None:
            self._write(text)
            if self._left_out and self._waiting.empty():
                left_out, self._left_out = self._left_out, 0
                self._write(f"({left_out} messages were left out: nobody read them)")

    def _write(self, text: str) -> None:
        data = f"{text}\n".encode(errors="replace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._fd, data) :]


def begin(form: str, *, verbose: bool) -> None:
    """Have this process say what it has to say, in lines of that form (as of the module `logging`)."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=form, handlers=[Writer()])
