"""The rate cap that the syncs of a group share."""

from __future__ import annotations

import threading

import pytest

from tapcore.bucket import BURST_S
from writelog.sync_cap import Cap

THREADS, TAKES = 4, 5000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now_s = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    return now_s


def test_what_threads_take_at_the_same_time_all_counts(clock: list[float]) -> None:
    cap = Cap(1000.0)

    def take() -> None:
        for _ in range(TAKES):
            cap.take(3)
            cap.take(-2)

    threads = [threading.Thread(target=take) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cap.waits_s == pytest.approx(THREADS * TAKES / 1000 - BURST_S)


@pytest.mark.parametrize("syncs", [1, 3])
def test_bytes_over_its_own_clock_are_the_rate(clock: list[float], syncs: int) -> None:
    """Each sync sends a piece whenever it finds that it may."""
    cap, piece, sent = Cap(20e6), 512 << 10, 0
    while clock[0] < 30:
        for _ in range(syncs):
            if not cap.waits_s:
                cap.take(piece)
                sent += piece
        clock[0] += max(cap.waits_s, 1e-4)
    assert sent / clock[0] == pytest.approx(20e6, rel=0.02)


def test_a_cap_comes_goes_and_changes(clock: list[float]) -> None:
    cap = Cap(None)
    cap.take(1 << 30)
    assert cap.waits_s == 0
    cap.set_rate(1e6)
    cap.take(1 << 20)
    assert cap.waits_s == pytest.approx((1 << 20) / 1e6 - BURST_S)
    cap.set_rate(1e7)
    assert cap.waits_s < 0.11
    cap.set_rate(None)
    assert cap.waits_s == 0
