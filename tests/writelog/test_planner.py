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
