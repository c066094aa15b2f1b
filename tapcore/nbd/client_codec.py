"""The client's side of NBD without I/O: the handshake (`ClientNegotiation`) and the replies (`ReplyDecoder`).

Specification: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tapcore.errors import ProtocolError, WritelogError
from tapcore.layout import Layout
from tapcore.nbd import wire
from tapcore.request import Extent

MAX_OPTION_REPLY_BYTES: Final = 64 << 10
MAX_OPTION_REPLIES: Final = 4096
"""Replies to one option."""
MAX_ERROR_BYTES: Final = 64 << 10
MAX_STATUS_BYTES: Final = 8 << 20
"""The longest payloads that are taken of an option reply, an error chunk, a block status chunk."""
SCRATCH_BYTES: Final = 256 << 10
NO_BYTES: Final = memoryview(bytearray())

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

    def __init__(self, export: str, *, structured_replies: bool = True, contexts: Sequence[str] = ()) -> None:
        self.result: ServerOffer | None = None
        self._export = export
        self._queries = contexts
        self._options = [wire.NBD_OPT_GO]
        if structured_replies and contexts:
            self._options.append(wire.NBD_OPT_SET_META_CONTEXT)
        if structured_replies:
            self._options.append(wire.NBD_OPT_STRUCTURED_REPLY)
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
        elif reply_type == wire.NBD_REP_ERR_UNSUP:
            self._ask_export_name()
        else:
            code, meaning = REFUSALS.get(reply_type, (errno.EPROTO, f"refused with error {reply_type:#x}"))
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


@dataclass(slots=True, eq=False)
class Transaction:
    """A request under way, and its reply as far as it has come."""

    cookie: int
    command: int
    offset: int
    length: int
    error: int = 0
    """An errno of the protocol (NBD_EPERM …), 0 for success."""
    message: str = ""
    data: bytearray = field(default_factory=bytearray)
    """What a read has read."""
    extents: dict[int, list[Extent]] = field(default_factory=dict)
    """What a block status has found, by context id."""
    missing_bytes: int = 0
    """What a read has still to get."""

    def failed(self) -> NbdError:
        text = f": {self.message}" if self.message else ""
        name = errno.errorcode.get(self.error, str(self.error))
        return NbdError(f"{self} failed: {name} ({os.strerror(self.error)}){text}", errno=self.error)

    def __str__(self) -> str:
        return f"{COMMAND_NAMES[self.command]} of {self.length} bytes at byte {self.offset}"


COMMAND_NAMES: Final = {value: name for name, value in vars(wire).items()
                        if name.startswith("NBD_CMD_") and not name.startswith("NBD_CMD_FLAG_")}


class ReplyDecoder:
    """Replies of the transmission phase, out of order, in simple and structured form.

    Receive into `room()`, then tell `received()` how much it was: payloads of reads go to their own buffer without
    being copied. What is complete is in `finished`. Raises ProtocolError; the connection is of no use afterwards.
    """

    def __init__(self, structured_replies: bool) -> None:
        self.pending: dict[int, Transaction] = {}
        self.finished: deque[Transaction] = deque()
        self._structured_replies = structured_replies
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._start = 0
        self._end = 0
        self._rest = NO_BYTES
        """The part of a payload that has not come yet."""
        self._payload_done: Callable[[], None] = _nothing

    def request(self, command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
        """The header that asks; its reply will be awaited."""
        transaction = Transaction(cookie, command, offset, length)
        if command == wire.NBD_CMD_READ:
            transaction.data = bytearray(length)
            transaction.missing_bytes = length
        self.pending[cookie] = transaction
        return wire.REQUEST.struct.pack(wire.NBD_REQUEST_MAGIC, flags, command, cookie, offset, length)

    def room(self) -> memoryview:
        """Where the next bytes belong."""
        if self._rest:
            return self._rest
        left = self._end - self._start
        self._scratch[:left] = self._scratch[self._start : self._end]
        self._start, self._end = 0, left
        return self._scratch[left:]

    def received(self, count_bytes: int) -> None:
        """`count_bytes` have been put into `room()`."""
        if self._rest:
            self._rest = self._rest[count_bytes:]
            if not self._rest:
                self._rest = NO_BYTES
                self._payload_done()
            return
        self._end += count_bytes
        while (payload := self._head()) is not None:
            there = min(len(payload), self._end - self._start)
            payload[:there] = self._scratch[self._start : self._start + there]
            self._start += there
            if there < len(payload):
                self._rest = payload[there:]
                return
            self._payload_done()

    def feed(self, data: bytes) -> None:
        """Take bytes that were received elsewhere."""
        view = memoryview(data)
        while view:
            room = self.room()
            count_bytes = min(len(room), len(view))
            room[:count_bytes] = view[:count_bytes]
            self.received(count_bytes)
            view = view[count_bytes:]

    def _head(self) -> memoryview | None:
        """Take the head of the next message; where its payload goes, or None if the head is not complete."""
        left = self._end - self._start
        if left < wire.SIMPLE_REPLY.size:
            return None
        magic, word, cookie = wire.SIMPLE_REPLY.struct.unpack_from(self._scratch, self._start)
        if magic == wire.NBD_SIMPLE_REPLY_MAGIC:
            self._start += wire.SIMPLE_REPLY.size
            return self._simple(self._find(cookie), word)
        if magic != wire.NBD_STRUCTURED_REPLY_MAGIC or not self._structured_replies:
            raise ProtocolError(f"a reply with the magic {magic:#010x}")
        if left < wire.CHUNK.size:
            return None
        _, flags, kind, cookie, length = wire.CHUNK.struct.unpack_from(self._scratch, self._start)
        transaction = self._find(cookie)
        done = bool(flags & wire.NBD_REPLY_FLAG_DONE)
        if kind != wire.NBD_REPLY_TYPE_OFFSET_DATA:
            self._start += wire.CHUNK.size
            return self._chunk(transaction, kind, length, done)
        if left < wire.DATA_CHUNK.size:
            return None
        offset = wire.DATA_CHUNK.struct.unpack_from(self._scratch, self._start)[-1]
        self._start += wire.DATA_CHUNK.size
        return self._data(transaction, offset, length - wire.OFFSET_DATA.size, done)

    def _find(self, cookie: int) -> Transaction:
        try:
            return self.pending[cookie]
        except KeyError:
            raise ProtocolError(f"a reply to cookie {cookie}, which is not under way") from None

    def _simple(self, transaction: Transaction, code: int) -> memoryview:
        command = transaction.command
        has_payload = command == wire.NBD_CMD_BLOCK_STATUS or (
            command == wire.NBD_CMD_READ and self._structured_replies)
        if has_payload and not (code and command == wire.NBD_CMD_BLOCK_STATUS):
            raise ProtocolError(f"a simple reply to {COMMAND_NAMES[command]}, which asks for a structured one")
        transaction.error = code
        self._payload_done = partial(self._finish, transaction)
        if command == wire.NBD_CMD_READ and not code:
            transaction.missing_bytes = 0
            return memoryview(transaction.data)
        return NO_BYTES

    def _data(self, transaction: Transaction, offset: int, length: int, done: bool) -> memoryview:
        target = self._part(transaction, offset, length)
        self._payload_done = partial(self._finish, transaction) if done else _nothing
        return target

    def _part(self, transaction: Transaction, offset: int, length: int) -> memoryview:
        """The place of `length` bytes at `offset` of the disk in a read's data."""
        start = offset - transaction.offset
        if (transaction.command != wire.NBD_CMD_READ or length <= 0 or start < 0
                or start + length > transaction.length):
            raise ProtocolError(f"{length} bytes at byte {offset} are no answer to {transaction}")
        transaction.missing_bytes -= length
        return memoryview(transaction.data)[start : start + length]

    def _chunk(self, transaction: Transaction, kind: int, length: int, done: bool) -> memoryview:
        """A chunk whose payload is read whole before it is looked at."""
        if kind & wire.NBD_REPLY_TYPE_FLAG_ERROR:
            right, take = wire.ERROR.size <= length <= MAX_ERROR_BYTES, self._take_error
        elif kind == wire.NBD_REPLY_TYPE_NONE:
            right, take = length == 0 and done, self._take_nothing
        elif kind == wire.NBD_REPLY_TYPE_OFFSET_HOLE:
            right, take = length == wire.OFFSET_HOLE.size, self._take_hole
        elif kind == wire.NBD_REPLY_TYPE_BLOCK_STATUS:
            extents_bytes = length - wire.STATUS_CONTEXT.size
            right = 0 < extents_bytes <= MAX_STATUS_BYTES and extents_bytes % wire.STATUS_EXTENT.size == 0
            take = self._take_status
        else:
            raise ProtocolError(f"a chunk of unknown type {kind}")
        if not right:
            raise ProtocolError(f"a chunk of type {kind} with {length} bytes of payload and "
                                f"{'the' if done else 'no'} flag NBD_REPLY_FLAG_DONE")
        payload = bytearray(length)

        def payload_done() -> None:
            take(transaction, payload)
            if done:
                self._finish(transaction)

        self._payload_done = payload_done
        return memoryview(payload)

    def _take_nothing(self, transaction: Transaction, payload: bytearray) -> None:
        pass

    def _take_error(self, transaction: Transaction, payload: bytearray) -> None:
        code, message_length = wire.ERROR.struct.unpack_from(payload)
        if code == 0 or message_length > len(payload) - wire.ERROR.size:
            raise ProtocolError(f"an error chunk with the error {code} and a message of {message_length} bytes "
                                f"in {len(payload)} bytes")
        if not transaction.error:
            transaction.error = code
            text = payload[wire.ERROR.size : wire.ERROR.size + message_length]
            transaction.message = text.decode(errors="replace")

    def _take_hole(self, transaction: Transaction, payload: bytearray) -> None:
        self._part(transaction, *wire.OFFSET_HOLE.struct.unpack(payload))

    def _take_status(self, transaction: Transaction, payload: bytearray) -> None:
        if transaction.command != wire.NBD_CMD_BLOCK_STATUS:
            raise ProtocolError(f"a block status chunk in reply to {COMMAND_NAMES[transaction.command]}")
        context_id = wire.STATUS_CONTEXT.struct.unpack_from(payload)[0]
        extents = list(wire.STATUS_EXTENT.struct.iter_unpack(memoryview(payload)[wire.STATUS_CONTEXT.size :]))
        transaction.extents[context_id] = extents

    def _finish(self, transaction: Transaction) -> None:
        if transaction.missing_bytes and not transaction.error:
            raise ProtocolError(f"{transaction} ended with {transaction.missing_bytes} bytes missing")
        del self.pending[transaction.cookie]
        self.finished.append(transaction)


def _nothing() -> None:
    pass
