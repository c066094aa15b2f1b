"""Chains of VHDs, which QEMU does not read, read by libvhdi (https://github.com/libyal/libvhdi).

It ends what is present with a whole byte of the bitmap, and shows zeroes where its last bits are clear; it reads
overlays right with blocks of 2 MiB alone; and it takes original_size for the size. So overlays have such blocks
here, and are written in units of eight sectors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pyvhdi
from contract.runner import Runner
from vhd_images import footer_of, make_overlay

from tapcore.driver import Env
from tapcore.formats.tools import Backing
from tapcore.formats.vhd.create import create
from tapcore.formats.vhd.tools import VhdTools

SIZE = (5 << 20) + 4096
BLOCK = 2 << 20


@contextmanager
def opened_there(paths: list[Path]) -> Iterator[Any]:
    """The first image, over the others."""
    with ExitStack() as stack:
        files = []
        for path in paths:
            files.append(pyvhdi.file())
            files[-1].open(str(path))
            stack.callback(files[-1].close)
        for child, parent, path in zip(files, files[1:], paths[1:], strict=False):
            assert child.get_parent_identifier() == parent.get_identifier()
            assert child.get_parent_filename() == path.name
            child.set_parent(parent)
        yield files[0]


def read_there(*paths: Path) -> bytes:
    with opened_there(list(paths)) as file:
        data: bytes = file.read_buffer_at_offset(file.get_media_size(), 0)
    return data


def change(env: Env, path: Path, disk: bytearray, rng: random.Random, unit: int = 4096) -> None:
    runner = Runner(env, f"vhd:{path}")
    for _ in range(60):
        offset = rng.randrange(SIZE // unit) * unit
        length = min(rng.choice((1, 2, 7, 20)) * unit, SIZE - offset)
        kind = rng.choice(("write", "write", "write", "zeroes", "discard", "flush"))
        if kind == "write":
            data = rng.randbytes(length)
            assert runner.write(offset, data) == 0
            disk[offset : offset + length] = data
        elif kind == "zeroes":
            assert runner.zeroes(offset, length) == 0
            disk[offset : offset + length] = bytes(length)
        elif kind == "discard":
            assert runner.discard(offset, length) == 0
            disk[offset : offset + length] = runner.read(offset, length)
        else:
            assert runner.flush() == 0
    assert runner.read(0, SIZE) == disk
    runner.close()


@pytest.mark.parametrize("variant", ["fixed", "dynamic"])
def test_one_image(env: Env, tmp_path: Path, variant: str) -> None:
    path, disk, rng = tmp_path / "a.vhd", bytearray(SIZE), random.Random(variant)
    create(str(path), SIZE, variant=variant)
    for _ in range(2):
        change(env, path, disk, rng, 700)
        assert read_there(path) == disk


def test_a_chain(env: Env, tmp_path: Path) -> None:
    """Each level is changed, and read as a whole."""
    paths, disk, rng = [tmp_path / "0.vhd"], bytearray(SIZE), random.Random(4)
    create(str(paths[0]), SIZE)
    change(env, paths[0], disk, rng)
    for level in range(1, 5):
        path = tmp_path / f"{level}.vhd"
        make_overlay(path, SIZE, paths[0].name, "vhd", block_bytes=BLOCK)
        paths.insert(0, path)
        assert read_there(*paths) == disk
        change(env, path, disk, rng)
        assert read_there(*paths) == disk


def test_after_resize_and_another_backing(env: Env, tmp_path: Path) -> None:
    base, other, path = (tmp_path / name for name in ("base.vhd", "other.vhd", "a.vhd"))
    disk, rng = bytearray(SIZE), random.Random(3)
    create(str(base), SIZE)
    change(env, base, disk, rng)
    other.write_bytes(base.read_bytes())
    make_overlay(path, SIZE, "base.vhd", "vhd", block_bytes=BLOCK)
    change(env, path, disk, rng)
    VhdTools.set_backing(str(path), Backing("other.vhd", "vhd"))
    assert read_there(path, other) == disk
    VhdTools.resize(str(path), 9 << 20)
    assert read_there(path, other) == disk


def test_ids_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), SIZE)
    with opened_there([path]) as file:
        assert UUID(file.get_identifier()).bytes == footer_of(path).unique_id
        assert file.get_media_size() == SIZE
