"""The side-car of a log as a file: opened, locked, made, read, written. Everything here blocks.

The lock is that of an image (tapcore.imagelock): two processes do not keep one side-car.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from bitarray import bitarray

from tapcore.driver import OpenFlag
from tapcore.durablefile import sync_folder
from tapcore.errors import ImageError, LogError
from tapcore.formats.imagefile import ImageFile
from writelog.bitmap import Bitmap
from writelog.sidecar_layout import (
    SECTOR,
    SECTOR_BITS,
    SECTORS_OFFSET,
    Record,
    blocks_of_extent,
    decode_sector,
    encode_sector,
    is_of_another_kind,
    newest,
    sector_count,
    slots_of,
)

READ_SECTORS: Final = 2048
"""Read at once."""
PLACE_HINT: Final = "name a place for it, log:,sidecar=PATH, or do without: log:,sidecar=none"

Sectors = Sequence[tuple[int, bytes]]
"""(number, bits) of each, ascending."""


class Sidecar:
    """An open file and the record that is durable in it, None if none is whole, or the file is too short for
    it."""

    file_type: ClassVar[type[ImageFile]] = ImageFile

    def __init__(self, file: ImageFile, record: Record | None) -> None:
        self.path = Path(file.path)
        self.record = record
        self._file = file

    @classmethod
    def open(cls, path: Path) -> Sidecar | None:
        """The side-car at `path`; None if there is no such file. LogError if it is something else, in use, or
        cannot be opened."""
        if not path.exists():
            return None
        try:
            file = cls.file_type.open(str(path), OpenFlag.NONE)
            try:
                slots = slots_of(file.load(0, SECTORS_OFFSET, "the side-car"))
                if is_of_another_kind(slots):
                    raise LogError("is no side-car of a log, or one of a later version", errno=errno.EINVAL,
                                   path=str(path), hint="move it away, or name another: log:,sidecar=PATH")
                record = newest(slots)
                if record is not None and file.size_bytes < record.file_bytes:
                    record = None
                return cls(file, record)
            except BaseException:
                file.close()
                raise
        except ImageError as error:
            raise LogError(f"cannot open the side-car: {error.message}", errno=error.errno, path=str(path),
                           hint=error.hint) from error

    @classmethod
    def create(cls, path: Path, record: Record, sectors: Sectors) -> Sidecar:
        """A new one, durable, with its room claimed, in place of what is at `path`. LogError, and nothing is made,
        if that cannot be done."""
        new = path.with_name(f"{path.name}.new")
        file: ImageFile | None = None
        try:
            new.unlink(missing_ok=True)
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, record.file_bytes)
            finally:
                os.close(fd)
            file = cls.file_type.open(str(new), OpenFlag.NONE)
            sidecar = cls(file, None)
            if code := sidecar.write(record, sectors):
                raise OSError(code, os.strerror(code))
            new.rename(path)
            sync_folder(path.parent)
        except (OSError, ImageError) as error:
            if file is not None:
                file.close()
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            what = error.message if isinstance(error, ImageError) else error.strerror
            raise LogError(f"cannot make the side-car of the log: {what}", errno=error.errno, path=str(path),
                           hint=PLACE_HINT) from error
        file.path = str(path)
        sidecar.path = path
        return sidecar

    def close(self) -> None:
        self._file.close()

    def load(self, dirty: Bitmap) -> int:
        """Mark in `dirty` what the side-car says; returns how many of its sectors were damaged or out of date.
        LogError if it cannot be read."""
        record = self.record
        assert record is not None
        unusable = 0
        last = sector_count(dirty.blocks)
        for start in range(0, last, READ_SECTORS):
            count = min(READ_SECTORS, last - start)
            try:
                data = self._file.load(SECTORS_OFFSET + start * SECTOR.size, count * SECTOR.size, "the side-car")
            except ImageError as error:
                raise LogError(error.message, errno=error.errno, path=error.path, offset=error.offset) from error
            for number in range(start, start + count):
                at = (number - start) * SECTOR.size
                bits = decode_sector(number, data[at : at + SECTOR.size], record)
                first, stop = number * SECTOR_BITS, min((number + 1) * SECTOR_BITS, dirty.blocks)
                if bits is None:
                    unusable += 1
                    dirty.bits[first:stop] = 1
                elif any(bits):
                    found = bitarray(endian="little")
                    found.frombytes(bits)
                    dirty.bits[first:stop] |= found[: stop - first]
        for extent in record.hot:
            first, stop = blocks_of_extent(extent, record)
            dirty.bits[first : min(stop, dirty.blocks)] = 1
        return unusable

    def write(self, record: Record | None, sectors: Sectors) -> int:
        """Make sectors and record durable, in any order; without one, the epoch is that of the last. Returns 0 or
        an errno: then each of them may be in the file or not."""
        newest_record = record or self.record
        assert newest_record is not None
        epoch = newest_record.epoch
        run: list[bytes] = []
        first = 0
        for number, bits in sectors:
            if run and number != first + len(run):
                if code := self._put(SECTORS_OFFSET + first * SECTOR.size, run):
                    return code
                run = []
            if not run:
                first = number
            run.append(encode_sector(number, epoch, bits))
        code = self._put(SECTORS_OFFSET + first * SECTOR.size, run) if run else 0
        if record is not None and not code:
            code = self._put(record.slot, [record.encode()])
        code = code or self._file.sync()
        if record is not None and not code:
            self.record = record
        return code

    def _put(self, offset: int, parts: list[bytes]) -> int:
        data = b"".join(parts)
        return self._file.write([memoryview(data)], offset, len(data))


def remove(path: Path) -> bool:
    """Remove the side-car at `path`; False if there is none. LogError if it is in use or something else."""
    sidecar = Sidecar.open(path)
    if sidecar is None:
        return False
    try:
        path.unlink()
        sync_folder(path.parent)
    except OSError as error:
        raise LogError(f"cannot remove the side-car: {error.strerror}", errno=error.errno,
                       path=str(path)) from error
    finally:
        sidecar.close()
    return True
