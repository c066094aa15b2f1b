"""Disks of one guest over one made-up link: they switch together, in time, and their cap holds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from writelog.plan import Limits
from writelog.planner_group import GroupPlanner
from writelog.simulate import (
    BLOCK_BYTES,
    Idle,
    Load,
    Outcome,
    Rewrite,
    Scattered,
    Scene,
    Simulation,
    Wire,
    run_together,
)
from writelog.sync_simulate import MIB

LINK = 14.0 * MIB
SIZE = 64 * MIB
BLOCKS = SIZE // BLOCK_BYTES


def run(*loads: Load, sizes: tuple[int, ...] = (), **options: Any) -> list[Outcome]:
    limits = Limits(**options)
    wire, group = Wire(LINK, limits.rate), GroupPlanner(limits, [f"disk{number}" for number in range(len(loads))])
    outcomes = run_together([
        Simulation(Scene(size, LINK, load), limits, wire=wire, group=group, name=name)
        for name, load, size in zip(group.disks, loads, sizes or (SIZE,) * len(loads), strict=True)])
    for outcome in outcomes:
        assert outcome.switched and outcome.equal, outcome
        assert outcome.predicted_pause_s <= limits.downtime_s
        assert outcome.pause_s <= 1.1 * limits.downtime_s
        assert outcome.elapsed_s == pytest.approx(outcomes[0].elapsed_s, rel=0.01)
    return outcomes


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_they_switch_together_within_one_budget(seed: int) -> None:
    outcomes = run(Idle(), Scattered(BLOCKS, 2 * MIB, seed, 0.99), Rewrite(BLOCKS // 8, 1 * MIB))
    assert outcomes[0].extra_bytes == 0
    assert outcomes[0].elapsed_s >= 3 * SIZE / LINK


def test_a_small_disk_waits_for_a_large_one() -> None:
    small, large = run(Idle(), Idle(), sizes=(4 * MIB, 128 * MIB))
    assert small.extra_bytes == large.extra_bytes == 0
    assert large.elapsed_s <= 1.05 * 132 * MIB / LINK


def test_the_guest_is_slowed_down_where_it_writes_most() -> None:
    busy, quiet = run(Scattered(BLOCKS // 2, 1.25 * LINK, 1), Scattered(BLOCKS // 8, 0.05 * LINK, 2))
    assert busy.steps and busy.delayed_writes and not quiet.delayed_writes
    assert all("on disk0" in step and "on disk1" not in step for step in busy.steps)


@pytest.mark.parametrize("disks", [1, 3])
def test_the_rate_cap_holds_for_all_together(disks: int) -> None:
    """Bytes that were put on the link, over the time that it took, by the same clock."""
    cap = 0.4 * LINK
    outcomes = run(*(Scattered(BLOCKS // 8, 0.02 * LINK, number) for number in range(disks)), rate=cap)
    sent_bytes = sum(outcome.sent_bytes for outcome in outcomes)
    assert sent_bytes / outcomes[0].elapsed_s == pytest.approx(cap, rel=0.03)
    assert math.fsum(outcome.extra_bytes for outcome in outcomes) < 0.2 * sent_bytes
