"""What the planner makes of what a sync has seen."""

from __future__ import annotations

import pytest

from writelog.backlog import Backlog
from writelog.plan import Action, Limits
from writelog.planner import Planner, Seen

SIZE = 1 << 30


def test_a_host_that_was_busy_at_the_greeting_is_not_held_to_it_for_ever() -> None:
    planner = Planner(Limits(downtime_s=0.3, patience_s=60, max_pause_s=10), Backlog(SIZE), 0.0)
    planner.greeted(0.5)

    def look(now_s: float) -> Action:
        planner.look(Seen(now_s=now_s, dirty_bytes=0, leased_bytes=0, todo_bytes=0, unacked_bytes=0,
                          applied_bytes=SIZE, applied_seq=9, committed_bytes=SIZE, written_bytes=0,
                          first_pass_done=True, flush_s=0.001, flush_bytes=SIZE))
        return planner.decide().action

    assert look(1.0) == Action.COPY
    assert planner.outlook.round_trip_s == pytest.approx(1.0)
    planner.window.answered(0.004)
    assert look(2.0) == Action.SWITCH
    assert planner.outlook.round_trip_s == pytest.approx(0.008)


def test_how_fast_the_ends_compare_says_nothing_of_the_link() -> None:
    """100 MB/s are found equal, and 1 MB/s is sent meanwhile; the link carries 10 MB/s."""
    planner = Planner(Limits(downtime_s=0.3, patience_s=60, max_pause_s=10), Backlog(SIZE), 0.0)
    planner.greeted(0.001)
    planner.window.answered(0.001)
    mb = 10**6

    def look(now_s: float, equal: int, sent: int, done: bool) -> Action:
        planner.look(Seen(now_s=now_s, dirty_bytes=20 * mb, leased_bytes=0, todo_bytes=mb, unacked_bytes=mb,
                          applied_bytes=sent * mb, applied_seq=int(10 * now_s) + 1, committed_bytes=0,
                          written_bytes=0, first_pass_done=done, equal_bytes=equal * mb))
        return planner.decide().action

    for second in range(10):
        assert look(second, 100 * second + 1, second, False) == Action.COPY
    assert planner.outlook.send_rate == pytest.approx(101 * mb)
    for tenth in range(1, 11):
        assert look(9 + tenth / 10, 901, 9 + tenth, True) == Action.COPY
    for outlook in (planner.prospect, planner.outlook):
        assert outlook.send_rate == pytest.approx(10 * mb)
    assert planner.prospect.pause_s == pytest.approx(2.2, abs=0.1)
