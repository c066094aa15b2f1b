"""One client of a log: its messages, its region, its leases and its reads through the ring.

Messages are answered in the order in which they came. What takes long, a search of a big bitmap, is a generator
that is continued a few milliseconds a turn, so that guests are served in between. Nothing grows with a client that
sends without reading: while its replies are stuck its messages stay in the socket, and kicks coalesce to one.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections import deque
from collections.abc import Generator
from dataclasses import replace
from functools import partial

from tapcore.errors import LogError, ProtocolError
from tapcore.request import BACKGROUND, READ, Request
from writelog.bitmap import SECTOR_BYTES
from writelog.control import (
    CLEAR,
    DONE,
    FAIL,
    GET,
    KICK,
    KICK_MESSAGE,
    PEEK,
    SHMP,
    ClearOp,
    Decoder,
    GetOp,
    Message,
    PeekOp,
    Version,
    encode_shmp_reply,
)
from writelog.dirtymap import WINDOW_BLOCKS, Lease
from writelog.generations import new_id
from writelog.logcontext import Begin, LogContext, Steps
from writelog.logexport import export_ranges, export_touched, listed
from writelog.ring import BackRing, Extent, is_valid
from writelog.shm import (
    COOKIE,
    COOKIE_WORD,
    EXPORT_BYTES,
    Region,
    unlink_shared,
)

logger = logging.getLogger(__name__)

TURN_S = 0.002
"""Time that one client's messages get of one turn of the loop."""
MAX_LEASES = 64
"""Open leases of one connection."""
MAX_UNSENT_BYTES = 4096
"""Replies not yet sent, above which no further message is answered."""
RECEIVE_BYTES = 4096

Job = Generator[Begin | None, None, bytes]


