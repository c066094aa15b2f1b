"""One connection of the `nbd` driver to its server: `Dial` makes it, `Link` is it, past the handshake."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from tapcore.errors import ImageError, ProtocolError, WritelogError
from tapcore.loop import Loop, Timer
from tapcore.nbd import wire
from tapcore.nbd.address import NbdAddress
from tapcore.nbd.client_codec import ClientNegotiation, NbdError, ServerOffer
from tapcore.nbd.reply_decoder import ReplyDecoder, Transaction
from tapcore.nbd.tls import TlsSocket

HANDSHAKE_RECV_BYTES: Final = 64 << 10
SOCKET_BUFFER_BYTES: Final = 4 << 20
IOV_MAX: Final = 1024
"""Buffers that one sendmsg takes."""
TURN_RECEIVES: Final = 16
"""Receives before other descriptors have their turn."""
MORE_BYTES: Final = 128 << 10
"""After a receive of so many bytes more is on its way: ask again before going back to the loop."""
SILENT_TICKS: Final = 5
"""A server is watched in so many steps: it is found silent between the timeout and six fifths of it."""

_pack_request = wire.REQUEST.struct.pack_into
_HEADER_BYTES: Final = wire.REQUEST.size
_WRITE: Final = wire.NBD_CMD_WRITE
_MAGIC: Final = wire.NBD_REQUEST_MAGIC


class Dial:
    """One attempt to connect and to agree on the export. `run` blocks, for `timeout_s` at most; `cancel` may come
    from another thread."""

    def __init__(self, address: NbdAddress, timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        """With `tls`, nothing is said to a server that does not prove itself with it."""
        self._tls = tls
        self.sock: socket.socket | None = None
        self.offer: ServerOffer | None = None
        """Set, with `sock`, when `run` succeeded."""
        self.error: WritelogError | None = None
        self._address = address
        self._timeout_s = timeout_s
        self._cancelled = False

    def run(self) -> None:
        """Sets `offer` or `error`; raises nothing."""
        try:
            self.offer = self._agree()
        except WritelogError as error:
            self.error = error
        except OSError as error:
            self.error = self._failed(error)
        if self.sock is not None and (self.offer is None or self._cancelled):
            self.sock.close()

    def cancel(self) -> None:
        """Let `run` end soon, without a connection."""
        self._cancelled = True
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def _agree(self) -> ServerOffer:
        deadline_s = time.monotonic() + self._timeout_s
        self.sock = sock = self._address.connect(self._timeout_s)
        negotiation = ClientNegotiation(self._address.export, contexts=(wire.BASE_ALLOCATION,),
                                        uses_tls=self._tls is not None)
        while negotiation.result is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._cancelled:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            sock.settimeout(left_s)
            data = sock.recv(HANDSHAKE_RECV_BYTES)
            if not data:
                raise ImageError(f"{self._address}: the server hung up during the handshake",
                                 errno=errno.ECONNRESET, hint="is it an NBD server, with such an export?")
            try:
                negotiation.feed(data)
            except ProtocolError as error:
                raise ImageError(f"{self._address}: {error.message}", errno=error.errno) from error
            except NbdError as error:
                with contextlib.suppress(OSError):
                    sock.sendall(negotiation.output())
                raise ImageError(f"{self._address}: {error.message}", errno=error.errno,
                                 hint=f"nbdinfo --list '{self._address.uri}' shows what there is") from error
            if negotiation.wants_tls:
                assert self._tls is not None
                self.sock = sock = self._tls.wrap_socket(sock, server_hostname=self._address.host)
                negotiation.tls_begun()
            sock.sendall(negotiation.output())
        if negotiation.leftover():
            raise ImageError(f"{self._address}: the server replied before it was asked", errno=errno.EPROTO)
        return negotiation.result

    def _failed(self, error: OSError) -> ImageError:
        if isinstance(error, TimeoutError):
            return ImageError(f"{self._address}: no answer for {self._timeout_s:g} s", errno=errno.ETIMEDOUT,
                              hint="is the server stopped, or busy with another client?")
        if isinstance(error, ssl.SSLError):
            return ImageError(f"{self._address}: TLS fails: {error.strerror or error}", errno=errno.EACCES,
                              hint="each end's certificate must be signed by the other's ca-cert.pem, and the "
                                   "server's be for the host that is named here")
        return ImageError(f"cannot connect to {self._address}: {error.strerror or error}",
                          errno=error.errno or errno.ENOTCONN, hint="is the NBD server running there?")


class Link:
    """A connection in the transmission phase.

    `finished(link)` is called when there is something in `decoder.finished`, `lost(link, why)` once, when the
    connection has come to its end; what is in `decoder.pending` then will have no reply. `writable()` is called
    when a `blocked` link is no longer so. With `timeout_s` not 0, a server that owes a reply and sends nothing for
    about that long is given up.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        offer: ServerOffer,
        timeout_s: float,
        *,
        finished: Callable[[Link], None],
        lost: Callable[[Link, str], None],
        writable: Callable[[], None],
    ) -> None:
        self.decoder = ReplyDecoder(offer.structured_replies)
        self.offer = offer
        self.born_s = loop.time_s()
        self.proven = False
        """It has brought a reply."""
        self.blocked = False
        """The server does not take what was sent: send no more until `writable`."""
        self.closed = False
        self.timed_out = False
        """It was given up because of the server's silence."""
        self._loop = loop
        self._socket = TlsSocket(sock) if isinstance(sock, ssl.SSLSocket) else sock
        self._fd = sock.fileno()
        self._timeout_s = timeout_s
        self._on_finished = finished
        self._on_lost = lost
        self._on_free = writable
        self._unsent: list[memoryview] = []
        self._cookie = 0
        self._heard = False
        self._silent_ticks = 0
        self._timer: Timer | None = None
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        loop.add_reader(self._fd, self._on_readable)
        if timeout_s:
            self._watch()

    def send(self, batch: Sequence[Transaction]) -> None:
        """Send requests, and await their replies. Not to be called while `blocked` or `closed`."""
        pending, unsent, cookie = self.decoder.pending, self._unsent, self._cookie
        headers = memoryview(bytearray(_HEADER_BYTES * len(batch)))
        start = at = size_bytes = 0
        for transaction in batch:
            cookie += 1
            transaction.cookie = cookie
            pending[cookie] = transaction
            command = transaction.command
            _pack_request(headers, at, _MAGIC, transaction.flags, command, cookie, transaction.offset,
                          transaction.length)
            at += _HEADER_BYTES
            if command == _WRITE:
                unsent.append(headers[start:at])
                unsent.extend(transaction.iov)
                size_bytes += transaction.length
                start = at
        if start < at:
            unsent.append(headers[start:at])
        self._cookie = cookie
        self._flush(size_bytes + at)

    def close(self, *, goodbye: bool = False) -> None:
        """Hang up; with `goodbye`, say so first if that does not wait."""
        if self.closed:
            return
        self.closed = True
        if goodbye and not self._unsent:
            with contextlib.suppress(OSError):
                self._socket.send(wire.REQUEST.pack(magic=_MAGIC, flags=0, type=wire.NBD_CMD_DISC, cookie=0,
                                                    offset=0, length=0))
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove(self._fd)
        self._socket.close()

    def give_up(self, why: str) -> None:
        """Hang up because of the server."""
        if not self.closed:
            self.close()
            self._on_lost(self, why)

    def _flush(self, size_bytes: int) -> None:
        """Send of `_unsent`, which is `size_bytes` or more, what the socket takes."""
        unsent = self._unsent
        try:
            while unsent:
                sent = self._socket.sendmsg(unsent if len(unsent) <= IOV_MAX else list(islice(unsent, IOV_MAX)))
                if sent == size_bytes:
                    unsent.clear()
                    break
                size_bytes -= sent
                _drop(unsent, sent)
        except BlockingIOError:
            if not self.blocked:
                self.blocked = True
                self._loop.add_writer(self._fd, self._on_writable)
        except OSError as error:
            # Not from here: who sends is not prepared for the end of the link.
            why = _said(error)
            self.blocked = True
            self._loop.call_soon(lambda: self.give_up(why))

    def _on_writable(self) -> None:
        self._flush(sum(map(len, self._unsent)))
        if self.blocked and not self._unsent:
            self.blocked = False
            self._loop.add_writer(self._fd, None)
            self._on_free()

    def _on_readable(self) -> None:
        decoder, receive = self.decoder, self._socket.recv_into
        for _ in range(TURN_RECEIVES):
            room = decoder.room()
            why = ""
            try:
                count_bytes = receive(room)
                if count_bytes:
                    decoder.received(count_bytes)
                else:
                    why = "the server hung up"
            except BlockingIOError:
                return
            except OSError as error:
                why = _said(error)
            except ProtocolError as error:
                why = f"the server sent {error}"
            self._heard = True
            try:
                if decoder.finished:
                    self._on_finished(self)
            finally:
                if why:
                    self.give_up(why)
            if self.closed or count_bytes < min(len(room), MORE_BYTES):
                return
        if isinstance(self._socket, TlsSocket) and self._socket.has_pending:
            # It has left the descriptor, which will not tell of it again.
            self._loop.call_soon(self._on_pending)

    def _on_pending(self) -> None:
        if not self.closed:
            self._on_readable()

    def _watch(self) -> None:
        """Count the ticks without a sign of life while a reply is due."""
        if self._heard or not self.decoder.pending:
            self._silent_ticks = 0
        else:
            self._silent_ticks += 1
        self._heard = False
        if self._silent_ticks > SILENT_TICKS:
            self.timed_out = True
            self.give_up(f"no reply for {self._timeout_s:g} s")
        else:
            self._timer = self._loop.call_later(self._timeout_s / SILENT_TICKS, self._watch)


def _drop(views: list[memoryview], count_bytes: int) -> None:
    """Forget the first `count_bytes` of `views`."""
    whole = 0
    for view in views:
        if count_bytes < len(view):
            break
        count_bytes -= len(view)
        whole += 1
    del views[:whole]
    if count_bytes:
        views[0] = views[0][count_bytes:]


def _said(error: OSError) -> str:
    return f"the connection broke: {error.strerror or error}"
