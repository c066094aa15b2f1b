"""What a comparison by hashes says, beside a comparison of the bytes."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from writelog.hashtree import MAX_PIECES, differing, extents_of, is_mask, piece_digests, pieces_of

GRAIN = 64


@given(st.integers(1, GRAIN * MAX_PIECES), st.lists(st.integers(0, GRAIN * MAX_PIECES - 1), max_size=20),
       st.randoms(use_true_random=False))
def test_pieces_differ_where_their_bytes_do(length: int, places: list[int], random: Random) -> None:
    here = random.randbytes(length)
    there = bytearray(here)
    for place in places:
        there[place % length] ^= 1
    mask = differing(there, GRAIN, piece_digests(here, GRAIN))
    assert is_mask(mask, length, GRAIN)
    offset = 4096
    extents, equal = extents_of(mask, offset, length, GRAIN)
    covered = sorted(extents + equal)
    assert [start for start, _ in covered] == [offset, *(start + size for start, size in covered[:-1])]
    assert sum(size for _, size in covered) == length
    expected = {at // GRAIN for at in range(length) if here[at] != there[at]}
    named = {at // GRAIN for start, size in extents for at in range(start - offset, start - offset + size)}
    assert named == expected
    for start, size in equal:
        assert here[start - offset : start - offset + size] == there[start - offset : start - offset + size]


@given(st.integers(1, GRAIN * MAX_PIECES), st.binary(max_size=20))
def test_a_mask_has_a_bit_for_each_piece_and_no_more(length: int, mask: bytes) -> None:
    pieces = pieces_of(length, GRAIN)
    fits = len(mask) == (pieces + 7) // 8 and not any(
        mask[bit // 8] >> bit % 8 & 1 for bit in range(pieces, 8 * len(mask)))
    assert is_mask(mask, length, GRAIN) == fits


@pytest.mark.parametrize("length", [1, GRAIN, GRAIN + 1, GRAIN * MAX_PIECES])
def test_equal_is_equal_everywhere(length: int) -> None:
    data = bytes(range(256)) * (length // 256 + 1)
    mask = differing(data[:length], GRAIN, piece_digests(data[:length], GRAIN))
    assert extents_of(mask, 0, length, GRAIN) == ([], [(0, length)])
