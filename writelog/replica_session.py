"""One connection of one sync, as the replica sees it: messages in, applied extents and answers out.

    waiting ──welcome()──▶ open ──any fault, end()──▶ over

What is applied and what is durable are prefixes of the sequence: `applied` is the last seq with nothing missing
before it, `durable` what the last flush covered of it. A fault (garbage, a seq that is not the next, an extent
outside the disk, a wrong checksum, a failed write or flush) is answered with ERROR, and nothing after it counts.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

from tapcore.errors import ProtocolError, ReplicationError, WritelogError
from tapcore.layout import Buffer
from tapcore.loop import Loop, Timer
from writelog.hashtree import differing
from writelog.replica_apply import Applier
from writelog.wire import (
    VERIFY_CHUNK_BYTES,
    Ack,
    Barrier,
    Base,
    Content,
    ContentDigest,
    Data,
    Digest,
    Epoch,
    Failure,
    Kept,
    Message,
    Packed,
    Probe,
    Probed,
    Promote,
    Promoted,
    Release,
    Released,
    RunningDigest,
    Verify,
    Welcome,
    Zero,
    checksum,
    decode,
    unpack,
)

CREDIT_BYTES: Final = 64 << 20
ALIVE_INTERVAL_S: Final = 0.25
FLUSH_BYTES: Final = 64 << 20
MIN_FLUSH_GAP_S: Final = 0.02
VERIFY_DEPTH: Final = 8

WAITING, OPEN, OVER = "waiting", "open", "over"


class Owner(Protocol):
    """The replica around a session."""

    promoted: bool

    @property
    def kept(self) -> Kept: ...

    def session_based(self, base: int) -> None:
        """The copy has a new name: record it, durably. ReplicationError if that cannot be done."""

    def session_writes(self) -> None:
        """An extent is about to be applied. WritelogError if it must not be."""

    def session_epoch(self, message: Epoch, done: Callable[[WritelogError | None], None]) -> None:
        """The copy is that of one instant: `done(error)` when it stays so whatever happens."""

    def why_full(self) -> WritelogError | None:
        """Why an extent did not fit, if it is the replica's own limit."""

    def session_confirmed(self, digest: bytes | None) -> None:
        """The digest of the last barrier; None as soon as anything follows it."""

    def promote(self, digest: bytes, done: Callable[[str | WritelogError], None]) -> None:
        """Open the export, then `done(where it is)`, or with what failed. ReplicationError if `digest` is not what
        was confirmed."""

    def session_released(self) -> None: ...

    def session_failed(self, error: WritelogError) -> None: ...


