"""The planner over a made-up disk, link and clock: it ends, in time, and loses nothing; or says why not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from writelog.plan import Limits
from writelog.simulate import BLOCK_BYTES, Idle, Load, Outcome, Rewrite, Scattered, Scene, Simulation
from writelog.sync_simulate import LOADS, MIB, main

LINK = 14 * MIB
SIZE = 192 * MIB
BLOCKS = SIZE // BLOCK_BYTES


def run(load: Load, by_heat: bool = True, size_bytes: int = SIZE, link: float = LINK, **limits: Any) -> Outcome:
    outcome = Simulation(Scene(size_bytes, link, load), Limits(**limits), by_heat).run()
    if outcome.switched:
        assert outcome.equal, "a write was lost"
        assert outcome.predicted_pause_s <= limits.get("downtime_s", 0.3)
        assert outcome.pause_s <= 1.1 * limits.get("downtime_s", 0.3)
    else:
        assert outcome.reason
    return outcome


def test_an_idle_disk_moves_at_the_speed_of_the_link() -> None:
    outcome = run(Idle())
    assert (outcome.switched, outcome.extra_bytes) == (True, 0)
    assert outcome.elapsed_s <= 1.02 * SIZE / LINK


def test_scattered_popular_blocks_cost_little_at_full_size() -> None:
    size_bytes, link = 4096 * MIB, 112.0 * MIB
    outcome = run(LOADS["zipf"](size_bytes // BLOCK_BYTES, 1, link, 1), True, size_bytes, link)
    assert outcome.extra_percent <= 5.0
    assert outcome.pause_s <= 0.1


@pytest.mark.parametrize(("name", "most_percent"), [("moving", 15), ("rewrite", 5)])
def test_what_is_written_next_is_sent_last_at_full_size(name: str, most_percent: float) -> None:
    size_bytes, link = 4096 * MIB, 112.0 * MIB
    outcome = run(LOADS[name](size_bytes // BLOCK_BYTES, 1, link, 1), True, size_bytes, link)
    assert outcome.extra_percent <= most_percent
    assert outcome.pause_s <= 0.1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("name", "most_percent"), [("moving", 22), ("rewrite", 9)])
def test_the_order_by_heat_is_better(name: str, most_percent: float, seed: int) -> None:
    size_bytes, link = 256 * MIB, 7 * MIB
    by_heat, by_address = (
        run(LOADS[name](size_bytes // BLOCK_BYTES, 0.0625, link, seed), order, size_bytes, link)
        for order in (True, False))
    assert by_heat.switched and by_address.switched
    assert by_heat.extra_percent <= min(most_percent, by_address.extra_percent)
    assert by_heat.pause_s <= 0.1


def test_a_stream_that_was_seen_before_costs_little_more_than_its_own_pace() -> None:
    cold_only = run(Rewrite(BLOCKS // 16, 4 * MIB))
    assert cold_only.extra_percent <= 10


@pytest.mark.parametrize(("scale", "seed", "most_delayed"), [(1.0, 1, 10), (0.0625, 2, 13), (0.0625, 3, 13)])
def test_a_guest_that_writes_faster_than_the_link_is_slowed_down_late_and_for_a_short_time(
    scale: float, seed: int, most_delayed: float
) -> None:
    """A slow link carries few writes between two ticks of this clock, so that nearly all of them wait a little."""
    size_bytes, link = int(4096 * scale) * MIB, 112 * MIB * scale
    outcome = run(LOADS["uniform"](size_bytes // BLOCK_BYTES, scale, link, seed), True, size_bytes, link)
    assert outcome.switched
    assert outcome.delayed_percent <= most_delayed
    assert outcome.extra_percent <= 45
    rates = [float(step.split()[-2]) for step in outcome.steps]
    assert all(0.85 <= after / before < 1 for before, after in pairwise(rates))
    assert 0.95 * link / 2 / MIB <= rates[-1]


def test_without_leave_to_slow_the_guest_down_it_gives_up_with_a_reason() -> None:
    outcome = run(Scattered(BLOCKS // 4, 1.25 * LINK, 1), may_throttle=False, patience_s=10)
    assert (outcome.switched, outcome.steps, outcome.delayed_writes) == (False, [], 0)
    assert "does not converge" in outcome.reason


def test_at_the_floor_it_gives_up_and_says_what_was_done() -> None:
    outcome = run(Scattered(BLOCKS // 4, 1.25 * LINK, 1), throttle_floor=1.2 * LINK, patience_s=10)
    assert not outcome.switched
    assert "the guest is slowed down to 16.8 MiB/s" in outcome.reason


def test_a_cap_of_its_own_is_raised_before_the_guest_is_touched() -> None:
    load = Scattered(BLOCKS // 4, 0.5 * LINK, 1)
    outcome = run(load, rate=0.4 * LINK, max_rate=LINK)
    assert outcome.switched
    assert outcome.steps and not any("slowed" in step for step in outcome.steps)
    kept = run(Scattered(BLOCKS // 8, 0.1 * LINK, 1), rate=0.4 * LINK, max_rate=LINK)
    assert (kept.switched, kept.steps) == (True, [])
    assert kept.elapsed_s >= SIZE / (0.4 * LINK)


def test_a_budget_that_cannot_be_met_is_not_met() -> None:
    outcome = run(Scattered(BLOCKS, 0.5 * LINK, 1), downtime_s=0.01, patience_s=5)
    assert not outcome.switched


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scale", "0.02", "idle", "zipf"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all("switched" in line for line in lines[2:])
    with pytest.raises(SystemExit):
        main(["nosuch"])
