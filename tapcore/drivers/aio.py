"""aio: a raw file or block device, with as many requests on their way as there are.

Use: aio:/vm/disk.img
     aio:/dev/vg/disk
     aio:direct,/vm/disk.img

Options:
    direct   bypass the page cache (O_DIRECT); requests of any offset, length and memory are made to fit
They stand in front of the path, which begins with '/' or '.' and may contain anything.

Holes are reported by block status; discard punches them, write-zeroes makes them or unwritten blocks.
The file is locked as QEMU does it: two programs do not write one image.

What runs where, without `direct`:

    read                the loop's thread if the page cache has it (RWF_NOWAIT), else a worker
    write               the loop's thread, into the page cache; a worker while writes are seen to stall
    flush, FUA, others  a worker; flushes that wait together share one fdatasync, begun after the last was queued
    BACKGROUND          a worker, always

With `direct` all of it is for workers.

Limits: the file's size is a multiple of 512 bytes, with `direct` of its alignment (mostly 512 or 4096). When a
flush has failed all later ones fail too, until the image is opened again: the kernel has forgotten what it could
not write. ext4 and XFS report blocks zeroed with NO_HOLE as holes, though they are allocated.
"""

from __future__ import annotations

import errno
import os
import resource
from functools import partial
from time import monotonic
from typing import Final

from tapcore.directio import DirectFile, WriteGate
from tapcore.driver import Driver
from tapcore.params import path_params
from tapcore.rawfile import RawFile
from tapcore.request import DISCARD, WRITE, ZEROES, Request

STALL_S: Final = 0.005
"""A batch whose writes took this much longer than copying is slow."""
SUSPICION_S: Final = 1.0
"""For so long after a slow batch it is watched whether the next slow one waited (for write-back), or this thread
was just not given a processor."""
COPY_BYTES_PER_S: Final = 500e6
"""Into the page cache, slowest."""
MIN_DETOUR_S: Final = 1.0
MAX_DETOUR_S: Final = 8.0
"""How long writes go to workers after a wait; twice as long if they wait again soon after the last detour."""

# Where a write goes. The clock is read at a batch's first write and at its end, not at every request.
_FIRST, _INLINE, _DETOUR, _WORKERS_ONLY = range(4)

_preadv, _pwritev = os.preadv, os.pwritev


class Aio(Driver):
    name = "aio"

    def open(self) -> None:
        """UsageError for a bad option or path; ImageError if the file cannot be opened, locked or used."""
        chosen, self.path = path_params(self.name, self.params, ("direct",))
        direct = "direct" in chosen
        self._file = (DirectFile if direct else RawFile).open(self.path, self.flags)
        self.info = self._file.info()
        self._fd = self._file.fd
        read_flags = self._file.quick_read_flags()
        self._reads_inline = read_flags is not None
        self._read_flags = read_flags or 0
        self._writes = _WORKERS_ONLY if direct or self._file.read_only else _FIRST
        self._batch_began_s = 0.0
        self._batch_bytes = 0
        self._batch_waits: int | None = None
        """This thread's waits before the batch, while there is suspicion."""
        self._suspicion_end_s = 0.0
        self._detour_s = MIN_DETOUR_S
        self._detour_end_s = 0.0
        self._gate = WriteGate(self._file.min_block_bytes) if direct else None
        self._late: list[tuple[Request, int]] = []
        """Queued for workers, with the number of bytes that are done already."""
        self._flushes: list[Request] = []
        self._syncing: list[Request] = []
        self._sync_errno = 0

    def close(self) -> None:
        self._file.close()

    # The loop's thread: queueing

    def queue_read(self, request: Request) -> bool:
        count = 0
        if self._reads_inline and not request.flags:
            try:
                count = _preadv(self._fd, request.iov, request.offset, self._read_flags)
            except OSError:
                count = 0
            if count == request.length:
                return True
        self._late.append((request, count))
        return False

    def queue_write(self, request: Request) -> bool:
        if request.flags or self._writes != _INLINE:
            return self._queue_write(request)
        try:
            count = _pwritev(self._fd, request.iov, request.offset)
        except OSError:
            count = 0
        if count == request.length:
            self._batch_bytes += count
            return True
        self._late.append((request, count))
        return False

    def _queue_write(self, request: Request) -> bool:
        """A write that is not to be done inline, or the batch's first, which starts the clock."""
        if request.flags or self._writes != _FIRST:
            return self._queue_late(request)
        self._batch_began_s = now_s = monotonic()
        self._batch_bytes = 0
        self._batch_waits = _waits() if now_s < self._suspicion_end_s else None
        self._writes = _INLINE
        return self.queue_write(request)

    def queue_flush(self, request: Request) -> bool:
        self._flushes.append(request)
        return False

    def _queue_late(self, request: Request) -> bool:
        self._late.append((request, 0))
        return False

    queue_discard = queue_zeroes = queue_status = _queue_late

    def submit(self) -> None:
        if self._writes != _FIRST:
            self._watch_writes()
        if self._late:
            late, self._late = self._late, []
            gate = self._gate
            for request, start in late:
                if gate is None or request.op not in (WRITE, DISCARD, ZEROES) or gate.enter(request):
                    self._start(request, start)
        if self._flushes and not self._syncing:
            self._start_sync()

    def _watch_writes(self) -> None:
        """At the end of a batch: did its writes wait for write-back? Then later ones take the detour through
        workers, for a while."""
        if self._writes == _WORKERS_ONLY:
            return
        now_s = monotonic()
        if self._writes == _DETOUR:
            if now_s >= self._detour_end_s:
                self._writes = _FIRST
                self._suspicion_end_s = now_s + SUSPICION_S
            return
        self._writes = _FIRST
        if now_s - self._batch_began_s <= STALL_S + self._batch_bytes / COPY_BYTES_PER_S:
            return
        if self._batch_waits is None or _waits() == self._batch_waits:
            self._suspicion_end_s = now_s + SUSPICION_S
            return
        self._writes = _DETOUR
        just_tried = now_s - self._detour_end_s < SUSPICION_S
        self._detour_s = min(2 * self._detour_s, MAX_DETOUR_S) if just_tried else MIN_DETOUR_S
        self._detour_end_s = now_s + self._detour_s

    # Workers, and back

    def _start(self, request: Request, start: int = 0) -> None:
        self.env.workers.submit(partial(self._work, request, start), partial(self._finish, request))

    def _work(self, request: Request, start: int) -> None:
        request.error = errno.EIO  # what stays if the next line raises
        request.error = self._file.perform(request, start)

    def _finish(self, request: Request) -> None:
        if self._gate is not None and request.op in (WRITE, DISCARD, ZEROES):
            for waiting in self._gate.leave(request):
                self._start(waiting)
        request.done(request)

    def _start_sync(self) -> None:
        self._syncing, self._flushes = self._flushes, []
        self.env.workers.submit(self._sync, self._synced)

    def _sync(self) -> None:
        self._sync_errno = errno.EIO  # what stays if the next line raises
        self._sync_errno = self._file.sync()

    def _synced(self) -> None:
        finished, self._syncing = self._syncing, []
        code = self._sync_errno
        if self._flushes:
            self._start_sync()
        for request in finished:
            request.error = code
            request.done(request)


def _waits() -> int:
    """How often this thread has waited so far, for whatever."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
