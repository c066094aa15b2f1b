"""A Walk gives out a disk's pieces once, in order, and none that is not zero as ZERO."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Manual

from tapcore.errors import ImageError
from tapcore.img.session import Session, Task
from tapcore.img.walk import DATA, MAX_RUN_BYTES, SKIP, ZERO, Piece, Walk
from tapcore.request import STATUS_HOLE, STATUS_ZERO, Request

HOLE = STATUS_HOLE | STATUS_ZERO


class Told(Manual):
    """A disk that answers block status from a list, `per_answer` extents at a time."""

    name = ""
    states: list[tuple[int, int]]
    per_answer = 3

    def queue_status(self, request: Request) -> bool:
        at = 0
        for length, state in self.states:
            start, stop = max(at, request.offset), min(at + length, request.offset + request.length)
            if start < stop and len(request.extents) < self.per_answer:
                request.extents.append((stop - start, state))
            at += length
        return True


@pytest.fixture
def session() -> Iterator[Session]:
    with Session() as session:
        yield session


def told(session: Session, states: list[tuple[int, int]]) -> Told:
    disk = Told(session.env, str(sum(length for length, _ in states)), 0)  # type: ignore[arg-type]
    disk.open()
    disk.states = states
    return disk


def pieces_of(session: Session, disk: Told, tasks: int = 2, **options: int) -> list[Piece]:
    walk = Walk(session, disk, "disk", **options)  # type: ignore[arg-type]
    found: list[Piece] = []

    def task() -> Task:
        while (piece := (yield from walk.next())) is not None:
            found.append(piece)

    session.run(task() for _ in range(tasks))
    return found


def test_pieces_end_at_extents_and_at_borders(session: Session) -> None:
    disk = told(session, [(8192, HOLE), (4096, 0), (4096, STATUS_ZERO), (65536, 0)])
    assert pieces_of(session, disk, granule_bytes=4096, piece_bytes=65536) == [
        (0, 8192, ZERO), (8192, 4096, DATA), (12288, 4096, ZERO), (16384, 49152, DATA), (65536, 16384, DATA)]


def test_a_granule_that_is_partly_zero_is_data(session: Session) -> None:
    disk = told(session, [(6144, HOLE), (512, 0), (9728, HOLE)])
    assert pieces_of(session, disk, granule_bytes=4096, piece_bytes=65536) == [
        (0, 4096, ZERO), (4096, 4096, DATA), (8192, 8192, ZERO)]


def test_long_runs_are_given_out_in_parts(session: Session) -> None:
    disk = told(session, [(4096, 0)])
    disk.info = disk.info.with_changes(size_bytes=3 * MAX_RUN_BYTES)
    disk.states = [(3 * MAX_RUN_BYTES, HOLE)]
    assert [length for _, length, _ in pieces_of(session, disk)] == [MAX_RUN_BYTES] * 3


def test_a_status_that_says_nothing_or_fails_ends_it(session: Session, tmp_path: Path) -> None:
    disk = told(session, [(4096, 0)])
    disk.states = []
    with pytest.raises(ImageError, match="says nothing"):
        pieces_of(session, disk)
    path = tmp_path / "a.img"
    path.write_bytes(bytes(4096))
    chain = session.open(f"error:op=status,errno=ENOSPC|aio:{path}")
    with pytest.raises(ImageError, match="status failed: No space"):
        session.run([Walk(session, chain.head, "a")._look()])


states = st.lists(st.tuples(st.integers(1, 40).map(lambda sectors: sectors * 512),
                            st.sampled_from([0, HOLE, STATUS_ZERO, 256])), min_size=1, max_size=20)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states, st.sampled_from([512, 1024, 4096]), st.sampled_from([4096, 16384]), st.integers(1, 4))
def test_every_byte_is_in_one_piece_of_its_kind(
    session: Session, states: list[tuple[int, int]], granule_bytes: int, piece_bytes: int, tasks: int
) -> None:
    disk = told(session, states)

    def kind_of(state: int) -> int:
        return SKIP if state == 256 else ZERO if state & STATUS_ZERO else DATA

    found = pieces_of(session, disk, tasks, granule_bytes=granule_bytes, piece_bytes=piece_bytes,
                      kind_of=kind_of)  # type: ignore[arg-type]
    assert [piece.offset for piece in found] == sorted(piece.offset for piece in found)
    kinds = [kind_of(state) for length, state in states for _ in range(length // 512)]
    at = 0
    for offset, length, kind in found:
        assert offset == at and length > 0
        at += length
        covered = kinds[offset // 512 : (offset + length) // 512]
        if kind == DATA:
            assert length <= piece_bytes and offset // piece_bytes == (offset + length - 1) // piece_bytes
        else:
            assert set(covered) == {kind}
        assert at % granule_bytes == 0 or at == disk.info.size_bytes
    assert at == disk.info.size_bytes
