"""The planner: figures in, decision out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from writelog.dirtymap import CHUNK_BYTES
from writelog.heat import Spread
from writelog.plan import (
    SWEEP_STEP,
    Action,
    Improvement,
    Limits,
    Meter,
    Outlook,
    converges_s,
    decide,
    flush_estimate_s,
    settled_pause_s,
)

MB = 1_000_000
LIMITS = Limits(downtime_s=0.3, patience_s=60, max_pause_s=10)
CALM = Outlook(elapsed_s=5, first_pass_done=True, remaining_bytes=10 * MB, send_rate=100e6, dirty_rate=1e6,
               round_trip_s=0.01, flush_s=0.05, unimproved_s=1)


def test_switches_when_the_pause_fits() -> None:
    assert CALM.pause_s == pytest.approx(0.16)
    assert decide(CALM, LIMITS).action == Action.SWITCH


@pytest.mark.parametrize("change", [
    {"remaining_bytes": 26 * MB}, {"send_rate": 30e6}, {"round_trip_s": 0.2}, {"flush_s": 0.2},
])
def test_copies_on_when_it_does_not_fit(change: dict[str, Any]) -> None:
    assert decide(replace(CALM, **change), LIMITS).action == Action.COPY


def test_a_pause_that_becomes_shorter_is_waited_for() -> None:
    assert decide(replace(CALM, unimproved_s=0.2), LIMITS).action == Action.COPY
    short = replace(CALM, unimproved_s=0, remaining_bytes=0, flush_s=0)
    assert decide(short, LIMITS).action == Action.SWITCH


def test_an_unmeasured_rate_is_assumed() -> None:
    assert decide(replace(CALM, send_rate=None), LIMITS).action == Action.SWITCH
    assert decide(replace(CALM, send_rate=None, remaining_bytes=40 * MB), LIMITS).action == Action.COPY


def test_a_replica_that_has_shown_nothing_yet_is_waited_for() -> None:
    assert decide(replace(CALM, send_rate=None, is_untried=True), LIMITS).action == Action.COPY
    assert decide(replace(CALM, stalled_s=0.2), LIMITS).action == Action.COPY
    assert decide(replace(CALM, stalled_s=0.1), LIMITS).action == Action.SWITCH


def test_gives_up_when_the_replica_applies_nothing() -> None:
    for first_pass_done in (False, True):
        stalled = replace(CALM, first_pass_done=first_pass_done, stalled_s=61)
        decision = decide(stalled, LIMITS)
        assert decision.action == Action.GIVE_UP
        assert "applied nothing for 61 s, with 9.537 MiB to go" in decision.reason
        assert decide(replace(stalled, stalled_s=59), LIMITS).action == Action.COPY


def test_gives_up_when_it_does_not_converge_and_says_why() -> None:
    hopeless = replace(CALM, remaining_bytes=500 * MB, dirty_rate=120e6, unimproved_s=61)
    decision = decide(hopeless, LIMITS)
    assert decision.action == Action.GIVE_UP
    for figure in ("114.4 MiB/s are written", "95.37 MiB/s are sent", "476.8 MiB remain", "5.06 s"):
        assert figure in decision.reason
    assert "--downtime 6.1" in decision.hint
    assert decide(replace(hopeless, unimproved_s=59), LIMITS).action == Action.COPY
    assert decide(replace(hopeless, first_pass_done=False), LIMITS).action == Action.COPY
    assert hopeless.eta_s is None
    assert CALM.eta_s == pytest.approx(10 / 99)


def test_slows_the_guest_down_once_waiting_gains_little() -> None:
    outlook = replace(CALM, remaining_bytes=500 * MB, best_pause_s=3.0, can_escalate=True)
    assert decide(replace(outlook, dirty_rate=84e6), LIMITS).action == Action.COPY
    assert decide(replace(outlook, dirty_rate=86e6), LIMITS).action == Action.ESCALATE
    assert decide(replace(outlook, dirty_rate=86e6, can_escalate=False), LIMITS).action == Action.COPY
    assert decide(replace(outlook, dirty_rate=86e6, first_pass_done=False), LIMITS).action == Action.COPY


def test_once_slowed_down_it_is_to_be_over_soon() -> None:
    outlook = replace(CALM, elapsed_s=50, remaining_bytes=500 * MB, best_pause_s=0.1, can_escalate=True,
                      is_slowed=True, escalated_s=0.1)
    assert decide(replace(outlook, converges_s=4.1), LIMITS).action == Action.ESCALATE
    assert decide(replace(outlook, converges_s=3.9), LIMITS).action == Action.COPY


@given(st.lists(st.tuples(st.integers(1, 10**5), st.floats(0.001, 10)), min_size=1, max_size=5),
       st.floats(1e6, 1e9))
def test_a_sync_that_converges_settles_below_the_budget(groups: list[tuple[int, float]], send_rate: float) -> None:
    spread = Spread(groups)

    def bytes_after(elapsed_s: float) -> float:
        return spread.bytes_after(elapsed_s, CHUNK_BYTES)

    left_bytes = spread.chunks * CHUNK_BYTES
    if converges_s(bytes_after, left_bytes, send_rate, 0.01, 0.3) < math.inf:
        assert settled_pause_s(bytes_after, send_rate, 0.01) <= 0.3 * SWEEP_STEP**2
    slower = converges_s(bytes_after, left_bytes, send_rate / 2, 0.01, 0.3)
    assert converges_s(bytes_after, left_bytes, send_rate, 0.01, 0.3) <= slower


def test_gives_up_when_the_time_is_over_whatever_else() -> None:
    limits = replace(LIMITS, max_time_s=4)
    assert decide(CALM, limits).action == Action.GIVE_UP
    assert decide(replace(CALM, first_pass_done=False), limits).action == Action.GIVE_UP
    assert decide(replace(CALM, paused_s=0.1), limits).action == Action.GIVE_UP
    assert decide(replace(CALM, elapsed_s=3), limits).action == Action.SWITCH


def test_breaks_a_long_pause_off_and_gives_up_after_several() -> None:
    assert decide(replace(CALM, paused_s=9), LIMITS).action == Action.COPY
    assert decide(replace(CALM, paused_s=11), LIMITS).action == Action.RESUME
    assert decide(replace(CALM, failed_pauses=2), LIMITS).action == Action.SWITCH
    assert decide(replace(CALM, failed_pauses=3), LIMITS).action == Action.GIVE_UP


def test_a_flush_of_less_is_estimated_in_proportion() -> None:
    assert flush_estimate_s(2.0, 100, 25) == 0.5
    assert flush_estimate_s(2.0, 100, 1000) == 2.0
    assert flush_estimate_s(2.0, 0, 10) == 2.0


def test_improvement_counts_from_the_last_noticeable_one() -> None:
    improvement = Improvement()
    assert improvement.unimproved_s(10, 5.0) == 0
    assert improvement.unimproved_s(12, 4.9) == 2
    assert improvement.unimproved_s(15, 4.0) == 0
    assert improvement.unimproved_s(20, 6.0) == 5


def test_meter_measures_over_its_window() -> None:
    meter = Meter(2.0)
    assert meter.rate is None
    meter.feed(0, 0)
    assert meter.rate is None
    for second in range(1, 6):
        meter.feed(second, 100 * second)
    assert meter.rate == 100
    meter.feed(6, 500)
    meter.feed(7, 500)
    assert meter.rate == 0
