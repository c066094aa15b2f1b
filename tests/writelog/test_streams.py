"""Streams: what is foreseen of them, and that all of a stream is foreseen."""

from __future__ import annotations

import math

from bitarray import bitarray
from bitarray.util import zeros
from hypothesis import given, settings
from hypothesis import strategies as st

from writelog.streams import HEAD_S, MAX_STRETCHES, MIN_STRETCH, Streams, long_runs, runs_of

SAMPLE_S = 0.5
CHUNKS = 1000


def touched(*spans: tuple[int, int], size: int = CHUNKS) -> bitarray:
    bits = zeros(size, "little")
    for first, stop in spans:
        bits[first:stop] = 1
    return bits


def fed(*samples: bitarray) -> Streams:
    streams = Streams(CHUNKS)
    for number, bits in enumerate(samples):
        streams.feed(number * SAMPLE_S, SAMPLE_S, bits)
    return streams


def behind(streams: Streams, now_s: float, within_s: float = math.inf) -> list[tuple[float, tuple[int, int]]]:
    return [(item.wait_s, item.span) for item in streams.foreseen(now_s, within_s) if not item.is_ahead]


def test_the_latest_of_a_stream_comes_first() -> None:
    streams = fed(touched((0, 50)), touched((49, 100)), touched((99, 150)))
    assert [span for _, span in behind(streams, 1.0)] == [(100, 150), (50, 100), (0, 50)]


def test_the_way_ahead_is_as_long_as_the_time_left_and_ends_at_the_head() -> None:
    streams = fed(touched((0, 50)), touched((49, 100)))
    ahead = [item for item in streams.foreseen(SAMPLE_S, 3.0) if item.is_ahead]
    assert ahead[-1].span[0] == 100
    assert ahead[0].span[1] == 100 + 3 * 50 / SAMPLE_S
    assert [item.span for item in ahead] == sorted((item.span for item in ahead), reverse=True)
    assert all(item.wait_s <= 3.0 for item in ahead)


def test_a_stream_that_stops_has_no_way_ahead() -> None:
    streams = fed(touched((0, 50)))
    streams.feed(HEAD_S + SAMPLE_S, HEAD_S, touched())
    assert not any(item.is_ahead for item in streams.foreseen(HEAD_S, 3.0))
    assert behind(streams, HEAD_S)


def test_a_stream_that_goes_round_is_expected_again() -> None:
    streams = fed(*(touched((first, first + 100)) for first in (0, 100, 200, 0, 100)))
    assert behind(streams, 4 * SAMPLE_S) == [
        (math.inf, (200, 300)), (3 * SAMPLE_S, (100, 200)), (2 * SAMPLE_S, (0, 100))]
    assert [wait_s for wait_s, _ in behind(streams, 4 * SAMPLE_S, SAMPLE_S)] == [math.inf] * 3


def test_what_is_hot_or_short_is_no_stream() -> None:
    assert not fed(touched((5, 5 + MIN_STRETCH - 1))).behind.any()
    assert not fed(*[touched((100, 200))] * 3).behind.any()


def test_the_oldest_is_forgotten() -> None:
    size = 2 * MIN_STRETCH * (MAX_STRETCHES + 100)
    streams = Streams(size)
    for number in range(MAX_STRETCHES + 100):
        first = 2 * MIN_STRETCH * number
        streams.feed(number * SAMPLE_S, SAMPLE_S, touched((first, first + MIN_STRETCH), size=size))
    assert streams.behind.count() == MAX_STRETCHES * MIN_STRETCH
    assert not streams.behind[: 100 * MIN_STRETCH].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 990), st.integers(1, 80)), max_size=6), max_size=20),
       st.floats(0, 100))
def test_all_that_is_behind_is_foreseen_once(samples: list[list[tuple[int, int]]], within_s: float) -> None:
    streams = fed(*(touched(*((first, first + count) for first, count in sample)) for sample in samples))
    foreseen = streams.foreseen(len(samples) * SAMPLE_S, within_s)
    assert [item.wait_s for item in foreseen] == sorted((item.wait_s for item in foreseen), reverse=True)
    seen = zeros(CHUNKS, "little")
    for item in foreseen:
        first, stop = item.span
        assert 0 <= first < stop <= CHUNKS
        if not item.is_ahead:
            assert not seen[first:stop].any()
            seen[first:stop] = 1
    assert not (streams.behind & ~seen).any()


@given(st.lists(st.booleans(), max_size=60))
def test_long_runs_are_those_of_runs(flags: list[bool]) -> None:
    bits = bitarray(flags, endian="little")
    long = [(first, stop) for first, stop in runs_of(bits) if stop - first >= MIN_STRETCH]
    assert runs_of(long_runs(bits)) == long
