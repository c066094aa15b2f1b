"""The transmission phase of one NBD connection: bytes in, requests down, replies out. The hot loop.

Specification: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, "Transmission phase".

No socket is touched here. The shell (`tapcore.nbd.server`) asks where to receive (`recv_buffer`), says how much
came (`received`), and calls `step` until it returns False, sending `replies.output()` in between.

    slab    | hdr | hdr payload | hdr | hdr payload | …             received, being parsed
    arena   | hdr data        | hdr data        | hdr | hdr data …  being answered (`tapcore.nbd.replies`)

What makes it quick: one receive holds many requests, one `step` makes a batch of them, one `Vbd.submit` runs it,
one send answers it; a read's data is read straight into its reply; a write's payload is written from where it was
received, a large one from a buffer of its own; requests and buffers are used again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

from tapcore.errors import ProtocolError
from tapcore.nbd import status, wire
from tapcore.nbd.buffers import Pool
from tapcore.nbd.replies import DATA_HEADER_BYTES, Replies
from tapcore.request import (
    BACKGROUND,
    DISCARD,
    FAST,
    FLUSH,
    FUA,
    IS_ZERO,
    NO_HOLE,
    READ,
    STATUS,
    WRITE,
    ZEROES,
    Extent,
    Request,
)

SLAB_BYTES = 256 << 10
"""Received bytes that are parsed together."""
STEP_BYTES = 256 << 10
"""Read replies after which a batch ends: what was read is sent while it is still in the CPU's cache."""
LARGE_BYTES = 32 << 10
"""Payloads from here on that have not wholly arrived are received into a buffer of their own."""
MAX_LATE_REQUESTS = 1024
MAX_LATE_BYTES = 64 << 20
"""In flight from one connection; beyond, its next requests wait in the socket."""

_REQUEST = wire.REQUEST.struct
_HOLE = wire.HOLE_CHUNK.struct
_HEADER_BYTES = wire.REQUEST.size
_MAX_PAYLOAD_BYTES = wire.DEFAULT_MAX_PAYLOAD_BYTES

_PLAIN = {
    wire.NBD_CMD_FLUSH: (FLUSH, 0),
    wire.NBD_CMD_TRIM: (DISCARD, 0),
    wire.NBD_CMD_WRITE_ZEROES: (ZEROES, wire.NBD_CMD_FLAG_NO_HOLE | wire.NBD_CMD_FLAG_FAST_ZERO),
    wire.NBD_CMD_BLOCK_STATUS: (STATUS, wire.NBD_CMD_FLAG_REQ_ONE),
    wire.NBD_CMD_CACHE: (READ, 0),
    wire.NBD_CMD_READ: (READ, wire.NBD_CMD_FLAG_DF),
}
"""Commands off the fast path: the request's op, and the flags that a client may set. FUA goes with every command,
and is ignored where nothing is changed, as the protocol asks."""

_FLAGS = ((wire.NBD_CMD_FLAG_FUA, FUA), (wire.NBD_CMD_FLAG_NO_HOLE, NO_HOLE), (wire.NBD_CMD_FLAG_FAST_ZERO, FAST))

_CACHE = -1
"""`request.at` of a read whose data is not wanted."""


class Disk(Protocol):
    """What a session needs of a vbd."""

    def submit(self, batch: Sequence[Request]) -> list[Request]: ...

    def request_done(self, request: Request) -> None: ...


