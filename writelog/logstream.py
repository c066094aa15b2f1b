"""Changed extents of a disk as a stream of bytes: a file or a pipe, the start of an incremental backup.

    header      64 bytes: magic "WLOGDATA", u32 version 1, u32 granularity, u64 size of the disk, u64 generation
                of the log, zeroes
    records     24 bytes: u64 offset, u64 length, u32 CRC-32 of the data (as zlib's), zeroes; then `length` bytes
    end         a record of length 0, whose offset is the number of records before it

Integers are little-endian, offsets and lengths are bytes. A stream without its end was cut off: nothing in it may
be taken for complete. Extents do not overlap and come in order.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from tapcore.errors import LogError
from tapcore.layout import Layout

HEADER = Layout(
    "log stream header", "<", "magic:8s version:I granularity_bytes:I size_bytes:Q generation:Q :32x", size=64)
RECORD = Layout("log stream record", "<", "offset:Q length:Q crc:I :4x", size=24)
MAGIC = b"WLOGDATA"
VERSION = 1
MAX_RECORD_BYTES = 16 << 20
"""The longest data of one record that a reader accepts."""


@dataclass(frozen=True)
class StreamInfo:
    """What the header says."""

    granularity_bytes: int
    size_bytes: int
    generation: int


def write_stream(out: BinaryIO, info: StreamInfo, pieces: Iterable[tuple[int, memoryview]]) -> int:
    """Write the whole stream; the number of bytes of data in it."""
    out.write(HEADER.pack(magic=MAGIC, version=VERSION, **vars(info)))
    records = total = 0
    for offset, data in pieces:
        out.write(RECORD.pack(offset=offset, length=len(data), crc=zlib.crc32(data)))
        out.write(data)
        records += 1
        total += len(data)
    out.write(RECORD.pack(offset=records, length=0, crc=0))
    return total


def read_info(source: BinaryIO) -> StreamInfo:
    """The header; LogError if it is none."""
    header = HEADER.unpack(_read_exactly(source, HEADER.size))
    if header.pop("magic") != MAGIC:
        raise LogError("this is no stream of changed extents", hint="writelog-client read makes one")
    if (version := header.pop("version")) != VERSION:
        raise LogError(f"a stream of version {version}", hint=f"this program knows version {VERSION}")
    return StreamInfo(**header)


def read_records(source: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The (offset, data) of a stream, after `read_info`; LogError if it is damaged or cut off."""
    records = 0
    while True:
        record = RECORD.unpack(_read_exactly(source, RECORD.size))
        offset, length = record["offset"], record["length"]
        if length == 0:
            if offset != records:
                raise LogError(f"the stream's end counts {offset} records, but {records} were read")
            return
        if length > MAX_RECORD_BYTES:
            raise LogError(f"a record of {length} bytes in the stream: it is damaged", offset=offset)
        data = _read_exactly(source, length)
        if zlib.crc32(data) != record["crc"]:
            raise LogError("checksum of a record in the stream is wrong", offset=offset)
        records += 1
        yield offset, data


def _read_exactly(source: BinaryIO, length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        raise LogError("the stream ends early: it was cut off, and is not complete")
    return data
