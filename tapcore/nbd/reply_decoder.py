"""The replies of NBD's transmission phase, as a client decodes them, without I/O.

Specification: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, "Transmission phase".
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from tapcore.errors import ProtocolError
from tapcore.nbd import wire
from tapcore.nbd.client_codec import NbdError
from tapcore.request import Extent, slice_iov

MAX_ERROR_BYTES: Final = 64 << 10
MAX_STATUS_BYTES: Final = 8 << 20
"""The longest payloads that are taken of an error chunk and of a block status chunk."""
SCRATCH_BYTES: Final = 256 << 10
LARGE_BYTES: Final = 32 << 10
"""From here on what is missing of a payload is received where it belongs, and not copied there."""


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
    iov: Sequence[memoryview] = ()
    """Where a read's data goes, or what a write sends: `length` bytes."""
    flags: int = 0
    owner: Any = None
    """The caller's own: NBD_CMD_FLAG_* that were asked for, and for whom."""

    def failed(self) -> NbdError:
        text = f": {self.message}" if self.message else ""
        name = errno.errorcode.get(self.error, str(self.error))
        return NbdError(f"{self} failed: {name} ({os.strerror(self.error)}){text}", errno=self.error)

    def __str__(self) -> str:
        return f"{COMMAND_NAMES[self.command]} of {self.length} bytes at byte {self.offset}"


COMMAND_NAMES: Final = {value: name for name, value in vars(wire).items()
                        if name.startswith("NBD_CMD_") and not name.startswith("NBD_CMD_FLAG_")}


_SIMPLE_MAGIC: Final = wire.NBD_SIMPLE_REPLY_MAGIC
_CHUNK_MAGIC: Final = wire.NBD_STRUCTURED_REPLY_MAGIC
_ANSWERED_WITH_DATA: Final = (wire.NBD_CMD_READ, wire.NBD_CMD_BLOCK_STATUS)
_WHOLE_READ: Final = wire.NBD_REPLY_FLAG_DONE << 16 | wire.NBD_REPLY_TYPE_OFFSET_DATA
"""The second word of a chunk that is all of a read."""
_unpack_head = wire.SIMPLE_REPLY.struct.unpack_from
_unpack_data_head = wire.DATA_CHUNK.struct.unpack_from


