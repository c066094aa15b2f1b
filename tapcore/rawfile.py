"""A raw file or block device as a disk: opened, locked, and every request done on it by one blocking call.

Used by `sync` in the loop's thread, by `aio` in workers, and by image formats for their files.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final, Self

from tapcore.driver import SECTOR_BYTES, DiskInfo, Feature, OpenFlag
from tapcore.errors import ImageError, image_error
from tapcore.imagelock import lock_image
from tapcore.layout import Layout
from tapcore.request import (
    DISCARD,
    FAST,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    STATUS,
    STATUS_HOLE,
    STATUS_ZERO,
    WRITE,
    Extent,
    Request,
    slice_iov,
)

logger = logging.getLogger(__name__)

IOV_MAX: Final = 1024
"""Buffers that one preadv or pwritev takes."""
MAX_EXTENTS: Final = 4096
"""Extents in one block status."""

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10
TMPFS_MAGIC: Final = 0x01021994
BLKDISCARD: Final = 0x1277
BLKSSZGET: Final = 0x1268

_STATFS = Layout("struct statfs of statfs(2)", "=", "f_type:q :112x", size=120)
_BLOCK_RANGE = Layout("range of BLKDISCARD", "=", "start:Q length:Q", size=16)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)

_ZEROES = memoryview(mmap.mmap(-1, 1 << 20)).toreadonly()

Call = Callable[[int, Sequence[memoryview], int, int], int]
"""os.preadv or os.pwritev."""

_FILE_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFCHR: "a character device", stat.S_IFIFO: "a pipe",
               stat.S_IFSOCK: "a socket"}


class RawFile:
    """An open image. Any thread may call `perform` and what it calls, any number at once.

    `size_bytes` is the size when it was opened; a file that is cut shorter afterwards gives EIO.
    """

    open_flags: ClassVar[int] = 0
    size_unit_bytes: ClassVar[int] = SECTOR_BYTES
    memory_align_bytes = 1
    """What the address and length of each buffer must be a multiple of."""

    def __init__(self, path: str, fd: int, size_bytes: int, *, is_device: bool, read_only: bool) -> None:
        """Takes over `fd` if it returns. ImageError if the file cannot be used in this way."""
        self.path = path
        self.fd = fd
        self.size_bytes = size_bytes
        self.is_device = is_device
        self.read_only = read_only
        self.min_block_bytes = 1
        self._lost_errno = 0
        self._data_run = range(0)
        """Where data was found last, as far as it goes. If a part of it is a hole by now, it is read in vain."""

    @classmethod
    def open(cls, path: str, flags: OpenFlag) -> Self:
        """Open and lock (unless QUERY) `path`. ImageError if it is missing, cannot be opened, is neither file nor
        block device, is in use, or its size is no multiple of a sector."""
        read_only = bool(flags & (OpenFlag.RDONLY | OpenFlag.QUERY))
        mode = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | cls.open_flags
        try:
            kind = stat.S_IFMT(Path(path).stat().st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFBLK):
                raise ImageError(f"is {_FILE_KINDS.get(kind, 'something else')}, not a disk image",
                                 errno=errno.EINVAL, path=path, hint="name a file or a block device")
            fd = os.open(path, mode)
        except OSError as error:
            raise _open_error(error, path, read_only) from error
        try:
            size_bytes = os.lseek(fd, 0, os.SEEK_END)
            if size_bytes % cls.size_unit_bytes:
                raise ImageError(f"its size, {size_bytes} bytes, is not a multiple of {SECTOR_BYTES}",
                                 errno=errno.EINVAL, path=path,
                                 hint=f"round it up with: truncate -s %{SECTOR_BYTES} FILE")
            if not flags & OpenFlag.QUERY:
                lock_image(fd, path, flags)
            return cls(path, fd, size_bytes, is_device=kind == stat.S_IFBLK, read_only=read_only)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the file, and with it release its locks."""
        os.close(self.fd)

    def info(self) -> DiskInfo:
        features = Feature.FLUSH | Feature.DISCARD | Feature.ZEROES | Feature.FAST_ZEROES | Feature.STATUS
        return DiskInfo(self.size_bytes, features, min_block_bytes=self.min_block_bytes, read_only=self.read_only)

    def quick_read_flags(self) -> int | None:
        """The flags of a preadv that never waits for a disk: RWF_NOWAIT, 0 on tmpfs, where none does, or None if
        there are no such flags for this file."""
        try:
            os.preadv(self.fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:
            return 0 if self._is_tmpfs() else None
        return os.RWF_NOWAIT

    def _is_tmpfs(self) -> bool:
        answer = ctypes.create_string_buffer(_STATFS.size)
        return bool(_libc.fstatfs(self.fd, answer) == 0 and _STATFS.unpack(answer.raw)["f_type"] == TMPFS_MAGIC)

    def perform(self, request: Request, start: int = 0) -> int:
        """Do `request`, of a read or write what follows its first `start` bytes. Returns 0 or an errno."""
        op, offset, length, iov = request.op, request.offset, request.length, request.iov
        if start:
            iov, offset, length = slice_iov(iov, start, length - start), offset + start, length - start
        if op == READ:
            return self.read(iov, offset, length)
        if op == FLUSH:
            return self.sync()
        if op == STATUS:
            return self._status(request)
        if self.read_only:
            return errno.EROFS
        if op == WRITE:
            return self.write(iov, offset, length, fua=bool(request.flags & FUA))
        code = self.discard(offset, length) if op == DISCARD else self.zeroes(offset, length, request.flags)
        return code or (self.sync() if request.flags & FUA else 0)

    def read(self, iov: Sequence[memoryview], offset: int, length: int) -> int:
        return transfer(os.preadv, self.fd, iov, offset, length)

    def write(self, iov: Sequence[memoryview], offset: int, length: int, *, fua: bool = False) -> int:
        code = transfer(os.pwritev, self.fd, iov, offset, length, os.RWF_DSYNC if fua else 0)
        if code == errno.EIO and fua and not self.open_flags & os.O_DIRECT:
            self._lose(code)
        return code

    def sync(self) -> int:
        """fdatasync. Once that has failed it fails for good: the kernel forgets the pages that it could not write,
        and the next fdatasync would succeed without them."""
        if not self._lost_errno:
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                self._lose(error.errno or errno.EIO)
        return self._lost_errno

    def _lose(self, code: int) -> None:
        self._lost_errno = code
        logger.error("%s: %s while data was made durable: some may be lost, and no flush will succeed until the "
                     "image is opened again", self.path, os.strerror(code))

    def discard(self, offset: int, length: int) -> int:
        """Give the space back, where that is possible; elsewhere nothing happens. What is read there afterwards is
        zeroes, the former data, or for a device whatever it gives."""
        try:
            if self.is_device:
                self._discard_blocks(offset, length)
            else:
                fallocate(self.fd, FALLOC_FL_PUNCH_HOLE, offset, length)
        except OSError as error:
            return 0 if error.errno == errno.EOPNOTSUPP else error.errno or errno.EIO
        finally:
            self._data_run = range(0)
        return 0

    def _discard_blocks(self, offset: int, length: int) -> None:
        block_bytes = logical_block_bytes(self.fd)
        first = -(-offset // block_bytes) * block_bytes
        last = (offset + length) // block_bytes * block_bytes
        if first < last:
            fcntl.ioctl(self.fd, BLKDISCARD, _BLOCK_RANGE.pack(start=first, length=last - first))

    def zeroes(self, offset: int, length: int, flags: int) -> int:
        """Zero a range, by what is quickest: a hole (unless NO_HOLE), unwritten blocks, or (unless FAST) zeroes.

        On a block device the kernel makes these a write-zeroes that unmaps, and one that does not; the latter may
        be as slow as writing, so FAST does without it.
        """
        modes = [FALLOC_FL_ZERO_RANGE] if flags & NO_HOLE else [FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE]
        if self.is_device and flags & FAST:
            modes.remove(FALLOC_FL_ZERO_RANGE)
        for mode in modes:
            try:
                fallocate(self.fd, mode, offset, length)
                self._data_run = range(0)
                return 0
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    return error.errno or errno.EIO
        if flags & FAST:
            return errno.ENOTSUP
        whole, rest = divmod(length, len(_ZEROES))
        return self.write([_ZEROES] * whole + [_ZEROES[:rest]], offset, length)

    def _status(self, request: Request) -> int:
        try:
            request.extents = self.status(request.offset, request.length)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def status(self, offset: int, length: int) -> list[Extent]:
        """Extents from `offset` on, at most MAX_EXTENTS; a hole, or what was allocated but never written, is
        HOLE|ZERO. OSError if the file system fails.

        To find the end of a run of data, tmpfs walks through all of its pages: so that is done once for a run.
        """
        if self.is_device:
            return [(length, 0)]
        end = offset + length
        extents: list[Extent] = []
        while offset < end and len(extents) < MAX_EXTENTS:
            run = self._data_run
            if offset not in run:
                run = self._find_data(offset)
            data, hole = min(max(run.start, offset), end), min(run.stop, end)
            if data > offset:
                extents.append((data - offset, STATUS_HOLE | STATUS_ZERO))
            if hole > data:
                extents.append((hole - data, 0))
            offset = hole
        return extents

    def _find_data(self, offset: int) -> range:
        """The first run of data at or after `offset`; empty, at the end of the disk, if there is none."""
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
            run = range(data, os.lseek(self.fd, data, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return range(self.size_bytes, self.size_bytes)
            raise
        self._data_run = run
        return run


def _open_error(error: OSError, path: str, read_only: bool) -> ImageError:
    failure = image_error(error, path, "open the image" if read_only else "open the image for writing")
    failure.hint = {
        errno.ENOENT: "check the path; a new image is made with: truncate -s 10G FILE",
        errno.EACCES: f"user {os.geteuid()} needs the right to read it and, unless read-only, to write it",
        errno.EPERM: "it may be immutable (lsattr); open the disk read-only",
        errno.EROFS: "open the disk read-only",
        errno.EINVAL: "its file system may have no O_DIRECT: leave out the option direct",
    }.get(failure.errno)
    return failure


def transfer(call: Call, fd: int, iov: Sequence[memoryview], offset: int, length: int, flags: int = 0) -> int:
    """All `length` bytes of `iov` by os.preadv or os.pwritev, in as many calls as it takes. Returns 0 or an errno;
    EIO at the end of the file."""
    done = 0
    while done < length:
        part = iov if not done and len(iov) <= IOV_MAX else slice_iov(iov, done, length - done)[:IOV_MAX]
        try:
            count = call(fd, part, offset + done, flags)
        except OSError as error:
            return error.errno or errno.EIO
        if count == 0:
            return errno.EIO
        done += count
    return 0


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) that keeps the file's size, tried again when a signal came in between. OSError."""
    while _libc.fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def logical_block_bytes(fd: int) -> int:
    """The unit in which a block device is addressed. OSError."""
    return int.from_bytes(fcntl.ioctl(fd, BLKSSZGET, bytes(4)), sys.byteorder)
