"""The token bucket: what it lets through in the long run, and at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapcore.bucket import BURST_S, Bucket


@given(st.floats(1e3, 1e9), st.lists(st.tuples(st.integers(0, 1 << 21), st.floats(0, 0.2)), max_size=80))
def test_never_more_than_the_rate_and_one_burst(rate: float, steps: list[tuple[int, float]]) -> None:
    bucket = Bucket(rate, 100.0)
    now_s, passed, last = 100.0, 0, 0
    for amount, pause_s in steps:
        now_s += pause_s
        if not bucket.wait_s(now_s):
            bucket.take(amount)
            passed += amount
            last = amount
        assert passed - last <= (now_s - 100.0 + BURST_S) * rate * (1 + 1e-9)


def test_the_rate_holds_on_average() -> None:
    bucket = Bucket(1e6, 0.0)
    now_s, passed = 0.0, 0
    while now_s < 10:
        if wait_s := bucket.wait_s(now_s):
            now_s += wait_s
            continue
        bucket.take(300_000)
        passed += 300_000
    assert passed == pytest.approx(10e6, rel=0.04)


def test_a_new_rate_counts_from_now_on() -> None:
    bucket = Bucket(1000, 0.0)
    bucket.take(1050)
    assert bucket.wait_s(0.0) == pytest.approx(1.0)
    bucket.set_rate(10, 0.5)
    assert bucket.wait_s(0.5) == pytest.approx(50.0)


@pytest.mark.parametrize("takers", [1, 3, 8])
@pytest.mark.parametrize("amount", [4096, 512 << 10])
def test_the_rate_holds_for_all_who_share_it(takers: int, amount: int) -> None:
    """They find it open at the same moment, and none knows of the others; over its clock they keep to the rate."""
    bucket = Bucket(40e6, 0.0)
    now_s, passed = 0.0, 0
    while now_s < 20:
        if not bucket.wait_s(now_s):
            for _ in range(takers):
                bucket.take(amount)
                passed += amount
        now_s += max(bucket.wait_s(now_s), 1e-5)
    assert passed / now_s == pytest.approx(40e6, rel=0.02)
