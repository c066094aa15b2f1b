"""The log's control socket: who may connect, and the connections (writelog.logconn).

The socket `log__NAME.ctl` in the run directory has mode 0600, and the peer's credentials are checked as well: root
and the tapdisk's own user may read the disk's data here, nobody else.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from tapcore import unixsocket
from tapcore.driver import Driver
from tapcore.errors import ControlError, LogError
from tapcore.loop import Loop
from writelog.control import Figures
from writelog.logconn import Connection
from writelog.logcontext import LogContext
from writelog.logstore import LogStore
from writelog.shm import socket_path

logger = logging.getLogger(__name__)

MAX_CLIENTS = 64
RETRY_ACCEPT_S = 1.0
"""Pause when the process has no descriptor left for another client."""
DRAIN_S = 30.0
"""How long `close` waits for ring reads."""


class LogServer:
    """Listens from its making until `close`. `lower` is the level below the log, read by the rings."""

    def __init__(
        self, loop: Loop, store: LogStore, lower: Driver, run_dir: Path, name: str
    ) -> None:
        """LogError if the socket cannot be made, or a live process serves it."""
        self.path = socket_path(run_dir, name)
        self._loop = loop
        self._context = LogContext(loop, store, lower, run_dir, name)
        try:
            self._listener = unixsocket.listen(self.path)
        except ControlError as error:
            raise LogError(f"cannot serve the log: {error.message}", errno=error.errno, path=error.path,
                           hint=f"{error.hint}; log:NAME gives the log another name") from error
        loop.add_reader(self._listener.fileno(), self._on_connect)

    def figures(self) -> Figures:
        """The log's figures, counted in one go."""
        steps = self._context.figures_steps()
        while True:
            try:
                next(steps)
            except StopIteration as end:
                figures: Figures = end.value
                return figures

    @property
    def reads_in_flight(self) -> int:
        """Reads of rings that the level below has not completed."""
        return self._context.reads

    def quiesce(self, done: Callable[[], None]) -> None:
        """Start no more reads, and call `done` when none is in flight, at once if there is none."""
        self._context.quiescing = True
        if self._context.reads == 0:
            done()
        else:
            self._context.reads_ended.append(done)

    def go_on(self, lower: Driver) -> None:
        """After `quiesce`: read from `lower`, beginning with what was asked for meanwhile."""
        self._context.lower = lower
        self._context.quiescing = False
        for connection in list(self._context.connections):
            connection.go_on()

    def close(self) -> None:
        """End every connection and remove the socket.

        Reads in flight are waited for, by turning the loop; after `quiesce` there are none. LogError if they do
        not end.
        """
        self._context.quiescing = True
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        self.path.unlink(missing_ok=True)
        for connection in list(self._context.connections):
            connection.close()
        try:
            self._loop.run_until(lambda: self._context.reads == 0, DRAIN_S)
        except TimeoutError:
            raise LogError(f"log {self._context.name}: {self._context.reads} reads of clients did not end in "
                           f"{DRAIN_S:.0f} s", errno=errno.ETIMEDOUT) from None

    def _on_connect(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                logger.warning("%s: cannot accept a client: %s", self.path, error)
                fd = self._listener.fileno()
                self._loop.remove(fd)
                self._loop.call_later(RETRY_ACCEPT_S, self._listen_again)
                return
            self._admit(sock)

    def _listen_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._on_connect)

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        allowed, peer = unixsocket.peer_allowed(sock)
        if not allowed:
            logger.warning("%s: %s turned away", self.path, peer)
            sock.close()
        elif len(self._context.connections) >= MAX_CLIENTS:
            logger.warning("%s: %s turned away: %d clients are connected", self.path, peer, MAX_CLIENTS)
            sock.close()
        else:
            Connection(self._context, sock)
