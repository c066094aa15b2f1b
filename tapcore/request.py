"""The request that travels down a chain.

Offsets and lengths are bytes. A verb of a driver (`queue_read(request)` …) returns True when the request is
already complete, with `request.error` set: 0, or a positive errno. It returns False when the request is under
way: then the driver sets `request.error` later, from the loop's thread, and calls `request.done(request)`
exactly once. It never does both. This is the "early completion" of the original td_queue_read/td_queue_write,
and it is what makes a request served from the page cache cost no callback at all.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

READ: Final = 0
WRITE: Final = 1
FLUSH: Final = 2
DISCARD: Final = 3
ZEROES: Final = 4
STATUS: Final = 5
OP_NAMES: Final = ("read", "write", "flush", "discard", "zeroes", "status")

FUA: Final = 1
"""Durable before it completes (write, discard, zeroes)."""
NO_HOLE: Final = 2
"""Zeroes that keep the range allocated."""
FAST: Final = 4
"""Zeroes only if that is quicker than writing them; otherwise ENOTSUP and nothing is changed."""
BACKGROUND: Final = 8
"""Not the guest's: drivers do the I/O in a worker, so that the loop stays free for the guest."""
ABANDONED: Final = 16
"""Its owner has gone: not to be tried again. Of no concern to drivers."""
IS_ZERO: Final = 32
"""The answer to a read that `takes_zero`: all of it is zeroes, and its buffers were not filled."""

STATUS_HOLE: Final = 1
STATUS_ZERO: Final = 2
"""Bits of an extent's state, as NBD's base:allocation has them: not allocated; reads as zeroes."""

Extent: TypeAlias = tuple[int, int]
"""(length in bytes, state bits) of one range of a block status answer."""


def never_done(request: Request) -> None:
    raise AssertionError("a request was completed late that nobody waits for")

PERMANENT = frozenset({
    errno.EROFS, errno.EINVAL, errno.EOVERFLOW, errno.EFBIG, errno.ENXIO, errno.EPERM, errno.EACCES, errno.EBADF,
    errno.EOPNOTSUPP, errno.ENOSYS, errno.EILSEQ, errno.EBADMSG, errno.ESHUTDOWN, errno.ERANGE, errno.ENODEV,
})
"""Errors that a second try cannot cure. All others (EIO, ENOSPC, ENOMEM, ETIMEDOUT …) are tried again."""


class Request:
    """One read, write, flush, discard, write-zeroes or block status.

    `iov` holds the buffers of a read (filled) or a write (sent), `length` bytes in all. They belong to the
    request until it is done. A filter that hooks `done` puts the former one back before it calls it. `extents`
    is the answer of a STATUS: consecutive from `offset`, at least one byte, at most `length`.
    """

    __slots__ = ("at", "cookie", "done", "error", "extents", "flags", "iov", "length", "offset", "op", "owner",
                 "parts", "place", "started_ns", "takes_zero", "tries")

    def __init__(
        self,
        op: int,
        offset: int = 0,
        length: int = 0,
        iov: Sequence[memoryview] = (),
        flags: int = 0,
        done: Callable[[Request], None] = never_done,
    ) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.iov = iov
        self.flags = flags
        self.done = done
        self.error = 0
        self.takes_zero = False
        """Of a read: a driver may set the flag IS_ZERO instead of filling the buffers. Who looks at what was read
        on its way up calls `show_zeroes` first."""
        self.extents: list[Extent] = []
        self.parts: list[Request] | None = None
        """The requests that were merged into this one (by the vbd)."""
        self.owner: Any = None
        """Who gets `request_done(request)` from the vbd when the request completes late."""
        self.cookie = 0
        self.place: Any = None
        self.at = 0
        """The owner's own: a handle, a buffer, a position in it."""
        self.started_ns = 0
        self.tries = 0

    def __repr__(self) -> str:
        return f"<{OP_NAMES[self.op]} {self.length} bytes at {self.offset}, error {self.error}>"


class Caller:
    """The owner of a single request: `done(errno, extents)` is called when it ends."""

    def __init__(self, done: Callable[[int, list[Extent]], None]) -> None:
        self._done = done

    def request_done(self, request: Request) -> None:
        self._done(request.error, request.extents)


def fail(request: Request, code: int) -> bool:
    """Complete `request` early with the errno `code`: `return fail(request, EIO)`."""
    request.error = code
    return True


def show_zeroes(request: Request) -> None:
    """Fill the buffers of a read that was answered with IS_ZERO alone."""
    if request.flags & IS_ZERO:
        request.flags &= ~IS_ZERO
        for view in request.iov:
            view[:] = bytes(len(view))


def slice_iov(iov: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """The buffers that hold bytes [start, start + length) of `iov`, without copying."""
    if len(iov) == 1:
        return [iov[0][start : start + length]]
    out: list[memoryview] = []
    for view in iov:
        if length <= 0:
            break
        size = len(view)
        if start >= size:
            start -= size
            continue
        part = view[start : start + length]
        out.append(part)
        length -= len(part)
        start = 0
    return out
