"""Heat: bitwise counters beside plain ones, and what is predicted from them."""

from __future__ import annotations

from random import Random

import pytest
from bitarray import bitarray
from hypothesis import given, settings
from hypothesis import strategies as st

from writelog.dirtymap import CHUNK_BYTES
from writelog.heat import HALF_LIFE_S, MAX_COUNT, WEIGHT_SHIFT, Heat, Spread

SAMPLE_S = 0.5
CHUNKS = 40


def touched(chunks: set[int], size: int = CHUNKS) -> bitarray:
    bits = bitarray(size, endian="little")
    bits.setall(0)
    for chunk in chunks:
        bits[chunk] = 1
    return bits


def class_of(heat: Heat, chunk: int) -> int:
    (found,) = [number for number, mask in enumerate(heat.classes()) if mask[chunk]]
    return found


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, CHUNKS - 1)), st.sampled_from([0.1, 0.5, 20.0])), max_size=80))
def test_planes_count_as_numbers_do(samples: list[tuple[set[int], float]]) -> None:
    heat = Heat(CHUNKS)
    counts = [0] * CHUNKS
    now_s = halved_s = 0.0
    for chunks, pause_s in samples:
        heat.feed(now_s, touched(chunks))
        while now_s - halved_s >= HALF_LIFE_S:
            halved_s += HALF_LIFE_S
            counts = [count // 2 for count in counts]
        for chunk in chunks:
            counts[chunk] += 1 << WEIGHT_SHIFT
            if counts[chunk] > MAX_COUNT:
                counts[chunk] = MAX_COUNT
        now_s += pause_s
    assert [class_of(heat, chunk) for chunk in range(CHUNKS)] == [count.bit_length() for count in counts]


def test_rates_are_about_those_of_the_writes() -> None:
    random = Random(1)
    heat = Heat(4000)
    rates = [0.0] * 1000 + [0.1] * 1000 + [0.5] * 1000 + [2.0] * 1000
    for number in range(80):
        heat.feed(number * SAMPLE_S, touched(
            {chunk for chunk, rate in enumerate(rates) if random.expovariate(1) < rate * SAMPLE_S}, 4000))
    assert heat.classes()[0].count() >= 1000
    assert heat.spread().touch_rate == pytest.approx(sum(rates), rel=0.2)
    distinct = sum(1 - 2.718281828 ** (-rate * 3) for rate in rates)
    assert heat.spread().bytes_after(3, CHUNK_BYTES) / CHUNK_BYTES == pytest.approx(distinct, rel=0.2)


def test_what_is_written_no_more_cools_down() -> None:
    heat = Heat(CHUNKS)
    for number in range(40):
        heat.feed(number * SAMPLE_S, touched({3}))
    hot = class_of(heat, 3)
    for number in range(40, 160):
        heat.feed(number * SAMPLE_S, touched({4}))
    assert class_of(heat, 3) < hot <= class_of(heat, 4) + 1


def test_cold_chunks_beside_warm_ones_are_not_the_coldest() -> None:
    heat = Heat(CHUNKS)
    heat.feed(0.0, touched({0, 9, 10, *range(24, 28)}))
    places = {chunk: number for number, mask in enumerate(heat.cold()) for chunk in mask.search(1)}
    assert (places[39], places[1], places[8], places[31]) == (0, 1, 2, 3)
    assert set(places) == set(range(CHUNKS)) - {0, 9, 10, *range(24, 28)}


def test_a_spread_without_writes_stays_clean() -> None:
    assert Spread([(1000, 0.0)]).bytes_after(100, CHUNK_BYTES) == 0
    assert Spread([(10, 1.0)]).bytes_after(100, 4096) == pytest.approx(10 * CHUNK_BYTES, rel=0.01)
