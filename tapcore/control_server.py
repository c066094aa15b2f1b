"""The control socket of a tapdisk, in the loop: who may connect, and the connections. The ops are the engine's.

A connection handles one request a turn of the loop, and the next one when the reply of the last has left: replies
are in order, a client that does not read costs one reply of memory, and none keeps the loop for itself.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tapcore import unixsocket
from tapcore.control import (
    MAX_REQUEST_BYTES,
    RECV_BYTES,
    Lines,
    decode_request,
    encode_error,
    encode_result,
    socket_path,
)
from tapcore.driver import Env
from tapcore.errors import ControlError, ProtocolError, WritelogError

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
MAX_WAITING_BYTES: Final = 1 << 20
"""Requests that wait for those before them; a client that sends more is dropped."""
RETRY_ACCEPT_S: Final = 1.0
"""Pause when the process has no descriptor left for another client."""


class Call:
    """One request: `finish` or `fail` it, once."""

    def __init__(self, connection: Connection, op: str, params: dict[str, Any]) -> None:
        self.connection = connection
        self.op = op
        self.params = params
        """Those that were given, of the right types (tapcore.control.PARAMS)."""
        self._answered = False

    def finish(self, result: dict[str, Any]) -> None:
        self._answer(encode_result(result))

    def fail(self, error: WritelogError) -> None:
        self._answer(encode_error(error))

    def _answer(self, line: bytes) -> None:
        assert not self._answered, f"{self.op} was answered twice"
        self._answered = True
        self.connection.answer(line)


Handler = Callable[[Call], dict[str, Any] | None]
"""The result, or None if the call is answered later; WritelogError if it fails at once."""


class ControlServer:
    """`handle` is called with each request, `ended` once with each connection that comes to its end."""

    def __init__(self, env: Env, handle: Handler, ended: Callable[[Connection], None]) -> None:
        self.loop = env.loop
        self.handle = handle
        self.ended = ended
        self._path = socket_path(env.run_dir, os.getpid())
        self._listener: socket.socket | None = None
        self._connections: set[Connection] = set()

    def listen(self) -> Path:
        """Returns the socket. ControlError if it cannot be made, or a live process has it."""
        unixsocket.remove_stale(self._path)
        # It gets its name once it listens: where nobody listens at a socket of that name, the process is dead.
        nameless = self._path.with_suffix(".new")
        listener = unixsocket.listen(nameless)
        try:
            nameless.rename(self._path)
        except OSError as error:
            listener.close()
            nameless.unlink(missing_ok=True)
            raise ControlError(f"cannot listen: {error.strerror}", errno=error.errno,
                               path=str(self._path)) from error
        self._listener = listener
        self.loop.add_reader(listener.fileno(), self._on_connect)
        return self._path

    def stop_listening(self) -> None:
        if self._listener is not None:
            self._path.unlink(missing_ok=True)
            self.loop.remove(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """Stop listening and end every connection."""
        self.stop_listening()
        for connection in list(self._connections):
            connection.close()

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def _on_connect(self) -> None:
        assert self._listener is not None
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                logger.warning("%s: cannot accept a client: %s", self._path, error)
                self.loop.remove(self._listener.fileno())
                self.loop.call_later(RETRY_ACCEPT_S, self._accept_again)
                return
            self._admit(sock)

    def _accept_again(self) -> None:
        if self._listener is not None:
            self.loop.add_reader(self._listener.fileno(), self._on_connect)

    def _admit(self, sock: socket.socket) -> None:
        allowed, peer = unixsocket.peer_allowed(sock)
        if not allowed or len(self._connections) >= MAX_CONNECTIONS:
            why = f"{MAX_CONNECTIONS} are connected" if allowed else "it is another user's"
            logger.warning("%s: %s was turned away: %s", self._path, peer, why)
            sock.close()
            return
        self._connections.add(Connection(self, sock, peer))


class Connection:
    """One client."""

    def __init__(self, server: ControlServer, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        """Who it is, for people."""
        self.ended = False
        """Nothing more comes from the client; it may still get answers."""
        self._server = server
        self._loop = server.loop
        self._socket = sock
        self._fd = sock.fileno()
        self._lines = Lines(MAX_REQUEST_BYTES)
        self._output = bytearray()
        self._busy = False
        self._closed = False
        sock.setblocking(False)
        self._loop.add_reader(self._fd, self._on_readable)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove(self._fd)
        self._socket.close()
        self._server.forget(self)
        self._end()

    def answer(self, line: bytes) -> None:
        """The reply to the request under way."""
        self._busy = False
        self._send(line)

    def _end(self) -> None:
        """No more input."""
        if not self.ended:
            self.ended = True
            if not self._closed:
                self._loop.add_reader(self._fd, None)
            self._server.ended(self)

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(RECV_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            self._end()
        self._lines.feed(data)
        if self._lines.buffered_bytes > MAX_WAITING_BYTES:
            logger.warning("%s sent more requests at once than are kept waiting; it was dropped", self.peer)
            self.close()
        self._advance()

    def _advance(self) -> None:
        """Handle the next request, if it is there and it is its turn."""
        if self._closed or self._busy or self._output:
            return
        try:
            line = self._lines.next_line()
        except ProtocolError as error:
            self._end()
            self._send(encode_error(error))
            return
        if line is not None:
            self._handle(line)
        elif self.ended:
            self.close()

    def _handle(self, line: bytes) -> None:
        try:
            call = Call(self, *decode_request(line))
        except WritelogError as error:
            self._send(encode_error(error))
            return
        self._busy = True
        try:
            result = self._server.handle(call)
            if result is not None:
                call.finish(result)
        except WritelogError as error:
            call.fail(error)
        except Exception as error:
            logger.exception("%s failed", call.op)
            code = error.errno if isinstance(error, OSError) else None
            call.fail(ControlError(f"{call.op} failed: {error}", errno=code or errno.EIO))

    def _send(self, line: bytes) -> None:
        if not self._closed:
            self._output += line
            self._flush()

    def _flush(self) -> None:
        try:
            while self._output:
                del self._output[: self._socket.send(self._output)]
        except BlockingIOError:
            self._loop.add_writer(self._fd, self._flush)
            return
        except OSError:
            self.close()
            return
        self._loop.add_writer(self._fd, None)
        self._loop.call_soon(self._advance)
