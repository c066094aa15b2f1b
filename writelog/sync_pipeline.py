"""From dirty extents to messages: reads them through the log's ring and sends them, in one order.

    take ─▶ todo ─▶ reading ─▶ ready ─▶ sent ─▶ applied ─▶ durable ─▶ commit
            items   in the shared area  │ until zmq is done with it

Reads end in any order, and what they brought is sent in the order in which they were started. So of two versions
of a block the one that was read last is sent last, and a ZERO never passes the data that was there before it.
Each portion is a lease on what it took, and is committed when the replica has all of it on its disk.

With a `comparison`, an extent that is to go for the first time can be sent as a PROBE, its digests alone. What the
replica answers to be different goes back to the head of todo, to be read anew, and the portion is not over before
that has been sent; the rest counts as sent. Others may `ask` in the same way what the replica has.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import zmq
from bitarray import bitarray

from tapcore.errors import ProtocolError, ReplicationError
from writelog.backlog import Runs
from writelog.client import LogClient, Response
from writelog.hashtree import Extents, extents_of, is_mask, piece_digests
from writelog.sync_cap import Cap
from writelog.sync_compare import Comparison
from writelog.sync_link import MAX_UNACKED_MESSAGES, Link
from writelog.sync_pack import Packer
from writelog.sync_report import Report
from writelog.wire import MAX_ZERO_BYTES, Ack, Data, Packed, Probe, Probed, RunningDigest, Zero, checksum

PIECE_BYTES: Final = 512 << 10
"""One read, and the payload of one DATA."""
PAGE_BYTES: Final = 4096
MESSAGE_COST_BYTES: Final = 4096
"""What a message costs of the credit at least."""
MAX_PROBED_BYTES: Final = 64 << 20
"""What the replica has to read and hash to answer the PROBEs that are under way."""
TO_DECIDE: Final = -1
"""The grain of what may be compared first."""

Settle = Callable[["Piece", Extents], None]
"""Called with what of a piece is different at the replica."""


@dataclass
class Portion:
    """What one lease took: [(is_zero, offset, length)], as the disk's map says."""

    lease: int
    """0: it holds what the log thinks the replica has."""
    items: list[tuple[bool, int, int]]
    chunks: Runs
    """Where its blocks are."""
    last_seq: int = -1
    """Of its last message; -1 until that was sent."""
    open_ends: int = 1
    """That still have to pass: its own, and one for each PROBE."""


@dataclass(slots=True)
class Item:
    """To do: send a range, or compare it by pieces of `grain`; or, with length 0, an end of `portion`."""

    portion: Portion | None
    is_zero: bool
    offset: int
    length: int
    grain: int = 0
    settle: Settle | None = None


@dataclass(slots=True)
class Piece:
    """One read or one range of zeroes; or, with length 0, an end of `portion`."""

    portion: Portion | None
    """None for what somebody asks."""
    offset: int
    length: int
    place: int = -1
    """Where it is in the shared area; -1 if nothing was read."""
    cost_bytes: int = 0
    """What it takes of the shared area."""
    checksum: bytes | None = None
    """None for zeroes, and until it is read."""
    is_ready: bool = True
    grain: int = 0
    settle: Settle | None = None
    digests: bytes = b""
    """Of what is to be compared, when it was read."""


