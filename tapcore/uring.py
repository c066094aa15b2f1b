"""io_uring: the reads and writes of a batch on their way by one system call, their ends told through the loop.

Interface: https://man7.org/linux/man-pages/man7/io_uring.7.html, io_uring_setup(2), io_uring_enter(2)

    push ─▶ SQE, SQE, …       entries of 64 bytes in memory shared with the kernel
    submit ─▶ io_uring_enter  the kernel takes them
    epoll ─▶ _reap            CQEs, 16 bytes each: user_data says which call, res is what preadv returns

A thread hop costs more than a read of a fast disk; this has none. The kernel reads the tail of the submission ring
within the system call, and this reads the completion ring after epoll has told of it: both order memory, which
Python itself could not.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from array import array
from collections.abc import Callable, Sequence
from typing import Final

from tapcore.layout import Layout
from tapcore.loop import Loop

logger = logging.getLogger(__name__)

ENTRIES: Final = 256
"""Of the submission ring; twice as many calls may be on their way."""

SYS_IO_URING_SETUP: Final = 425
SYS_IO_URING_ENTER: Final = 426
IORING_OFF_SQ_RING: Final = 0
IORING_OFF_SQES: Final = 0x10000000
IORING_FEAT_SINGLE_MMAP: Final = 1 << 0
IORING_OP_READV: Final = 1
IORING_OP_WRITEV: Final = 2

PARAMS: Final = Layout("struct io_uring_params", "=", """
    sq_entries:I cq_entries:I flags:I sq_thread_cpu:I sq_thread_idle:I features:I wq_fd:I :12x
    sq_head:I sq_tail:I sq_mask:I sq_ring_entries:I sq_flags:I sq_dropped:I sq_array:I :12x
    cq_head:I cq_tail:I cq_mask:I cq_ring_entries:I cq_overflow:I cq_cqes:I cq_flags:I :12x""", size=120)
SQE: Final = Layout("struct io_uring_sqe", "=",
                    "opcode:B flags:B ioprio:H fd:i off:Q addr:Q len:I rw_flags:I user_data:Q :24x", size=64)
CQE: Final = Layout("struct io_uring_cqe", "=", "user_data:Q res:i flags:I", size=16)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_pack_sqe = SQE.struct.pack_into
_unpack_cqe = CQE.struct.unpack_from

Done = Callable[[int], None]
"""Called in the loop's thread with the number of bytes, or a negative errno."""


