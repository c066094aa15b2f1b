"""The redo journal of a replica as a file: what was received, in order, and is not in the image yet.

    /vm/copy.img           the image: the disk as it was at one instant, the epoch
    /vm/copy.img.redo      header, then records without gaps

    header                 which epoch it begins at
    DATA offset length     and the data
    ZERO offset length
    COMMIT epoch at        all before it makes the disk of a later instant: that epoch. The last record there is

A record's checksum is over that of the record before (at first, of the header), itself and its data. So the
journal ends where that chain breaks: neither a torn record nor an old one behind it is taken for one of them.

Everything here blocks; one thread at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
from array import array
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, ClassVar, Final

import xxhash

from tapcore.driver import OpenFlag
from tapcore.durablefile import remove_file, sync_folder
from tapcore.errors import ImageError, image_error
from tapcore.formats.imagefile import ImageFile
from tapcore.layout import Layout
from writelog.wire import MAX_DATA_BYTES, MAX_ZERO_BYTES

MAGIC: Final = b"wrlgredo"
VERSION: Final = 1
READ_BYTES: Final = 1 << 20
"""Read ahead."""
MAX_RECORDS: Final = 4 << 20
"""Each costs some 60 bytes of memory."""
INDEX_SHIFT: Final = 18

HEADER: Final = Layout("redo header", "<", "magic:8s version:I :4x epoch:Q :8x", size=32)
RECORD: Final = Layout("redo record", "<", "checksum:16s kind:I :4x offset:Q length:Q", size=40)
_CHECKSUM_BYTES: Final = 16


class Kind(IntEnum):
    DATA = 1
    ZERO = 2
    COMMIT = 3


@dataclass(frozen=True, slots=True)
class Commit:
    """`at_ms`: when the disk looked so, by the primary's clock."""

    epoch: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Extent:
    """`data` None: zeroes."""

    offset: int
    length: int
    data: Sequence[memoryview] | None