class Arena:
    """Hands out parts of `size_bytes` like a ring: they come back in the order in which they went."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._head = 0
        self._used_bytes = 0

    def allocate(self, length: int) -> tuple[int, int] | None:
        """(place, cost) of `length` bytes in one piece, or None if there is no room now."""
        length = -(-length // PAGE_BYTES) * PAGE_BYTES
        place = self._head if self._used_bytes else 0
        cost_bytes = length
        if place + length > self._size_bytes:
            cost_bytes += self._size_bytes - place
            place = 0
        if self._used_bytes + cost_bytes > self._size_bytes:
            return None
        self._head = place + length
        self._used_bytes += cost_bytes
        return place, cost_bytes

    def release(self, cost_bytes: int) -> None:
        """The oldest part that is out comes back."""
        self._used_bytes -= cost_bytes


class Pipeline:
    """`durable(portion)` is called for each portion that is on the replica's disk, in order;
    `answered(latency_s)` for extents that it has applied."""

    def __init__(self, reader: LogClient, durable: Callable[[Portion], None],
                 answered: Callable[[float], None], cap: Cap) -> None:
        self.window_bytes = 0
        """No more than this is to be sent and not applied."""
        self.unsent_blocks = 0
        """How many are still to be sent for the first time, which tells the extra bytes from the others."""
        self._unsent = bitarray(endian="little")
        self.comparison: Comparison | None = None
        self.packer = Packer()
        self.sent_bytes = 0
        """Payload, over all connections."""
        self.wire_bytes = 0
        """The same, as it was sent: compressed, perhaps."""
        self.zero_bytes = 0
        self.equal_bytes = 0
        """That the replica had already."""
        self.first_pass_bytes = 0
        self.applied_bytes = 0
        """Payload that the replica has applied, over all connections."""
        self._reader = reader
        self._durable = durable
        self._answered = answered
        self.cap = cap
        self._block_bytes = reader.granularity_bytes
        self.reset(None, 0)

    def count(self, report: Report) -> None:
        """Fill the totals in."""
        report.sent_bytes, report.zero_bytes = self.sent_bytes, self.zero_bytes
        report.wire_bytes, report.equal_bytes = self.wire_bytes, self.equal_bytes
        report.extra_bytes = self.sent_bytes - self.first_pass_bytes

    def go_on_counting(self, former: Pipeline) -> None:
        """Take over the totals of a pipeline that is given up."""
        self.sent_bytes, self.zero_bytes = former.sent_bytes, former.zero_bytes
        self.packer, self.wire_bytes = former.packer, former.wire_bytes
        self.comparison, self.equal_bytes = former.comparison, former.equal_bytes
        self.first_pass_bytes, self.applied_bytes = former.first_pass_bytes, former.applied_bytes

    def begin_pass(self, unsent: bitarray) -> None:
        """These blocks are to be sent, a bit each; whatever is sent beyond them is extra."""
        self._unsent = unsent
        self.unsent_blocks = unsent.count()
        self.first_pass_bytes = 0

    def reset(self, link: Link | None, credit_bytes: int) -> None:
        """Begin anew on `link`. No read may be in flight, and nothing in zmq's hands (`settle`)."""
        self._link = link
        self._credit_bytes = credit_bytes
        self.seq = 0
        self.digest = RunningDigest()
        self._arena = Arena(len(self._reader.data) // PAGE_BYTES * PAGE_BYTES)
        self._todo: deque[Item] = deque()
        self._pieces: deque[Piece] = deque()
        self._reading: dict[int, Piece] = {}
        self._sending: deque[tuple[zmq.MessageTracker | None, int]] = deque()
        self._unacked: deque[tuple[int, int, int, float]] = deque()
        """(seq, cost, payload, when it was sent) of what the replica has not applied."""
        self._unacked_bytes = 0
        self._probes: dict[int, Piece] = {}
        """Sent and not answered, by seq."""
        self._probed_bytes = 0
        self._portions: deque[Portion] = deque()
        """Taken and not durable."""
        self._last_durable = 0
        self.applied_seq = 0
        """The replica has applied all up to this one."""
        self.todo_bytes = 0
        """Taken, not yet sent."""

    @property
    def open_portions(self) -> int:
        return len(self._portions)

    def is_durable(self, portion: Portion) -> bool:
        """Whether one that was added on this connection is on the replica's disk."""
        return 0 <= portion.last_seq <= self._last_durable

    @property
    def is_all_sent(self) -> bool:
        return not self._todo and not self._pieces and not self._probes

    @property
    def unacked_bytes(self) -> int:
        """Sent and not yet applied by the replica."""
        return self._unacked_bytes

    @property
    def waits_for_room(self) -> bool:
        """Nothing but zmq's being done with a buffer lets it go on."""
        return bool(self._todo and self._sending and not self._reading and not self._is_out_of_credit())

    @property
    def waits_s(self) -> float:
        """How long the rate still forbids to send more."""
        return self.cap.waits_s if self._todo else 0.0

    @property
    def reads_in_flight(self) -> int:
        return len(self._reading)

    def add(self, portion: Portion) -> None:
        """Queue all of a portion."""
        self._portions.append(portion)
        for is_zero, offset, length in portion.items:
            self._todo.append(Item(portion, is_zero, offset, length, TO_DECIDE))
            self.todo_bytes += length
        self._todo.append(Item(portion, False, 0, 0))

    def ask(self, offset: int, length: int, grain: int, settle: Settle) -> None:
        """Have a range of at most PIECE_BYTES compared, after all that was added before. Nothing comes of it if
        the pipeline is `reset` meanwhile."""
        assert length <= PIECE_BYTES
        self._todo.append(Item(None, False, offset, length, grain, settle))

    def feed(self) -> None:
        """Start the reads that there is room for, and send what is ready."""
        sending = self._sending
        while sending and (sending[0][0] is None or sending[0][0].done):
            self._arena.release(sending.popleft()[1])
        if self._link is None:
            return
        started = False
        while self._todo and len(self._pieces) < MAX_UNACKED_MESSAGES and not self._is_out_of_credit():
            if self.waits_s or not self._start_next():
                break
            started = True
        if started:
            self._reader.push()
        while self._pieces and self._pieces[0].is_ready:
            self._send(self._pieces.popleft())

    def _is_out_of_credit(self) -> bool:
        limit_bytes = min(self._credit_bytes, self.window_bytes)
        return (self._unacked_bytes >= limit_bytes or len(self._unacked) >= MAX_UNACKED_MESSAGES
                or self._probed_bytes >= MAX_PROBED_BYTES)

    def _start_next(self) -> bool:
        """Start the next piece of the first item; False if there is no room to read it."""
        item = self._todo[0]
        if item.is_zero or not item.length:
            piece_bytes = min(item.length, MAX_ZERO_BYTES)
            piece = Piece(item.portion, item.offset, piece_bytes)
        else:
            piece_bytes = min(item.length, PIECE_BYTES)
            part = self._arena.allocate(piece_bytes) if self._reader.free_slots else None
            if part is None:
                return False
            self.cap.take(piece_bytes)
            place, cost_bytes = part
            grain = item.grain if item.grain != TO_DECIDE else self._grain_for(item.offset, piece_bytes)
            piece = Piece(item.portion, item.offset, piece_bytes, place, cost_bytes, None, False, grain,
                          item.settle or self._compared)
            self._reading[place] = piece
            self._reader.submit_read(item.offset, piece_bytes, place)
        self._pieces.append(piece)
        item.offset += piece_bytes
        item.length -= piece_bytes
        if not item.length:
            self._todo.popleft()
        return True

    def _grain_for(self, offset: int, length: int) -> int:
        """By what pieces to compare a range, 0 to send it."""
        if self.comparison is None or self._unsent.find(1, *self._blocks(offset, length)) < 0:
            return 0
        return self.comparison.grain()

    def on_read(self, response: Response) -> None:
        """A read has ended; ReplicationError if the disk cannot be read there."""
        piece = self._reading.pop(response.slot_offset)
        if not response.ok:
            raise ReplicationError(f"the disk's {response.length} bytes cannot be read", offset=response.offset,
                                   hint="see the tapdisk's log for the cause")
        piece.is_ready = True
        data = self._reader.data[piece.place : piece.place + piece.length]
        if piece.portion is not None:
            check = checksum(data)
            if check == zero_checksum(piece.length):
                return
            piece.checksum = check
        if piece.grain:
            piece.digests = piece_digests(data, piece.grain)

    def _send(self, piece: Piece) -> None:
        assert self._link is not None
        if not piece.length:
            self._end_of(piece)
            return
        self.seq += 1
        tracker = None
        payload_bytes = 0
        if piece.digests:
            message: Data | Packed | Zero | Probe = self._send_probe(piece)
        elif piece.checksum is None:
            message = Zero(self.seq, piece.offset, piece.length)
            self._link.send(message)
            self.zero_bytes += piece.length
        else:
            message, tracker = self._send_payload(piece, piece.checksum)
            payload_bytes = piece.length
            self.sent_bytes += payload_bytes
        if piece.place >= 0 and not payload_bytes:
            self.cap.take(-piece.length)
        if piece.portion is not None:
            self.todo_bytes -= piece.length
        if not piece.digests:
            self._count_first(piece.offset, piece.length, payload_bytes)
        self.digest.add(message)
        if piece.cost_bytes:
            self._sending.append((tracker, piece.cost_bytes))
        cost_bytes = max(payload_bytes, MESSAGE_COST_BYTES if piece.portion is not None else 0)
        self._unacked.append((self.seq, cost_bytes, payload_bytes, time.monotonic()))
        self._unacked_bytes += cost_bytes

    def _send_payload(self, piece: Piece, check: bytes) -> tuple[Data | Packed, zmq.MessageTracker | None]:
        """Send it, compressed if that pays; then its place is free at once, as no tracker says."""
        assert self._link is not None
        data = self._reader.data[piece.place : piece.place + piece.length]
        packed = self.packer.pack(data)
        if packed is None:
            self.wire_bytes += piece.length
            plain = Data(self.seq, piece.offset, piece.length, check)
            return plain, self._link.send_data(plain, data)
        self.wire_bytes += len(packed)
        self.cap.take(len(packed) - piece.length)
        message = Packed(self.seq, piece.offset, piece.length, check)
        self._link.send_data(message, packed)
        return message, None

    def _send_probe(self, piece: Piece) -> Probe:
        assert self._link is not None
        message = Probe(self.seq, piece.offset, piece.length, piece.grain, piece.digests)
        self._link.send(message)
        self.wire_bytes += len(piece.digests)
        self._probes[self.seq] = piece
        self._probed_bytes += piece.length
        if piece.portion is not None:
            piece.portion.open_ends += 1
        return message

    def on_probed(self, answer: Probed) -> None:
        """ProtocolError if that was not asked, or makes no sense."""
        piece = self._probes.pop(answer.seq, None)
        if piece is None or not is_mask(answer.differing, piece.length, piece.grain):
            raise ProtocolError(f"the replica answers a PROBE of seq {answer.seq} that was not sent so")
        self.digest.settle(answer)
        self._probed_bytes -= piece.length
        assert piece.settle is not None
        piece.settle(piece, extents_of(answer.differing, piece.offset, piece.length, piece.grain)[0])

    def _compared(self, piece: Piece, differing: Extents) -> None:
        """Send what differs of a piece that was compared."""
        assert self.comparison is not None
        at = piece.offset
        for offset, length in [*differing, (piece.offset + piece.length, 0)]:
            if offset > at:
                self.equal_bytes += offset - at
                self._count_first(at, offset - at, 0)
            at = offset + length
        grain = self.comparison.learn(piece.length, piece.grain, differing)
        if not differing:
            self._end_of(piece)
            return
        self._todo.appendleft(Item(piece.portion, False, 0, 0))
        for offset, length in reversed(differing):
            self._todo.appendleft(Item(piece.portion, False, offset, length, grain))
            self.todo_bytes += length

    def _end_of(self, piece: Piece) -> None:
        """One of the ends of its portion has passed."""
        portion = piece.portion
        assert portion is not None
        portion.open_ends -= 1
        if not portion.open_ends:
            portion.last_seq = self.seq
            self._commit_up_to(self._last_durable)

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self._block_bytes, -(-(offset + length) // self._block_bytes)

    def _count_first(self, offset: int, length: int, payload_bytes: int) -> None:
        first, stop = self._blocks(offset, length)
        blocks = self._unsent.count(1, first, stop)
        if blocks:
            self.unsent_blocks -= blocks
            self._unsent[first:stop] = 0
            self.first_pass_bytes += min(blocks * self._block_bytes, payload_bytes)

    def next_seq(self) -> int:
        """A seq for a barrier."""
        self.seq += 1
        return self.seq

    def on_ack(self, ack: Ack) -> None:
        """ProtocolError if the replica acknowledges what was not sent, or takes something back."""
        if not ack.durable <= ack.applied <= self.seq:
            raise ProtocolError(f"the replica acknowledges seq {ack.applied} and {ack.durable} of {self.seq}")
        self.applied_seq = ack.applied
        unacked = self._unacked
        sent_s = None
        while unacked and unacked[0][0] <= ack.applied:
            _, cost_bytes, payload_bytes, when_s = unacked.popleft()
            self._unacked_bytes -= cost_bytes
            self.applied_bytes += payload_bytes
            sent_s = when_s if payload_bytes else sent_s
        if sent_s is not None:
            self._answered(time.monotonic() - sent_s)
        self._commit_up_to(ack.durable)

    def _commit_up_to(self, durable: int) -> None:
        self._last_durable = durable
        portions = self._portions
        while portions and 0 <= portions[0].last_seq <= durable:
            self._durable(portions.popleft())

    def settle(self, wait_s: float) -> None:
        """Wait until zmq is done with every buffer: nothing of the shared area is in use then, if no read is in
        flight. ReplicationError if it keeps one for `wait_s`."""
        for tracker, cost_bytes in self._sending:
            if tracker is not None:
                try:
                    tracker.wait(wait_s)
                except zmq.NotDone:
                    raise ReplicationError("zmq does not let go of a buffer that it should have sent") from None
            self._arena.release(cost_bytes)
        self._sending.clear()


_ZERO_CHECKSUMS: dict[int, bytes] = {}


def zero_checksum(length: int) -> bytes:
    """The checksum of `length` zero bytes."""
    known = _ZERO_CHECKSUMS.get(length)
    if known is None:
        known = _ZERO_CHECKSUMS[length] = checksum(bytes(length))
    return known


def split(offset: int, length: int, extents: Iterable[tuple[int, int, bool]]) -> Iterator[tuple[bool, int, int]]:
    """[offset, offset + length) as (is_zero, offset, length), by the disk's map `extents`, which are (offset,
    length, is_zero) in order. Zero ranges shrink to whole pages; what the map leaves out is data."""
    end = offset + length
    data_start = offset
    for start, size, is_zero in extents:
        stop = min(start + size, end)
        start = max(start, data_start)
        if stop < end:
            stop = stop // PAGE_BYTES * PAGE_BYTES
        if start > offset:
            start = -(-start // PAGE_BYTES) * PAGE_BYTES
        if not is_zero or stop <= start:
            continue
        if start > data_start:
            yield False, data_start, start - data_start
        yield True, start, stop - start
        data_start = stop
    if data_start < end:
        yield False, data_start, end - data_start
