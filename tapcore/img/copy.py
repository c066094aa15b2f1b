"""From one chain to another, with many requests in flight, leaving out what is zero.

    walk ─▶ DATA  read ─▶ runs of data   ─▶ write
                     └──▶ runs of zeroes ─▶ nothing if the target reads as zeroes there, else write-zeroes
         └▶ ZERO  as a run of zeroes
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tapcore.driver import DiskInfo, Driver, Feature
from tapcore.formats.imagefile import zero_views
from tapcore.img.progress import Progress
from tapcore.img.session import Batch, Session, Steps, Task, ended_well
from tapcore.img.walk import DATA, PIECE_BYTES, SKIP, Walk
from tapcore.request import BACKGROUND, FLUSH, READ, WRITE, ZEROES, Request

TASKS: Final = 8
MIN_GRANULE_BYTES: Final = 4096
MAX_GRANULE_BYTES: Final = 2 << 20

_ZERO: Final = bytearray(MAX_GRANULE_BYTES)
"""A bytearray compares itself with a memoryview by memcmp, bytes and memoryviews do not."""


@dataclass(frozen=True)
class Disk:
    """The end of a copy: the driver, and the name that errors give it."""

    driver: Driver
    name: str


def granule_of(info: DiskInfo) -> int:
    """The unit in which a target is written: zeroes in smaller ones save nothing there."""
    return min(max(info.preferred_block_bytes, MIN_GRANULE_BYTES), MAX_GRANULE_BYTES)


def piece_of(granule_bytes: int) -> int:
    """The longest read for a target with this granule."""
    return max(granule_bytes, PIECE_BYTES)


def new_buffer(length: int) -> memoryview:
    """Memory at the start of a page."""
    return memoryview(mmap.mmap(-1, length))


def is_zero(view: memoryview) -> bool:
    for start in range(0, len(view), MAX_GRANULE_BYTES):
        part = view[start : start + MAX_GRANULE_BYTES]
        if (_ZERO if len(part) == MAX_GRANULE_BYTES else _ZERO[: len(part)]) != part:
            return False
    return True


def runs(view: memoryview, granule_bytes: int) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, is zero) of the runs of granules of which all or none are zero, the first at 0."""
    zero = _ZERO[:granule_bytes]
    length = len(view)
    start, kind = 0, False
    for at in range(0, length, granule_bytes):
        part = view[at : at + granule_bytes]
        same = zero == part if len(part) == granule_bytes else is_zero(part)
        if same != kind:
            if at > start:
                yield start, at, kind
            start, kind = at, same
    if length > start:
        yield start, length, kind


def zero_out(disk: Disk, offset: int, length: int) -> Steps[None]:
    """Make a range read as zeroes, as a hole where the chain can."""
    request = Request(ZEROES, offset, length, flags=BACKGROUND)
    request.error = errno.EOPNOTSUPP
    if disk.driver.info.features & Feature.ZEROES:
        yield [(disk.driver, request)]
    if request.error in (errno.EOPNOTSUPP, errno.ENOTSUP):
        for start in range(0, length, PIECE_BYTES):
            part = min(PIECE_BYTES, length - start)
            request = Request(WRITE, offset + start, part, zero_views(part), BACKGROUND)
            yield [(disk.driver, request)]
            ended_well(request, disk.name)
    ended_well(request, disk.name)


def flush(disk: Disk) -> Task:
    """What was written is durable."""
    if disk.driver.info.features & Feature.FLUSH:
        request = Request(FLUSH)
        yield [(disk.driver, request)]
        ended_well(request, disk.name)


def copy(
    session: Session, source: Disk, target: Disk, walk: Walk, progress: Progress, *,
    granule_bytes: int, reads_zero: bool = False,
) -> None:
    """Copy the pieces of `walk`, which is over `source`, and flush. `reads_zero`: where nothing was written yet
    the target reads as zeroes. ImageError; then an unknown part is copied."""

    def task(buffer: memoryview) -> Task:
        while (piece := (yield from walk.next())) is not None:
            if piece.kind == SKIP:
                continue
            if piece.kind == DATA:
                data = buffer[: piece.length]
                request = Request(READ, piece.offset, piece.length, [data], BACKGROUND)
                yield [(source.driver, request)]
                ended_well(request, source.name)
                yield from store(target, piece.offset, data, granule_bytes, reads_zero=reads_zero)
                progress.advance(piece.length)
            elif not reads_zero:
                yield from zero_out(target, piece.offset, piece.length)

    piece_bytes = piece_of(granule_bytes)
    session.run(task(new_buffer(piece_bytes)) for _ in range(TASKS))
    session.run([flush(target)])


def read_in_order(
    session: Session, source: Disk, walk: Walk, piece_bytes: int
) -> Iterator[tuple[int, memoryview]]:
    """(offset, data) of the DATA pieces of `walk`, several of which are read together; the data is good until the
    next is asked for. ImageError."""
    buffers = [new_buffer(piece_bytes) for _ in range(TASKS)]
    found: list[tuple[int, memoryview]] = []

    def task() -> Task:
        batch: Batch = []
        while len(batch) < len(buffers) and (piece := (yield from walk.next())) is not None:
            if piece.kind == DATA:
                data = buffers[len(batch)][: piece.length]
                found.append((piece.offset, data))
                batch.append((source.driver, Request(READ, piece.offset, piece.length, [data], BACKGROUND)))
        yield batch
        for _, request in batch:
            ended_well(request, source.name)

    while True:
        found.clear()
        session.run([task()])
        if not found:
            return
        yield from found


def store(target: Disk, offset: int, data: memoryview, granule_bytes: int, *, reads_zero: bool) -> Steps[None]:
    """Write what is not zero of `data`, and zero the rest unless it reads as zeroes already."""
    batch: Batch = []
    for start, stop, zero in runs(data, granule_bytes):
        if not zero:
            request = Request(WRITE, offset + start, stop - start, [data[start:stop]], BACKGROUND)
            batch.append((target.driver, request))
        elif not reads_zero:
            yield from zero_out(target, offset + start, stop - start)
    yield batch
    for _, request in batch:
        ended_well(request, target.name)
