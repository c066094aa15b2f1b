"""The client's side of the NBD handshake without I/O. What follows it is in `tapcore.nbd.reply_decoder`.

Specification: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tapcore.errors import ProtocolError, WritelogError
from tapcore.layout import Layout
from tapcore.nbd import wire

MAX_OPTION_REPLY_BYTES: Final = 64 << 10
MAX_OPTION_REPLIES: Final = 4096
"""What is taken of one option reply, and how many of them to one option."""

CLISERV_MAGIC: Final = 0x00420281861253
"""Where IHAVEOPT is expected, this says oldstyle negotiation."""

REFUSALS: Final[dict[int, tuple[int, str]]] = {
    wire.NBD_REP_ERR_UNSUP: (errno.EOPNOTSUPP, "not supported"),
    wire.NBD_REP_ERR_POLICY: (errno.EACCES, "forbidden by the server's policy"),
    wire.NBD_REP_ERR_INVALID: (errno.EINVAL, "invalid"),
    wire.NBD_REP_ERR_PLATFORM: (errno.EOPNOTSUPP, "not supported on the server's platform"),
    wire.NBD_REP_ERR_TLS_REQD: (errno.EACCES, "refused without TLS"),
    wire.NBD_REP_ERR_UNKNOWN: (errno.ENOENT, "no such export"),
    wire.NBD_REP_ERR_SHUTDOWN: (errno.ESHUTDOWN, "the server is shutting down"),
    wire.NBD_REP_ERR_BLOCK_SIZE_REQD: (errno.EINVAL, "refused without block sizes"),
    wire.NBD_REP_ERR_TOO_BIG: (errno.E2BIG, "too big"),
}


class NbdError(WritelogError):
    """The server refused an export or failed a request; `errno` is what it said."""


@dataclass(frozen=True)
class ServerOffer:
    """What the handshake told of the export. Sizes in bytes."""

    size_bytes: int
    flags: int
    structured_replies: bool
    contexts: dict[int, str]
    """Name by id of the metadata contexts that were selected."""
    min_block: int
    preferred_block: int
    max_block: int


class ClientNegotiation:
    """Asks for one export: NBD_OPT_STRUCTURED_REPLY and NBD_OPT_SET_META_CONTEXT where wanted, then NBD_OPT_GO,
    or NBD_OPT_EXPORT_NAME with a server that knows no better.

    `feed` raises NbdError when the server refuses, ProtocolError when it sends garbage. `result` is set when the
    transmission phase begins.
    """

    def __init__(self, export: str, *, structured_replies: bool = True, contexts: Sequence[str] = (),
                 uses_tls: bool = False) -> None:
        """With `uses_tls` nothing is told to a server that does not begin TLS first."""
        self.result: ServerOffer | None = None
        self.wants_tls = False
        """TLS's handshake is due now; then `tls_begun`."""
        self._uses_tls = uses_tls
        self._export = export
        self._queries = contexts
        self._options = [wire.NBD_OPT_GO]
        if structured_replies and contexts:
            self._options.append(wire.NBD_OPT_SET_META_CONTEXT)
        if structured_replies:
            self._options.append(wire.NBD_OPT_STRUCTURED_REPLY)
        if uses_tls:
            self._options.append(wire.NBD_OPT_STARTTLS)
        self._option = 0
        self._reply_type = 0
        self._replies_seen = 0
        self._no_zeroes = False
        self._structured_replies = False
        self._contexts: dict[int, str] = {}
        self._size_and_flags: tuple[int, int] | None = None
        self._blocks = (1, 4096, wire.DEFAULT_MAX_PAYLOAD_BYTES)
        self._buffer = bytearray()
        self._output = bytearray()
        self._step: Callable[[bytes], None] = self._greeting
        self._needed_bytes = wire.GREETING.size

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the server sent."""
        self._buffer += data
        while self.result is None and len(self._buffer) >= self._needed_bytes:
            piece = bytes(self._buffer[: self._needed_bytes])
            del self._buffer[: self._needed_bytes]
            self._step(piece)
            if self.wants_tls and self._buffer:
                # It may be anybody's who sits in between: it must not count as said inside TLS.
                raise ProtocolError("the server sent bytes after NBD_OPT_STARTTLS that do not belong to TLS")

    def tls_begun(self) -> None:
        """TLS's handshake has ended well."""
        self.wants_tls = False
        self._next_option()

    def output(self) -> bytes:
        """What is to be sent now; it is forgotten here. After an NbdError: a polite NBD_OPT_ABORT."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def leftover(self) -> bytes:
        """What came after the handshake; it is forgotten here."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    # Steps: each takes the bytes it asked for, and says what comes next.

    def _greeting(self, piece: bytes) -> None:
        nbdmagic, ihaveopt, flags = wire.GREETING.struct.unpack(piece)
        if nbdmagic != wire.NBDMAGIC:
            raise ProtocolError(f"the server is no NBD server: its greeting begins with {piece[:8]!r}")
        if ihaveopt != wire.IHAVEOPT:
            style = "oldstyle negotiation" if ihaveopt == CLISERV_MAGIC else f"the magic {ihaveopt:#018x}"
            raise ProtocolError(f"the server greets with {style}, which is not supported")
        fixed = bool(flags & wire.NBD_FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & wire.NBD_FLAG_NO_ZEROES)
        self._output += wire.CLIENT_FLAGS.pack(flags=(wire.NBD_FLAG_C_FIXED_NEWSTYLE if fixed else 0)
                                               | (wire.NBD_FLAG_C_NO_ZEROES if self._no_zeroes else 0))
        if fixed:
            self._next_option()
        elif self._uses_tls:
            raise ProtocolError("the server is too old for TLS")
        else:
            self._ask_export_name()

    def _reply_header(self, piece: bytes) -> None:
        magic, option, reply_type, length = wire.OPTION_REPLY.struct.unpack(piece)
        if magic != wire.NBD_REP_MAGIC:
            raise ProtocolError(f"an option reply with the magic {magic:#018x}, not {wire.NBD_REP_MAGIC:#018x}")
        if option != self._option:
            raise ProtocolError(f"a reply to option {option} where one to option {self._option} was due")
        self._replies_seen += 1
        if self._replies_seen > MAX_OPTION_REPLIES:
            raise ProtocolError(f"more than {MAX_OPTION_REPLIES} replies to option {option}")
        if length > MAX_OPTION_REPLY_BYTES:
            raise ProtocolError(f"an option reply of {length} bytes; at most {MAX_OPTION_REPLY_BYTES} are read")
        self._reply_type = reply_type
        self._step = self._reply_data
        self._needed_bytes = length

    def _reply_data(self, data: bytes) -> None:
        self._await_reply()
        reply_type = self._reply_type
        if reply_type & wire.NBD_REP_FLAG_ERROR:
            self._refused(reply_type, data)
        elif reply_type == wire.NBD_REP_ACK:
            self._acknowledged()
        elif reply_type == wire.NBD_REP_INFO:
            self._info(data)
        elif reply_type == wire.NBD_REP_META_CONTEXT:
            self._contexts[self._field(wire.META_CONTEXT, data)] = decode(data[wire.META_CONTEXT.size :])
        else:
            raise ProtocolError(f"an unexpected reply of type {reply_type} to option {self._option}")

    def _export_reply(self, piece: bytes) -> None:
        self._size_and_flags = wire.EXPORT_REPLY.struct.unpack_from(piece)
        self._begin()

    # Options and their outcome.

    def _next_option(self) -> None:
        option = self._options.pop()
        name = string(self._export)
        data = b""
        if option == wire.NBD_OPT_SET_META_CONTEXT:
            data = name + wire.LENGTH.pack(value=len(self._queries)) + b"".join(map(string, self._queries))
        elif option == wire.NBD_OPT_GO:
            data = name + wire.INFO_COUNT.pack(value=1) + wire.INFO_TYPE.pack(type=wire.NBD_INFO_BLOCK_SIZE)
        self._send(option, data)
        self._await_reply()

    def _await_reply(self) -> None:
        self._step = self._reply_header
        self._needed_bytes = wire.OPTION_REPLY.size

    def _ask_export_name(self) -> None:
        self._send(wire.NBD_OPT_EXPORT_NAME, self._export.encode())
        self._step = self._export_reply
        self._needed_bytes = wire.EXPORT_REPLY.size + (0 if self._no_zeroes else len(wire.RESERVED_ZEROES))

    def _send(self, option: int, data: bytes) -> None:
        self._option = option
        self._replies_seen = 0
        self._output += wire.OPTION.pack(magic=wire.IHAVEOPT, option=option, length=len(data)) + data

    def _acknowledged(self) -> None:
        if self._option == wire.NBD_OPT_GO:
            self._begin()
            return
        if self._option == wire.NBD_OPT_STARTTLS:
            self.wants_tls = True
            return
        if self._option == wire.NBD_OPT_STRUCTURED_REPLY:
            self._structured_replies = True
        self._next_option()

    def _refused(self, reply_type: int, data: bytes) -> None:
        """Without structured replies or contexts one can live; without the export not."""
        if self._option == wire.NBD_OPT_STRUCTURED_REPLY:
            self._options = [wire.NBD_OPT_GO]
            self._next_option()
        elif self._option == wire.NBD_OPT_SET_META_CONTEXT:
            self._contexts.clear()
            self._next_option()
        elif reply_type == wire.NBD_REP_ERR_UNSUP and self._option != wire.NBD_OPT_STARTTLS:
            self._ask_export_name()
        else:
            code, meaning = REFUSALS.get(reply_type, (errno.EPROTO, f"refused with error {reply_type:#x}"))
            if self._option == wire.NBD_OPT_STARTTLS:
                meaning = "the server has no TLS"
            self._send(wire.NBD_OPT_ABORT, b"")
            text = f" ({data.decode(errors='replace')})" if data else ""
            raise NbdError(f"export {self._export!r}: {meaning}{text}", errno=code)

    def _info(self, data: bytes) -> None:
        info = self._field(wire.INFO_TYPE, data)
        if info == wire.NBD_INFO_EXPORT and len(data) == wire.INFO_EXPORT.size:
            self._size_and_flags = wire.INFO_EXPORT.struct.unpack(data)[1:]
        elif info == wire.NBD_INFO_BLOCK_SIZE and len(data) == wire.INFO_BLOCK_SIZE.size:
            self._blocks = wire.INFO_BLOCK_SIZE.struct.unpack(data)[1:]

    def _field(self, layout: Layout, data: bytes) -> int:
        if len(data) < layout.size:
            raise ProtocolError(f"{layout.title}: {len(data)} bytes instead of {layout.size}")
        return int(layout.struct.unpack_from(data)[0])

    def _begin(self) -> None:
        if self._size_and_flags is None:
            raise ProtocolError("the server agreed to NBD_OPT_GO without NBD_INFO_EXPORT")
        self.result = ServerOffer(*self._size_and_flags, self._structured_replies, self._contexts, *self._blocks)


def string(text: str) -> bytes:
    """A string with its length before it."""
    data = text.encode()
    return wire.LENGTH.pack(value=len(data)) + data


def decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"the server sent a name that is no UTF-8: {data[:80]!r}") from None
