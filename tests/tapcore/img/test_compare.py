"""compare finds the first byte that differs, and nothing where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tapcore.img.compare import NOWHERE, Comparison, first_difference
from tapcore.img.copy import Disk
from tapcore.img.progress import Progress
from tapcore.img.session import Session

SIZE = 5 << 20


@pytest.fixture
def session() -> Iterator[Session]:
    with Session() as session:
        yield session


def compare(session: Session, *paths: Path) -> int:
    disks = [Disk(session.open(f"aio:{path}").head, str(path)) for path in paths]
    return Comparison(session, disks[0], disks[1], Progress()).run()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Equal, but one with holes where the other has zeroes."""
    content = bytearray(SIZE)
    content[1 << 20 : 2 << 20] = Random(2).randbytes(1 << 20)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(content)
    with other.open("wb") as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), content[1 << 20 : 2 << 20], 1 << 20)
    return one, other


def test_holes_are_zeroes(session: Session, pair: tuple[Path, Path]) -> None:
    assert compare(session, *pair) == NOWHERE


@pytest.mark.parametrize("changes", [
    [0], [(1 << 20) + 5], [(2 << 20) - 1], [SIZE - 1], [4096, 4097], [SIZE - 1, 3 << 20, (1 << 20) + 1],
    [511, 512]])
@pytest.mark.parametrize("which", [0, 1])
def test_the_first_difference_is_told(
    session: Session, pair: tuple[Path, Path], changes: list[int], which: int
) -> None:
    with pair[which].open("r+b") as file:
        for at in changes:
            file.seek(at)
            before = file.read(1)[0]
            os.pwrite(file.fileno(), bytes([before ^ 0x40]), at)
    assert compare(session, *pair) == min(changes)


@pytest.mark.parametrize("which", [0, 1])
def test_the_rest_of_the_longer_disk_is_zero(session: Session, pair: tuple[Path, Path], which: int) -> None:
    os.truncate(pair[which], SIZE + 8192)
    with Session() as first:
        assert compare(first, *pair) == NOWHERE
    with pair[which].open("r+b") as file:
        os.pwrite(file.fileno(), b"x", SIZE + 5000)
    assert compare(session, *pair) == SIZE + 5000


def test_first_difference() -> None:
    data = Random(1).randbytes(1000)
    for at in (0, 1, 499, 500, 501, 999):
        other = bytearray(data)
        other[at] ^= 1
        assert first_difference(memoryview(data), memoryview(other)) == at
    assert first_difference(memoryview(data), memoryview(bytes(data))) == NOWHERE
    assert first_difference(memoryview(b""), memoryview(b"")) == NOWHERE
