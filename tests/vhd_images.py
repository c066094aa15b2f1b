"""VHD images for tests: made over a parent, changed byte by byte, and driven at random beside plain bytes."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from contract.runner import Runner
from hypothesis import strategies as st

from tapcore.driver import Env
from tapcore.formats.vhd.create import create, look_at_parent
from tapcore.formats.vhd.layout import (
    FOOTER,
    HEADER,
    SECTOR_BYTES,
    Footer,
    Header,
    Image,
    parse_footer,
    parse_header,
)
from tapcore.request import BACKGROUND, DISCARD, FAST, FLUSH, FUA, NO_HOLE, READ, WRITE, ZEROES, Request

BLOCK = 65536


def make_overlay(path: Path, size: int, parent: str, driver: str, *, block_bytes: int = BLOCK) -> None:
    create(str(path), size, block_bytes=block_bytes, parent=look_at_parent(str(path), parent, driver))


def fill(env: Env, path: Path, data: bytes, driver: str = "vhd") -> None:
    """Write `data` to the start of the image's disk."""
    runner = Runner(env, f"{driver}:{path}")
    assert runner.write(0, data) == 0
    runner.close()


def edit_footer(
    path: Path, change: Callable[[Footer], None], *, at_start: bool = True, at_end: bool = True
) -> None:
    """Change the footer and its copy, with checksums that are right."""
    image = path.read_bytes()
    footer = parse_footer(str(path), image[-512:], len(image) - 512)
    change(footer)
    if at_end:
        patch(path, len(image) - 512, footer.pack())
    if at_start:
        patch(path, 0, footer.pack())


def edit_header(path: Path, change: Callable[[Header], None]) -> None:
    image = path.read_bytes()
    footer = parse_footer(str(path), image[-512:], len(image) - 512)
    at = footer.data_offset
    header = parse_header(str(path), image[at : at + HEADER.size], Image(footer), len(image))
    change(header)
    patch(path, at, header.pack())


def header_of(path: Path) -> Header:
    found: list[Header] = []
    edit_header(path, lambda header: found.append(replace(header)))
    return found[0]


def footer_of(path: Path) -> Footer:
    return parse_footer(str(path), path.read_bytes()[-FOOTER.size :], 0)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def first_block(path: Path) -> int:
    """Where the first allocated block of the image begins."""
    image, header = path.read_bytes(), header_of(path)
    table = image[header.table_offset :][: 4 * header.max_table_entries]
    entries = [int.from_bytes(table[at : at + 4], "big") for at in range(0, len(table), 4)]
    return min(entries) * SECTOR_BYTES


Op = tuple[int, int, int, int, int]
"""op, offset, length, flags, seed."""


@st.composite
def operations(draw: st.DrawFn, size: int) -> Op:
    op = draw(st.sampled_from((READ, WRITE, WRITE, ZEROES, DISCARD, FLUSH)))
    unit = draw(st.sampled_from((1, 512, 4096)))
    offset = draw(st.integers(0, (size - 1) // unit)) * unit
    length = min(draw(st.integers(1, 40)) * unit, size - offset)
    flags = {READ: (0, BACKGROUND), WRITE: (0, FUA, BACKGROUND), ZEROES: (0, NO_HOLE, FUA, FAST),
             DISCARD: (0, FUA), FLUSH: (0,)}[op]
    return op, offset, length, draw(st.sampled_from(flags)), draw(st.integers(0, 1 << 30))


class Model:
    """The bytes of the disk; batches of requests that do not overlap run on both."""

    def __init__(self, runner: Runner, disk: bytes) -> None:
        self.runner = runner
        self.disk = bytearray(disk)

    def run(self, ops: list[Op]) -> None:
        batch: list[Request] = []
        for op, offset, length, flags, seed in ops:
            if any(offset < other.offset + other.length and other.offset < offset + length for other in batch):
                self._finish(batch)
                batch = []
            data = random.Random(seed).randbytes(length) if op == WRITE else bytes(length)
            iov = [memoryview(bytearray(data))] if op in (READ, WRITE) else []
            batch.append(Request(op, offset, length if op != FLUSH else 0, iov, flags))
        self._finish(batch)

    def _finish(self, batch: list[Request]) -> None:
        for request, code in zip(batch, self.runner.run(*batch), strict=True):
            start, end = request.offset, request.offset + request.length
            if request.flags & FAST and code == errno.ENOTSUP:
                continue
            assert code == 0
            if request.op == READ:
                assert b"".join(request.iov) == self.disk[start:end]
            elif request.op == WRITE:
                self.disk[start:end] = b"".join(request.iov)
            elif request.op == ZEROES:
                self.disk[start:end] = bytes(request.length)
            elif request.op == DISCARD:
                now = self.runner.read(start, end - start)
                assert all(new in (0, old) for new, old in zip(now, self.disk[start:end], strict=True))
                self.disk[start:end] = now
