"""The server's side of the fixed newstyle handshake, as a state machine: bytes in, bytes out.

    greeting ▶ client flags ▶ option header ◀──▶ option data (kept, or skipped when it is too long)
                                    ├─▶ `wants_tls` send `output()`, shake hands, `tls_begun()`; options again
                                    ├─▶ `result`    the transmission phase begins
                                    └─▶ `finished`  send what is left in `output()`, then close

    negotiation = ServerNegotiation(exports)
    send(negotiation.greeting())
    while negotiation.result is None and not negotiation.finished:
        negotiation.feed(receive())
        send(negotiation.output())

Specification: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
and, for the contexts of the namespace qemu, https://www.qemu.org/docs/master/interop/nbd.html
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Protocol

from tapcore.layout import Layout
from tapcore.nbd import wire

MAX_OPTION_BYTES: Final = 64 << 10
"""The longest option data that is read; what is longer is skipped and answered NBD_REP_ERR_TOO_BIG."""
MAX_SKIPPED_BYTES: Final = 1 << 20
"""The longest option data that is skipped; a client that announces more is hung up on."""
MAX_QUERIES: Final = 256
"""Queries for metadata contexts in one option."""
MAX_OPTIONS: Final = 1024
"""Options of one client before it is taken for one that never comes to the point."""
SHOWN_CHARACTERS: Final = 80
"""How much of a client's string an error text repeats."""

CLIENT_FLAGS_KNOWN: Final = wire.NBD_FLAG_C_FIXED_NEWSTYLE | wire.NBD_FLAG_C_NO_ZEROES
_BEFORE_TLS: Final = (wire.NBD_OPT_STARTTLS, wire.NBD_OPT_ABORT)
OPTION_NAMES: Final = {value: name for name, value in vars(wire).items() if name.startswith("NBD_OPT_")}


@dataclass(frozen=True)
class ExportInfo:
    """What the handshake tells of one export. `flags` are the NBD_FLAG_* of the transmission phase."""

    name: str
    size_bytes: int
    flags: int
    description: str = ""
    min_block: int = 1
    """Bytes, a power of two."""
    preferred_block: int = 4096
    """Bytes, a power of two, at least 512 and `min_block`."""
    max_block: int = wire.DEFAULT_MAX_PAYLOAD_BYTES
    """The longest payload of one request, in bytes; a multiple of `min_block`."""
    contexts: tuple[str, ...] = ()
    """The metadata contexts that can be selected, such as base:allocation."""


class Exports(Protocol):
    """What a server has to offer."""

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of each export."""

    def find(self, name: str) -> ExportInfo | None:
        """The export called `name` ("" is the default one, see `resolve_name`), or None."""


@dataclass(frozen=True)
class Negotiated:
    """What client and server agreed on."""

    export: ExportInfo
    flags: int
    """The transmission flags as the client was told them: without NBD_FLAG_SEND_DF if replies are simple."""
    structured_replies: bool
    no_zeroes: bool
    contexts: list[tuple[int, str]]
    """(id, name) of the metadata contexts that a block status answers; none without structured replies."""


class OptionError(Exception):
    """An option that is refused with the reply `type`; the connection lives."""

    def __init__(self, type: int, text: str) -> None:
        super().__init__(text)
        self.type = type
        self.text = text


def resolve_name(names: Collection[str], wanted: str) -> str | None:
    """The export that `wanted` means: itself, or for "" the one called "default", or the only one; else None."""
    if wanted in names:
        return wanted
    if wanted:
        return None
    if "default" in names:
        return "default"
    return next(iter(names)) if len(names) == 1 else None


def shown(text: str) -> str:
    """`text` of a peer, fit for an error message."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")


def option_name(option: int) -> str:
    return OPTION_NAMES.get(option, f"option {option}")


def decode_string(data: bytes, what: str) -> str:
    """`data` as the string that the protocol allows; OptionError names `what` is wrong."""
    if len(data) > wire.MAX_STRING_BYTES:
        raise OptionError(wire.NBD_REP_ERR_TOO_BIG,
                          f"the {what} has {len(data)} bytes; at most {wire.MAX_STRING_BYTES} are allowed")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise OptionError(wire.NBD_REP_ERR_INVALID,
                          f"the {what} is no UTF-8 (byte {error.start})") from None
    if "\0" in text:
        raise OptionError(wire.NBD_REP_ERR_INVALID, f"the {what} has a NUL in it")
    return text


