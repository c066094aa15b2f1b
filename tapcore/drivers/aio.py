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

    read                the loop's thread if the page cache has it (RWF_NOWAIT), else io_uring
    write               the loop's thread, into the page cache; a worker while writes are seen to stall
    flush, FUA, others  a worker; flushes that wait together share one fdatasync, begun after the last was queued
    BACKGROUND          a worker, always

With `direct` reads and writes go through io_uring, all else is for workers. So is what it cannot take: where the
kernel has no io_uring, and reads of other offsets, lengths or memory than the file asks for.

Limits: the file's size is a multiple of 512 bytes, with `direct` of its alignment (mostly 512 or 4096). When a
flush has failed all later ones fail too, until the image is opened again: the kernel has forgotten what it could
not write. ext4 and XFS report blocks zeroed with NO_HOLE as holes, though they are allocated.
"""

from __future__ import annotations

import errno
import os
from functools import partial

from tapcore.directio import DirectFile, WriteGate
from tapcore.driver import Driver
from tapcore.params import path_params
from tapcore.rawfile import RawFile
from tapcore.request import DISCARD, WRITE, ZEROES, Request
from tapcore.ringfile import FileRing
from tapcore.writewatch import WriteWatch

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
        self._watch = WriteWatch()
        self._writes_inline = not direct and not self._file.read_only
        self._gate = WriteGate(self._file.min_block_bytes) if direct else None
        self._ring = FileRing(self.env.loop, self._file, self._ring_ended)
        self._late: list[tuple[Request, int]] = []
        """Not done at once, with the number of bytes that are done already."""
        self._flushes: list[Request] = []
        self._syncing: list[Request] = []
        self._sync_errno = 0

    def close(self) -> None:
        self._ring.close()
        self._file.close()

    def fileno(self) -> int:
        return self._fd

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
        watch = self._watch
        if request.flags or not (watch.inline or (self._writes_inline and watch.begin())):
            self._late.append((request, 0))
            return False
        try:
            count = _pwritev(self._fd, request.iov, request.offset)
        except OSError:
            count = 0
        watch.batch_bytes += count
        if count == request.length:
            return True
        self._late.append((request, count))
        return False

    def queue_flush(self, request: Request) -> bool:
        self._flushes.append(request)
        return False

    def _queue_late(self, request: Request) -> bool:
        self._late.append((request, 0))
        return False

    queue_discard = queue_zeroes = queue_status = _queue_late

    def submit(self) -> None:
        if self._writes_inline:
            self._watch.end_batch()
        if self._late:
            late, self._late = self._late, []
            gate = self._gate
            for request, start in late:
                if gate is None or request.op not in (WRITE, DISCARD, ZEROES) or gate.enter(request):
                    self._start(request, start)
            self._ring.submit()
        if self._flushes and not self._syncing:
            self._start_sync()

    # On their way, and back

    def _start(self, request: Request, start: int = 0) -> None:
        if not self._ring.begin(request):
            self._hire(request, start)

    def _ring_ended(self, request: Request, done: bool) -> None:
        if done:
            self._finish(request)
        else:
            self._hire(request, 0)

    def _hire(self, request: Request, start: int) -> None:
        self.env.workers.submit(partial(self._work, request, start), partial(self._finish, request))

    def _work(self, request: Request, start: int) -> None:
        request.error = errno.EIO  # what stays if the next line raises
        request.error = self._file.perform(request, start)

    def _finish(self, request: Request) -> None:
        if self._gate is not None and request.op in (WRITE, DISCARD, ZEROES):
            for waiting in self._gate.leave(request):
                self._start(waiting)
            self._ring.submit()
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
