"""O_DIRECT: what the kernel asks of offsets, lengths and memory, and how any request is made to fit.

    request        |  ....xxxxxxxxxxxxxxxxxxxxxxx...........|
    blocks         |--------|--------|--------|--------|----|
    bounce buffer  |[  read  ]  copy          [  read  ]|      then written as whole blocks

A write that covers a block in part reads it, changes it and writes it whole: meanwhile no other change to that
block may run, or it would be undone. `WriteGate` sees to that.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final

from tapcore.errors import ImageError
from tapcore.layout import Layout
from tapcore.rawfile import RawFile, logical_block_bytes
from tapcore.request import WRITE, Request, slice_iov

BOUNCE_BYTES: Final = 1 << 20
MAX_FREE_BOUNCES: Final = 8
DEFAULT_ALIGN_BYTES: Final = 4096
"""Where the kernel does not tell."""

AT_EMPTY_PATH: Final = 0x1000
STATX_DIOALIGN: Final = 0x2000
_STATX = Layout("struct statx of statx(2)", "=", "stx_mask:I :148x mem_align:I offset_align:I :96x", size=256)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)


class DirectFile(RawFile):
    """A RawFile that bypasses the page cache. Misaligned requests go through page-aligned buffers; changes to the
    same blocks must be kept apart by a WriteGate."""

    open_flags: ClassVar[int] = os.O_DIRECT

    def __init__(self, path: str, fd: int, size_bytes: int, *, is_device: bool, read_only: bool) -> None:
        super().__init__(path, fd, size_bytes, is_device=is_device, read_only=read_only)
        self.memory_align_bytes, self.min_block_bytes = _alignment(path, fd, is_device)
        if size_bytes % self.min_block_bytes:
            raise ImageError(
                f"its size, {size_bytes} bytes, is not a multiple of {self.min_block_bytes}, as O_DIRECT needs",
                errno=errno.EINVAL, path=path,
                hint=f"leave out the option direct, or: truncate -s %{self.min_block_bytes} FILE")
        self._bounces: deque[mmap.mmap] = deque(maxlen=MAX_FREE_BOUNCES)

    def quick_read_flags(self) -> int | None:
        return None

    def read(self, iov: Sequence[memoryview], offset: int, length: int) -> int:
        if self._fits(iov, offset, length):
            return super().read(iov, offset, length)
        bounce = self._take()
        try:
            for first, window in self._windows(offset, length, bounce):
                code = super().read([window], first, len(window))
                if code:
                    return code
                start, stop = max(offset, first), min(offset + length, first + len(window))
                _scatter(window[start - first : stop - first], iov, start - offset)
        finally:
            self._bounces.append(bounce)
        return 0

    def write(self, iov: Sequence[memoryview], offset: int, length: int, *, fua: bool = False) -> int:
        if self._fits(iov, offset, length):
            return super().write(iov, offset, length, fua=fua)
        bounce = self._take()
        try:
            for first, window in self._windows(offset, length, bounce):
                start, stop = max(offset, first), min(offset + length, first + len(window))
                code = self._read_edges(window, first, start, stop)
                if code:
                    return code
                _gather(iov, start - offset, window[start - first : stop - first])
                code = super().write([window], first, len(window), fua=fua)
                if code:
                    return code
        finally:
            self._bounces.append(bounce)
        return 0

    def _read_edges(self, window: memoryview, first: int, start: int, stop: int) -> int:
        """Read those blocks of `window`, which lies at `first`, that [start, stop) covers in part."""
        block_bytes = self.min_block_bytes
        edges = set()
        if start % block_bytes:
            edges.add(start - start % block_bytes)
        if stop % block_bytes:
            edges.add(stop - stop % block_bytes)
        for edge in edges:
            at = edge - first
            code = super().read([window[at : at + block_bytes]], edge, block_bytes)
            if code:
                return code
        return 0

    def _fits(self, iov: Sequence[memoryview], offset: int, length: int) -> bool:
        """Can the kernel take it as it is?"""
        block_mask, memory_mask = self.min_block_bytes - 1, self.memory_align_bytes - 1
        if (offset | length) & block_mask:
            return False
        for view in iov:
            if len(view) & block_mask or view.readonly:
                return False
            if len(view) and ctypes.addressof(ctypes.c_char.from_buffer(view)) & memory_mask:
                return False
        return True

    def _windows(self, offset: int, length: int, bounce: mmap.mmap) -> Iterator[tuple[int, memoryview]]:
        """The whole blocks around [offset, offset + length), as pieces that fit `bounce`: (offset, memory)."""
        block_bytes = self.min_block_bytes
        first = offset - offset % block_bytes
        end = -(-(offset + length) // block_bytes) * block_bytes
        memory = memoryview(bounce)
        while first < end:
            window = memory[: min(BOUNCE_BYTES, end - first)]
            yield first, window
            first += len(window)

    def _take(self) -> mmap.mmap:
        try:
            return self._bounces.pop()
        except IndexError:
            return mmap.mmap(-1, BOUNCE_BYTES)


class WriteGate:
    """Keeps a change that reads and rewrites its edge blocks away from every other change of the same blocks.

    A change is a write, discard or write-zeroes. Aligned ones pass by each other; one that is not aligned waits
    for all that touch its blocks, and they for it, in the order in which they came. In the loop's thread.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        # Discard and zeroes of a part of a page go through the page cache, a page at a time.
        self._page_bytes = max(block_bytes, mmap.PAGESIZE)
        self._running: dict[Request, bool] = {}
        self._waiting: deque[Request] = deque()
        self._unaligned = 0
        """How many of both are not aligned."""

    def enter(self, request: Request) -> bool:
        """May `request` run now? If not, a later `leave` returns it."""
        unaligned = self._is_unaligned(request)
        self._unaligned += unaligned
        if self._unaligned and self._must_wait(request, unaligned, self._waiting):
            self._waiting.append(request)
            return False
        self._running[request] = unaligned
        return True

    def leave(self, request: Request) -> list[Request]:
        """`request` has ended; returns those that may run now."""
        self._unaligned -= self._running.pop(request)
        ready: list[Request] = []
        still: deque[Request] = deque()
        first, last = self._pages(request)
        for waiting in self._waiting:
            waiting_first, waiting_last = self._pages(waiting)
            if waiting_first > last or waiting_last < first:
                still.append(waiting)  # for others
                continue
            unaligned = self._is_unaligned(waiting)
            if self._must_wait(waiting, unaligned, still):
                still.append(waiting)
            else:
                self._running[waiting] = unaligned
                ready.append(waiting)
        self._waiting = still
        return ready

    def _pages(self, request: Request) -> tuple[int, int]:
        """The first and the last page that it touches."""
        page_bytes = self._page_bytes
        return request.offset // page_bytes, (request.offset + request.length - 1) // page_bytes

    def _is_unaligned(self, request: Request) -> bool:
        unit_bytes = self._block_bytes if request.op == WRITE else self._page_bytes
        return bool((request.offset | request.length) & (unit_bytes - 1))

    def _must_wait(self, request: Request, unaligned: bool, before: deque[Request]) -> bool:
        """Does `request` meet one that runs, or waits in front of it, where one of the two is not aligned?"""
        page_bytes = self._page_bytes
        first, last = self._pages(request)
        for other in (*self._running, *before):
            if (other.offset // page_bytes <= last and first <= (other.offset + other.length - 1) // page_bytes
                    and (unaligned or self._is_unaligned(other))):
                return True
        return False


