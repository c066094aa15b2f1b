"""What the tests of image formats share: a disk's bytes beside the driver, and what a crash may leave of them."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field

from contract.runner import Runner
from hypothesis import strategies as st
from recording import SECTOR, Journal

from tapcore.request import BACKGROUND, DISCARD, FAST, FLUSH, FUA, NO_HOLE, READ, WRITE, ZEROES, Request


@st.composite
def disk_operations(draw: st.DrawFn, size: int) -> tuple[int, int, int, int, int]:
    """op, offset, length, flags, seed (of the data) of a request within `size` bytes."""
    op = draw(st.sampled_from((READ, WRITE, WRITE, ZEROES, DISCARD, FLUSH)))
    unit = draw(st.sampled_from((1, 512, 2048)))
    offset = draw(st.integers(0, (size - 1) // unit)) * unit
    length = min(draw(st.integers(1, 30)) * unit, size - offset)
    flags = {READ: (0, BACKGROUND), WRITE: (0, FUA, BACKGROUND), ZEROES: (0, NO_HOLE, FUA, FAST),
             DISCARD: (0, FUA), FLUSH: (0,)}[op]
    return op, offset, length, draw(st.sampled_from(flags)), draw(st.integers(0, 1 << 30))


class Model:
    """The bytes of the disk, and batches of requests that do not overlap run on both."""

    def __init__(self, runner: Runner, disk: bytes) -> None:
        self.runner = runner
        self.disk = bytearray(disk)

    def run(self, ops: list[tuple[int, int, int, int, int]]) -> None:
        batch: list[tuple[Request, int]] = []
        for op, offset, length, flags, seed in ops:
            if any(offset < other.offset + other.length and other.offset < offset + length for other, _ in batch):
                self.finish(batch)
                batch = []
            data = random.Random(seed).randbytes(length) if op == WRITE else bytes(length)
            iov = [memoryview(bytearray(data))] if op in (READ, WRITE) else []
            batch.append((Request(op, offset, length if op != FLUSH else 0, iov, flags), seed))
        self.finish(batch)

    def finish(self, batch: list[tuple[Request, int]]) -> None:
        errors = self.runner.run(*[request for request, _ in batch])
        for (request, _), code in zip(batch, errors, strict=True):
            start, end = request.offset, request.offset + request.length
            if request.flags & FAST and code == errno.ENOTSUP:
                continue
            assert code == 0
            if request.op == READ:
                assert b"".join(request.iov) == self.disk[start:end]
            elif request.op == WRITE:
                self.disk[start:end] = b"".join(request.iov)
            elif request.op == ZEROES:
                self.disk[start:end] = bytes(request.length)
            elif request.op == DISCARD:
                now = self.runner.read(start, end - start)
                assert all(new in (0, old) for new, old in zip(now, self.disk[start:end], strict=True))
                self.disk[start:end] = now


@dataclass
class History:
    """What each sector of the disk may hold, by how far the journal had got."""

    disk: bytearray
    flushed: list[tuple[int, bytes]] = field(default_factory=list)
    changes: list[tuple[int, int, bytes]] = field(default_factory=list)
    """(entries when it was asked for, offset, data)."""

    def allowed(self, cut: int) -> list[set[bytes]]:
        at, disk = [mark for mark in self.flushed if mark[0] <= cut][-1]
        found = [{disk[sector : sector + SECTOR]} for sector in range(0, len(disk), SECTOR)]
        for begun, offset, data in self.changes:
            if at <= begun <= cut:
                for place in range(0, len(data), SECTOR):
                    found[(offset + place) // SECTOR].add(data[place : place + SECTOR])
        return found


def drive(runner: Runner, journal: Journal, history: History, rng: random.Random, count: int) -> None:
    """Random aligned changes and flushes, one at a time."""
    size = runner.size
    for _ in range(count):
        offset = rng.randrange(size // SECTOR) * SECTOR
        length = min(rng.choice((1, 2, 5, 20)) * SECTOR, size - offset)
        kind = rng.choice(("write", "write", "write", "zeroes", "discard", "flush"))
        begun = len(journal.entries)
        if kind == "flush":
            assert runner.flush() == 0
            history.flushed.append((len(journal.entries), bytes(history.disk)))
            continue
        data = rng.randbytes(length) if kind == "write" else bytes(length)
        history.changes.append((begun, offset, data))
        if kind == "write":
            assert runner.write(offset, data) == 0
        else:
            assert (runner.zeroes if kind == "zeroes" else runner.discard)(offset, length) == 0
        history.disk[offset : offset + length] = runner.read(offset, length)


def drive_batches(runner: Runner, journal: Journal, history: History, rng: random.Random, count: int) -> None:
    """Random aligned changes, several at a time, and flushes among them, which cover what was complete before."""
    for _ in range(count):
        before, begun = bytes(history.disk), len(journal.entries)
        batch: list[Request] = []
        for _ in range(rng.randrange(1, 9)):
            offset = rng.randrange(runner.size // SECTOR) * SECTOR
            length = min(rng.choice((1, 2, 5, 20)) * SECTOR, runner.size - offset)
            if all(offset + length <= other.offset or other.offset + other.length <= offset for other in batch):
                op = rng.choice((WRITE, WRITE, WRITE, ZEROES, DISCARD))
                iov = [memoryview(rng.randbytes(length))] if op == WRITE else []
                batch.append(Request(op, offset, length, iov, rng.choice((0, BACKGROUND))))
        flushes = [Request(FLUSH)] if rng.random() < 0.6 else []
        assert set(runner.run(*batch[1:], *flushes, batch[0])) == {0}
        marks = [begun]
        if flushes:
            history.flushed.append((len(journal.entries), before))
            marks.append(len(journal.entries))
        for request in batch:
            start, end = request.offset, request.offset + request.length
            data = b"".join(request.iov) or bytes(request.length)
            history.changes += [(mark, start, data) for mark in marks]
            history.disk[start:end] = data if request.op == WRITE else runner.read(start, request.length)
