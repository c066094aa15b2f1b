"""vmdk: streamOptimized images, written and read from front to back, as into and from a pipe.

    header | descriptor | grain, grain … table | grain … table | directory | footer | end of stream

A grain is a marker (its first sector, its compressed length) and what deflate made of it, padded to a sector;
tables, directory and footer have a sector of marker before them. What holds only zeroes is left out.

    with StreamImage("/vm/disk.vmdk", size_bytes) as image:       a file
        image.write(offset, data)                                 each offset behind the one before

    encoder = StreamEncoder(size_bytes, descriptor)               bytes, for wherever they go
    out(encoder.start()); out(encoder.write(offset, data)); out(encoder.finish())

    decoder = StreamDecoder("name")                               the way back
    for offset, data in decoder.feed(received): …
    decoder.finish()

Specification: VMware, Virtual Disk Format 5.0 (https://www.vmware.com/support/developer/vddk/vmdk_50_technote.pdf).
"""

from __future__ import annotations

import errno
import os
import secrets
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Self

from tapcore.driver import SECTOR_BYTES
from tapcore.errors import ImageError, UsageError, image_error
from tapcore.formats.vmdk.descriptor import NO_PARENT_CID, ExtentLine, parse_descriptor, render_descriptor
from tapcore.formats.vmdk.layout import (
    COMPRESSION_DEFLATE,
    FLAG_COMPRESSED,
    FLAG_LINE_ENDS,
    FLAG_MARKERS,
    GD_AT_END,
    GRAIN_MARKER,
    GTE_BYTES,
    GTES_PER_GT,
    HEADER,
    LINE_ENDS,
    MAGIC,
    MARKER,
    MARKER_EOS,
    MARKER_FOOTER,
    MARKER_GD,
    MARKER_GT,
    MAX_SECTORS,
    Header,
    Sectors,
    parse_stream_header,
)
from tapcore.formats.vmdk.mapping import to_little_endian, unpack_grain
from tapcore.layout import Buffer

GRAIN_BYTES: Final = 64 << 10
OVERHEAD_SECTORS: Final = 128
MAX_DESCRIPTOR_BYTES: Final = (OVERHEAD_SECTORS - 1) * SECTOR_BYTES
LEVEL: Final = 6

_REACH_BYTES: Final = GTES_PER_GT * GRAIN_BYTES
_ZEROES: Final = bytes(GRAIN_BYTES)


