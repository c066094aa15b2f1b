"""ram: a disk in memory, gone when it is closed.

Use: ram:512M
     ram:1T

Options: none. The size is a number of bytes, or one with K, M, G or T, a multiple of 512 bytes.

Memory is taken when it is first written, and given back by discard and write-zeroes.

Limits: there is no promise that memory is left when it is needed, also not after write-zeroes with NO_HOLE. Block
status shows everything as data.
"""

from __future__ import annotations

import errno
import mmap
from typing import Final

from tapcore.driver import SECTOR_BYTES, DiskInfo, Driver, Feature
from tapcore.errors import ImageError, UsageError
from tapcore.params import size_bytes
from tapcore.request import Request, fail

MAP_NORESERVE: Final = 0x4000


class Ram(Driver):
    name = "ram"

    def open(self) -> None:
        """UsageError for a size that is none; ImageError if the system has no room for it."""
        size = size_bytes("size", self.params)
        if size == 0 or size % SECTOR_BYTES:
            raise UsageError(f"the size {self.params!r} is not a positive multiple of {SECTOR_BYTES} bytes")
        try:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        except (OSError, OverflowError) as error:
            raise ImageError(f"no address space for {size} bytes of memory: {error}") from error
        self._memory = memoryview(self._map)
        features = Feature.FLUSH | Feature.DISCARD | Feature.ZEROES | Feature.FAST_ZEROES
        self.info = DiskInfo(size, features, read_only=self.read_only)

    def close(self) -> None:
        self._memory.release()
        self._map.close()

    def queue_read(self, request: Request) -> bool:
        memory, offset = self._memory, request.offset
        for view in request.iov:
            end = offset + len(view)
            view[:] = memory[offset:end]
            offset = end
        return True

    def queue_write(self, request: Request) -> bool:
        if self.read_only:
            return fail(request, errno.EROFS)
        memory, offset = self._memory, request.offset
        for view in request.iov:
            end = offset + len(view)
            memory[offset:end] = view
            offset = end
        return True

    def queue_flush(self, request: Request) -> bool:
        return True

    def queue_zeroes(self, request: Request) -> bool:
        """Give whole pages back, which then read as zeroes, and clear the ends."""
        if self.read_only:
            return fail(request, errno.EROFS)
        start, end = request.offset, request.offset + request.length
        first_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last_page = end // mmap.PAGESIZE * mmap.PAGESIZE
        if first_page >= last_page:
            self._memory[start:end] = bytes(end - start)
            return True
        self._memory[start:first_page] = bytes(first_page - start)
        self._map.madvise(mmap.MADV_DONTNEED, first_page, last_page - first_page)
        self._memory[last_page:end] = bytes(end - last_page)
        return True

    queue_discard = queue_zeroes
