"""What a connection has to send: replies in arenas, as few pieces as possible.

A read's data lies in an arena behind the room for its header (`Session` reserves both before the data is read),
a reply without data takes its few bytes when it is made. Replies that lie behind each other become one segment,
so that a batch that completed at once leaves in a single send.
"""

from __future__ import annotations

from tapcore.nbd import wire
from tapcore.nbd.buffers import Buffer, Pool
from tapcore.request import READ, WRITE, Request

ARENA_BYTES = 2 << 20
"""One arena; a larger reply gets one of its own. (Pages cost nothing before they are used.)"""
MAX_SEGMENTS = 512
"""Pieces in one send (below IOV_MAX)."""

_DATA = wire.DATA_CHUNK.struct
_SIMPLE = wire.SIMPLE_REPLY.struct
_SIMPLE_BYTES = wire.SIMPLE_REPLY.size
DATA_HEADER_BYTES = {True: wire.DATA_CHUNK.size, False: wire.SIMPLE_REPLY.size}
"""Room before a read's data, by whether structured replies were negotiated."""


class Segment:
    """Bytes [start, end) of a buffer that wait to be sent: `count` replies."""

    __slots__ = ("buffer", "count", "end", "start")

    def __init__(self, buffer: Buffer, start: int, end: int) -> None:
        self.buffer = buffer
        self.start = start
        self.end = end
        self.count = 1


class Replies:
    """The output side of one session; `structured` as negotiated."""

    def __init__(self, pool: Pool, structured: bool) -> None:
        self.arena = pool.take(ARENA_BYTES)
        self.unsent_bytes = 0
        self._pool = pool
        self._structured = structured
        self._segments: list[Segment] = []

    def next_arena(self, need_bytes: int) -> Buffer:
        """A new arena with room for a reply of `need_bytes`; the old one lives as long as it has users."""
        old = self.arena
        self.arena = self._pool.take(max(ARENA_BYTES, need_bytes))
        if not old.users:
            self._pool.give(old)
        return self.arena

    def add(self, finished: list[Request]) -> None:
        """Queue the replies to plain reads and writes that ended well. Reads have reserved their place."""
        segments = self._segments
        last = segments[-1] if segments else None
        structured = self._structured
        for request in finished:
            if request.op == READ:
                buffer = request.place
                at = request.at
                if structured:
                    _DATA.pack_into(buffer.memory, at, wire.NBD_STRUCTURED_REPLY_MAGIC, wire.NBD_REPLY_FLAG_DONE,
                                    wire.NBD_REPLY_TYPE_OFFSET_DATA, request.cookie, request.length + 8,
                                    request.offset)
                    end = at + 28 + request.length
                else:
                    _SIMPLE.pack_into(buffer.memory, at, wire.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie)
                    end = at + 16 + request.length
            else:
                assert request.op == WRITE
                request.place.users -= 1
                buffer = self.arena
                at = buffer.pos
                end = at + _SIMPLE_BYTES
                if end > buffer.size:
                    buffer = self.next_arena(_SIMPLE_BYTES)
                    at, end = 0, _SIMPLE_BYTES
                _SIMPLE.pack_into(buffer.memory, at, wire.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie)
                buffer.pos = end
                buffer.users += 1
            self.unsent_bytes += end - at
            if last is not None and last.end == at and last.buffer is buffer:
                last.end = end
                last.count += 1
            else:
                last = Segment(buffer, at, end)
                segments.append(last)

    def put(self, data: bytes) -> None:
        """Queue a reply that is ready as bytes."""
        buffer = self.arena
        if buffer.size - buffer.pos < len(data):
            buffer = self.next_arena(len(data))
        at = buffer.pos
        end = buffer.pos = at + len(data)
        buffer.view[at:end] = data
        buffer.users += 1
        self.unsent_bytes += len(data)
        last = self._segments[-1] if self._segments else None
        if last is not None and last.end == at and last.buffer is buffer:
            last.end = end
            last.count += 1
        else:
            self._segments.append(Segment(buffer, at, end))

    def forget(self, request: Request) -> None:
        """Give back the place of a read that failed or whose data nobody wants."""
        self._release(request.place, 1)

    def output(self) -> list[memoryview]:
        """What is to be sent next, in order; empty if nothing waits."""
        return [s.buffer.view[s.start : s.end] for s in self._segments[:MAX_SEGMENTS]]

    def sent(self, count_bytes: int) -> None:
        """The first `count_bytes` of `output()` are on their way: their memory may be used again."""
        self.unsent_bytes -= count_bytes
        segments = self._segments
        finished = 0
        while count_bytes:
            segment = segments[finished]
            size = segment.end - segment.start
            if count_bytes < size:
                segment.start += count_bytes
                break
            count_bytes -= size
            finished += 1
            self._release(segment.buffer, segment.count)
        del segments[:finished]

    def _release(self, buffer: Buffer, count: int) -> None:
        buffer.users -= count
        if buffer.users:
            return
        if buffer is not self.arena:
            self._pool.give(buffer)
        elif buffer.size > ARENA_BYTES:
            self.next_arena(0)
        else:
            buffer.pos = 0