class Session:
    """`send` takes messages for the sync; `size_bytes` is the disk's."""

    def __init__(self, loop: Loop, applier: Applier, size_bytes: int, send: Callable[[Message], None],
                 owner: Owner) -> None:
        self.state = WAITING
        self._is_based = False
        """Whether it is known what the extents make a copy of."""
        self.received_bytes = 0
        self._loop = loop
        self._applier = applier
        self._size_bytes = size_bytes
        self._send = send
        self._owner = owner
        self._digest = RunningDigest()
        self._last_seq = 0
        self._applied = 0
        self._ended: set[int] = set()
        """Seqs that ended before one that came earlier."""
        self._open_probes = 0
        self._durable = 0
        self._barrier: Digest | None = None
        """What to answer once it is durable."""
        self._confirmed = False
        self._is_promoting = False
        self._flushing = False
        self._flush_timer: Timer | None = None
        self._flush_ended_s = 0.0
        self._flush_ns = 0
        self._flush_bytes = 0
        self._unflushed_bytes = 0
        self._ack_due = False
        self._alive_timer: Timer | None = None
        self._verification: _Verification | None = None

    def welcome(self, base: int, journal_bytes: int | None) -> None:
        """Begin, unless the connection has gone meanwhile. `journal_bytes`: None without a journal."""
        if self.state == WAITING:
            self.state = OPEN
            self._send(Welcome(base, CREDIT_BYTES, journal_bytes is not None, journal_bytes or 0))

    def refuse(self, error: WritelogError) -> None:
        """It cannot begin, or not go on."""
        if self.state != OVER:
            self._fail(error)

    def end(self) -> None:
        """The connection is gone, or another one takes its place. What is in flight ends by itself."""
        self.state = OVER
        for timer in (self._alive_timer, self._flush_timer):
            if timer is not None:
                timer.cancel()
        if self._verification is not None:
            self._verification.stop()

    def handle(self, frames: Sequence[Buffer]) -> None:
        """One message. The frames must not change as long as anybody holds them."""
        if self.state == OVER:
            return
        try:
            message, payload = decode(frames)
            if self.state == WAITING:
                raise ProtocolError(f"{type(message).__name__} came before the WELCOME")
            self._dispatch(message, payload)
        except WritelogError as error:
            self._fail(error)

    def _dispatch(self, message: Message, payload: Buffer | None) -> None:
        if isinstance(message, Data):
            assert payload is not None, "decode() sees to it"
            self._on_data(message, payload)
        elif isinstance(message, Packed):
            assert payload is not None, "decode() sees to it"
            self._on_data(message, unpack(message, payload))
        elif isinstance(message, Zero):
            self._accept(message)
            self._owner.session_writes()
            self._applier.zero(message.offset, message.length, partial(self._ended_one, message))
        elif isinstance(message, Probe):
            self._on_probe(message)
        elif isinstance(message, Base):
            self._on_base(message)
        elif isinstance(message, Barrier):
            self._must_be_based()
            if self._open_probes:
                raise ProtocolError(f"BARRIER came with {self._open_probes} PROBEs still to be answered")
            self._next_seq(message.seq)
            self._barrier = Digest(message.seq, self._digest.digest())
            self._advance(message.seq)
        elif isinstance(message, Verify):
            self._must_be_confirmed("VERIFY")
            self._verification = _Verification(self._loop, self._applier, self._size_bytes, self._verified)
            self._verification.turn()
        elif isinstance(message, Epoch):
            self._must_be_confirmed("EPOCH")
            self._owner.session_epoch(message, self._epoch_ended)
        elif isinstance(message, Promote):
            self._must_be_confirmed("PROMOTE")
            self._is_promoting = True
            self._owner.promote(message.digest, self._promoted)
        elif isinstance(message, Release):
            self._send(Released())
            self.end()
            self._owner.session_released()
        else:
            raise ProtocolError(f"a sync does not send {type(message).__name__} here")

    def resume_confirmed(self) -> None:
        """The last barrier of this session's former connection still stands."""
        self._confirmed = True

    def _must_be_confirmed(self, what: str) -> None:
        if not self._confirmed:
            raise ProtocolError(f"{what} came without a confirmed barrier right before it")
        if self._verification is not None:
            raise ProtocolError(f"{what} came while the disk is read for a VERIFY")

    # Extents

    def _on_base(self, message: Base) -> None:
        if not message.base:
            raise ProtocolError("BASE names no copy")
        self._owner.session_based(message.base)
        self._is_based = True

    def _on_data(self, message: Data | Packed, payload: Buffer) -> None:
        if checksum(payload) != message.checksum:
            raise ReplicationError(f"{message.length} bytes were damaged on the way: their checksum is wrong",
                                   errno=errno.EBADMSG, offset=message.offset, hint="nothing of them was written")
        self._accept(message)
        self._owner.session_writes()
        self._applier.write(message.offset, memoryview(payload), partial(self._ended_one, message))

    def _on_probe(self, probe: Probe) -> None:
        self._accept(probe)
        self._open_probes += 1
        look = _Look(probe)
        self._applier.inspect(probe.offset, probe.length, look, partial(self._probed, look))

    def _probed(self, look: _Look, code: int) -> None:
        if self.state == OVER:
            return
        probe = look.probe
        if code:
            self._fail(ReplicationError(f"the replica cannot read {probe.length} bytes: {os.strerror(code)}",
                                        errno=code, offset=probe.offset))
            return
        self._open_probes -= 1
        answer = Probed(probe.seq, look.differing)
        self._digest.settle(answer)
        self._send(answer)
        self._advance(probe.seq)

    def _accept(self, message: Data | Packed | Zero | Probe) -> None:
        """Check what an extent says of itself, and count it."""
        if message.offset + message.length > self._size_bytes:
            raise ProtocolError(f"an extent of {message.length} bytes goes beyond the disk's {self._size_bytes}",
                                offset=message.offset)
        self._must_be_based()
        self._must_not_be_promoted()
        self._next_seq(message.seq)
        self._digest.add(message)
        self.received_bytes += message.length

    def _must_be_based(self) -> None:
        if not self._is_based:
            raise ProtocolError("a message was lost on the way: BASE did not come first", errno=errno.EBADMSG)

    def _must_not_be_promoted(self) -> None:
        if self._owner.promoted or self._is_promoting:
            raise ReplicationError("the replica was promoted: it takes no extents any more", errno=errno.EPERM)

    def _next_seq(self, seq: int) -> None:
        if seq != self._last_seq + 1:
            raise ProtocolError(f"a message was lost or doubled on the way: seq {seq} came after {self._last_seq}",
                                errno=errno.EBADMSG)
        self._last_seq = seq
        self._confirmed = False
        self._owner.session_confirmed(None)

    def _ended_one(self, message: Data | Packed | Zero, code: int) -> None:
        if self.state == OVER:
            return
        if code:
            what = "zero" if isinstance(message, Zero) else "write"
            error = ReplicationError(f"the replica cannot {what} {message.length} bytes: {os.strerror(code)}",
                                     errno=code, offset=message.offset)
            self._fail(self._owner.why_full() or error)
            return
        self._unflushed_bytes += message.length
        self._advance(message.seq)

    def _advance(self, seq: int) -> None:
        """`seq` has ended."""
        ended = self._ended
        ended.add(seq)
        while self._applied + 1 in ended:
            self._applied += 1
            ended.remove(self._applied)
        self._ack_soon()
        self._flush_if_due()

    # Flushes

    def _flush_if_due(self) -> None:
        """Flush when a barrier waits, when much has piled up, or when the flushes have been at rest for as long
        as the last one took."""
        if self._flushing or self._applied == self._durable or self.state == OVER:
            return
        barrier = self._barrier
        due_s = self._flush_ended_s + max(MIN_FLUSH_GAP_S, self._flush_ns / 1e9)
        left_s = due_s - self._loop.time_s()
        if ((barrier is not None and barrier.seq <= self._applied) or self._unflushed_bytes >= FLUSH_BYTES
                or left_s <= 0):
            self._flush()
        elif self._flush_timer is None:
            self._flush_timer = self._loop.call_later(left_s, self._flush_timer_rang)

    def _flush_timer_rang(self) -> None:
        self._flush_timer = None
        self._flush_if_due()

    def _flush(self) -> None:
        self._flushing = True
        covered_bytes, self._unflushed_bytes = self._unflushed_bytes, 0
        self._applier.flush(partial(self._flushed, self._applied, covered_bytes, self._loop.time_s()))

    def _flushed(self, seq: int, covered_bytes: int, started_s: float, code: int) -> None:
        self._flushing = False
        if self.state == OVER:
            return
        if code:
            self._fail(ReplicationError(f"the replica cannot flush: {os.strerror(code)}", errno=code))
            return
        self._flush_ended_s = self._loop.time_s()
        self._flush_ns = int((self._flush_ended_s - started_s) * 1e9)
        self._flush_bytes = covered_bytes
        self._durable = seq
        self._send_ack()
        barrier = self._barrier
        if barrier is not None and barrier.seq <= seq:
            self._barrier = None
            if barrier.seq == self._last_seq:
                self._confirmed = True
                self._owner.session_confirmed(barrier.digest)
            self._send(barrier)
        self._flush_if_due()

    # Answers

    def _ack_soon(self) -> None:
        if not self._ack_due:
            self._ack_due = True
            self._loop.call_soon(self._send_ack)

    def _send_ack(self) -> None:
        self._ack_due = False
        if self.state != OVER:
            self._send(Ack(self._applied, self._durable, self._flush_ns, self._flush_bytes))

    def stay_alive(self) -> None:
        """Show now and then that somebody is here, also as long as it cannot begin."""
        if self.state != OVER:
            self._send_ack()
            self._alive_timer = self._loop.call_later(ALIVE_INTERVAL_S, self.stay_alive)

    def _epoch_ended(self, error: WritelogError | None) -> None:
        if self.state == OVER:
            return
        if error is not None:
            self._fail(error)
        else:
            self._send(self._owner.kept)

    def _verified(self, code: int, digest: bytes) -> None:
        self._verification = None
        if self.state == OVER:
            return
        if code:
            self._fail(ReplicationError(f"the replica cannot read its disk back: {os.strerror(code)}", errno=code))
        else:
            self._send(Content(digest))

    def _promoted(self, outcome: str | WritelogError) -> None:
        if isinstance(outcome, WritelogError):
            self._fail(outcome)
        else:
            self._send(Promoted(outcome))

    def _fail(self, error: WritelogError) -> None:
        offset = "" if error.offset is None else f" (at byte {error.offset})"
        self._send(Failure(error.errno, f"{error.message}{offset}", error.hint or ""))
        self.end()
        self._owner.session_failed(error)