class ReplyDecoder:
    """Replies of the transmission phase, out of order, in simple and structured form.

    Receive into `room()`, then tell `received()` how much it was: large payloads of reads go to their own buffers
    without being copied. What is complete is in `finished`. Raises ProtocolError; the connection is of no use
    afterwards, but what is in `finished` is.
    """

    def __init__(self, structured_replies: bool) -> None:
        self.pending: dict[int, Transaction] = {}
        self.finished: deque[Transaction] = deque()
        self._structured_replies = structured_replies
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._start = 0
        self._end = 0
        self._rest: list[memoryview] = []
        """Where the part of a payload goes that has not come yet."""
        self._direct = False
        """`room()` is the first of `_rest`."""
        self._after_large = False
        self._payload_done: Callable[[], None] = _nothing

    def request(self, command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
        """The header that asks; its reply will be awaited. A read's data goes to a buffer of its own."""
        transaction = Transaction(cookie, command, offset, length)
        if command == wire.NBD_CMD_READ:
            transaction.data = bytearray(length)
            transaction.iov = (memoryview(transaction.data),)
            transaction.missing_bytes = length
        self.pending[cookie] = transaction
        return wire.REQUEST.struct.pack(wire.NBD_REQUEST_MAGIC, flags, command, cookie, offset, length)

    def room(self) -> memoryview:
        """Where the next bytes belong."""
        if self._rest and (self._direct or len(self._rest[0]) >= LARGE_BYTES):
            self._direct = True
            return self._rest[0]
        left = self._end - self._start
        self._scratch[:left] = self._scratch[self._start : self._end]
        self._start, self._end = 0, left
        if self._after_large and not left:
            # The next payload is probably as large: take its header alone, so that the payload is not copied.
            self._after_large = False
            return self._scratch[: wire.DATA_CHUNK.size]
        return self._scratch[left:]

    def received(self, count_bytes: int) -> None:
        """`count_bytes` have been put into `room()`."""
        if self._direct:
            if count_bytes < len(self._rest[0]):
                self._rest[0] = self._rest[0][count_bytes:]
                return
            del self._rest[0]
            self._direct = False
            if not self._rest:
                self._after_large = True
                self._payload_done()
            return
        self._end += count_bytes
        while self._fill():
            self._take_whole_replies()
            payload = self._head()
            if payload is None:
                return
            self._rest = payload

    def _fill(self) -> bool:
        """Copy what has come of a payload to where it goes. True if none is missing."""
        rest = self._rest
        while rest:
            target = rest[0]
            there = min(len(target), self._end - self._start)
            target[:there] = self._scratch[self._start : self._start + there]
            self._start += there
            if there < len(target):
                rest[0] = target[there:]
                return False
            del rest[0]
            if not rest:
                self._payload_done()
        return True

    def _take_whole_replies(self) -> None:
        """The hot loop: replies without a payload, and reads in one chunk and one buffer that are wholly there.
        Stops at any other reply."""
        scratch, start, end = self._scratch, self._start, self._end
        pending, finished = self.pending, self.finished
        head_bytes, data_head_bytes = wire.SIMPLE_REPLY.size, wire.DATA_CHUNK.size
        while end - start >= head_bytes:
            magic, word, cookie = _unpack_head(scratch, start)
            transaction = pending.get(cookie)
            if transaction is None:
                break
            if word == _WHOLE_READ and end - start >= data_head_bytes and self._structured_replies:
                length = transaction.length
                stop = start + data_head_bytes + length
                if (_unpack_data_head(scratch, start)
                        != (_CHUNK_MAGIC, wire.NBD_REPLY_FLAG_DONE, wire.NBD_REPLY_TYPE_OFFSET_DATA, cookie,
                            length + wire.OFFSET_DATA.size, transaction.offset)
                        or transaction.missing_bytes != length or len(transaction.iov) != 1 or stop > end):
                    break
                transaction.iov[0][:] = scratch[start + data_head_bytes : stop]
                transaction.missing_bytes = 0
                start = stop
            elif magic == _SIMPLE_MAGIC and not word and transaction.command not in _ANSWERED_WITH_DATA:
                start += head_bytes
            else:
                break
            del pending[cookie]
            finished.append(transaction)
        self._start = start

    def feed(self, data: bytes) -> None:
        """Take bytes that were received elsewhere."""
        view = memoryview(data)
        while view:
            room = self.room()
            count_bytes = min(len(room), len(view))
            room[:count_bytes] = view[:count_bytes]
            self.received(count_bytes)
            view = view[count_bytes:]

    def _head(self) -> list[memoryview] | None:
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

    def _simple(self, transaction: Transaction, code: int) -> list[memoryview]:
        command = transaction.command
        has_payload = command == wire.NBD_CMD_BLOCK_STATUS or (
            command == wire.NBD_CMD_READ and self._structured_replies)
        if has_payload and not (code and command == wire.NBD_CMD_BLOCK_STATUS):
            raise ProtocolError(f"a simple reply to {COMMAND_NAMES[command]}, which asks for a structured one")
        transaction.error = code
        if command == wire.NBD_CMD_READ and transaction.length and not code:
            self._payload_done = partial(self._finish, transaction)
            transaction.missing_bytes = 0
            return [view for view in transaction.iov if view]
        self._finish(transaction)
        return []

    def _data(self, transaction: Transaction, offset: int, length: int, done: bool) -> list[memoryview]:
        target = self._part(transaction, offset, length)
        self._payload_done = partial(self._finish, transaction) if done else _nothing
        return target

    def _part(self, transaction: Transaction, offset: int, length: int) -> list[memoryview]:
        """The place of `length` bytes at `offset` of the disk in a read's data."""
        start = offset - transaction.offset
        if (transaction.command != wire.NBD_CMD_READ or length <= 0 or start < 0
                or start + length > transaction.length):
            raise ProtocolError(f"{length} bytes at byte {offset} are no answer to {transaction}")
        transaction.missing_bytes -= length
        return [view for view in slice_iov(transaction.iov, start, length) if view]

    def _chunk(self, transaction: Transaction, kind: int, length: int, done: bool) -> list[memoryview]:
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

        if not payload:
            payload_done()
            return []
        self._payload_done = payload_done
        return [memoryview(payload)]

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
        for view in self._part(transaction, *wire.OFFSET_HOLE.struct.unpack(payload)):
            view[:] = bytes(len(view))

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
