"""VHD images for tests: made over a parent, and changed byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from contract.runner import Runner

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