def encode_string(text: str) -> bytes:
    """Our own `text` (a name, a description that holds a path) as the protocol allows it: UTF-8, not too long."""
    data = text.encode(errors="replace")
    if len(data) > wire.MAX_STRING_BYTES:
        data = data[: wire.MAX_STRING_BYTES].decode(errors="ignore").encode()
    return data


class OptionData:
    """Reads the data of one option from left to right; OptionError where it ends too soon or too late."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def number(self, layout: Layout, what: str) -> int:
        return int(layout.struct.unpack(self._take(layout.size, what))[0])

    def string(self, what: str) -> str:
        """A string with its length before it."""
        return decode_string(self._take(self.number(wire.LENGTH, f"length of the {what}"), what), what)

    def end(self) -> None:
        extra_bytes = len(self._data) - self._position
        if extra_bytes:
            raise OptionError(wire.NBD_REP_ERR_INVALID, f"{extra_bytes} bytes too many at the end")

    def _take(self, length: int, what: str) -> bytes:
        start = self._position
        if length > len(self._data) - start:
            raise OptionError(wire.NBD_REP_ERR_INVALID,
                              f"the data ends inside the {what} ({len(self._data) - start} of {length} bytes)")
        self._position += length
        return self._data[start : self._position]


def match_contexts(available: tuple[str, ...], queries: list[str], *, wildcards: bool) -> list[str]:
    """The contexts of `available` that a query names, each once. With `wildcards` a query that ends in a
    colon ("base:", "qemu:dirty-bitmap:") means all that start with it. Unknown queries match nothing."""
    return [name for name in available
            if any(name == query or (wildcards and query.endswith(":") and name.startswith(query))
                   for query in queries)]


class ServerNegotiation:
    """One connection's handshake. It never raises for what a client sends: it answers, or it finishes.

    `result` is set when the transmission phase begins; `finished` when the connection must be closed (after
    `output()` was sent), with the reason in `error`, which is "" after a client's NBD_OPT_ABORT.
    """

    def __init__(self, exports: Exports, *, uses_tls: bool = False) -> None:
        """With `uses_tls` nothing is told or given to a client before it has begun TLS (the specification's
        FORCEDTLS)."""
        self.wants_tls = False
        """The client may begin TLS's handshake when it has `output()`."""
        self.result: Negotiated | None = None
        self.finished = False
        self.error = ""
        self._exports = exports
        self._uses_tls = uses_tls
        self._is_secure = False
        self._buffer = bytearray()
        self._output = bytearray()
        self._step: Callable[[bytes], None] = self._client_flags
        self._needed_bytes = wire.CLIENT_FLAGS.size
        self._fixed_newstyle = False
        self._no_zeroes = False
        self._structured_replies = False
        self._options_seen = 0
        self._option = 0
        self._skip_bytes = 0
        self._contexts_export = ""
        self._contexts: list[tuple[int, str]] = []
        self._handlers: dict[int, Callable[[OptionData], None]] = {
            wire.NBD_OPT_LIST: self._list,
            wire.NBD_OPT_INFO: self._info,
            wire.NBD_OPT_GO: self._info,
            wire.NBD_OPT_STRUCTURED_REPLY: self._structured_reply,
            wire.NBD_OPT_LIST_META_CONTEXT: self._list_meta_context,
            wire.NBD_OPT_SET_META_CONTEXT: self._set_meta_context,
        }
        if uses_tls:
            self._handlers[wire.NBD_OPT_STARTTLS] = self._starttls

    def greeting(self) -> bytes:
        """What the server sends first."""
        return wire.GREETING.pack(nbdmagic=wire.NBDMAGIC, ihaveopt=wire.IHAVEOPT,
                                  handshake_flags=wire.NBD_FLAG_FIXED_NEWSTYLE | wire.NBD_FLAG_NO_ZEROES)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent. At most MAX_OPTION_BYTES of it are kept until the next call, and what
        follows the handshake."""
        if self.finished:
            return
        buffer = self._buffer
        buffer += data
        while self.result is None:
            if self.wants_tls and buffer:
                # It may be anybody's who sits in between: it must not count as said inside TLS.
                self._finish("bytes after NBD_OPT_STARTTLS that do not belong to TLS")
                buffer.clear()
                return
            if self._skip_bytes:
                skipped = min(self._skip_bytes, len(buffer))
                del buffer[:skipped]
                self._skip_bytes -= skipped
            if self._skip_bytes or len(buffer) < self._needed_bytes:
                return
            piece = bytes(buffer[: self._needed_bytes])
            del buffer[: self._needed_bytes]
            self._step(piece)
            if self.finished:
                buffer.clear()
                return

    def output(self) -> bytes:
        """What is to be sent now; it is forgotten here."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def leftover(self) -> bytes:
        """What came after the handshake and belongs to the transmission phase; it is forgotten here."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    # Steps: each takes the bytes it asked for, and says what comes next.

    def _client_flags(self, piece: bytes) -> None:
        flags = wire.CLIENT_FLAGS.unpack(piece)["flags"]
        if flags & ~CLIENT_FLAGS_KNOWN:
            self._finish(f"unknown client flags {flags:#x}")
            return
        self._fixed_newstyle = bool(flags & wire.NBD_FLAG_C_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & wire.NBD_FLAG_C_NO_ZEROES)
        self._next_option()

    def _option_header(self, piece: bytes) -> None:
        magic, option, length = wire.OPTION.struct.unpack(piece)
        self._option = option
        self._options_seen += 1
        if magic != wire.IHAVEOPT:
            self._finish(f"option {self._options_seen} has the magic {magic:#018x} "
                         f"instead of {wire.IHAVEOPT:#018x} (IHAVEOPT)")
        elif option != wire.NBD_OPT_EXPORT_NAME and not self._fixed_newstyle:
            self._finish(f"{option_name(option)} from a client that did not set NBD_FLAG_C_FIXED_NEWSTYLE")
        elif self._options_seen > MAX_OPTIONS:
            self._finish(f"more than {MAX_OPTIONS} options")
        elif option == wire.NBD_OPT_EXPORT_NAME and length > wire.MAX_STRING_BYTES:
            self._finish(f"an export name of {length} bytes; at most {wire.MAX_STRING_BYTES} are allowed")
        elif length > MAX_SKIPPED_BYTES:
            self._finish(f"{option_name(option)} announces {length} bytes of data; "
                         f"more than {MAX_SKIPPED_BYTES} are not even skipped")
        elif length > MAX_OPTION_BYTES:
            self._skip_bytes = length
            self._refuse(wire.NBD_REP_ERR_TOO_BIG,
                         f"{length} bytes of option data; at most {MAX_OPTION_BYTES} are read")
        else:
            self._step = self._option_data
            self._needed_bytes = length

    def _option_data(self, data: bytes) -> None:
        option = self._option
        self._next_option()
        if self._uses_tls and not self._is_secure and option not in _BEFORE_TLS:
            if option == wire.NBD_OPT_EXPORT_NAME:
                self._finish("a client that does not use TLS, which is required")
            else:
                self._refuse(wire.NBD_REP_ERR_TLS_REQD, "TLS is required: NBD_OPT_STARTTLS first")
        elif option == wire.NBD_OPT_EXPORT_NAME:
            self._export_name(data)
        elif option == wire.NBD_OPT_ABORT:
            self._reply(wire.NBD_REP_ACK)
            self._finish("")
        elif option in self._handlers:
            try:
                self._handlers[option](OptionData(data))
            except OptionError as error:
                self._refuse(error.type, error.text)
        else:
            self._refuse(wire.NBD_REP_ERR_UNSUP, f"{option_name(option)} is not supported")

    def _next_option(self) -> None:
        self._step = self._option_header
        self._needed_bytes = wire.OPTION.size

    # Options.

    def _starttls(self, data: OptionData) -> None:
        data.end()
        if self._is_secure:
            raise OptionError(wire.NBD_REP_ERR_INVALID, "TLS has begun already")
        self._reply(wire.NBD_REP_ACK)
        self.wants_tls = True

    def tls_begun(self) -> None:
        """TLS's handshake has ended well. What was said before it is forgotten: anybody might have said it."""
        self.wants_tls = False
        self._is_secure = True
        self._structured_replies = False
        self._contexts = []
        self._contexts_export = ""

    def _export_name(self, data: bytes) -> None:
        try:
            name = decode_string(data, "export name")
        except OptionError as error:
            self._finish(error.text)
            return
        export = self._exports.find(name)
        if export is None:
            self._finish(f"there is no export {shown(name)}")
            return
        self._begin(export)
        self._output += wire.EXPORT_REPLY.pack(size_bytes=export.size_bytes, flags=self._flags(export))
        if not self._no_zeroes:
            self._output += wire.RESERVED_ZEROES

    def _list(self, data: OptionData) -> None:
        data.end()
        for name, description in self._exports.names():
            encoded = encode_string(name)
            self._reply(wire.NBD_REP_SERVER,
                        wire.LENGTH.pack(value=len(encoded)) + encoded + encode_string(description))
        self._reply(wire.NBD_REP_ACK)

    def _info(self, data: OptionData) -> None:
        """NBD_OPT_INFO and NBD_OPT_GO: export and block sizes always, the rest when it is asked for."""
        name = data.string("export name")
        count = data.number(wire.INFO_COUNT, "number of information requests")
        wanted = {data.number(wire.INFO_TYPE, "information requests") for _ in range(count)}
        data.end()
        export = self._find(name)
        infos = [
            wire.INFO_EXPORT.pack(type=wire.NBD_INFO_EXPORT, size_bytes=export.size_bytes,
                                  flags=self._flags(export)),
            wire.INFO_BLOCK_SIZE.pack(type=wire.NBD_INFO_BLOCK_SIZE, min_block=export.min_block,
                                      preferred_block=export.preferred_block, max_block=export.max_block),
        ]
        if wire.NBD_INFO_NAME in wanted:
            infos.append(wire.INFO_TYPE.pack(type=wire.NBD_INFO_NAME) + encode_string(export.name))
        if wire.NBD_INFO_DESCRIPTION in wanted and export.description:
            infos.append(wire.INFO_TYPE.pack(type=wire.NBD_INFO_DESCRIPTION) + encode_string(export.description))
        for info in infos:
            self._reply(wire.NBD_REP_INFO, info)
        self._reply(wire.NBD_REP_ACK)
        if self._option == wire.NBD_OPT_GO:
            self._begin(export)

    def _structured_reply(self, data: OptionData) -> None:
        data.end()
        self._structured_replies = True
        self._reply(wire.NBD_REP_ACK)

    def _list_meta_context(self, data: OptionData) -> None:
        export, queries = self._meta_context_queries(data)
        available = export.contexts
        names = match_contexts(available, queries, wildcards=True) if queries else available
        for name in names:
            self._reply(wire.NBD_REP_META_CONTEXT, wire.META_CONTEXT.pack(id=0) + encode_string(name))
        self._reply(wire.NBD_REP_ACK)

    def _set_meta_context(self, data: OptionData) -> None:
        """What was selected before is gone, even if this option fails."""
        self._contexts = []
        export, queries = self._meta_context_queries(data)
        names = match_contexts(export.contexts, queries, wildcards=False)
        self._contexts_export = export.name
        self._contexts = list(enumerate(names, start=1))
        for id, name in self._contexts:
            self._reply(wire.NBD_REP_META_CONTEXT, wire.META_CONTEXT.pack(id=id) + encode_string(name))
        self._reply(wire.NBD_REP_ACK)

    def _meta_context_queries(self, data: OptionData) -> tuple[ExportInfo, list[str]]:
        if not self._structured_replies:
            raise OptionError(wire.NBD_REP_ERR_INVALID, "metadata contexts need NBD_OPT_STRUCTURED_REPLY first")
        name = data.string("export name")
        count = data.number(wire.LENGTH, "number of queries")
        if count > MAX_QUERIES:
            raise OptionError(wire.NBD_REP_ERR_TOO_BIG, f"{count} queries; at most {MAX_QUERIES} are answered")
        queries = [data.string("query") for _ in range(count)]
        data.end()
        return self._find(name), queries

    # What the options share.

    def _find(self, name: str) -> ExportInfo:
        export = self._exports.find(name)
        if export is None:
            raise OptionError(wire.NBD_REP_ERR_UNKNOWN, f"there is no export {shown(name)}")
        return export

    def _flags(self, export: ExportInfo) -> int:
        """The transmission flags; SEND_DF is for structured replies alone."""
        flags = export.flags | wire.NBD_FLAG_HAS_FLAGS
        return flags if self._structured_replies else flags & ~wire.NBD_FLAG_SEND_DF

    def _begin(self, export: ExportInfo) -> None:
        """Contexts count only if they were selected for the export that is used in the end."""
        selected = self._contexts if self._contexts_export == export.name else []
        contexts = [(id, name) for id, name in selected if name in export.contexts]
        self.result = Negotiated(export, self._flags(export), self._structured_replies, self._no_zeroes, contexts)

    def _reply(self, type: int, data: bytes = b"") -> None:
        self._output += wire.OPTION_REPLY.pack(magic=wire.NBD_REP_MAGIC, option=self._option, type=type,
                                               length=len(data))
        self._output += data

    def _refuse(self, type: int, text: str) -> None:
        self._reply(type, text.encode())

    def _finish(self, error: str) -> None:
        self.finished = True
        self.wants_tls = False
        self.error = error