class Index:
    """Where in the journal the newest version of each range is."""

    def __init__(self) -> None:
        self._offsets = array("Q")
        self._lengths = array("Q")
        self._places = array("Q")
        self._chunks: dict[int, list[int]] = {}
        """The extents in each chunk, by number, the newest last."""

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, offset: int, length: int, place: int) -> None:
        """Its data is at `place`; 0: it is zeroes."""
        number, end = len(self._offsets), offset + length
        self._offsets.append(offset)
        self._lengths.append(length)
        self._places.append(place)
        for chunk in range(offset >> INDEX_SHIFT, ((end - 1) >> INDEX_SHIFT) + 1):
            known = self._chunks.get(chunk)
            if known is None:
                self._chunks[chunk] = [number]
                continue
            start, stop = max(offset, chunk << INDEX_SHIFT), min(end, (chunk + 1) << INDEX_SHIFT)
            known[:] = [old for old in known if not self._is_inside(old, chunk, start, stop)]
            known.append(number)

    def _is_inside(self, number: int, chunk: int, start: int, stop: int) -> bool:
        offset = max(self._offsets[number], chunk << INDEX_SHIFT)
        end = min(self._offsets[number] + self._lengths[number], (chunk + 1) << INDEX_SHIFT)
        return start <= offset and end <= stop

    def over(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(offset, length, place) of what is to be laid over that range, in this order, cut to it."""
        end = offset + length
        numbers: set[int] = set()
        for chunk in range(offset >> INDEX_SHIFT, ((end - 1) >> INDEX_SHIFT) + 1):
            numbers.update(self._chunks.get(chunk, ()))
        found = []
        for number in sorted(numbers):
            first, place = self._offsets[number], self._places[number]
            start, stop = max(offset, first), min(end, first + self._lengths[number])
            if start < stop:
                found.append((start, stop - start, place and place + start - first))
        return found


class RedoFile:
    """An open journal; `end` is where its records end, `commit` the last of them if it is one."""

    file_type: ClassVar[type[ImageFile]] = ImageFile

    def __init__(self, file: ImageFile, epoch: int) -> None:
        self.path = Path(file.path)
        self._file = file
        self._failed = 0
        """The errno of a sync that failed: nobody knows what of the file is durable any more."""
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        header = _header(epoch)
        self.epoch = epoch
        self.end = HEADER.size
        self.commit: Commit | None = None
        self.index = Index()
        self._chain = self._seed = xxhash.xxh3_128_digest(header)

    @classmethod
    def create(cls, path: Path, epoch: int) -> RedoFile:
        """An empty one, durable, in place of what is at `path`. ImageError, and nothing is made, if that cannot be
        done."""
        new = path.with_name(f"{path.name}.new")
        file: ImageFile | None = None
        try:
            new.unlink(missing_ok=True)
            os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            file = cls.file_type.open(str(new), OpenFlag.NONE)
            file.store(0, _header(epoch), "the redo journal")
            file.sync_or_raise()
            new.rename(path)
            sync_folder(path.parent)
        except (OSError, ImageError) as error:
            if file is not None:
                file.close()
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            if isinstance(error, ImageError):
                raise
            raise image_error(error, str(path), "make the redo journal") from error
        file.path = str(path)
        return cls(file, epoch)

    @classmethod
    def open(cls, path: Path) -> RedoFile | None:
        """The journal at `path`, with what follows its last whole record cut off; None if there is none, or not
        even a header. ImageError if it cannot be read, or is something else."""
        if not path.exists():
            return None
        file = cls.file_type.open(str(path), OpenFlag.NONE)
        try:
            header = file.load(0, HEADER.size, "the redo journal")
            fields = HEADER.unpack(header)
            if header.strip(b"\0") and (fields["magic"] != MAGIC or fields["version"] != VERSION):
                raise ImageError("is no redo journal, or one of a later version", errno=errno.EINVAL,
                                 path=str(path), hint="move it away, or name another place with --journal")
            if not any(header):
                file.close()
                return None
            redo = cls(file, fields["epoch"])
            redo._scan()
            return redo
        except BaseException:
            file.close()
            raise

    def _scan(self) -> None:
        try:
            for _ in self._records(self._file.length_now(), remember=True):
                if self.commit is not None:
                    break
            if self._file.length_now() != self.end:
                self._file.truncate(self.end)
                self._file.sync_or_raise()
        except OSError as error:
            raise image_error(error, str(self.path), "read the redo journal") from error

    def _records(self, end: int, remember: bool = False) -> Generator[Extent]:
        """What the journal has before the byte `end`, as far as its records are whole."""
        chain, place = self._seed, HEADER.size
        with os.fdopen(os.dup(self._file.fd), "rb", buffering=READ_BYTES) as reader:
            reader.seek(place)
            while (found := _read_record(reader, chain, end - place)) is not None:
                chain, kind, offset, length, data = found
                place += RECORD.size + len(data)
                if remember:
                    self._chain, self.end = chain, place
                    if kind == Kind.COMMIT:
                        self.commit = Commit(offset, length)
                    else:
                        self.index.add(offset, length, place - len(data) if kind == Kind.DATA else 0)
                yield Extent(offset, length if kind != Kind.COMMIT else 0,
                             [memoryview(data)] if kind == Kind.DATA else None)

    def extents(self) -> Generator[Extent]:
        """All that the journal holds, in order. ImageError if it is damaged by now, OSError."""
        count = 0
        for extent in self._records(self.end):
            if extent.length:
                count += 1
                yield extent
        if count != len(self.index):
            raise ImageError("the redo journal is damaged", errno=errno.EUCLEAN, path=str(self.path),
                             hint="a full copy (writelog-sync --overwrite) makes the replica good again")

    # Writing

    def append(self, extents: Sequence[Extent]) -> tuple[int, list[int]]:
        """Write them behind the last one: 0 and the place of each one's data; or an errno, and then none of them
        is in the journal. Not durable before `sync`."""
        chain, place = self._chain, self.end
        iov: list[memoryview] = []
        places = []
        for extent in extents:
            kind = Kind.ZERO if extent.data is None else Kind.DATA
            chain, head = _encode(chain, kind, extent.offset, extent.length, extent.data or ())
            iov += [memoryview(head), *(extent.data or ())]
            place += RECORD.size
            places.append(0 if extent.data is None else place)
            place += extent.length if extent.data is not None else 0
        code = self._put(iov, place, chain)
        return code, [] if code else places

    def append_commit(self, commit: Commit) -> int:
        """The journal is complete, durably: 0 or an errno."""
        chain, head = _encode(self._chain, Kind.COMMIT, commit.epoch, commit.at_ms, ())
        code = self._put([memoryview(head)], self.end + RECORD.size, chain) or self.sync()
        if not code:
            self.commit = commit
        return code

    def _put(self, iov: Sequence[memoryview], end: int, chain: bytes) -> int:
        assert self.commit is None
        if self._failed:
            return self._failed
        code = self._file.write(iov, self.end, end - self.end)
        if code:
            with contextlib.suppress(OSError):
                self._file.truncate(self.end)
            return code
        self._chain, self.end = chain, end
        return 0

    def sync(self) -> int:
        """Make all of it durable: 0 or an errno. After one that failed nothing is written, and nothing durable,
        until the file is opened again: the system may have dropped what it could not write."""
        self._failed = self._failed or self._file.sync()
        return self._failed

    def reset(self, epoch: int) -> None:
        """Empty it, durably: from now on it begins at `epoch`. ImageError, OSError."""
        self._begin(epoch)
        self._file.store(0, _header(epoch), "the redo journal")
        self._file.truncate(HEADER.size)
        self._file.sync_or_raise()

    def read(self, place: int, views: Sequence[memoryview], length: int) -> int:
        """Fill `views` with data from `place` on: 0 or an errno."""
        return self._file.read_padded(views, place, length)

    def free_bytes(self) -> int:
        """How much more the file system has room for. OSError."""
        status = os.fstatvfs(self._file.fd)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Close and remove it, durably. ImageError if that cannot be done."""
        self._file.close()
        try:
            remove_file(self.path)
        except OSError as error:
            raise image_error(error, str(self.path), "remove the redo journal") from error


def look(path: Path) -> tuple[int, int, bool]:
    """Of a journal that another process may have: the epoch that it begins at, how much it holds, and whether it
    looks complete, so that it is being applied or has to be. Zeroes if there is none."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            end = file.seek(0, os.SEEK_END)
            if len(header) < HEADER.size or end < HEADER.size + RECORD.size:
                return 0, 0, False
            file.seek(end - RECORD.size)
            last = RECORD.unpack(file.read(RECORD.size).ljust(RECORD.size, b"\0"))
    except OSError:
        return 0, 0, False
    epoch = HEADER.unpack(header)["epoch"]
    return epoch, end - HEADER.size, last["kind"] == Kind.COMMIT and last["offset"] == epoch + 1


def _header(epoch: int) -> bytes:
    return HEADER.pack(magic=MAGIC, version=VERSION, epoch=epoch)


def _encode(chain: bytes, kind: Kind, offset: int, length: int, data: Sequence[memoryview]) -> tuple[bytes, bytes]:
    """The record's checksum, and the record without its data."""
    rest = RECORD.struct.pack(b"", kind, offset, length)[_CHECKSUM_BYTES:]
    content = xxhash.xxh3_128(chain + rest)
    for view in data:
        content.update(view)
    checksum = content.digest()
    return checksum, checksum + rest


def _read_record(reader: BinaryIO, chain: bytes, left_bytes: int) -> tuple[bytes, int, int, int, bytes] | None:
    """(checksum, kind, offset, length, data) of the next record that is whole; None if there is none."""
    if left_bytes < RECORD.size:
        return None
    head = reader.read(RECORD.size)
    if len(head) < RECORD.size:
        return None
    checksum, kind, offset, length = RECORD.struct.unpack(head)
    data = b""
    if kind == Kind.DATA:
        if not 0 < length <= min(MAX_DATA_BYTES, left_bytes - RECORD.size):
            return None
        data = reader.read(length)
    elif kind == Kind.ZERO and not 0 < length <= MAX_ZERO_BYTES:
        return None
    content = xxhash.xxh3_128(chain + head[_CHECKSUM_BYTES:])
    content.update(data)
    return (checksum, kind, offset, length, data) if content.digest() == checksum else None
