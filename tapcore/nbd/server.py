"""The NBD server's sockets: moves bytes between clients and their `ServerNegotiation`, then `Session`."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import monotonic

from tapcore import unixsocket
from tapcore.driver import Env, Feature
from tapcore.errors import ControlError, ProtocolError, UsageError
from tapcore.nbd import wire
from tapcore.nbd.address import parse_address
from tapcore.nbd.negotiate import ExportInfo, Negotiated, ServerNegotiation, resolve_name
from tapcore.nbd.session import Session
from tapcore.nbd.tls import TlsSocket
from tapcore.request import Extent
from tapcore.vbd import CLOSED, CLOSING, Vbd

logger = logging.getLogger(__name__)

NEGOTIATION_RECV_BYTES = 64 << 10
NEGOTIATION_TIMEOUT_S = 30.0
"""A client that has not chosen an export by then is dropped."""
MAX_UNSENT_BYTES = 1 << 20
"""Replies that wait for a slow client; beyond, its next requests wait in the socket."""
SOCKET_BUFFER_BYTES = 4 << 20
TURN_RECEIVES = 16
TURN_S = 0.005
"""Receives from one client, and time for its requests, before the others have their turn."""
MORE_BYTES = 128 << 10
"""After a receive of so many bytes more is on its way: ask again before going back to the loop."""
RETRY_ACCEPT_S = 1.0
"""Pause when the process has no descriptor left for another client."""


class NbdServer:
    """Serves `exports` (a live mapping of name to open Vbd) on any number of addresses."""

    def __init__(
        self, env: Env, exports: Mapping[str, Vbd], *, max_connections: int = 1000, allow_remote: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """With `tls` TCP clients must use it, and may be on other hosts. `allow_remote` lets these in without."""
        self.addresses: list[str] = []
        self.exports = exports
        self.env = env
        self._max_connections = max_connections
        self._allow_remote = allow_remote
        self.tls = tls
        self._listeners: list[tuple[socket.socket, Path | None]] = []
        self._connections: set[Connection] = set()

    @property
    def connections(self) -> int:
        return len(self._connections)

    def clients_of(self, vbd: Vbd) -> int:
        """Connections in the transmission phase on `vbd`."""
        return sum(connection.vbd is vbd for connection in self._connections)

    def listen(self, address: str, listener_fd: int | None = None) -> str:
        """Listen on `address` (see `parse_address`); returns it with the port that was bound. UsageError for a
        bad one, ControlError if it is taken or cannot be bound. With `listener_fd` a socket listens there already,
        and is taken over."""
        where = parse_address(address)
        if not where.loopback and not self._allow_remote and self.tls is None:
            raise UsageError(f"{address}: not a loopback address, and NBD is neither encrypted nor authenticated "
                             "without TLS", hint="give TLS credentials, or listen on 127.0.0.1 or a UNIX socket")
        try:
            if listener_fd is not None:
                listener = socket.socket(fileno=listener_fd)
                listener.set_inheritable(False)
            elif where.path is not None:
                listener = unixsocket.listen(Path(where.path))
            else:
                family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
                listener = socket.create_server((where.host, where.port), family=family, backlog=128)
                where = replace(where, port=listener.getsockname()[1])
        except OSError as error:
            raise ControlError(f"cannot listen on {address}: {error.strerror or error}",
                               errno=error.errno or errno.EADDRNOTAVAIL) from error
        listener.setblocking(False)
        self._listeners.append((listener, None if where.path is None else Path(where.path)))
        bound = str(where)
        self.addresses.append(bound)
        self.env.loop.add_reader(listener.fileno(), lambda: self._accept(listener))
        return bound

    def hand_on(self) -> list[tuple[str, int]]:
        """Stop accepting clients, without closing the sockets: who connects waits. Returns the addresses with
        descriptors of their sockets, which outlive this program."""
        handed: list[tuple[str, int]] = []
        for address, (listener, _) in zip(self.addresses, self._listeners, strict=True):
            self.env.loop.remove(listener.fileno())
            listener.set_inheritable(True)
            handed.append((address, listener.detach()))
        self._listeners.clear()
        return handed

    def close(self) -> None:
        """Stop listening and drop every client."""
        for listener, path in self._listeners:
            self.env.loop.remove(listener.fileno())
            listener.close()
            if path is not None:
                path.unlink(missing_ok=True)
        self._listeners.clear()
        self.addresses.clear()
        for connection in list(self._connections):
            connection.close()

    def drop(self, vbd: Vbd) -> None:
        """Disconnect the clients of one disk."""
        for connection in list(self._connections):
            if connection.vbd is vbd:
                connection.close()

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # The client still waits to be accepted: without a pause the loop would do nothing but try.
            logger.error("cannot accept an NBD client: %s", error)
            self.env.loop.remove(listener.fileno())
            self.env.loop.call_later(RETRY_ACCEPT_S, lambda: self._accept_again(listener))
            return
        try:
            self._admit(listener, client)
        except OSError as error:
            logger.warning("an NBD client was dropped: %s", error)
            client.close()

    def _accept_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self.env.loop.add_reader(listener.fileno(), lambda: self._accept(listener))

    def _admit(self, listener: socket.socket, client: socket.socket) -> None:
        if listener.family == socket.AF_UNIX:
            allowed, who = unixsocket.peer_allowed(client)
            if not allowed:
                logger.warning("an NBD client was refused: %s", who)
                client.close()
                return
        if len(self._connections) >= self._max_connections:
            logger.warning("an NBD client was refused: %d are connected", len(self._connections))
            client.close()
            return
        connection = Connection(self, client)
        self._connections.add(connection)
        connection.begin()

    # What ServerNegotiation asks

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of the exports."""
        return [(name, vbd.chain.text) for name, vbd in self.exports.items() if vbd.state not in (CLOSING, CLOSED)]

    def find(self, name: str) -> ExportInfo | None:
        """The export that a client asks for; "" is the only one, or the one called "default"."""
        resolved = resolve_name([known for known, _ in self.names()], name)
        return None if resolved is None else export_info(resolved, self.exports[resolved])


