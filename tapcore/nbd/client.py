"""A blocking NBD client: for tools, for tests and for load.

    with NbdClient("nbd+unix:///disk?socket=/run/nbd.sock", contexts=["base:allocation"]) as client:
        client.write(0, b"hello", fua=True)
        client.read(0, 5)
        client.block_status(0, client.size_bytes)["base:allocation"]

Many requests at once: `submit` as many as wanted, `wait` for each. Not to be shared between threads.
Addresses: `tapcore.nbd.address`.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeAlias

from tapcore.errors import UsageError
from tapcore.nbd import wire
from tapcore.nbd.address import NbdAddress, parse_address
from tapcore.nbd.client_codec import ClientNegotiation, NbdError, ServerOffer
from tapcore.nbd.reply_decoder import ReplyDecoder, Transaction
from tapcore.request import Extent

__all__ = ["NbdClient", "NbdError"]

HANDSHAKE_RECV_BYTES = 64 << 10

Data: TypeAlias = bytes | bytearray | memoryview
Answer: TypeAlias = bytearray | dict[str, list[Extent]] | None
"""What a read has read; what a block status has found, by context; None for every other command."""


class NbdClient:
    """One connection, past the handshake.

    Raises NbdError for what the server refuses (`errno` says why; ECONNRESET when it hung up, ETIMEDOUT when it
    did not answer for `timeout_s`), ProtocolError for garbage, OSError if there is no connection. After anything
    but a request that the server failed, the client is closed.
    """

    def __init__(
        self,
        uri: str | NbdAddress,
        *,
        structured_replies: bool = True,
        contexts: Sequence[str] = (),
        timeout_s: float = 30.0,
    ) -> None:
        self.address = parse_address(uri) if isinstance(uri, str) else uri
        self.timeout_s = timeout_s
        if self.address.tls:
            raise UsageError(f"{self.address.uri}: this client has no TLS", hint="nbd:tls-creds=DIR,nbds://… has")
        self.sock = self.address.connect(timeout_s)
        """For tests that must say something wrong."""
        self._poll = select.poll()
        self._last_cookie = 0
        negotiation = ClientNegotiation(self.address.export, structured_replies=structured_replies,
                                        contexts=contexts)
        try:
            self.offer = self._negotiate(negotiation)
            self._decoder = ReplyDecoder(self.offer.structured_replies)
            self._decoder.feed(negotiation.leftover())
            self.sock.setblocking(True)
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        return self.offer.size_bytes

    @property
    def flags(self) -> int:
        """NBD_FLAG_* of the transmission phase."""
        return self.offer.flags

    @property
    def read_only(self) -> bool:
        return bool(self.flags & wire.NBD_FLAG_READ_ONLY)

    @property
    def contexts(self) -> list[str]:
        """The metadata contexts that the server agreed to."""
        return list(self.offer.contexts.values())

    @property
    def in_flight(self) -> int:
        """Requests that were submitted and whose end `wait` has not told."""
        return len(self._decoder.pending) + len(self._decoder.finished)

    # One request at a time

    def read(self, offset: int, length: int, *, flags: int = 0) -> bytearray:
        return self._run(wire.NBD_CMD_READ, offset, length, flags).data

    def write(self, offset: int, data: Data, *, fua: bool = False) -> None:
        self._run(wire.NBD_CMD_WRITE, offset, len(data), fua_flag(fua), data)

    def flush(self) -> None:
        self._run(wire.NBD_CMD_FLUSH, 0, 0)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._run(wire.NBD_CMD_TRIM, offset, length, fua_flag(fua))

    def zeroes(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        """`no_hole` keeps the range allocated; with `fast` ENOTSUP says that writing would be as quick."""
        flags = (fua_flag(fua) | (wire.NBD_CMD_FLAG_NO_HOLE if no_hole else 0)
                 | (wire.NBD_CMD_FLAG_FAST_ZERO if fast else 0))
        self._run(wire.NBD_CMD_WRITE_ZEROES, offset, length, flags)

    def cache(self, offset: int, length: int) -> None:
        self._run(wire.NBD_CMD_CACHE, offset, length)

    def block_status(self, offset: int, length: int, *, one: bool = False) -> dict[str, list[Extent]]:
        """The extents from `offset` on by context; they may end before `length`. Only the first if `one`."""
        flags = wire.NBD_CMD_FLAG_REQ_ONE if one else 0
        return self._by_name(self._run(wire.NBD_CMD_BLOCK_STATUS, offset, length, flags))

    # Many requests at once

    def submit(self, command: int, offset: int, length: int, data: Data | None = None, flags: int = 0) -> int:
        """Send a request (NBD_CMD_*, with `data` for a write) and return its handle for `wait`."""
        self._last_cookie += 1
        cookie = self._last_cookie
        views = [memoryview(self._decoder.request(command, cookie, offset, length, flags))]
        if data:
            views.append(memoryview(data).cast("B"))
        try:
            self._send(views)
        except BaseException:
            self.close()
            raise
        return cookie

    def wait(self) -> tuple[int, int, Answer]:
        """The next request to end: (handle, errno or 0, answer). UsageError if there is none under way."""
        finished = self._decoder.finished
        if not finished and not self._decoder.pending:
            raise UsageError("there is no request under way to wait for")
        self._receive_until(lambda: bool(finished))
        transaction = finished.popleft()
        return transaction.cookie, transaction.error, self._answer(transaction)

    # The end

    def disconnect(self) -> None:
        """Say goodbye, and close. What is still under way is not waited for."""
        goodbye = wire.REQUEST.pack(magic=wire.NBD_REQUEST_MAGIC, flags=0, type=wire.NBD_CMD_DISC, cookie=0,
                                    offset=0, length=0)
        with contextlib.suppress(OSError):
            self.sock.send(goodbye, socket.MSG_DONTWAIT)
        self.close()

    def close(self) -> None:
        """Hang up without a word."""
        self.sock.close()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.disconnect()
        else:
            self.close()

    # Bytes

    def _negotiate(self, negotiation: ClientNegotiation) -> ServerOffer:
        try:
            while negotiation.result is None:
                data = self.sock.recv(HANDSHAKE_RECV_BYTES)
                if not data:
                    raise NbdError(f"{self.address}: the server hung up during the handshake",
                                   errno=errno.ECONNRESET, hint="is there such an export?")
                try:
                    negotiation.feed(data)
                except NbdError:
                    with contextlib.suppress(OSError):
                        self.sock.sendall(negotiation.output())
                    raise
                if output := negotiation.output():
                    self.sock.sendall(output)
        except OSError as error:
            raise self._broken(error) from error
        return negotiation.result

    def _run(
        self, command: int, offset: int, length: int, flags: int = 0, data: Data | None = None
    ) -> Transaction:
        """One request from its beginning to its end; NbdError if it fails."""
        cookie = self.submit(command, offset, length, data, flags)
        pending, finished = self._decoder.pending, self._decoder.finished
        self._receive_until(lambda: cookie not in pending)
        transaction = next(one for one in finished if one.cookie == cookie)
        finished.remove(transaction)
        if transaction.error:
            raise transaction.failed()
        return transaction

    def _answer(self, transaction: Transaction) -> Answer:
        if transaction.error:
            return None
        if transaction.command == wire.NBD_CMD_READ:
            return transaction.data
        if transaction.command == wire.NBD_CMD_BLOCK_STATUS:
            return self._by_name(transaction)
        return None

    def _by_name(self, transaction: Transaction) -> dict[str, list[Extent]]:
        names = self.offer.contexts
        return {names[id]: extents for id, extents in transaction.extents.items() if id in names}

    def _send(self, views: list[memoryview]) -> None:
        """Send all of `views`, taking replies meanwhile: a server may not receive while its own are stuck."""
        while views:
            try:
                sent = self.sock.sendmsg(views, (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                if self._wait_for(select.POLLIN | select.POLLOUT) & ~select.POLLOUT:
                    self._receive()
                continue
            except OSError as error:
                raise self._broken(error) from error
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def _receive_until(self, ready: Callable[[], bool]) -> None:
        try:
            while not ready():
                self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> None:
        """Receive once, waiting for it."""
        room = self._decoder.room()
        try:
            count_bytes = self.sock.recv_into(room, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._wait_for(select.POLLIN)
            return
        except OSError as error:
            raise self._broken(error) from error
        if not count_bytes:
            raise NbdError(f"{self.address}: the server hung up with {len(self._decoder.pending)} requests "
                           "under way", errno=errno.ECONNRESET)
        self._decoder.received(count_bytes)

    def _wait_for(self, events: int) -> int:
        """Which of the poll `events` came; NbdError if none did in time."""
        self._poll.register(self.sock, events)
        ready = self._poll.poll(self.timeout_s * 1000)
        if not ready:
            raise NbdError(f"{self.address}: no answer for {self.timeout_s} s", errno=errno.ETIMEDOUT)
        return ready[0][1]

    def _broken(self, error: OSError) -> NbdError:
        if isinstance(error, TimeoutError):
            return NbdError(f"{self.address}: no answer for {self.timeout_s} s", errno=errno.ETIMEDOUT)
        return NbdError(f"{self.address}: the connection broke: {error.strerror}",
                        errno=error.errno or errno.ECONNRESET)


def fua_flag(fua: bool) -> int:
    return wire.NBD_CMD_FLAG_FUA if fua else 0