class Ring:
    """One ring, in the loop's thread. OSError if the kernel has none for this process."""

    def __init__(self, loop: Loop, entries: int = ENTRIES) -> None:
        params = ctypes.create_string_buffer(PARAMS.size)
        self._fd = _syscall(SYS_IO_URING_SETUP, entries, ctypes.byref(params))
        try:
            self._map(PARAMS.unpack(params.raw))
        except BaseException:
            os.close(self._fd)
            raise
        self._loop = loop
        self._queued = 0
        """Pushed, and not yet taken by the kernel."""
        self._calls: list[tuple[Done, object]] = [(_nobody, None)] * self.capacity
        self._free = list(range(self.capacity))
        loop.add_reader(self._fd, self._reap)

    def _map(self, fields: dict[str, int]) -> None:
        if not fields["features"] & IORING_FEAT_SINGLE_MMAP:
            raise OSError(errno.ENOSYS, "an io_uring older than Linux 5.4")
        self.capacity = fields["cq_entries"]
        """Calls that may be on their way at once."""
        self._sq_entries = fields["sq_entries"]
        length = max(fields["sq_array"] + 4 * self._sq_entries, fields["cq_cqes"] + CQE.size * self.capacity)
        self._rings = mmap.mmap(self._fd, length, offset=IORING_OFF_SQ_RING)
        self._sqes = mmap.mmap(self._fd, SQE.size * self._sq_entries, offset=IORING_OFF_SQES)
        self._words = memoryview(self._rings)[: length & -4].cast("I")
        self._sq_tail_at, self._cq_head_at, self._cq_tail_at = (
            fields[name] // 4 for name in ("sq_tail", "cq_head", "cq_tail"))
        self._sq_mask, self._cq_mask = self._sq_entries - 1, self.capacity - 1
        self._cqes_at = fields["cq_cqes"]
        first = fields["sq_array"] // 4
        self._words[first : first + self._sq_entries] = memoryview(array("I", range(self._sq_entries)))
        self._sq_tail = self._words[self._sq_tail_at]
        self._cq_head = self._words[self._cq_head_at]

    def close(self) -> None:
        """With nothing on its way."""
        assert self.in_flight == 0, "a ring was closed with calls on their way"
        self._loop.remove(self._fd)
        self._words.release()
        self._rings.close()
        self._sqes.close()
        os.close(self._fd)

    @property
    def in_flight(self) -> int:
        return self.capacity - len(self._free)

    def read(self, fd: int, iov: Iovec, offset: int, done: Done) -> bool:
        """preadv, begun by the next `submit`; False if too many calls are on their way."""
        return self._push(IORING_OP_READV, fd, iov, offset, 0, done)

    def write(self, fd: int, iov: Iovec, offset: int, flags: int, done: Done) -> bool:
        """pwritev with RWF flags, begun by the next `submit`; False if too many calls are on their way."""
        return self._push(IORING_OP_WRITEV, fd, iov, offset, flags, done)

    def _push(self, opcode: int, fd: int, iov: Iovec, offset: int, flags: int, done: Done) -> bool:
        if self._queued == self._sq_entries:
            self.submit()
        if not self._free or self._queued == self._sq_entries:
            return False
        number = self._free.pop()
        self._calls[number] = (done, iov)
        tail = self._sq_tail
        _pack_sqe(self._sqes, (tail & self._sq_mask) * 64, opcode, 0, 0, fd, offset, iov.address, iov.count, flags,
                  number)
        self._sq_tail = tail + 1 & 0xFFFFFFFF
        self._queued += 1
        return True

    def submit(self) -> None:
        """Hand what was pushed to the kernel; what it cannot take now, again in the loop's next turn."""
        if not self._queued:
            return
        self._words[self._sq_tail_at] = self._sq_tail
        try:
            self._queued -= _syscall(SYS_IO_URING_ENTER, self._fd, self._queued, 0, 0, None, 0)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EBUSY, errno.EINTR):
                raise
        if self._queued:
            self._loop.call_soon(self.submit)

    def _reap(self) -> None:
        head, tail = self._cq_head, self._words[self._cq_tail_at]
        ended: list[tuple[Done, int]] = []
        while head != tail:
            number, result, _ = _unpack_cqe(self._rings, self._cqes_at + (head & self._cq_mask) * 16)
            ended.append((self._calls[number][0], result))
            self._calls[number] = (_nobody, None)
            self._free.append(number)
            head = head + 1 & 0xFFFFFFFF
        self._words[self._cq_head_at] = self._cq_head = head
        for done, result in ended:
            done(result)


class Iovec:
    """Buffers, as the kernel is told of them; to be kept until the call has ended."""

    __slots__ = ("_array", "address", "count")

    def __init__(self, views: Sequence[memoryview], align_mask: int = 0) -> None:
        """ValueError if a buffer is read-only, or its address or length is not a multiple of align_mask + 1."""
        words = array("Q")
        for view in views:
            if view.readonly:
                raise ValueError("a read-only buffer")
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            if (address | len(view)) & align_mask:
                raise ValueError("a buffer that is not aligned")
            words.extend((address, len(view)))
        self._array = words
        self.address = words.buffer_info()[0]
        self.count = len(views)


def open_ring(loop: Loop) -> Ring | None:
    """A ring, or None where the kernel has none, or lets this process have none."""
    try:
        return Ring(loop)
    except OSError as error:
        logger.debug("no io_uring: %s", error)
        return None


def _nobody(result: int) -> None:
    raise AssertionError("a call ended that was never begun")


def _syscall(number: int, *arguments: object) -> int:
    """OSError if it fails."""
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