class Session:
    """One client in the transmission phase.

    `size_bytes`, `read_only`: the export. `contexts`: (id, name) of the metadata contexts that the client chose.
    `dirty_extents(name, offset, length)` answers for qemu:dirty-bitmap:name. Data of reads is placed at multiples
    of `align_bytes`. `wake()` is called when a late reply is ready to be sent.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        size_bytes: int,
        read_only: bool,
        structured: bool,
        contexts: Sequence[tuple[int, str]],
        dirty_extents: Callable[[str, int, int], list[Extent]],
        align_bytes: int,
        wake: Callable[[], None],
    ) -> None:
        self._buffers = Pool()
        self.replies = Replies(self._buffers, structured)
        self.closing = False
        """The client said goodbye: close when nothing is late and all output is sent."""
        self.dead = False
        """The connection is gone: late replies are dropped."""
        self.late = 0
        self._late_bytes = 0
        self._disk = disk
        self._size_bytes = size_bytes
        self._read_only = read_only
        self._structured = structured
        self._contexts = contexts
        self._dirty_extents = dirty_extents
        self._align_mask = align_bytes - 1
        self._wake = wake
        self._slab = self._buffers.take(SLAB_BYTES)
        self._start = 0
        self._end = 0
        self._skip_bytes = 0
        self._skip_error = (0, 0)
        self._large: Request | None = None
        self._large_filled = 0
        self._after_large = False
        self._free: list[Request] = []

    # Bytes in

    def recv_buffer(self) -> memoryview:
        """Where the next bytes of the client belong; never empty unless `blocked`."""
        if self._large is not None:
            return self._large.iov[0][self._large_filled :]
        slab, start, end = self._slab, self._start, self._end
        if slab.users:
            if slab.size - end >= slab.size // 2:
                return slab.view[end:]
            self._slab = self._buffers.take(SLAB_BYTES)
        if start < end:
            self._slab.view[: end - start] = slab.view[start:end]
        elif self._after_large and not slab.users:
            # The next request is probably as large: take its header alone, so that its payload is not copied.
            self._after_large = False
            self._start = self._end = 0
            return slab.view[:_HEADER_BYTES]
        self._start, self._end = 0, end - start
        return self._slab.view[end - start :]

    def received(self, count_bytes: int) -> None:
        """`count_bytes` were put into `recv_buffer()`."""
        if self._large is not None:
            self._large_filled += count_bytes
        else:
            self._end += count_bytes

    def feed(self, data: bytes) -> None:
        """Bytes, fewer than SLAB_BYTES, that came in one piece with the end of the negotiation."""
        self._slab.view[: len(data)] = data
        self._end = len(data)

    @property
    def blocked(self) -> bool:
        """Too much is in flight: do not receive or step until some of it is done."""
        return self.late >= MAX_LATE_REQUESTS or self._late_bytes >= MAX_LATE_BYTES

    def step(self) -> bool:
        """Run one batch of what was received. True if there may be another. ProtocolError on garbage."""
        if self.closing or self.blocked:
            return False
        batch: list[Request] = []
        large = self._large
        more = self._parse(batch)
        if batch:
            finished = self._disk.submit(batch)
            if len(finished) != len(batch):
                self.late += len(batch) - len(finished)
                self._late_bytes += sum(r.length for r in batch if r.op <= WRITE)
                self._late_bytes -= sum(r.length for r in finished if r.op <= WRITE)
            if large is None:
                self._finish(finished)
            else:
                self._finish_payload(large, finished)
        return more

    def _parse(self, batch: list[Request]) -> bool:
        """Append the requests of the received bytes to `batch`. True if it stopped before their end."""
        if self._large is not None:
            return self._large_arrived(batch)
        if self._skip_bytes and not self._skip():
            return False
        slab, start, end = self._slab, self._start, self._end
        memory, view = slab.memory, slab.view
        free, size_bytes, mask = self._free, self._size_bytes, self._align_mask
        arena = self.replies.arena
        place = arena.pos
        stop_at = place + STEP_BYTES
        header_bytes = DATA_HEADER_BYTES[self._structured]
        unpack, magic_wanted, may_write = _REQUEST.unpack_from, wire.NBD_REQUEST_MAGIC, not self._read_only
        more = False
        while end - start >= _HEADER_BYTES:
            magic, flags, kind, cookie, offset, length = unpack(memory, start)
            if magic != magic_wanted:
                raise ProtocolError(f"not an NBD request: magic {magic:#010x}, not {magic_wanted:#010x}")
            good = offset + length <= size_bytes and 0 < length <= _MAX_PAYLOAD_BYTES
            if kind == READ and good and not flags:
                data = place + header_bytes
                if mask:
                    data = (data + mask) & ~mask
                if data + length > arena.size:
                    arena.pos = place
                    arena = self.replies.next_arena(header_bytes + mask + length)
                    data = (header_bytes + mask) & ~mask
                    stop_at = STEP_BYTES
                request = free.pop() if free else self._new_request()
                place = data + length
                request.op, request.offset, request.length = READ, offset, length
                request.iov = (arena.view[data:place],)
                request.cookie, request.place, request.at = cookie, arena, data - header_bytes
                arena.users += 1
                batch.append(request)
                start += _HEADER_BYTES
                if place > stop_at:
                    more = True
                    break
            elif kind == WRITE and good and may_write and flags <= FUA:
                data = start + _HEADER_BYTES
                if end - data < length and length < LARGE_BYTES:
                    break
                request = free.pop() if free else self._new_request()
                request.op, request.offset, request.length = WRITE, offset, length
                request.flags, request.cookie = flags, cookie
                start = data + length
                if start > end:
                    self._begin_large(request, view[data:end])
                    start = end
                    break
                request.iov = (view[data:start],)
                request.place = slab
                slab.users += 1
                batch.append(request)
                self._after_large = False
            else:
                self._start = start + _HEADER_BYTES
                arena.pos = place
                self._other(batch, flags, kind, cookie, offset, length)
                start = self._start
                arena = self.replies.arena
                place = arena.pos
                if self.closing or self._skip_bytes:
                    break
        self._start = start
        arena.pos = place
        return more

    def _new_request(self) -> Request:
        request = Request(READ, done=self._disk.request_done)
        request.owner = self
        request.takes_zero = self._structured
        return request

    # Large writes, and payloads that are passed over

    def _begin_large(self, request: Request, arrived: memoryview) -> None:
        buffer = self._buffers.take(request.length)
        buffer.users = 1
        buffer.view[: len(arrived)] = arrived
        request.place = buffer
        request.iov = (buffer.view[: request.length],)
        self._large = request
        self._large_filled = len(arrived)

    def _large_arrived(self, batch: list[Request]) -> bool:
        request = self._large
        assert request is not None
        if self._large_filled == request.length:
            batch.append(request)
            self._large = None
            self._after_large = True
        return False

    def _skip(self) -> bool:
        """Pass over the payload of a write that is refused, then answer it. True if it is behind us."""
        count_bytes = min(self._skip_bytes, self._end - self._start)
        self._start += count_bytes
        self._skip_bytes -= count_bytes
        if not self._skip_bytes:
            self._answer_error(wire.NBD_CMD_WRITE, *self._skip_error)
        return not self._skip_bytes

    def _finish_payload(self, request: Request, finished: list[Request]) -> None:
        payload = request.place
        self._finish(finished)
        if not payload.users:
            self._buffers.give(payload)

    # Off the fast path

    def _other(self, batch: list[Request], flags: int, kind: int, cookie: int, offset: int, length: int) -> None:
        """A command that is rare, or not right: append its request to `batch`, or answer it."""
        if kind == wire.NBD_CMD_DISC:
            self.closing = True
            return
        code = self._check(flags, kind, offset, length)
        if kind == wire.NBD_CMD_WRITE:
            self._skip_bytes = length
            self._skip_error = (cookie, code)
            self._skip()
            return
        if code or (length == 0 and kind != wire.NBD_CMD_FLUSH):
            self._answer_error(kind, cookie, code or errno.EINVAL)
            return
        request = self._free.pop() if self._free else self._new_request()
        request.op = _PLAIN[kind][0]
        request.offset = offset
        request.length = length
        request.cookie = cookie
        request.at = flags
        request.place = None
        if request.op in (DISCARD, ZEROES):
            for wire_flag, flag in _FLAGS:
                if flags & wire_flag:
                    request.flags |= flag
        if request.op == READ:
            if kind == wire.NBD_CMD_CACHE:
                request.length = min(length, _MAX_PAYLOAD_BYTES)
            self._reserve(request)
            if kind == wire.NBD_CMD_CACHE:
                request.at = _CACHE
                request.flags = BACKGROUND
        batch.append(request)

    def _check(self, flags: int, kind: int, offset: int, length: int) -> int:
        """The errno of a request that the protocol or the export does not allow, or 0."""
        if kind == wire.NBD_CMD_WRITE:
            allowed = 0
        elif kind in _PLAIN:
            allowed = _PLAIN[kind][1]
        else:
            return errno.EINVAL
        if flags & ~(allowed | wire.NBD_CMD_FLAG_FUA):
            return errno.EINVAL
        if kind == wire.NBD_CMD_FLUSH:
            return 0
        changes = kind in (wire.NBD_CMD_WRITE, wire.NBD_CMD_TRIM, wire.NBD_CMD_WRITE_ZEROES)
        if changes and self._read_only:
            return errno.EPERM
        if offset + length > self._size_bytes:
            return errno.ENOSPC if kind in (wire.NBD_CMD_WRITE, wire.NBD_CMD_WRITE_ZEROES) else errno.EINVAL
        if kind in (wire.NBD_CMD_READ, wire.NBD_CMD_WRITE) and length > _MAX_PAYLOAD_BYTES:
            return errno.EINVAL
        if kind == wire.NBD_CMD_WRITE and length == 0:
            return errno.EINVAL
        if kind == wire.NBD_CMD_BLOCK_STATUS and not self._contexts:
            return errno.EINVAL
        return 0

    def _reserve(self, request: Request) -> None:
        """Room in an arena for the reply to a read."""
        header_bytes = DATA_HEADER_BYTES[self._structured]
        arena = self.replies.arena
        data = (arena.pos + header_bytes + self._align_mask) & ~self._align_mask
        if data + request.length > arena.size:
            arena = self.replies.next_arena(header_bytes + self._align_mask + request.length)
            data = (header_bytes + self._align_mask) & ~self._align_mask
        arena.pos = data + request.length
        arena.users += 1
        request.iov = (arena.view[data : arena.pos],)
        request.place = arena
        request.at = data - header_bytes

    # Replies

    def request_done(self, request: Request) -> None:
        """The vbd's late completion."""
        self.late -= 1
        if request.op <= WRITE:
            self._late_bytes -= request.length
        request.tries = 0
        if request.op == WRITE and request.place is not self._slab:
            self._finish_payload(request, [request])
        else:
            self._finish([request])
        if not self.dead:
            self._wake()

    def _finish(self, finished: list[Request]) -> None:
        """Queue the replies, and keep the requests for the next batch."""
        plain = finished
        for request in finished:
            if request.error or request.flags or request.op > WRITE:
                plain = [r for r in finished if not self._finish_other(r)]
                break
        self.replies.add(plain)
        for request in finished:
            request.iov = ()
            request.place = None
        self._free.extend(finished)

    def _finish_other(self, request: Request) -> bool:
        """Queue the reply if it is not that of a plain read or write. The request is plain again afterwards."""
        code, op, at, flags = request.error, request.op, request.at, request.flags
        plain = not (code or op > WRITE or (op == READ and (at == _CACHE or flags & IS_ZERO)))
        request.error = request.flags = 0
        if plain:
            return False
        request.at = 0
        if op == READ:
            self.replies.forget(request)
        elif op == WRITE:
            request.place.users -= 1
        if op == STATUS and not code:
            self._answer_status(request, bool(at & wire.NBD_CMD_FLAG_REQ_ONE))
        elif code:
            kind = {READ: wire.NBD_CMD_READ, STATUS: wire.NBD_CMD_BLOCK_STATUS}.get(op, wire.NBD_CMD_WRITE)
            self._answer_error(wire.NBD_CMD_CACHE if at == _CACHE else kind, request.cookie, code)
        elif op == READ and at != _CACHE:
            self.replies.put(_HOLE.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, wire.NBD_REPLY_FLAG_DONE,
                                        wire.NBD_REPLY_TYPE_OFFSET_HOLE, request.cookie, 12, request.offset,
                                        request.length))
        else:
            self._put_simple(request.cookie, 0)
        return True

    def _put_simple(self, cookie: int, code: int) -> None:
        self.replies.put(wire.SIMPLE_REPLY.pack(magic=wire.NBD_SIMPLE_REPLY_MAGIC, error=wire.nbd_error(code),
                                                cookie=cookie))

    def _answer_error(self, kind: int, cookie: int, code: int) -> None:
        """An error as the client expects it: reads and block status are answered by chunks once structured
        replies were negotiated."""
        if self._structured and kind in (wire.NBD_CMD_READ, wire.NBD_CMD_BLOCK_STATUS):
            self.replies.put(
                wire.CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=wire.NBD_REPLY_FLAG_DONE,
                                type=wire.NBD_REPLY_TYPE_ERROR, cookie=cookie, length=wire.ERROR.size)
                + wire.ERROR.pack(error=wire.nbd_error(code), message_length=0))
        else:
            self._put_simple(cookie, code)

    def _answer_status(self, request: Request, one: bool) -> None:
        """A chunk for each context that the client chose; all describe ranges from the request's offset on."""
        for number, (context_id, name) in enumerate(self._contexts, start=1):
            if name == wire.BASE_ALLOCATION:
                extents = request.extents
            else:
                bitmap = name.removeprefix(wire.QEMU_DIRTY_BITMAP)
                extents = self._dirty_extents(bitmap, request.offset, request.length)
            done = number == len(self._contexts)
            self.replies.put(
                status.status_chunk(request.cookie, context_id, extents, request.length, one=one, done=done))
