"""Requests made to fit what an NBD server takes: `Split` for its largest request and its missing FUA, `Widen` for
its smallest block.

    Widen ▶ Split ▶ Remote            each has a driver's verbs; Widen is there only where a block is not a byte

    request      |    ....xxxxxxxxxxxxxxxxxxxxx..     |
    blocks       |--------|--------|--------|--------|
    as read      |[ pad ][  the request's own ][ pad ]|
    as written   |[ kept ][ the request's own ][ kept ]|      kept: read before, while no other change runs there
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

from tapcore.directio import WriteGate
from tapcore.request import (
    DISCARD,
    FAST,
    FLUSH,
    FUA,
    READ,
    STATUS,
    WRITE,
    ZEROES,
    Extent,
    Request,
    fail,
    slice_iov,
)

Verb = Callable[[Request], bool]


class Verbs(Protocol):
    """What there is below: the verbs of `tapcore.driver`."""

    def queue_read(self, request: Request) -> bool: ...
    def queue_write(self, request: Request) -> bool: ...
    def queue_flush(self, request: Request) -> bool: ...
    def queue_discard(self, request: Request) -> bool: ...
    def queue_zeroes(self, request: Request) -> bool: ...
    def queue_status(self, request: Request) -> bool: ...
    def submit(self) -> None: ...


class Joint:
    """Several requests that end as one, with the first error among them."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._left = 1

    def add(self, verb: Verb, part: Request) -> None:
        """Queue `part` by `verb`."""
        self._left += 1
        part.done = self._ended
        if verb(part):
            self._ended(part)

    def end(self) -> bool:
        """All parts are queued. Returns what a verb does: True if the request is complete."""
        self._left -= 1
        return self._left == 0

    def _ended(self, part: Request) -> None:
        self._request.error = self._request.error or part.error
        self._left -= 1
        if self._left == 0:
            self._request.done(self._request)


class Split:
    """Reads and writes in pieces of at most `max_bytes`; with a server that has no `fua`, FUA by a flush after the
    change; FAST only with a server that knows it (`fast_zeroes`)."""

    def __init__(self, lower: Verbs, *, max_bytes: int, fua: bool, fast_zeroes: bool) -> None:
        self._lower = lower
        self._max_bytes = max_bytes
        self._fua = fua
        self._fast_zeroes = fast_zeroes
        self._read = lower.queue_read
        self._write = lower.queue_write
        self.queue_flush = lower.queue_flush
        self.queue_status = lower.queue_status
        self.submit = lower.submit

    def queue_read(self, request: Request) -> bool:
        if request.length <= self._max_bytes:
            return self._read(request)
        return self._split(self._read, request)

    def queue_write(self, request: Request) -> bool:
        if request.flags & FUA and not self._fua:
            return self._then_flush(self.queue_write, request)
        if request.length <= self._max_bytes:
            return self._write(request)
        return self._split(self._write, request)

    def queue_discard(self, request: Request) -> bool:
        if request.flags & FUA and not self._fua:
            return self._then_flush(self._lower.queue_discard, request)
        return self._lower.queue_discard(request)

    def queue_zeroes(self, request: Request) -> bool:
        if request.flags & FAST and not self._fast_zeroes:
            return fail(request, errno.ENOTSUP)
        if request.flags & FUA and not self._fua:
            return self._then_flush(self._lower.queue_zeroes, request)
        return self._lower.queue_zeroes(request)

    def _split(self, verb: Verb, request: Request) -> bool:
        joint = Joint(request)
        for start in range(0, request.length, self._max_bytes):
            length = min(self._max_bytes, request.length - start)
            iov = slice_iov(request.iov, start, length)
            joint.add(verb, Request(request.op, request.offset + start, length, iov, request.flags))
        return joint.end()

    def _then_flush(self, verb: Verb, request: Request) -> bool:
        def changed(plain: Request) -> None:
            if plain.error:
                ended(plain)
            elif self.queue_flush(flush := Request(FLUSH, done=ended)):
                ended(flush)
            else:
                self.submit()

        def ended(part: Request) -> None:
            request.error = part.error
            request.done(request)

        plain = Request(request.op, request.offset, request.length, request.iov, request.flags & ~FUA, changed)
        if verb(plain):
            return fail(request, plain.error)
        return False


