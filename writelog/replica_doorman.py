"""Ends the connections to a replica that take more than they may: zmq has no limit of its own for either.

- A zmq message may have any number of frames, each as long as is allowed, and zmq keeps them until the last one is
  there. So what a connection has sent since its last whole message is looked at, as the kernel counts it (tcp(7),
  TCP_INFO): a sync has credit, and cannot have sent more than that.
- zmq takes in any number of connections. Above a limit the oldest one goes that is not the sync's.

The monitor of the socket tells the descriptors, which are zmq's. One may be closed and used anew at any time: it
is only ever touched if it is a TCP connection to the replica's own port.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Final

from tapcore.layout import Layout
from writelog.replica_session import CREDIT_BYTES

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 0.1
MAX_PENDING_BYTES: Final = CREDIT_BYTES + (64 << 20)
"""What a connection may send before a whole message of it has been taken: its credit, and what headers and the
kernel's buffers make of it."""
MAX_CONNECTIONS: Final = 64
TCP_INFO: Final = Layout("tcp_info", "<", ":128x bytes_received:Q", size=136)


class Doorman:
    """Of the socket that is bound to TCP port `port`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._received: dict[int, int] = {}
        """By descriptor, the oldest first: how much had come when its last message was taken."""
        self._heard: set[int] = set()
        """Who had a message taken since the last look."""

    def accepted(self, fd: int, session_fd: int) -> None:
        """A new connection; `session_fd` is the sync's."""
        self.closed(fd)
        self._received[fd] = 0
        if len(self._received) > MAX_CONNECTIONS:
            oldest = next(known for known in self._received if known != session_fd)
            self._end(oldest, f"there are more than {MAX_CONNECTIONS} connections")

    def closed(self, fd: int) -> None:
        self._received.pop(fd, None)
        self._heard.discard(fd)

    def heard(self, fd: int) -> None:
        """A whole message was taken from this connection."""
        self._heard.add(fd)

    def look(self) -> None:
        """End what has sent too much."""
        for fd, before in list(self._received.items()):
            received = self._bytes_received(fd)
            if fd in self._heard:
                self._received[fd] = received
            elif received - before > MAX_PENDING_BYTES:
                self._end(fd, f"more than {MAX_PENDING_BYTES >> 20} MiB came without the end of a message")
        self._heard.clear()

    def _end(self, fd: int, why: str) -> None:
        logger.warning("a connection was ended: %s", why)
        self.closed(fd)
        sock = self._own(fd)
        if sock is not None:
            with sock, contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _bytes_received(self, fd: int) -> int:
        sock = self._own(fd)
        if sock is None:
            return 0
        with sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
        return int(TCP_INFO.unpack(info)["bytes_received"]) if len(info) == TCP_INFO.size else 0

    def _own(self, fd: int) -> socket.socket | None:
        """The connection, through a descriptor of its own, if it is one to this port."""
        try:
            sock = socket.socket(fileno=os.dup(fd))
        except OSError:
            return None
        try:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockname()[1] == self._port:
                return sock
        except OSError:
            pass
        sock.close()
        return None
