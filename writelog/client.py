"""A client of a log, for programs: look, get, read, confirm.

    with LogClient(path) as log:
        taken = log.get()
        for offset, data in log.read_extents(taken.extents):
            copy(offset, data)
        log.commit(taken.lease)

Offsets and lengths are bytes. Calls wait for their reply, at most `timeout_s`; LogError says that a server is
gone, too slow, or refuses. What was taken and not committed is dirty again when the connection ends, whatever ends
it.

Data can also be read without waiting, by a program with a loop of its own:

    log.submit_read(offset, length, slot_offset)    up to `free_slots` times, then log.push()
    log.fileno()                                    readable when responses may be there; a call can have read
                                                    their signal, so ask for responses() after one before polling
    log.responses()                                 the reads that have ended
    log.data[slot_offset : slot_offset + length]    the data, in the shared region: good for a zero-copy send

Calls and reads can be mixed. One thread at a time.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

from bitarray import bitarray

from tapcore.errors import LogError, ProtocolError
from writelog.bitmap import SECTOR_BYTES
from writelog.control import (
    CLEAR,
    FAIL,
    GET,
    KICK_MESSAGE,
    PEEK,
    SHMP,
    SHMP_REPLY,
    STATUS_BYTES,
    ClearOp,
    Figures,
    GetOp,
    Message,
    PeekOp,
    ReplyDecoder,
    Version,
    decode_shmp_reply,
)
from writelog.ring import FrontRing
from writelog.shm import DATA_BYTES, DISK_RANGE, MAX_LISTED, RESULT, RESULT_OFFSET, Region

DEFAULT_TIMEOUT_S = 30.0
PIECE_BYTES = 256 << 10
"""The longest single read of `read_extents`."""
MAX_MESSAGE_BYTES = 1 << 40
"""What one message speaks of: its count has 32 bits of sectors. A multiple of every granularity."""
GONE_HINT = "what was taken and not committed is dirty again; connect again when the disk is served"

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """What one `get` moved into `lease`. `next_offset` is where to go on when it was not all, else None."""

    lease: int
    extents: list[tuple[int, int]]
    next_offset: int | None


class Response(NamedTuple):
    """A read that has ended: the data is at `slot_offset` of `data` if `ok`."""

    offset: int
    length: int
    slot_offset: int
    ok: bool


class LogClient:
    """Connected to the log's control socket at `path`."""

    def __init__(self, path: str | Path, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.path = str(path)
        self.timeout_s = timeout_s
        self._decoder = ReplyDecoder()
        self._lengths: dict[tuple[int, int], int] = {}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._region: Region | None = None
        try:
            self._connect()
            self._sock.setblocking(False)
            name = self._checked(decode_shmp_reply, self._exchange(Message(SHMP), SHMP_REPLY.size))
            self._region = Region.attach(name)
            self._ring = FrontRing(self._region.page)
            self.data = self._region.data
            figures = self.stat()
        except BaseException:
            self.close()
            raise
        self.size_bytes = figures.sectors * SECTOR_BYTES
        self.granularity_bytes = figures.granularity_bytes

    def __enter__(self) -> LogClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. Leases that are still open return to the log."""
        self._sock.close()
        if self._region is not None:
            self._ring.release()
            self._region.close()
            self._region = None

    def fileno(self) -> int:
        """The socket, to be polled for input."""
        return self._sock.fileno()

    # The log

    def stat(self) -> Figures:
        """How large, how dirty, how busy the log is."""
        self._call(Message(PEEK, Version.LEASES, PeekOp.FIGURES))
        return self._checked(Figures.decode, self._memory().export)

    def peek(self, offset: int = 0, length: int = 0) -> Iterator[tuple[int, int]]:
        """The extents (offset, length) that are dirty or leased, in order; `length` 0 means up to the end of the
        disk. Nothing changes. The last extent of one call to the server and the first of the next can be adjacent.
        """
        at: int | None = offset
        stop = offset + length if length else None
        while at is not None:
            result, at = self._look(Message(PEEK, Version.LEASES, PeekOp.EXTENTS), at, stop)
            yield from self._exported(result["count"])

    def peek_bitmap(self) -> bitarray:
        """The whole log as bits, one a block: dirty or leased. Nothing changes."""
        bits = bitarray(endian="little")
        sector = 0
        while True:
            result = self._call(Message(PEEK, Version.LEASES, PeekOp.BITMAP, 0, 0, sector))
            part = bitarray(bytes(self._memory().export[: (result["count"] + 7) // 8]), endian="little")
            bits += part[: result["count"]]
            sector = result["next_sector"]
            if sector == 0:
                return bits

    def get(self, lease: int = 0, offset: int = 0, length: int = 0) -> Taken:
        """Take the dirty extents that touch [offset, offset + length) into `lease`, 0 for a new one; `length` 0
        means up to the end of the disk. Blocks with a write in flight, or leased already, are left for later."""
        message = Message(GET, Version.LEASES, GetOp.TAKE, lease)
        result, next_offset = self._look(message, offset, offset + length if length else None)
        return Taken(result["lease"], self._exported(result["count"]), next_offset)

    def get_listed(self, ranges: list[tuple[int, int]]) -> Taken:
        """Take what is dirty of the ranges (offset, length) into a new lease. They are ascending, and no two touch
        the same block."""
        assert ranges
        lease, cursor = 0, 0
        extents: list[tuple[int, int]] = []
        for start in range(0, len(ranges), MAX_LISTED):
            part = ranges[start : start + MAX_LISTED]
            while True:
                words = [word for offset, length in part
                         for word in (offset // SECTOR_BYTES, length // SECTOR_BYTES)]
                packed = memoryview(array("Q", words)).cast("B")
                self._memory().export[: len(packed)] = packed
                result = self._call(Message(GET, Version.LEASES, GetOp.LISTED, lease, len(part), cursor))
                lease, cursor = result["lease"], result["next_sector"]
                extents += self._exported(result["count"])
                if not cursor:
                    break
        return Taken(lease, extents, None)

    def touched(self) -> bitarray:
        """The chunks of CHUNK_BYTES that were written to since the last call, a bit each; the first one, of none,
        begins the watching."""
        bits = bitarray(endian="little")
        sector = 0
        while True:
            result = self._call(Message(PEEK, Version.LEASES, PeekOp.TOUCHED, 0, 0, sector))
            part = bitarray(bytes(self._memory().export[: (result["count"] + 7) // 8]), endian="little")
            bits += part[: result["count"]]
            sector = result["next_sector"]
            if sector == 0:
                return bits

    def commit(self, lease: int, offset: int = 0, length: int = 0) -> None:
        """The data of the lease's blocks that lie in [offset, offset + length) entirely is safe: forget them.
        `length` 0 means all, and closes the lease."""
        self._settle(ClearOp.COMMIT, lease, offset, length)

    def reclaim(self, lease: int, offset: int = 0, length: int = 0) -> None:
        """The lease's blocks that [offset, offset + length) touches are dirty again. `length` 0 means all, and
        closes the lease."""
        self._settle(ClearOp.RECLAIM, lease, offset, length)

    def clear(self) -> None:
        """Forget all that is dirty, unseen; not what is leased, and not blocks with a write in flight."""
        self._call(Message(CLEAR))

    def fill(self) -> int:
        """Every block of the disk is dirty: the start of a full resync. Returns the new base of the log, which is
        the name of the copy that lacks all of this; what is committed from now on, it has."""
        return self._call(Message(CLEAR, Version.LEASES, ClearOp.FILL))["next_sector"]

    def adopt(self, held: int) -> int:
        """What is committed from now on, the copy at `held` has, the log's base or former base. Returns its new
        base, which the copy has to have noted down before the first commit. LogError (ESTALE) if the log counts
        for another copy: then what is dirty does not say what this one lacks."""
        return self._call(Message(CLEAR, Version.LEASES, ClearOp.ADOPT, sector=held))["next_sector"]

    def _look(self, message: Message, offset: int, stop: int | None) -> tuple[dict[str, int], int | None]:
        """Send `message` for [offset, stop), or up to the end of the disk; its RESULT, and where to go on."""
        start = offset // self.granularity_bytes * self.granularity_bytes
        length = 0
        if stop is not None and stop < self.size_bytes:
            if stop <= start:
                raise LogError(f"an empty range from {offset} to {stop}", errno=errno.EINVAL, path=self.path)
            length = min(stop - start, MAX_MESSAGE_BYTES)
        count = -(-length // SECTOR_BYTES)
        result = self._call(replace(message, count=count, sector=start // SECTOR_BYTES))
        following = result["next_sector"] * SECTOR_BYTES or None
        if following is None and stop is not None and length and start + length < stop:
            following = start + length
        return result, following

    def _settle(self, op: ClearOp, lease: int, offset: int, length: int) -> None:
        """COMMIT or RECLAIM, in as many messages as its 32 bits of count make necessary."""
        if length == 0:
            self._call(Message(CLEAR, Version.LEASES, op, lease))
            return
        block = self.granularity_bytes
        first = (-(-offset // block) if op == ClearOp.COMMIT else offset // block) * block
        for start in range(first, offset + length, MAX_MESSAGE_BYTES):
            span = min(MAX_MESSAGE_BYTES, offset + length - start)
            count = span // SECTOR_BYTES if op == ClearOp.COMMIT else -(-span // SECTOR_BYTES)
            if count:
                self._call(Message(CLEAR, Version.LEASES, op, lease, count, start // SECTOR_BYTES))

    def _exported(self, count: int) -> list[tuple[int, int]]:
        """The first `count` ranges of the export area, in bytes."""
        ranges = DISK_RANGE.struct.iter_unpack(bytes(self._memory().export[: count * DISK_RANGE.size]))
        return [(sector * SECTOR_BYTES, sectors * SECTOR_BYTES) for sector, sectors in ranges]

    # Reads

    @property
    def free_slots(self) -> int:
        """Reads that can be submitted before a response is taken."""
        return self._ring.free_slots

    @property
    def open_reads(self) -> int:
        """Reads submitted whose response was not taken."""
        return self._ring.open_requests

    def submit_read(self, offset: int, length: int, slot_offset: int) -> None:
        """Ask for [offset, offset + length) of the disk at `slot_offset` of the data area; whole sectors. It is
        sent by `push`. No two open reads may share the same `offset` and `slot_offset`."""
        assert offset % SECTOR_BYTES == 0 and length % SECTOR_BYTES == 0
        assert slot_offset >= 0 and slot_offset + length <= DATA_BYTES
        self._lengths[offset, slot_offset] = length
        self._ring.put_request((offset // SECTOR_BYTES, length // SECTOR_BYTES, slot_offset))

    def push(self) -> None:
        """Send the reads submitted."""
        self._ring.push()
        self._send(KICK_MESSAGE, self._deadline_s())

    def responses(self) -> list[Response]:
        """The reads that have ended since the last call; does not wait."""
        self._receive()
        out = []
        for sector, count, slot_offset in self._checked(FrontRing.take_responses, self._ring):
            offset = sector * SECTOR_BYTES
            length = self._lengths.pop((offset, slot_offset), None)
            if length is None:
                raise LogError(f"response to a read of {offset} that nobody asked for", path=self.path)
            out.append(Response(offset, length, slot_offset, count * SECTOR_BYTES == length))
        return out

    def wait(self, timeout_s: float) -> bool:
        """Wait until `responses` may have something; False when the time is over."""
        return self._ring.has_responses or self._poll(select.POLLIN, time.monotonic() + timeout_s)

    def read_extents(self, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """The data of the extents, in their order, in pieces (offset, data) of at most 256 KiB.

        `data` is a view of the shared region: valid until the next piece is asked for. LogError names a range that
        the disk could not read.
        """
        assert self.open_reads == 0, "reads of another kind are open"
        pieces = _pieces(extents)
        piece = next(pieces, None)
        space = _Space()
        queue: deque[tuple[int, int, int]] = deque()
        ready: set[tuple[int, int]] = set()
        try:
            while piece is not None or queue:
                submitted = False
                while piece is not None and self.free_slots and (slot := space.allocate(piece[1])) is not None:
                    self.submit_read(*piece, slot)
                    queue.append((*piece, slot))
                    submitted = True
                    piece = next(pieces, None)
                if submitted:
                    self.push()
                offset, length, slot = queue.popleft()
                self._wait_for(offset, slot, ready)
                yield offset, self.data[slot : slot + length]
                space.free()
        finally:
            self._abandon_reads()

    def _wait_for(self, offset: int, slot: int, ready: set[tuple[int, int]]) -> None:
        """Wait until the read of `offset` into `slot` has ended; others that have are entered in `ready`."""
        deadline_s = self._deadline_s()
        while (offset, slot) not in ready:
            responses = self.responses()
            for response in responses:
                if not response.ok:
                    raise LogError(f"cannot read {response.length} bytes of the disk", path=self.path,
                                   offset=response.offset, hint="see the tapdisk's log")
                ready.add((response.offset, response.slot_offset))
            if not responses and not self._poll(select.POLLIN, deadline_s):
                raise self._too_slow()
        ready.remove((offset, slot))

    def _abandon_reads(self) -> None:
        """Wait for reads whose data nobody wants any more: they still fill the data area."""
        deadline_s = self._deadline_s()
        try:
            while self._region is not None and self.open_reads:
                if not self.responses() and not self._poll(select.POLLIN, deadline_s):
                    return
        except LogError:
            return

    # The socket

    def _connect(self) -> None:
        self._sock.settimeout(self.timeout_s)
        try:
            self._sock.connect(self.path)
        except OSError as error:
            raise LogError(f"cannot connect: {os.strerror(error.errno or errno.ETIMEDOUT)}", errno=error.errno,
                           path=self.path, hint="is a disk with a log served there?") from error

    def _call(self, message: Message) -> dict[str, int]:
        """Send a message and wait for its reply; the RESULT, for a message of version 1."""
        reply = self._exchange(message, STATUS_BYTES)
        result: dict[str, int] = RESULT.unpack(self._memory().memory, RESULT_OFFSET)
        if reply == FAIL:
            code = result["error"] or errno.EPROTO
            if code == errno.EBUSY:
                raise LogError("another client holds the log", errno=code, path=self.path,
                               hint="a sync or a backup is using it: wait until it has ended")
            raise LogError(f"the log server refused {message.command.decode()}: {os.strerror(code)}", errno=code,
                           path=self.path)
        return result

    def _exchange(self, message: Message, reply_bytes: int) -> bytes:
        deadline_s = self._deadline_s()
        self._decoder.expect(reply_bytes)
        self._send(message.encode(), deadline_s)
        while not (replies := self._receive()):
            if not self._poll(select.POLLIN, deadline_s):
                raise self._too_slow()
        return replies[0]

    def _send(self, data: bytes, deadline_s: float) -> None:
        while data:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                if not self._poll(select.POLLOUT, deadline_s):
                    raise self._too_slow() from None
            except OSError as error:
                raise self._gone(error) from error

    def _receive(self) -> list[bytes]:
        """Take in what has come; the replies in it."""
        try:
            data = self._sock.recv(4096)
        except BlockingIOError:
            return []
        except OSError as error:
            raise self._gone(error) from error
        if not data:
            raise self._gone(None)
        return self._checked(self._decoder.feed, data)

    def _poll(self, events: int, deadline_s: float) -> bool:
        poller = select.poll()
        poller.register(self._sock, events)
        return bool(poller.poll(max(0.0, deadline_s - time.monotonic()) * 1000))

    def _deadline_s(self) -> float:
        return time.monotonic() + self.timeout_s

    def _memory(self) -> Region:
        if self._region is None:
            raise LogError("the client is closed", path=self.path, errno=errno.EBADF)
        return self._region

    def _checked(self, decode: Callable[..., T], *args: object) -> T:
        """`decode(*args)`, with what the server did wrong as LogError."""
        try:
            return decode(*args)
        except ProtocolError as error:
            raise LogError(error.message, errno=error.errno, path=self.path, hint=error.hint) from error

    def _gone(self, error: OSError | None) -> LogError:
        detail = f": {os.strerror(error.errno or 0)}" if error else ""
        return LogError(f"the log server closed the connection{detail}", errno=errno.ECONNRESET, path=self.path,
                        hint=GONE_HINT)

    def _too_slow(self) -> LogError:
        return LogError(f"the log server did not answer in {self.timeout_s:g} s", errno=errno.ETIMEDOUT,
                        path=self.path, hint="is the tapdisk alive, and its disk?")


class _Space:
    """The data area, given out and taken back in turns, first in, first out."""

    def __init__(self) -> None:
        self._used: deque[tuple[int, int]] = deque()

    def allocate(self, length: int) -> int | None:
        """The offset of `length` free bytes, or None for now."""
        if not self._used:
            start = 0
        else:
            first, last = self._used[0][0], self._used[-1][1]
            start = last
            if last > first and last + length > DATA_BYTES:
                start = 0
            if start <= first < start + length:
                return None
        if start + length > DATA_BYTES:
            return None
        self._used.append((start, start + length))
        return start

    def free(self) -> None:
        """Take back the oldest."""
        self._used.popleft()


def _pieces(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The extents, none longer than PIECE_BYTES."""
    for offset, length in extents:
        for start in range(offset, offset + length, PIECE_BYTES):
            yield start, min(PIECE_BYTES, offset + length - start)