def export_info(name: str, vbd: Vbd) -> ExportInfo:
    """What the handshake tells of a disk."""
    features = vbd.info.features
    flags = (wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_SEND_DF | wire.NBD_FLAG_CAN_MULTI_CONN
             | wire.NBD_FLAG_SEND_CACHE)
    if features & Feature.FLUSH:
        flags |= wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_FUA
    if vbd.read_only:
        flags |= wire.NBD_FLAG_READ_ONLY
    if features & Feature.DISCARD:
        flags |= wire.NBD_FLAG_SEND_TRIM
    if features & Feature.ZEROES:
        flags |= wire.NBD_FLAG_SEND_WRITE_ZEROES
        if features & Feature.FAST_ZEROES:
            flags |= wire.NBD_FLAG_SEND_FAST_ZERO
    bitmaps = tuple(f"{wire.QEMU_DIRTY_BITMAP}{log_name}" for log_name in _logs(vbd))
    return ExportInfo(name, vbd.info.size_bytes, flags, vbd.chain.text,
                      preferred_block=max(4096, vbd.info.preferred_block_bytes),
                      contexts=(wire.BASE_ALLOCATION, *bitmaps))


def _logs(vbd: Vbd) -> dict[str, Callable[[int, int], list[Extent]]]:
    """The write logs in a disk's chain: name, and what tells its dirty extents."""
    return {log.log_name: log.dirty_extents for log in vbd.chain.find("log")}  # type: ignore[attr-defined]


