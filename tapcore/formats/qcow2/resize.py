"""qcow2: another size for the disk of an image that nobody has open.

    grow     L1 table long enough │ what is behind the present end reads as zeroes │ header: the size
    shrink   one switch to an image that refers to nothing behind the new end (rewrite.py)

What is behind the end of the disk is not always empty: the last cluster may have more bytes than the disk, a
backing file may be longer, and an applied snapshot keeps its machine's state there.

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tapcore.chain import open_chain
from tapcore.driver import Env, OpenFlag
from tapcore.errors import ImageError, UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow2.driver import Qcow2Driver
from tapcore.formats.qcow2.header import open_to_change, write_fields
from tapcore.formats.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK, Header
from tapcore.formats.qcow2.load import data_path
from tapcore.formats.qcow2.rewrite import begin
from tapcore.formats.qcow2.walk import Walk
from tapcore.loop import Loop
from tapcore.request import ZEROES, Request
from tapcore.workers import Workers

STEP_BYTES: Final = 1 << 30
"""Zeroed by one request."""
WORKERS: Final = 4


def resize(path: str, size_bytes: int, *, shrink: bool = False) -> None:
    """Give the disk of `path` another size, a smaller one only if `shrink`. UsageError, ImageError."""
    if size_bytes % 512 or size_bytes < 0:
        raise UsageError(f"size {size_bytes} is not a multiple of 512 bytes")
    file, header = open_to_change(path)
    try:
        if size_bytes < header.size and not shrink:
            raise UsageError(f"{size_bytes} bytes is less than the disk has ({header.size})",
                             hint="what is behind the new end is lost: say so with --shrink")
        if header.version == 2 and header.nb_snapshots:
            raise ImageError("version 2 keeps no disk size for its snapshots", errno=errno.EOPNOTSUPP, path=path,
                             hint="delete the snapshots first")
        if 8 * header.l1_size_needed(size_bytes) > MAX_L1_BYTES:
            raise UsageError(f"a disk of {size_bytes} bytes is too large for clusters of {header.cluster_bytes}")
        if size_bytes < header.size:
            with _data_of(path, header) as data:
                _shrink(file, header, size_bytes)
                if data is not None and data.length_now() > size_bytes:
                    data.truncate(size_bytes)
            return
        _lengthen_l1(file, header, header.l1_size_needed(size_bytes))
    finally:
        file.close()
    if size_bytes > header.size:
        _zero_behind(path, header, size_bytes)
        with _data_of(path, header) as data:
            if data is not None and header.data_is_raw and data.length_now() < size_bytes:
                data.truncate(size_bytes)
                data.sync_or_raise()
        file, _ = open_to_change(path)
        try:
            write_fields(file, {"size": size_bytes})
            file.sync_or_raise()
        finally:
            file.close()


@contextmanager
def _data_of(path: str, header: Header) -> Iterator[ImageFile | None]:
    """The external data file, if there is one and it is a regular file."""
    if header.data_file is None:
        yield None
        return
    data = ImageFile.open(data_path(path, header.data_file), OpenFlag.NONE)
    try:
        yield None if data.is_device else data
    finally:
        data.close()


def _lengthen_l1(file: ImageFile, header: Header, entries: int) -> None:
    more = entries - header.l1_size
    if more <= 0:
        return
    room = header.l1_size and -8 * header.l1_size % header.cluster_bytes
    if 8 * more <= room:
        file.store(header.l1_table_offset + 8 * header.l1_size, bytes(8 * more), "the L1 table")
        file.sync_or_raise()
        write_fields(file, {"l1_size": entries})
        file.sync_or_raise()
        return
    walk = Walk(file, header)
    walk.run()
    rewrite = begin(walk)
    rewrite.l1 += array("Q", bytes(8 * more))
    rewrite.run()


def _shrink(file: ImageFile, header: Header, size_bytes: int) -> None:
    walk = Walk(file, header)
    whole, part = divmod(-(-size_bytes >> header.cluster_bits), header.cluster_bytes >> header.l2_entry_bits)
    entry = walk.l1[whole] & OFFSET_MASK if part else 0
    walk.run(l1_end=whole, bitmaps=0)
    rewrite = begin(walk)
    rewrite.l1 = walk.l1[: max(1, header.l1_size_needed(size_bytes))]
    for index in range(whole, len(rewrite.l1)):
        rewrite.l1[index] = 0
    if entry:
        table = walk.load_table(entry, header.cluster_bytes // 8, "an L2 table")
        first = part << header.l2_entry_bits - 3
        table[first:] = array("Q", bytes(8 * (len(table) - first)))
        walk.count_entries(table, f"of L1 entry {whole}", 1)
        rewrite.tables[whole] = table
    rewrite.fields |= {"size": size_bytes, "autoclear_features": header.autoclear_kept}
    rewrite.run()


def _zero_behind(path: str, header: Header, size_bytes: int) -> None:
    """Let all from the disk's end to `size_bytes` read as zeroes: the driver does it, for a disk that is longer
    than the header says. ImageError, ChainError."""
    loop = Loop()
    workers = Workers(loop, WORKERS)
    try:
        chain = open_chain(Env(loop, workers), f"qcow2:{Path(path).absolute()}")
        try:
            driver = chain.head
            assert isinstance(driver, Qcow2Driver)
            tables = max((index + 1 for index, entry in enumerate(driver.mapping.l1) if entry), default=0)
            end = min(size_bytes, max(tables << driver.mapping.table_shift, driver.backing_bytes(0, size_bytes)))
            driver.info = driver.info.with_changes(size_bytes=size_bytes)
            for offset in range(header.size, end, STEP_BYTES):
                _zero(loop, driver, offset, min(STEP_BYTES, end - offset))
        finally:
            quiet: list[bool] = []
            chain.quiesce(lambda: quiet.append(True))
            while not quiet:
                loop.turn()
            chain.close()
    finally:
        workers.close()
        loop.close()


def _zero(loop: Loop, driver: Qcow2Driver, offset: int, length: int) -> None:
    done: list[Request] = []
    request = Request(ZEROES, offset, length, done=done.append)
    if not driver.queue_zeroes(request):
        driver.submit()
        while not done:
            loop.turn()
    if request.error:
        raise ImageError(f"cannot zero what is added: {os.strerror(request.error)}", errno=request.error,
                         path=driver.path, offset=offset)
