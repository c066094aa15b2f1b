"""The file of an image format: of any length, growing, and read as zeroes past its end."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from typing import ClassVar, Final

from tapcore.errors import ImageError, image_error
from tapcore.rawfile import IOV_MAX, RawFile
from tapcore.request import slice_iov

ZEROES: Final = memoryview(mmap.mmap(-1, 1 << 20)).toreadonly()


class ImageFile(RawFile):
    """A RawFile whose size need not be a multiple of a sector. Whatever changes the file goes through a method of
    this class, so that a test can record it."""

    size_unit_bytes: ClassVar[int] = 1

    def read_inline(self, iov: Sequence[memoryview], offset: int, length: int, flags: int) -> bool:
        """One preadv with `flags` of `quick_read_flags`; False if that did not read all."""
        try:
            return os.preadv(self.fd, iov, offset, flags) == length
        except OSError:
            return False

    def write_inline(self, iov: Sequence[memoryview], offset: int) -> int:
        """One pwritev; the number of bytes that were written, 0 if it failed. Not more than IOV_MAX buffers."""
        try:
            return os.pwritev(self.fd, iov, offset)
        except OSError:
            return 0

    def length_now(self) -> int:
        """How long the file is. OSError."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def truncate(self, length: int) -> None:
        """Make the file `length` bytes long (not of a block device). OSError."""
        os.ftruncate(self.fd, length)

    def read_padded(self, iov: Sequence[memoryview], offset: int, length: int) -> int:
        """Read; what is past the end of the file is zeroes. Returns 0 or an errno."""
        done = 0
        while done < length:
            part = iov if not done and len(iov) <= IOV_MAX else slice_iov(iov, done, length - done)[:IOV_MAX]
            try:
                count = os.preadv(self.fd, part, offset + done)
            except OSError as error:
                return error.errno or errno.EIO
            if count == 0:
                fill_zeroes(slice_iov(iov, done, length - done))
                return 0
            done += count
        return 0

    def load(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes, zeroes past the end. ImageError, which names `what`, if they cannot be read."""
        data = bytearray(length)
        code = self.read_padded([memoryview(data)], offset, length)
        if code:
            raise ImageError(f"cannot read {what}: {os.strerror(code)}", errno=code, path=self.path, offset=offset)
        return bytes(data)

    def store(self, offset: int, data: bytes, what: str) -> None:
        """Write `data`. ImageError, which names `what`, if that fails."""
        code = self.write([memoryview(data)], offset, len(data))
        if code:
            raise image_error(OSError(code, os.strerror(code)), self.path, f"write {what}")

    def sync_or_raise(self) -> None:
        """fdatasync. ImageError if that fails."""
        code = self.sync()
        if code:
            raise image_error(OSError(code, os.strerror(code)), self.path, "make the image durable")


def fill_zeroes(iov: Sequence[memoryview]) -> None:
    """Zero the buffers."""
    for view in iov:
        for start in range(0, len(view), len(ZEROES)):
            part = view[start : start + len(ZEROES)]
            part[:] = ZEROES[: len(part)]


def zero_views(length: int) -> list[memoryview]:
    """Read-only zeroes, `length` bytes, in as few buffers as there is memory for."""
    whole, rest = divmod(length, len(ZEROES))
    return [ZEROES] * whole + ([ZEROES[:rest]] if rest else [])
