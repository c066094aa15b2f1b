"""Block status: extents tidied, and their chunk. The clever function is checked against a byte map."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapcore.nbd import wire
from tapcore.nbd.status import MAX_EXTENTS, dirty_extents, status_chunk, tidy_extents
from tapcore.request import STATUS_HOLE, STATUS_ZERO, Extent

HOLE = STATUS_HOLE | STATUS_ZERO


def test_states_equal_those_of_the_protocol() -> None:
    assert (STATUS_HOLE, STATUS_ZERO) == (wire.NBD_STATE_HOLE, wire.NBD_STATE_ZERO)


@pytest.mark.parametrize(("extents", "length", "expected"), [
    ([(10, 0), (20, 0), (5, HOLE)], 100, [(30, 0), (5, HOLE)]),
    ([(10, 0), (20, HOLE)], 15, [(10, 0), (5, HOLE)]),
    ([(10, 0), (20, HOLE)], 10, [(10, 0)]),
    ([(0, HOLE), (10, 0), (0, HOLE), (10, 0)], 20, [(20, 0)]),
    ([], 20, [(20, 0)]),
    ([(0, HOLE)], 20, [(20, 0)]),
    ([(1 << 40, HOLE)], (1 << 32) - 1, [((1 << 32) - 1, HOLE)]),
])
def test_tidy(extents: list[Extent], length: int, expected: list[Extent]) -> None:
    assert tidy_extents(extents, length) == expected


def test_the_number_of_extents_is_limited() -> None:
    flicker = [(512, number % 2) for number in range(3 * MAX_EXTENTS)]
    assert tidy_extents(flicker, 1 << 31) == flicker[:MAX_EXTENTS]
    assert tidy_extents([(1, 0), (1, 0), (1, 0), (1, 1)], 10, 1) == [(3, 0)]


def test_a_long_source_is_not_read_to_its_end() -> None:
    def endless() -> Iterator[Extent]:
        number = 0
        while True:
            number += 1
            yield 512, number % 2

    assert tidy_extents(endless(), 1024) == [(512, 1), (512, 0)]
    assert len(tidy_extents(endless(), 1 << 32, 3)) == 3


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3))), st.integers(1, 40), st.integers(1, 6))
def test_tidy_against_a_byte_map(extents: list[Extent], length: int, max_extents: int) -> None:
    states = [state for extent_length, state in extents for _ in range(extent_length)][:length] or [0] * length
    runs = [(len(list(run)), state) for state, run in groupby(states)]
    assert tidy_extents(extents, length, max_extents) == runs[:max_extents]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5))), st.integers(0, 30), st.integers(1, 30))
def test_dirty_extents_against_a_byte_map(gaps_and_runs: list[tuple[int, int]], offset: int, length: int) -> None:
    dirty, position = [], 0
    marks = [0] * 1000
    for gap, run in gaps_and_runs:
        dirty.append((position + gap, run))
        marks[position + gap : position + gap + run] = [1] * run
        position += gap + run
    extents = dirty_extents(dirty, offset, length)
    states = [state for extent_length, state in extents for _ in range(extent_length)]
    assert states == marks[offset : offset + length]
    assert all(extent_length for extent_length, _ in extents)


def test_chunk() -> None:
    chunk = status_chunk(9, 2, [(4096, 0), (4096, HOLE)], 6144, one=False, done=True)
    assert chunk == bytes.fromhex("668e33ef 0001 0005 0000000000000009 00000014 00000002"
                                  "00001000 00000000 00000800 00000003")


def test_chunk_with_one_extent_that_is_not_the_last_of_the_reply() -> None:
    chunk = status_chunk(9, 2, [(512, 1), (512, 1), (512, 0)], 1536, one=True, done=False)
    assert chunk == bytes.fromhex("668e33ef 0000 0005 0000000000000009 0000000c 00000002 00000400 00000001")