class Connection:
    """Serves `sock`, non-blocking, until the client goes, breaks the protocol, or `close` is called."""

    def __init__(self, context: LogContext, sock: socket.socket) -> None:
        self._context = context
        self._map = context.map
        self._sock = sock
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()
        self._job: Job | None = None
        self._work_is_due = False
        self._waits = False
        """The job goes on when something has ended that is under way."""
        self._adopted = 0
        """The base whose copy this client speaks for."""
        self._unsent = bytearray()
        self._kick_unsent_bytes = 0
        """From the front of `_unsent` to the end of the kick in it; 0 if there is none."""
        self._push_is_due = False
        self._leases: dict[int, Lease] = {}
        self._region: Region | None = None
        self._ring: BackRing | None = None
        self._reads = 0
        self._closed = False
        self._watched = (False, False)
        context.connections.add(self)
        self._watch()

    def close(self) -> None:
        """End it: leases return to the log, the region's name goes, and the memory with the last read."""
        if self._closed:
            return
        self._closed = True
        self._context.loop.remove(self._sock.fileno())
        self._sock.close()
        if self._job is not None:
            self._job.close()
            self._job = None
        for lease in self._leases.values():
            self._map.close_lease(lease)
        self._leases.clear()
        if self._context.holder is self:
            self._context.holder = None
        if self._context.watcher is self:
            self._context.watcher = None
            self._map.unwatch()
        if self._region is not None:
            unlink_shared(self._region.name)
        self._release_if_idle()

    def _release_if_idle(self) -> None:
        if self._reads > 0:
            return
        self._context.connections.discard(self)
        if self._region is not None and self._ring is not None:
            self._ring.release()
            self._region.close()
            self._region = self._ring = None

    def _drop(self, why: object) -> None:
        logger.warning("log %s: client dropped: %s", self._context.name, why)
        self.close()

    # The socket

    def _watch(self) -> None:
        """Ask the loop for what is wanted now: messages if none is waiting, room if replies are."""
        wanted = (not self._messages and self._job is None, bool(self._unsent))
        if self._closed or wanted == self._watched:
            return
        self._watched = wanted
        loop, fd = self._context.loop, self._sock.fileno()
        loop.remove(fd)
        if wanted[0]:
            loop.add_reader(fd, self._on_readable)
        if wanted[1]:
            loop.add_writer(fd, self._on_writable)

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
            if not data:
                self.close()
                return
            self._messages.extend(self._decoder.feed(data))
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(error)
            return
        except ProtocolError as error:
            self._drop(error)
            return
        self._work()

    def _on_writable(self) -> None:
        self._send()
        self._work()

    def _send(self) -> None:
        """Send what the socket takes."""
        if self._closed or not self._unsent:
            return
        try:
            sent_bytes = self._sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(error)
            return
        del self._unsent[:sent_bytes]
        self._kick_unsent_bytes = max(0, self._kick_unsent_bytes - sent_bytes)

    # Messages

    def _work(self) -> None:
        """Answer messages for the time of one turn, and come back next turn if there is more."""
        if self._work_is_due or self._waits:
            return
        deadline_s = time.monotonic() + TURN_S
        while not (self._closed or self._waits):
            if self._job is not None:
                self._continue_job(self._job)
            elif self._messages and len(self._unsent) <= MAX_UNSENT_BYTES:
                message = self._messages.popleft()
                if message.command == KICK and message.version == Version.ORIGINAL:
                    self._on_kick()
                else:
                    self._job = self._answer(message)
            else:
                break
            if time.monotonic() > deadline_s:
                self._work_is_due = True
                self._context.loop.call_soon(self._work_again)
                break
        self._send()
        self._watch()

    def _work_again(self) -> None:
        self._work_is_due = False
        self._work()

    def _continue_job(self, job: Job) -> None:
        try:
            begin = next(job)
        except StopIteration as end:
            self._job = None
            self._unsent += end.value
        except Exception:
            self.close()
            raise
        else:
            if begin is not None:
                self._waits = True
                begin(self._waited)

    def _waited(self) -> None:
        self._waits = False
        self._context.loop.call_soon(self._work)

    def _answer(self, message: Message) -> Job:
        """Carry out one message a step at a time; returns the reply."""
        try:
            region = self._need_region()
        except LogError as error:
            logger.warning("log %s: no region for a client: %s", self._context.name, error)
            return encode_shmp_reply("") if message.command == SHMP else FAIL
        try:
            if not message.is_known:
                raise LogError(f"unknown message {message}", errno=errno.EINVAL
                               if message.version == Version.LEASES else errno.EPROTONOSUPPORT)
            if message.command == SHMP:
                COOKIE_WORD.pack_into(region.memory, 0, cookie=COOKIE)
                return encode_shmp_reply(region.name)
            if message.command in (GET, CLEAR):
                self._check_holder(message)
            if message.version == Version.ORIGINAL:
                yield from self._answer_original(message, region)
            else:
                yield from self._answer_version_1(message, region)
        except LogError as error:
            region.put_result(error=error.errno)
            return FAIL
        return DONE

    def _check_holder(self, message: Message) -> None:
        """LogError if another connection holds the log: what this one took or cleared, the other would miss. A
        message of version 1 makes its connection the holder."""
        context, is_original = self._context, message.version == Version.ORIGINAL
        if context.holder not in (None, self) or (context.clearing and not is_original):
            raise LogError("another client holds the log", errno=errno.EBUSY)
        if not is_original:
            context.holder = self

    def _speak_for_base(self) -> Steps:
        """To be called before bits are cleared: if it is not for the copy at the base, there is no base any
        more; if it is, the copy has that name by now."""
        ids = self._context.store.generations
        if ids.base not in (0, self._adopted):
            yield from self._context.rename(ids.with_base(0))
        elif ids.former:
            yield from self._context.rename(ids.confirmed())

    def _answer_original(self, message: Message, region: Region) -> Steps:
        """The original's messages. `getw` is a lease that lasts until its reply: if tapdisk or the client dies
        before, nothing is lost."""
        if message.command == PEEK:
            yield from export_ranges(region, self._map.peek, 0, self._map.blocks)
            return
        self._context.clearing += 1
        try:
            if message.command == GET:
                yield from self._get_original(region)
            else:
                assert message.command == CLEAR
                yield from self._speak_for_base()
                self._map.clear()
        finally:
            self._context.clearing -= 1

    def _get_original(self, region: Region) -> Steps:
        blocks = self._map.blocks
        lease = self._map.open_lease()
        try:
            yield from export_ranges(region, partial(self._map.take, lease), 0, blocks)
            yield from self._speak_for_base()
            self._map.commit(lease, 0, blocks)
        finally:
            self._map.close_lease(lease)

    def _answer_version_1(self, message: Message, region: Region) -> Steps:
        if message.command == PEEK and message.op == PeekOp.FIGURES:
            figures = yield from self._context.figures_steps()
            encoded = figures.encode()
            region.export[: len(encoded)] = encoded
            region.put_result()
        elif message.command == PEEK and message.op == PeekOp.BITMAP:
            yield from self._export_bitmap(message, region)
        elif message.command == PEEK and message.op == PeekOp.TOUCHED:
            self._watch_chunks(message, region)
        elif message.command == PEEK:
            start, stop = self._range(message)
            count, following = yield from export_ranges(region, self._map.peek, start, stop)
            region.put_result(count=count, next_sector=self._cursor(following, stop))
        elif message.command == GET:
            wanted = listed(self._map, message.count, region) if message.op == GetOp.LISTED else None
            start, stop = self._range(message if wanted is None else replace(message, count=0))
            lease = self._lease(message.lease) if message.lease else self._open_lease()
            step = partial(self._map.take, lease, wanted=wanted)
            count, following = yield from export_ranges(region, step, start, stop)
            region.put_result(lease=lease.id, count=count, next_sector=self._cursor(following, stop))
        elif message.op == ClearOp.FILL:
            self._map.dirty.fill()
            base = new_id()
            yield from self._context.rename(self._context.store.generations.with_base(base), all_dirty=True)
            self._adopted = base
            region.put_result(next_sector=base)
        elif message.op == ClearOp.ADOPT:
            ids, base = self._context.store.generations, new_id()
            if not ids.serves(message.sector):
                raise LogError("the log counts for another copy", errno=errno.ESTALE)
            yield from self._context.rename(ids.renewed(message.sector, base))
            self._adopted = base
            region.put_result(next_sector=base)
        else:
            if message.op == ClearOp.COMMIT and self._lease(message.lease).windows:
                yield from self._speak_for_base()
            self._settle(message)
            region.put_result(lease=message.lease)

    def _settle(self, message: Message) -> None:
        """COMMIT or RECLAIM."""
        lease = self._lease(message.lease)
        settle = self._map.commit if message.op == ClearOp.COMMIT else self._map.reclaim
        if message.count == 0:
            settle(lease, 0, self._map.blocks)
            self._map.close_lease(self._leases.pop(lease.id))
            return
        blocks = self._map.inner_blocks if message.op == ClearOp.COMMIT else self._map.outer_blocks
        settle(lease, *blocks(message.sector, message.count))

    def _export_bitmap(self, message: Message, region: Region) -> Generator[None, None, None]:
        start, stop = self._range(message)
        if message.sector % (8 * self._map.sectors_per_block):
            raise LogError(f"bitmap from sector {message.sector}", errno=errno.EINVAL)
        end = min(stop, start + 8 * EXPORT_BYTES)
        for first in range(start, end, WINDOW_BLOCKS):
            last = min(end, first + WINDOW_BLOCKS)
            self._map.copy_bits(first, last, region.export[(first - start) >> 3 :])
            yield
        region.put_result(count=end - start, next_sector=self._cursor(end, stop))

    def _watch_chunks(self, message: Message, region: Region) -> None:
        if self._context.watcher not in (None, self):
            raise LogError("another client watches the log", errno=errno.EBUSY)
        count, next_sector = export_touched(self._map, message.sector, region)
        self._context.watcher = self
        region.put_result(count=count, next_sector=next_sector)

    def _range(self, message: Message) -> tuple[int, int]:
        """The blocks that a message asks about."""
        if message.sector and message.sector >= self._map.sectors:
            raise LogError(f"sector {message.sector} is outside the disk", errno=errno.EINVAL)
        return self._map.outer_blocks(message.sector, message.count or self._map.sectors)

    def _cursor(self, block: int, stop: int) -> int:
        return block * self._map.sectors_per_block if block < stop else 0

    def _lease(self, lease_id: int) -> Lease:
        try:
            return self._leases[lease_id]
        except KeyError:
            raise LogError(f"no lease {lease_id}", errno=errno.ENOENT) from None

    def _open_lease(self) -> Lease:
        if len(self._leases) >= MAX_LEASES:
            raise LogError(f"{MAX_LEASES} leases are open", errno=errno.ENOSPC)
        lease = self._map.open_lease()
        self._leases[lease.id] = lease
        return lease

    def _need_region(self) -> Region:
        if self._region is None:
            self._region = self._context.new_region()
            self._ring = BackRing(self._region.page)
        return self._region

    # The ring

    def go_on(self) -> None:
        """Start the reads that came while the log was quiescing."""
        if self._ring is not None and not self._closed:
            self._on_kick()

    def _on_kick(self) -> None:
        """Start the reads that the ring asks for."""
        context = self._context
        if context.quiescing:
            return
        try:
            region = self._need_region()
            assert self._ring is not None
            wanted = self._ring.take_requests()
        except (LogError, ProtocolError) as error:
            self._drop(error)
            return
        for extent in wanted:
            if is_valid(extent, self._map.sectors):
                self._read(region, extent)
            else:
                self._respond((extent[0], 0, extent[2]))
        context.lower.submit()

    def _read(self, region: Region, extent: Extent) -> None:
        sector, count, offset = extent
        length = count * SECTOR_BYTES
        request = Request(READ, sector * SECTOR_BYTES, length, [region.data[offset : offset + length]],
                          BACKGROUND, self._on_read_done)
        request.place = extent
        self._reads += 1
        self._context.reads += 1
        if self._context.lower.queue_read(request):
            self._on_read_done(request)

    def _on_read_done(self, request: Request) -> None:
        sector, count, offset = request.place
        request.iov = ()
        self._reads -= 1
        context = self._context
        context.reads -= 1
        if self._closed:
            self._release_if_idle()
        else:
            if request.error:
                logger.warning("log %s: read of %d bytes at %d failed: errno %d", context.name, request.length,
                               request.offset, request.error)
            self._respond((sector, 0 if request.error else count, offset))
        if context.reads == 0:
            waiting, context.reads_ended = context.reads_ended, []
            for call in waiting:
                call()

    def _respond(self, extent: Extent) -> None:
        assert self._ring is not None
        self._ring.put_response(extent)
        if not self._push_is_due:
            self._push_is_due = True
            self._context.loop.call_soon(self._push)

    def _push(self) -> None:
        """Show the client all responses of this turn, with one kick."""
        self._push_is_due = False
        if self._closed or self._ring is None:
            return
        self._ring.push()
        if not self._kick_unsent_bytes:
            self._unsent += KICK_MESSAGE
            self._kick_unsent_bytes = len(self._unsent)
        self._send()
        self._watch()
