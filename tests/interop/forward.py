"""A UNIX socket that leads to another one, as `ssh -L` makes them, and connections through it that drop."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

WAIT_S = 10


class Forward:
    """`address` leads to `target`, both as QEMU writes them."""

    def __init__(self, path: Path, target: str) -> None:
        self.address = f"unix:{path}"
        self._target = target.removeprefix("unix:")
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._start(self._accept)

    def drop(self) -> None:
        """Whatever is connected; the next one gets through."""
        while self._open:
            end = self._open.pop()
            with contextlib.suppress(OSError):  # it has ended
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(WAIT_S)
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join(WAIT_S)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                self._open += [near, far]
                try:
                    far.connect(self._target)
                except OSError:
                    near.close()  # as ssh does when nobody listens at the other end
                    continue
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