def stream_descriptor(name: str, size_bytes: int, adapter_type: str = "ide") -> bytes:
    """The descriptor of a stream that will be in a file called `name`."""
    line = ExtentLine("RW", Sectors(size_bytes // SECTOR_BYTES), "SPARSE", name)
    return render_descriptor(cid=secrets.randbelow(NO_PARENT_CID), create_type="streamOptimized", extents=[line],
                             size_bytes=size_bytes, adapter_type=adapter_type)


class StreamEncoder:
    """Makes a stream of a disk of `size_bytes`. What its methods return follows each other in the stream."""

    def __init__(self, size_bytes: int, descriptor: bytes, level: int = LEVEL) -> None:
        """UsageError for what no stream can be."""
        if size_bytes % SECTOR_BYTES or not 0 < size_bytes <= MAX_SECTORS * SECTOR_BYTES:
            raise UsageError(f"size {size_bytes} is not a multiple of 512 bytes, is 0, or absurd")
        if len(descriptor) > MAX_DESCRIPTOR_BYTES:
            raise UsageError(f"a descriptor of {len(descriptor)} bytes is too long for a stream")
        self.size_bytes = size_bytes
        self._descriptor = descriptor
        self._level = level
        self._sector = 0
        self._grain = bytearray(GRAIN_BYTES)
        self._grain_at = 0
        """Of the disk: where the grain begins that is being filled."""
        self._position = 0
        """Of the disk: what is before it cannot be written any more."""
        self._table = array("I", bytes(GTES_PER_GT * GTE_BYTES))
        self._directory = array("I", bytes(-(-size_bytes // _REACH_BYTES) * GTE_BYTES))

    def start(self) -> bytes:
        """What a stream begins with; `write` and `finish` see to it if nobody called this."""
        if self._sector:
            return b""
        self._sector = OVERHEAD_SECTORS
        text = self._descriptor.ljust(MAX_DESCRIPTOR_BYTES, b"\0")
        return self._header(GD_AT_END) + text

    def _header(self, gd_offset: int) -> bytes:
        return HEADER.pack(
            magic=MAGIC, version=3, flags=FLAG_LINE_ENDS | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity=self.size_bytes // SECTOR_BYTES, grainSize=GRAIN_BYTES // SECTOR_BYTES, descriptorOffset=1,
            descriptorSize=OVERHEAD_SECTORS - 1, numGTEsPerGT=GTES_PER_GT, rgdOffset=0, gdOffset=gd_offset,
            overHead=OVERHEAD_SECTORS, uncleanShutdown=0, lineEnds=LINE_ENDS,
            compressAlgorithm=COMPRESSION_DEFLATE)

    def write(self, offset: int, data: Buffer) -> bytes:
        """The disk has `data` at `offset`. UsageError if that is before the end of what was written."""
        view = memoryview(data).cast("B")
        if offset < self._position or offset + len(view) > self.size_bytes:
            raise UsageError(f"a stream is written from front to back: {len(view)} bytes at {offset} are before "
                             f"{self._position}, or past the end, {self.size_bytes}")
        out = [self.start()]
        while len(view):
            start = offset & -GRAIN_BYTES
            if start != self._grain_at:
                out.append(self._end_grain())
                if start // _REACH_BYTES != self._grain_at // _REACH_BYTES:
                    out.append(self._end_table())
                self._grain_at = start
            part = view[: GRAIN_BYTES - (offset - start)]
            self._grain[offset - start : offset - start + len(part)] = part
            offset += len(part)
            view = view[len(part) :]
        self._position = offset
        return b"".join(out)

    def _end_grain(self) -> bytes:
        """ImageError if the stream has become too long."""
        if self._grain == _ZEROES:
            return b""
        packed = zlib.compress(self._grain, self._level)
        self._grain[:] = _ZEROES
        self._table[self._grain_at % _REACH_BYTES // GRAIN_BYTES] = self._sector
        return self._padded(GRAIN_MARKER.pack(lba=self._grain_at // SECTOR_BYTES, size=len(packed)) + packed)

    def _end_table(self) -> bytes:
        if not any(self._table):
            return b""
        self._directory[self._grain_at // _REACH_BYTES] = self._sector + 1
        out = self._metadata(MARKER_GT, to_little_endian(self._table))
        self._table = array("I", bytes(GTES_PER_GT * GTE_BYTES))
        return out

    def _metadata(self, kind: int, data: bytes) -> bytes:
        return self._padded(MARKER.pack(val=-(-len(data) // SECTOR_BYTES), size=0, type=kind) + data)

    def _padded(self, data: bytes) -> bytes:
        sectors = -(-len(data) // SECTOR_BYTES)
        self._sector += sectors
        if self._sector >= 1 << 32:
            raise ImageError("the stream is longer than 2 TiB, the most that its tables can say",
                             errno=errno.EFBIG)
        return data.ljust(sectors * SECTOR_BYTES, b"\0")

    def finish(self) -> bytes:
        """What a stream ends with."""
        out = [self.start(), self._end_grain(), self._end_table()]
        gd_offset = self._sector + 1
        out.append(self._metadata(MARKER_GD, to_little_endian(self._directory)))
        out.append(self._metadata(MARKER_FOOTER, self._header(gd_offset)))
        out.append(self._metadata(MARKER_EOS, b""))
        self._position = self.size_bytes
        return b"".join(out)


class StreamImage:
    """A stream that is being written into the new file `path`. As a context manager it finishes the file at the
    end, and leaves none after an exception."""

    def __init__(self, path: str, size_bytes: int, *, adapter_type: str = "ide", level: int = LEVEL) -> None:
        """UsageError for what no stream can be; ImageError if the file exists or cannot be made."""
        name = Path(path).name
        if '"' in name or not name.isprintable():
            raise UsageError(f"the name {name!r} cannot stand in a descriptor", hint="choose another")
        self.path = path
        self.unit_bytes = GRAIN_BYTES
        self._encoder = StreamEncoder(size_bytes, stream_descriptor(name, size_bytes, adapter_type), level)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            failure = image_error(error, path, "create the image")
            if error.errno == errno.EEXIST:
                failure.hint = "remove it first if it is not needed"
            raise failure from error

    def write(self, offset: int, data: Buffer) -> None:
        """Offsets go up; what is left out reads as zeroes. UsageError, ImageError."""
        self._put(self._encoder.write(offset, data))

    def finish(self) -> None:
        """The image is whole and durable. ImageError."""
        self._put(self._encoder.finish())
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise image_error(error, self.path, "make the image durable") from error
        os.close(self._fd)

    def abandon(self) -> None:
        """Remove what there is of it."""
        os.close(self._fd)
        Path(self.path).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abandon()
            return
        try:
            self.finish()
        except BaseException:
            self.abandon()
            raise

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while len(view):
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise image_error(error, self.path, "write the image") from error


class StreamDecoder:
    """Reads a stream that comes in pieces of any length; `name` is for errors. Does not need the tables: each
    grain's marker says where it belongs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.header: Header | None = None
        """Known once it was received, as is what follows."""
        self.descriptor = b""
        self.ended = False
        self._has_footer = False
        self._buffer = bytearray()
        self._at = 0
        """Of the stream: where the buffer begins."""
        self._skip = 0
        self._next_offset = 0

    @property
    def size_bytes(self) -> int | None:
        return self.header.size_bytes if self.header else None

    def feed(self, data: Buffer) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of each grain that is whole with `data`, in the order of the disk. ImageError for what no
        stream is."""
        self._buffer += data
        while not self.ended:
            if self._skip:
                taken = min(self._skip, len(self._buffer))
                self._take(taken)
                self._skip -= taken
                if self._skip:
                    return
            if self.header is None and not self._start():
                return
            if len(self._buffer) < SECTOR_BYTES:
                return
            marker = MARKER.unpack(self._buffer)
            if not marker["size"]:
                self._metadata(marker["val"], marker["type"])
                continue
            grain = self._grain(marker["size"])
            if grain is None:
                return
            yield grain

    def finish(self) -> None:
        """No more comes. ImageError if that is too early."""
        if self.header is None or self._skip or (self._has_footer and not self.ended) or (
                not self.ended and self._buffer):
            self._refuse("ends too early: it was cut short")

    def _take(self, length: int) -> bytes:
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._at += length
        return data

    def _refuse(self, message: str) -> NoReturn:
        raise ImageError(message, errno=errno.EINVAL, path=self.name, offset=self._at)

    def _start(self) -> bool:
        """Header and descriptor; False if they are not there yet."""
        if len(self._buffer) < HEADER.size:
            return False
        header, self._has_footer = parse_stream_header(self.name, bytes(self._buffer[: HEADER.size]))
        if len(self._buffer) < header.metadata_bytes and (
                len(self._buffer) < header.descriptor_offset + header.descriptor_bytes):
            return False
        text = self._buffer[header.descriptor_offset :][: header.descriptor_bytes]
        parse_descriptor(self.name, bytes(text))
        self.descriptor = bytes(text).rstrip(b"\0")
        self.header = header
        self._skip = header.metadata_bytes
        taken = min(self._skip, len(self._buffer))
        self._take(taken)
        self._skip -= taken
        return not self._skip

    def _metadata(self, sectors: int, kind: int) -> None:
        assert self.header is not None
        directory = -(-self.header.directory_entries * GTE_BYTES // SECTOR_BYTES)
        lengths = {MARKER_EOS: 0, MARKER_GT: self.header.table_bytes // SECTOR_BYTES, MARKER_GD: directory,
                   MARKER_FOOTER: 1}
        if lengths.get(kind) != sectors:
            self._refuse(f"has a marker of the type {kind} for {sectors} sectors, which is not possible")
        self._take(SECTOR_BYTES)
        self._skip = sectors * SECTOR_BYTES
        self.ended = kind == MARKER_EOS

    def _grain(self, size: int) -> tuple[int, bytes] | None:
        header = self.header
        assert header is not None
        if size > header.max_packed_bytes:
            self._refuse(f"has a grain that takes {size} bytes, more than is possible")
        length = -(-(GRAIN_MARKER.size + size) // SECTOR_BYTES) * SECTOR_BYTES
        if len(self._buffer) < length:
            return None
        try:
            lba, data = unpack_grain(header, bytes(self._buffer[:length]))
        except ImageError as error:
            self._refuse(error.message)
        assert lba is not None
        offset = lba * SECTOR_BYTES
        if offset % header.grain_bytes or offset >= header.size_bytes or offset < self._next_offset:
            self._refuse(f"has a grain for sector {lba}, which no grain begins at, or one before the last grain's")
        self._take(length)
        self._next_offset = offset + header.grain_bytes
        return offset, data[: header.size_bytes - offset]
