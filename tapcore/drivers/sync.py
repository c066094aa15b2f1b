"""sync: a raw file or block device, one request after the other.

Use: sync:/vm/disk.img
     sync:./disk.img

Options: none. Everything after the colon is the path, which begins with '/' or '.'.

The simplest driver that is right: each request is one blocking call in the loop's thread. To be compared with, and
for tools that have nothing else to do; a guest's disk is better served by aio.

Limits: the file's size is a multiple of 512 bytes. While a request waits for the disk, everything else waits too.
"""

from __future__ import annotations

from tapcore.driver import Driver
from tapcore.params import path_params
from tapcore.rawfile import RawFile
from tapcore.request import Request


class Sync(Driver):
    name = "sync"

    def open(self) -> None:
        """UsageError for a bad path; ImageError if the file cannot be opened, locked or used."""
        _, self.path = path_params(self.name, self.params)
        self._file = RawFile.open(self.path, self.flags)
        self.info = self._file.info()

    def fileno(self) -> int:
        return self._file.fd

    def close(self) -> None:
        self._file.close()

    def _perform(self, request: Request) -> bool:
        request.error = self._file.perform(request)
        return True

    queue_read = queue_write = queue_flush = queue_discard = queue_zeroes = queue_status = _perform
