"""Copies are equal to what was copied, whatever is zero where, and sparse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tapcore.driver import Driver, Feature
from tapcore.errors import ImageError
from tapcore.img.copy import Disk, copy, is_zero, runs, zero_out
from tapcore.img.progress import Progress
from tapcore.img.session import Session
from tapcore.img.walk import Walk

SIZE = 4 << 20


@pytest.fixture
def session() -> Iterator[Session]:
    with Session() as session:
        yield session


def copy_here(session: Session, source: Driver, target: Driver, granule_bytes: int, *, reads_zero: bool) -> None:
    walk = Walk(session, source, "source", granule_bytes=granule_bytes, piece_bytes=1 << 20)
    copy(session, Disk(source, "source"), Disk(target, "target"), walk, Progress(), granule_bytes=granule_bytes,
         reads_zero=reads_zero)


def sparse_file(path: Path, rng: Random, count: int = 12) -> bytes:
    """Data, zeroes that are written, and holes."""
    content = bytearray(SIZE)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for _ in range(count):
            length = min(rng.choice((512, 4096, 70 * 512, 1 << 20)), SIZE)
            offset = rng.randrange((SIZE - length) // 512 + 1) * 512
            half = bytes(length // 2) + rng.randbytes(length // 2)
            data = rng.choice((bytes(length), rng.randbytes(length), half))
            os.pwrite(file.fileno(), data, offset)
            content[offset : offset + len(data)] = data
    return bytes(content)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("granule_bytes", [4096, 65536])
@pytest.mark.parametrize("direct", ["", "direct,"])
def test_a_copy_is_equal_and_sparse(
    session: Session, tmp_path: Path, seed: int, granule_bytes: int, direct: str
) -> None:
    content = sparse_file(tmp_path / "a", Random(seed))
    (tmp_path / "b").touch()
    os.truncate(tmp_path / "b", SIZE)
    source, target = (session.open(f"aio:{direct}{tmp_path}/{name}").head for name in "ab")
    copy_here(session, source, target, granule_bytes, reads_zero=True)
    assert (tmp_path / "b").read_bytes() == content
    zero = sum(not any(content[at : at + granule_bytes]) for at in range(0, SIZE, granule_bytes))
    tables_bytes = 8192  # of the file system
    assert (tmp_path / "b").stat().st_blocks * 512 <= SIZE - zero * granule_bytes + tables_bytes


@pytest.mark.parametrize("seed", range(4))
def test_what_was_there_is_replaced(session: Session, tmp_path: Path, seed: int) -> None:
    content = sparse_file(tmp_path / "a", Random(seed))
    (tmp_path / "b").write_bytes(Random(seed).randbytes(SIZE))
    source, target = (session.open(f"aio:{tmp_path}/{name}").head for name in "ab")
    copy_here(session, source, target, 4096, reads_zero=False)
    assert (tmp_path / "b").read_bytes() == content


@pytest.mark.parametrize("target", ["error:op=zeroes,errno=EOPNOTSUPP|", ""])
def test_zeroes_are_written_where_there_is_no_verb_for_them(
    session: Session, tmp_path: Path, target: str
) -> None:
    path = tmp_path / "b"
    path.write_bytes(b"\1" * SIZE)
    disk = session.open(f"{target}aio:{path}").head
    if not target:
        disk.info = disk.info.with_changes(features=disk.info.features & ~Feature.ZEROES)
    session.run([zero_out(Disk(disk, "b"), 512, SIZE - 1024)])
    assert path.read_bytes() == b"\1" * 512 + bytes(SIZE - 1024) + b"\1" * 512


@pytest.mark.parametrize("op", ["read", "write", "flush"])
def test_a_failure_says_where(session: Session, tmp_path: Path, op: str) -> None:
    (tmp_path / "a").write_bytes(Random(1).randbytes(SIZE))
    (tmp_path / "b").write_bytes(bytes(SIZE))
    source = session.open(f"error:op={op},after=1,errno=EIO|aio:{tmp_path}/a").head
    target = session.open(f"error:op={op},after={int(op != 'flush')},errno=EIO|aio:{tmp_path}/b").head
    name = "source" if op == "read" else "target"
    with pytest.raises(ImageError, match=f"{name}: {op} failed: Input/output error"):
        copy_here(session, source, target, 4096, reads_zero=True)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 7), st.sampled_from([512, 4096]))
def test_runs_are_maximal_and_right(blocks: list[bool], tail_sectors: int, granule_bytes: int) -> None:
    data = b"".join(b"\0" * granule_bytes if zero else b"\0\1" * (granule_bytes // 2) for zero in blocks)
    data = data[: len(data) - tail_sectors * 512 % granule_bytes]
    found = list(runs(memoryview(data), granule_bytes))
    assert [start for start, _, _ in found] == [0, *(stop for _, stop, _ in found)][:-1]
    assert found[-1][1] == len(data)
    for (start, stop, zero), following in zip(found, [*found[1:], None], strict=True):
        assert is_zero(memoryview(data)[start:stop]) == zero
        assert following is None or following[2] != zero