def _alignment(path: str, fd: int, is_device: bool) -> tuple[int, int]:
    """What O_DIRECT needs of this file: (of memory, of offset and length), in bytes. ImageError if it has none."""
    answer = ctypes.create_string_buffer(_STATX.size)
    if _libc.statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN, answer) == 0:
        found = _STATX.unpack(answer.raw)
        if found["stx_mask"] & STATX_DIOALIGN:
            if not found["offset_align"]:
                raise ImageError("its file system has no O_DIRECT for it", errno=errno.EOPNOTSUPP, path=path,
                                 hint="leave out the option direct")
            return found["mem_align"], found["offset_align"]
    align_bytes = logical_block_bytes(fd) if is_device else DEFAULT_ALIGN_BYTES
    return align_bytes, align_bytes


def _scatter(data: memoryview, iov: Sequence[memoryview], start: int) -> None:
    """Copy `data` into `iov`, from its byte `start` on."""
    at = 0
    for view in slice_iov(iov, start, len(data)):
        view[:] = data[at : at + len(view)]
        at += len(view)


def _gather(iov: Sequence[memoryview], start: int, target: memoryview) -> None:
    """Fill `target` from byte `start` of `iov` on."""
    at = 0
    for view in slice_iov(iov, start, len(target)):
        target[at : at + len(view)] = view
        at += len(view)