class Connection:
    """One client: first negotiating, then in its session."""

    def __init__(self, server: NbdServer, client: socket.socket) -> None:
        self.vbd: Vbd | None = None
        self._server = server
        self._loop = server.env.loop
        self._socket: socket.socket | TlsSocket = client
        self._secure: TlsSocket | None = None
        """`_socket`, once TLS has begun."""
        self._is_shaking_hands = False
        """TLS's handshake is under way."""
        self._fd = client.fileno()
        uses_tls = server.tls is not None and client.family != socket.AF_UNIX
        self._negotiation = ServerNegotiation(server, uses_tls=uses_tls)
        self._session: Session | None = None
        self._output = bytearray()
        self._reading = False
        self._writing = False
        self._woken = False
        self._read_soon = False
        self._closed = False
        self._turn_end_s = 0.0
        client.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            client.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timer = self._loop.call_later(NEGOTIATION_TIMEOUT_S, self._too_slow)

    def begin(self) -> None:
        """Greet the client."""
        self._output += self._negotiation.greeting()
        self._want_read(True)
        self._on_writable()

    def close(self) -> None:
        """Drop the client. Its requests in flight complete without a reply, those that wait are given up."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._loop.remove(self._fd)
        self._socket.close()
        self._server.forget(self)
        if self._session is not None:
            assert self.vbd is not None
            self._session.dead = True
            self.vbd.abandon(self._session)

    def _fail(self, why: str) -> None:
        logger.warning("an NBD client was dropped: %s", why)
        self.close()

    def _too_slow(self) -> None:
        if self._session is None:
            self._fail(f"it had not chosen an export after {NEGOTIATION_TIMEOUT_S:g} s")

    def _want_read(self, want: bool) -> None:
        if want != self._reading:
            self._reading = want
            self._loop.add_reader(self._fd, self._on_readable if want else None)
        if want and self._secure is not None and self._secure.has_pending and not self._read_soon:
            self._read_soon = True
            self._loop.call_soon(self._read_pending)

    def _read_pending(self) -> None:
        """Take what TLS has received already, of which epoll does not know."""
        self._read_soon = False
        if self._reading and not self._closed:
            self._on_readable()

    def _want_write(self, want: bool) -> None:
        if want != self._writing:
            self._writing = want
            self._loop.add_writer(self._fd, self._on_writable if want else None)

    def _on_readable(self) -> None:
        self._guard(self._receive if self._session else
                    self._shake_hands if self._is_shaking_hands else self._negotiate)

    def _on_writable(self) -> None:
        self._guard(self._advance if self._session else
                    self._shake_hands if self._is_shaking_hands else self._send_negotiation)

    def _guard(self, action: Callable[[], None]) -> None:
        """Have a turn; whatever goes wrong in it ends this connection and nothing else."""
        self._turn_end_s = monotonic() + TURN_S
        try:
            action()
        except ProtocolError as error:
            self._fail(str(error))
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.EPIPE):
                logger.warning("an NBD client was dropped: %s", error)
            self.close()
        except Exception:
            self.close()
            raise

    # Negotiation

    def _negotiate(self) -> None:
        try:
            data = self._socket.recv(NEGOTIATION_RECV_BYTES)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        self._negotiation.feed(data)
        self._output += self._negotiation.output()
        self._send_negotiation()

    def _send_negotiation(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._output:
                del self._output[: self._socket.send(self._output)]
        if self._output:
            # Nothing more is read until the client has taken its replies.
            self._want_read(False)
            self._want_write(True)
            return
        self._want_write(False)
        if self._negotiation.wants_tls:
            self._begin_tls()
        elif self._negotiation.result is not None:
            self._end_negotiation(self._negotiation.result)
        elif self._negotiation.finished:
            if self._negotiation.error:
                self._fail(self._negotiation.error)
            else:
                self.close()
        else:
            self._want_read(True)

    def _begin_tls(self) -> None:
        assert self._server.tls is not None and isinstance(self._socket, socket.socket)
        self._socket = self._secure = TlsSocket.accepted(self._socket, self._server.tls)
        self._is_shaking_hands = True
        self._shake_hands()

    def _shake_hands(self) -> None:
        assert self._secure is not None
        wants = self._secure.handshake()
        self._want_write(bool(wants))
        if wants is None:
            self._is_shaking_hands = False
            self._negotiation.tls_begun()
        self._want_read(not wants)

    def _end_negotiation(self, result: Negotiated) -> None:
        # The client may have been here before: what is in flight from then must not come after what it says now.
        vbd = self._server.exports.get(result.export.name)
        if vbd is None:
            self._begin_session(result, None)
        else:
            self._want_read(False)
            vbd.after_strays(lambda: self._begin_session(result, vbd))

    def _begin_session(self, result: Negotiated, vbd: Vbd | None) -> None:
        if self._closed:
            return
        if vbd is None or vbd.state in (CLOSING, CLOSED):
            self._fail(f"export {result.export.name!r} was closed meanwhile")
            return
        self._timer.cancel()
        self.vbd = vbd
        align_bytes = vbd.info.min_block_bytes
        self._session = session = Session(
            vbd,
            size_bytes=vbd.info.size_bytes,
            read_only=vbd.read_only,
            structured=result.structured_replies,
            contexts=result.contexts,
            dirty_extents=self._dirty_extents,
            align_bytes=align_bytes,
            wake=self._wake,
        )
        session.feed(self._negotiation.leftover())
        self._want_read(True)
        self._wake()

    def _dirty_extents(self, log_name: str, offset: int, length: int) -> list[Extent]:
        assert self.vbd is not None
        tell = _logs(self.vbd).get(log_name)
        # A log that is gone (its disk was given another chain) knows nothing: all of it may have changed.
        return [(length, wire.QEMU_STATE_DIRTY)] if tell is None else tell(offset, length)

    # Transmission

    def _receive(self) -> None:
        session = self._session
        assert session is not None
        receive = self._socket.recv_into
        for _ in range(TURN_RECEIVES):
            view = session.recv_buffer()
            try:
                count_bytes = receive(view)
            except BlockingIOError:
                return
            if not count_bytes:
                self.close()
                return
            session.received(count_bytes)
            self._advance()
            if self._closed or not self._reading or count_bytes < min(len(view), MORE_BYTES):
                return

    def _advance(self) -> None:
        """Step and send until the received bytes are used up, or the client has to wait or has had its turn."""
        session = self._session
        assert session is not None
        more = in_turn = True
        while True:
            self._flush(session)
            if not more or not in_turn or session.replies.unsent_bytes > MAX_UNSENT_BYTES:
                break
            more = session.step()
            in_turn = not more or monotonic() < self._turn_end_s
        if not in_turn:
            self._wake()
        if session.closing and not session.late and not session.replies.unsent_bytes:
            self.close()
            return
        self._want_write(session.replies.unsent_bytes > 0)
        self._want_read(in_turn and not (session.closing or session.blocked
                                         or session.replies.unsent_bytes > MAX_UNSENT_BYTES))

    def _flush(self, session: Session) -> None:
        """Send what can be sent now."""
        replies = session.replies
        while replies.unsent_bytes:
            views = replies.output()
            try:
                count_bytes = self._socket.send(views[0]) if len(views) == 1 else self._socket.sendmsg(views)
            except BlockingIOError:
                return
            replies.sent(count_bytes)

    def _wake(self) -> None:
        """There is more to do, as a late reply to send, with the others of this turn: when the turn ends."""
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._late_replies)

    def _late_replies(self) -> None:
        self._woken = False
        if not self._closed:
            self._on_writable()
