"""The bitmap against a dumb set of block numbers."""

from __future__ import annotations

import mmap

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from tapcore.errors import LogError
from writelog.bitmap import Bitmap, bitmap_bytes, block_count, check_granularity, runs


def make(size_bytes: int, granularity_bytes: int = 4096) -> Bitmap:
    return Bitmap(bytearray(bitmap_bytes(size_bytes, granularity_bytes)), size_bytes, granularity_bytes)


@given(st.integers(9, 20), st.lists(st.tuples(st.integers(0, 299_999), st.integers(1, 300_000)), max_size=20))
def test_mark_sets_every_block_it_touches(shift: int, writes: list[tuple[int, int]]) -> None:
    size_bytes, granularity_bytes = 300_000 // 512 * 512, 1 << shift
    bitmap = make(size_bytes, granularity_bytes)
    expected: set[int] = set()
    for offset, length in writes:
        offset = min(offset, size_bytes - 1)
        length = min(length, size_bytes - offset)
        bitmap.mark(offset, length)
        expected |= {byte // granularity_bytes for byte in (*range(offset, offset + length, 512),
                                                            offset + length - 1)}
    assert set(bitmap.bits.search(1)) == expected


@given(st.lists(st.booleans(), max_size=300), st.integers(0, 300), st.integers(0, 300), st.integers(1, 40),
       st.integers(0, 5), st.integers(1, 16))
def test_runs_are_those_of_a_scan_bit_by_bit(
    bits: list[bool], start: int, stop: int, limit: int, base: int, unit: int
) -> None:
    stop = min(stop, len(bits))
    expected: list[tuple[int, int]] = []
    for at in range(start, stop):
        if bits[at]:
            if expected and sum(expected[-1]) == at:
                expected[-1] = (expected[-1][0], expected[-1][1] + 1)
            else:
                expected.append((at, 1))
    found, following = runs(bitarray(bits, endian="little"), start, stop, limit, base, unit)
    pairs = list(zip(found[::2], found[1::2], strict=True))
    assert pairs == [((base + at) * unit, count * unit) for at, count in expected[:limit]]
    if len(expected) > limit:
        assert sum(expected[limit - 1]) <= following <= expected[limit][0]
    else:
        assert following == stop


def test_runs_go_on_where_they_stopped() -> None:
    bits = bitarray("0110100111", endian="little")
    assert runs(bits, 0, 10, 1) == ([1, 2], 4)
    assert runs(bits, 4, 10, 1) == ([4, 1], 7)
    assert runs(bits, 7, 10, 1) == ([7, 3], 10)


def test_fault_4_the_last_word_is_exact() -> None:
    for blocks in range(1, 200):
        bitmap = make(blocks * 4096)
        bitmap.bits.setall(1)
        bitmap.fill()
        assert bitmap.bits.count() == blocks
        assert bitmap.bits[:blocks].all()


def test_a_short_last_block_has_a_bit() -> None:
    bitmap = make(4096 + 512)
    bitmap.mark(4096, 512)
    assert list(bitmap.bits.search(1)) == [1]
    assert block_count(4097, 4096) == 2


def test_the_memory_is_somebody_elses() -> None:
    shared = mmap.mmap(-1, 4096)
    Bitmap(shared, 1 << 20, 4096).mark(9 * 4096, 1)
    assert shared[1] == 2
    assert Bitmap(shared, 1 << 20, 4096).bits[9] == 1


@pytest.mark.parametrize("granularity_bytes", [0, 1, 256, 3000, 4097, 1 << 21, -4096])
def test_a_granularity_that_makes_no_sense(granularity_bytes: int) -> None:
    with pytest.raises(LogError, match="power of two from 512 to 1048576"):
        check_granularity(granularity_bytes)


@pytest.mark.parametrize("granularity_bytes", [512, 4096, 1 << 20])
def test_a_granularity_that_does(granularity_bytes: int) -> None:
    assert check_granularity(granularity_bytes) == granularity_bytes