class Widen:
    """Requests of any offset and length for a server that takes multiples of `block_bytes`."""

    def __init__(self, lower: Verbs, block_bytes: int) -> None:
        self._lower = lower
        self._block_bytes = block_bytes
        self._mask = block_bytes - 1
        self._gate = WriteGate(block_bytes)
        self._verbs = {DISCARD: lower.queue_discard, WRITE: lower.queue_write, ZEROES: lower.queue_zeroes}
        self.queue_flush = lower.queue_flush
        self.submit = lower.submit

    def queue_read(self, request: Request) -> bool:
        if not (request.offset | request.length) & self._mask:
            return self._lower.queue_read(request)
        first, stop = self._around(request)
        end = request.offset + request.length
        iov = [memoryview(bytearray(request.offset - first)), *request.iov, memoryview(bytearray(stop - end))]
        return self._instead(self._lower.queue_read, request, Request(READ, first, stop - first, iov))

    def queue_status(self, request: Request) -> bool:
        first, stop = self._around(request)
        wide = Request(STATUS, first, stop - first)
        return self._instead(self._lower.queue_status, request, wide)

    def queue_write(self, request: Request) -> bool:
        """A write, discard or write-zeroes, when no other change has the same blocks."""
        change = Request(request.op, request.offset, request.length, request.iov, request.flags, self._changed)
        change.owner = request
        if not self._gate.enter(change):
            return False
        if not self._run(change):
            return False
        self._leave(change)
        return fail(request, change.error)

    queue_discard = queue_zeroes = queue_write

    def _around(self, request: Request) -> tuple[int, int]:
        """The whole blocks that hold a request: (offset, end) in bytes."""
        return request.offset & ~self._mask, (request.offset + request.length + self._mask) & ~self._mask

    def _instead(self, verb: Verb, request: Request, wide: Request) -> bool:
        """Run `wide` and end `request` with its outcome."""
        def settle() -> None:
            request.error = wide.error
            if request.op == STATUS and not wide.error:
                request.extents = _window(wide.extents, request.offset - wide.offset, request.length)

        def ended(_: Request) -> None:
            settle()
            request.done(request)

        wide.done = ended
        if not verb(wide):
            return False
        settle()
        return True

    # Changes: past the gate

    def _changed(self, change: Request) -> None:
        request: Request = change.owner
        self._leave(change)
        request.error = change.error
        request.done(request)

    def _leave(self, change: Request) -> None:
        ready = self._gate.leave(change)
        for waiting in ready:
            if self._run(waiting):
                self._changed(waiting)
        if ready:
            self.submit()

    def _run(self, change: Request) -> bool:
        if not (change.offset | change.length) & self._mask:
            return self._verbs[change.op](change)
        if change.op == WRITE:
            return self._rewrite(change)
        return self._run_inner_blocks(change)

    def _run_inner_blocks(self, change: Request) -> bool:
        """Discard or zero the whole blocks in the middle, and of a zeroing rewrite those at the ends."""
        if change.flags & FAST:
            return fail(change, errno.ENOTSUP)
        end = change.offset + change.length
        first = min((change.offset + self._mask) & ~self._mask, end)
        stop = max(end & ~self._mask, first)
        joint = Joint(change)
        if first < stop:
            joint.add(self._verbs[change.op], Request(change.op, first, stop - first, flags=change.flags))
        for edge, edge_end in ((change.offset, first), (stop, end)):
            if change.op == ZEROES and edge < edge_end:
                zeroes = [memoryview(bytes(edge_end - edge))]
                joint.add(self._rewrite, Request(WRITE, edge, edge_end - edge, zeroes, change.flags & FUA))
        return joint.end()

    def _rewrite(self, change: Request) -> bool:
        """A write: read the blocks that it covers in part, then write all of them whole."""
        block_bytes = self._block_bytes
        first, stop = self._around(change)
        end = change.offset + change.length
        edges: dict[int, memoryview] = {}
        if first < change.offset:
            edges[first] = memoryview(bytearray(block_bytes))
        if end < stop:
            edges.setdefault(stop - block_bytes, memoryview(bytearray(block_bytes)))

        def edges_read(reading: Request) -> None:
            if reading.error:
                ended(reading)
                return
            iov: Sequence[memoryview] = change.iov
            if first < change.offset:
                iov = [edges[first][: change.offset - first], *iov]
            if end < stop:
                iov = [*iov, edges[stop - block_bytes][end - stop :]]
            whole = Request(WRITE, first, stop - first, iov, change.flags, ended)
            if self._lower.queue_write(whole):
                ended(whole)
            else:
                self.submit()

        def ended(part: Request) -> None:
            change.error = part.error
            change.done(change)

        reading = Request(READ, done=edges_read)
        joint = Joint(reading)
        for edge, view in edges.items():
            joint.add(self._lower.queue_read, Request(READ, edge, block_bytes, (view,)))
        return fail(change, reading.error) if joint.end() else False


def _window(extents: list[Extent], skip: int, length: int) -> list[Extent]:
    """What `extents` say of `length` bytes behind the first `skip`; that all is data if they end before."""
    found: list[Extent] = []
    for extent_length, state in extents:
        left = extent_length - skip
        skip = max(0, -left)
        if left > 0 and length > 0:
            found.append((min(left, length), state))
            length -= left
    return found or [(length, 0)]
