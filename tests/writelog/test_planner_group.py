"""What a group of disks makes of what each of them has seen."""

from __future__ import annotations

from itertools import pairwise

import pytest

from writelog.backlog import Backlog
from writelog.plan import Action, Limits
from writelog.planner import Planner, Seen
from writelog.planner_group import GroupPlanner

SIZE = 1 << 30
MIB = 1 << 20
LOOK_S = 0.1
NAMES = ("a", "b", "c")


class Disks:
    """Syncs that have sent for so long that their rates are known, at one time."""

    def __init__(self, limits: Limits) -> None:
        self.group = GroupPlanner(limits, NAMES)
        self.planners = {name: Planner(limits, Backlog(SIZE), 0.0, self.group, name) for name in NAMES}
        for planner in self.planners.values():
            planner.greeted(0.001)
        self.now_s = 0.0
        self.applied = dict.fromkeys(NAMES, 0)
        self.written = dict.fromkeys(NAMES, 0)

    def look(self, dirty: dict[str, int] | None = None, rate: float = 10 * MIB,
             writes: dict[str, float] | None = None) -> dict[str, Action]:
        """All look, a while later, in which each has sent at `rate`; `dirty` bytes are left."""
        self.now_s += LOOK_S
        actions = {}
        for name, planner in self.planners.items():
            self.applied[name] += int(rate * LOOK_S)
            self.written[name] += int((writes or {}).get(name, 0) * LOOK_S)
            planner.window.answered(0.001)
            planner.look(self.seen(name, (dirty or {}).get(name, 0)))
            actions[name] = planner.decide().action
        return actions

    def seen(self, name: str, dirty_bytes: int) -> Seen:
        return Seen(now_s=self.now_s, dirty_bytes=dirty_bytes, leased_bytes=0, todo_bytes=0, unacked_bytes=1,
                    applied_bytes=self.applied[name], applied_seq=int(self.now_s * 10), committed_bytes=0,
                    written_bytes=self.written[name], first_pass_done=True)


def test_what_all_have_left_goes_over_one_link() -> None:
    """Each disk alone would fit into the budget; all together do not."""
    disks = Disks(Limits(downtime_s=0.3))
    each = dict.fromkeys(NAMES, 5 * MIB)
    for _ in range(30):
        actions = disks.look(each)
    assert set(actions.values()) == {Action.COPY}
    outlook = disks.group.outlook
    assert outlook is not None and outlook.send_rate == pytest.approx(30 * MIB, rel=0.05)
    assert outlook.pause_s == pytest.approx(0.5, rel=0.05)
    for _ in range(10):
        actions = disks.look(dict.fromkeys(NAMES, MIB))
    assert set(actions.values()) == {Action.SWITCH}


def test_a_disk_that_is_ready_waits_for_the_others() -> None:
    disks = Disks(Limits(downtime_s=0.3))
    for _ in range(30):
        actions = disks.look({"c": 500 * MIB})
    assert set(actions.values()) == {Action.COPY}


def test_nobody_judges_while_one_is_lost() -> None:
    disks = Disks(Limits(downtime_s=0.3, patience_s=3))
    for _ in range(3):
        assert set(disks.look().values()) <= {Action.COPY, Action.SWITCH}
    disks.planners["b"].start_over()
    for _ in range(20):
        disks.now_s += 0.5
        disks.planners["a"].look(disks.seen("a", 100 * MIB))
        assert disks.planners["a"].decide().action is Action.COPY
    for _ in range(10):
        actions = disks.look()
    assert set(actions.values()) == {Action.SWITCH}


def test_the_cap_goes_up_once_for_all_then_the_busiest_is_slowed_down() -> None:
    limits = Limits(downtime_s=0.1, rate=30.0 * MIB, max_rate=33.0 * MIB)
    disks = Disks(limits)
    left = dict.fromkeys(NAMES, 50 * MIB)
    writes = {"a": 20.0 * MIB, "b": 4.0 * MIB}
    rates, throttles = [], []
    told = dict.fromkeys(NAMES, 0)
    for _ in range(800):
        for name, action in disks.look(left, writes=writes).items():
            told[name] += action is Action.ESCALATE
        rates.append(disks.group.rate)
        throttles.append(disks.planners["a"].throttle)
    assert set(rates) == {30 * MIB, 33 * MIB}, "one step, though three have seen it"
    assert len(set(told.values())) == 1, "each heard of each step"
    known = [throttle for throttle in throttles if throttle is not None]
    assert known == sorted(known, reverse=True) and len(set(known)) > 2
    assert all(after >= 0.89 * before for before, after in pairwise(known)), "one step at a time, though three ask"
    assert known[-1] + writes["b"] == pytest.approx(15 * MIB, rel=0.05), "the guest at half of what is sent"
    assert disks.planners["b"].throttle is None and disks.planners["c"].throttle is None
    assert "slowed down to" in disks.group.measures() and "on a" in disks.group.measures()


def test_limits_are_set_once_for_all() -> None:
    disks = Disks(Limits(rate=10.0 * MIB, max_rate=20.0 * MIB))
    limits = Limits(rate=5.0 * MIB, max_rate=20.0 * MIB)
    disks.group.set_limits(limits)
    disks.group.rate = 6.0 * MIB
    disks.group.set_limits(limits)
    assert disks.group.rate == 6 * MIB, "each sync says it"
    disks.look()
    assert all(planner.group is disks.group for planner in disks.planners.values())


def test_it_gives_up_for_all_with_the_figures_of_all() -> None:
    disks = Disks(Limits(downtime_s=0.1, patience_s=3, may_throttle=False))
    decision = None
    for _ in range(100):
        disks.look(dict.fromkeys(NAMES, 50 * MIB))
        decision = disks.planners["b"].decide()
    assert decision is not None and decision.action is Action.GIVE_UP
    assert "150 MiB remain" in decision.reason and "all disks together" in decision.reason
