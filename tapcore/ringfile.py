"""Reads and writes of a raw file by io_uring, as far as that can take them; who asks does the others himself.

    buffered   reads that the page cache does not have
    O_DIRECT   reads and writes of whole blocks; a write whose memory is not aligned goes through a bounce buffer
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from tapcore.loop import Loop
from tapcore.rawfile import IOV_MAX, RawFile
from tapcore.request import BACKGROUND, FUA, READ, WRITE, Request
from tapcore.uring import Iovec, Ring, open_ring

BOUNCES: Final = ((64 << 10, 64), (1 << 20, 8))
"""Bounce buffers: (bytes, how many are kept). Larger writes go other ways."""


class FileRing:
    """A ring for one file. It is opened when it is first needed; `ended(request, done)` tells of the end of what
    `begin` took: `done` is False if it is to be done again in another way, which then has the say on its error."""

    def __init__(self, loop: Loop, file: RawFile, ended: Callable[[Request, bool], None]) -> None:
        self._loop = loop
        self._file = file
        self._ended = ended
        self._is_direct = bool(file.open_flags & os.O_DIRECT)
        self._block_mask = file.min_block_bytes - 1
        self._memory_mask = max(file.memory_align_bytes, file.min_block_bytes) - 1 if self._is_direct else 0
        self._ring: Ring | None = None
        self._is_tried = False
        self._bounces: dict[int, list[mmap.mmap]] = {size_bytes: [] for size_bytes, _ in BOUNCES}

    def close(self) -> None:
        """With nothing on its way."""
        if self._ring is not None:
            self._ring.close()

    def submit(self) -> None:
        if self._ring is not None:
            self._ring.submit()

    def begin(self, request: Request) -> bool:
        """Take `request`, which goes with the next `submit`; False if it must be done in another way."""
        op = request.op
        if op == READ:
            if request.flags and not self._is_direct:
                return False
        elif op != WRITE or not self._is_direct or request.flags & ~(FUA | BACKGROUND):
            return False
        if (request.offset | request.length) & self._block_mask or len(request.iov) > IOV_MAX:
            return False
        if self._ring is None:
            if self._is_tried:
                return False
            self._is_tried = True
            self._ring = open_ring(self._loop)
            if self._ring is None:
                return False
        try:
            iov = Iovec(request.iov, self._memory_mask)
        except ValueError:
            return op == WRITE and self._begin_bounced(self._ring, request)
        fd, offset, done = self._file.fd, request.offset, partial(self._done, request)
        if op == READ:
            return self._ring.read(fd, iov, offset, done)
        return self._ring.write(fd, iov, offset, _rwf(request), done)

    def _begin_bounced(self, ring: Ring, request: Request) -> bool:
        size_bytes = next((size for size, _ in BOUNCES if size >= request.length), 0)
        if not size_bytes:
            return False
        kept = self._bounces[size_bytes]
        bounce = kept.pop() if kept else mmap.mmap(-1, size_bytes)
        view = memoryview(bounce)[: request.length]
        _gather(request.iov, view)
        if ring.write(self._file.fd, Iovec([view]), request.offset, _rwf(request),
                      partial(self._done_bounced, request, bounce)):
            return True
        kept.append(bounce)
        return False

    def _done_bounced(self, request: Request, bounce: mmap.mmap, result: int) -> None:
        kept = self._bounces[len(bounce)]
        if len(kept) < dict(BOUNCES)[len(bounce)]:
            kept.append(bounce)
        self._done(request, result)

    def _done(self, request: Request, result: int) -> None:
        request.error = 0
        self._ended(request, result == request.length)


def _rwf(request: Request) -> int:
    return os.RWF_DSYNC if request.flags & FUA else 0


def _gather(iov: Sequence[memoryview], target: memoryview) -> None:
    at = 0
    for view in iov:
        target[at : at + len(view)] = view
        at += len(view)
