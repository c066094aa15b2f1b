"""verify: what is read must be what was last written, or the read fails with EILSEQ.

Use: verify:|aio:/vm/disk.img
     verify:block=4096|aio:/vm/disk.img

Options:
    block=BYTES   a checksum is kept for each block of this size, a power of two from 512, default 512

Checked are whole blocks that were wholly written, zeroed or discarded since the disk was opened. Of writes to one
block that are in flight together any may win. A block that changes while a read of it is in flight is not checked
in that read, and one after a failed write not until it is written again. After a discard a block may be as it was,
or zeroes. A read that does not match is logged with its offset, which is added to `mismatches`.

Limits: for tests. Memory and time for each block, also of a large write-zeroes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final

from xxhash import xxh3_64_intdigest

from tapcore import params
from tapcore.driver import SECTOR_BYTES, Env, Filter, OpenFlag
from tapcore.errors import UsageError
from tapcore.request import WRITE, ZEROES, Request, show_zeroes

logger = logging.getLogger(__name__)

Sums = frozenset[int]
"""Checksums of what a block may hold."""

UNKNOWN: Final[Sums] = frozenset()


class _Change:
    """The writes, discards and zeroings of one block that overlap in time, from the first to the last."""

    __slots__ = ("count", "known", "sums")

    def __init__(self) -> None:
        self.count = 0
        self.sums: Sums = UNKNOWN
        self.known = True
        """False when one of them failed, or changed a part of the block."""


class Verify(Filter):
    name = "verify"

    def __init__(self, env: Env, params_text: str, flags: OpenFlag) -> None:
        """UsageError for a bad option."""
        super().__init__(env, params_text, flags)
        given = params.options(self.name, params_text, ("block",))
        self.block_bytes = params.size_bytes("block", given.get("block", str(SECTOR_BYTES)))
        if self.block_bytes < SECTOR_BYTES or self.block_bytes & (self.block_bytes - 1):
            raise UsageError(f"block {given['block']!r} is not a power of two from {SECTOR_BYTES} bytes")
        self.mismatches: list[int] = []
        self._zero_sum = xxh3_64_intdigest(bytes(self.block_bytes))
        self._sums: dict[int, Sums] = {}
        self._changes: dict[int, _Change] = {}
        self._changed_at: dict[int, int] = {}
        self._now = 0
        """Counts starts and ends of changes: the clock of `_changed_at`."""
        self._waiting: dict[Request, tuple[Callable[[Request], None], Callable[[], None]]] = {}

    def _pass(self, request: Request, verb: Callable[[Request], bool], end: Callable[[], None]) -> bool:
        """Send `request` down, and call `end` when it is complete."""
        done = request.done
        request.done = self._late
        if not verb(request):
            self._waiting[request] = (done, end)
            return False
        request.done = done
        end()
        return True

    def _late(self, request: Request) -> None:
        request.done, end = self._waiting.pop(request)
        end()
        request.done(request)

    # Changes

    def queue_write(self, request: Request) -> bool:
        return self._change(request, self.next.queue_write)

    def queue_zeroes(self, request: Request) -> bool:
        return self._change(request, self.next.queue_zeroes)

    def queue_discard(self, request: Request) -> bool:
        return self._change(request, self.next.queue_discard)

    def _change(self, request: Request, verb: Callable[[Request], bool]) -> bool:
        new = self._new_sums(request)
        self._now += 1
        for block in self._touched(request):
            self._changes.setdefault(block, _Change()).count += 1
            self._changed_at[block] = self._now
        return self._pass(request, verb, lambda: self._changed(request, new))

    def _new_sums(self, request: Request) -> dict[int, Sums]:
        """What the blocks that `request` covers may hold after it."""
        size = self.block_bytes
        covered = self._covered(request)
        if request.op == WRITE:
            data = memoryview(b"".join(request.iov))
            skip = request.offset
            return {block: frozenset({xxh3_64_intdigest(data[block * size - skip : (block + 1) * size - skip])})
                    for block in covered}
        zero = frozenset({self._zero_sum})
        if request.op == ZEROES:
            return dict.fromkeys(covered, zero)
        return {block: zero | self._sums[block] for block in covered if block in self._sums}

    def _changed(self, request: Request, new: dict[int, Sums]) -> None:
        self._now += 1
        for block in self._touched(request):
            self._changed_at[block] = self._now
            change = self._changes[block]
            change.count -= 1
            change.sums |= new.get(block, UNKNOWN)
            change.known = change.known and not request.error and block in new
            if not change.count:
                del self._changes[block]
                if change.known:
                    self._sums[block] = change.sums
                else:
                    self._sums.pop(block, None)

    # Reads

    def queue_read(self, request: Request) -> bool:
        started = self._now
        return self._pass(request, self.next.queue_read, lambda: self._check(request, started))

    def _check(self, request: Request, started: int) -> None:
        """Compare what was read with what may be there. A block that may hold several things is settled."""
        if request.error:
            return
        show_zeroes(request)
        size = self.block_bytes
        data = memoryview(b"".join(request.iov))
        for block in self._covered(request):
            sums = self._sums.get(block)
            if sums is None or block in self._changes or self._changed_at[block] > started:
                continue
            at = block * size - request.offset
            found = xxh3_64_intdigest(data[at : at + size])
            if found in sums:
                self._sums[block] = frozenset({found})
                continue
            logger.error("verify: %d bytes at offset %d are not what was written there (checksum %016x, not %s)",
                         size, block * size, found, " or ".join(f"{value:016x}" for value in sorted(sums)))
            self.mismatches.append(block * size)
            request.error = errno.EILSEQ

    def _touched(self, request: Request) -> range:
        return range(request.offset // self.block_bytes, -(-(request.offset + request.length) // self.block_bytes))

    def _covered(self, request: Request) -> range:
        return range(-(-request.offset // self.block_bytes), (request.offset + request.length) // self.block_bytes)
