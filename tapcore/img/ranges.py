"""read and write: ranges of a disk to and from files and pipes, in order."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import Final

from tapcore.errors import UsageError, image_error
from tapcore.img.copy import Disk, flush, new_buffer
from tapcore.img.progress import Progress
from tapcore.img.session import Batch, Session, Task, ended_well
from tapcore.img.walk import PIECE_BYTES
from tapcore.request import BACKGROUND, READ, WRITE, Request

BATCH: Final = 8
"""Requests that are under way together."""


def check_range(disk: Disk, offset: int, length: int | None) -> int:
    """The length, up to the disk's end without one. UsageError for what is not inside the disk."""
    size_bytes = disk.driver.info.size_bytes
    if offset > size_bytes or (length is not None and offset + length > size_bytes):
        raise UsageError(f"{length or 0} bytes from {offset} on are not inside the disk of {size_bytes} bytes")
    return size_bytes - offset if length is None else length


def read_range(session: Session, disk: Disk, offset: int, length: int, fd: int, progress: Progress) -> None:
    """Write the range to the descriptor. ImageError; BrokenPipeError if nobody reads."""
    progress.start(length)
    buffer = new_buffer(BATCH * PIECE_BYTES)
    done = 0
    while done < length:
        part = buffer[: min(len(buffer), length - done)]
        session.run([_transfer(disk, READ, offset + done, part)])
        _write_all(fd, [part])
        done += len(part)
        progress.advance(len(part))
    progress.end()


def write_range(session: Session, disk: Disk, offset: int, length: int | None, fd: int, progress: Progress) -> int:
    """Write what the descriptor gives, all of it or `length` bytes, to the disk, durably; the number of bytes.
    UsageError if the disk ends before, or the input does."""
    room = check_range(disk, offset, length)
    progress.start(room)
    buffer = new_buffer(BATCH * PIECE_BYTES)
    done = 0
    while done < room:
        part = buffer[: _read_up_to(fd, buffer[: min(len(buffer), room - done)])]
        if not part:
            break
        session.run([_transfer(disk, WRITE, offset + done, part)])
        done += len(part)
        progress.advance(len(part))
    session.run([flush(disk)])
    if length is not None and done < length:
        raise UsageError(f"the input ended after {done} bytes, which are written, of {length}")
    if length is None and done == room and os.read(fd, 1):
        raise UsageError(f"the input is longer than the {room} bytes up to the disk's end, which are written")
    return done


def _transfer(disk: Disk, op: int, offset: int, data: memoryview) -> Task:
    batch: Batch = []
    for start in range(0, len(data), PIECE_BYTES):
        part = data[start : start + PIECE_BYTES]
        batch.append((disk.driver, Request(op, offset + start, len(part), [part], BACKGROUND)))
    yield batch
    for _, request in batch:
        ended_well(request, disk.name)


def _read_up_to(fd: int, buffer: memoryview) -> int:
    """Fill `buffer`, less at the end of the input. The number of bytes."""
    done = 0
    while done < len(buffer):
        count = os.readv(fd, [buffer[done:]])
        if not count:
            break
        done += count
    return done


def _write_all(fd: int, views: Sequence[memoryview]) -> None:
    for view in views:
        done = 0
        while done < len(view):
            try:
                done += os.write(fd, view[done:])
            except BrokenPipeError:
                raise
            except BlockingIOError:
                select.select([], [fd], [])
            except OSError as error:
                raise image_error(error, "the output", "write") from error