class _Look:
    """Compares what is there with what a PROBE says; called in a thread."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.differing = b""

    def __call__(self, data: memoryview) -> None:
        self.differing = differing(data, self.probe.grain, self.probe.digests)


class _Verification:
    """Reads the whole disk, VERIFY_DEPTH chunks a turn of the loop, then calls `done(errno, digest)`."""

    def __init__(self, loop: Loop, applier: Applier, size_bytes: int, done: Callable[[int, bytes], None]) -> None:
        self._loop = loop
        self._applier = applier
        self._done = done
        self._content = ContentDigest(size_bytes)
        self._next = 0
        self._active = 0
        self._error = 0
        self._stopped = False
        self._turn_due = False
        self._free = [memoryview(bytearray(VERIFY_CHUNK_BYTES)) for _ in range(VERIFY_DEPTH)]

    def stop(self) -> None:
        """Start no more reads; `done` is not called."""
        self._stopped = True

    def turn(self) -> None:
        self._turn_due = False
        if self._stopped:
            return
        if not self._error:
            for _ in range(min(len(self._free), self._content.chunks - self._next)):
                self._read_next()
        if not self._active and not self._turn_due:
            self._done(self._error, self._content.digest())

    def _read_next(self) -> None:
        chunk, buffer = self._next, self._free.pop()
        self._next += 1
        self._active += 1
        offset, length = self._content.range_of(chunk)
        self._applier.read(offset, buffer[:length], partial(self._ended, chunk, buffer, length))

    def _ended(self, chunk: int, buffer: memoryview, length: int, code: int) -> None:
        self._active -= 1
        self._error = self._error or code
        self._content.set(chunk, buffer[:length])
        self._free.append(buffer)
        if not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self.turn)
