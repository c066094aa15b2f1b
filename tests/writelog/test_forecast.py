"""What is forecast, beside what the simulator then finds; and the command on a disk that is written to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from threading import Event, Thread

import pytest
from sync_rig import SIZE_BYTES, Rig

from tapcore.driver import Env
from writelog import sync
from writelog.dirtymap import CHUNK_BYTES
from writelog.forecast import forecast, together
from writelog.heat import Spread
from writelog.plan import Limits
from writelog.planner_group import GroupPlanner
from writelog.simulate import BLOCK_BYTES, Scattered, Scene, Simulation, Wire, run_together

MIB = 1 << 20
LINK = 14.0 * MIB
CHUNKS = 192 * MIB // CHUNK_BYTES


def test_an_idle_disk_takes_what_the_link_takes() -> None:
    found = forecast(140 * MIB, Spread([(CHUNKS, 0.0)]), CHUNK_BYTES, LINK, 0.05, 0.3)
    assert (found.converges, found.extra_bytes, found.total_s) == (True, 0, 10)
    assert found.pause_s == pytest.approx(0.05)


@pytest.mark.parametrize(("share", "converges"), [(0.3, True), (1.25, False)])
def test_it_foretells_what_the_simulator_finds(share: float, converges: bool) -> None:
    """Scattered over a quarter of the disk, at a share of the link's rate."""
    size_bytes, rate = CHUNKS * CHUNK_BYTES, share * LINK
    hot = CHUNKS // 4
    found = forecast(size_bytes, Spread([(hot, rate / BLOCK_BYTES / hot), (CHUNKS - hot, 0.0)]), BLOCK_BYTES,
                     LINK, 0.05, 0.3)
    load = Scattered(size_bytes // 4 // BLOCK_BYTES, rate, 1)
    outcome = Simulation(Scene(size_bytes, LINK, load), Limits(may_throttle=False, patience_s=5)).run()
    assert found.converges == outcome.switched == converges
    if converges:
        assert found.total_s == pytest.approx(outcome.elapsed_s, rel=0.25)
        assert found.pause_s <= 0.3


@pytest.mark.parametrize(("disks", "converges"), [(2, True), (6, False)])
def test_disks_together_are_forecast_as_the_simulator_finds_them(disks: int, converges: bool) -> None:
    """Each writes a fifth of the link's rate, scattered over a quarter of its own."""
    rate, chunks = 0.2 * LINK, CHUNKS // 4
    hot, size_bytes = chunks // 4, chunks * CHUNK_BYTES
    spread = Spread([(hot, rate / BLOCK_BYTES / hot), (chunks - hot, 0.0)])
    found = forecast(disks * size_bytes, together([(spread, BLOCK_BYTES)] * disks), CHUNK_BYTES, LINK, 0.05, 0.3)
    limits = Limits(may_throttle=False, patience_s=5)
    wire, group = Wire(LINK, None), GroupPlanner(limits, [str(number) for number in range(disks)])
    outcomes = run_together([
        Simulation(Scene(size_bytes, LINK, Scattered(size_bytes // 4 // BLOCK_BYTES, rate, number)), limits,
                   wire=wire, group=group, name=str(number)) for number in range(disks)])
    assert found.converges == outcomes[0].switched == converges
    if converges:
        assert found.total_s == pytest.approx(outcomes[0].elapsed_s, rel=0.25)


def test_touches_of_several_disks_are_of_whole_chunks() -> None:
    first, second = Spread([(10, 8.0), (20, 2.0)]), Spread([(5, 1.0)])
    both = together([(first, CHUNK_BYTES / 4), (second, CHUNK_BYTES)])
    assert both.groups == [(20, 0.5), (5, 1.0), (10, 2.0)]
    for elapsed_s in (0.1, 1.0, 10.0):
        assert both.bytes_after(elapsed_s, CHUNK_BYTES) == pytest.approx(
            first.bytes_after(elapsed_s, CHUNK_BYTES / 4) + second.bytes_after(elapsed_s, CHUNK_BYTES))


def test_a_longer_pause_makes_it_converge() -> None:
    spread = Spread([(1000, 5.0)])
    tight, loose = (forecast(100 * MIB, spread, CHUNK_BYTES, 50 * MIB, 0.05, budget_s) for budget_s in (0.3, 3))
    assert (tight.converges, loose.converges) == (False, True)
    assert tight.pause_s > 0.3


@pytest.fixture
def rig(env: Env, tmp_path: Path) -> Iterator[Rig]:
    image = tmp_path / "disk.img"
    image.write_bytes(Random(1).randbytes(SIZE_BYTES // 2) + bytes(SIZE_BYTES // 2))
    with image.open("r+b") as file:
        file.truncate(SIZE_BYTES // 2)
        file.truncate(SIZE_BYTES)
    rig = Rig(env, image)
    yield rig
    rig.close()


def test_the_command_watches_and_changes_nothing(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    done = Event()

    def write() -> None:
        with rig.guest() as guest:
            while not done.is_set():
                guest.write(0, bytes(4096))

    before_bytes = rig.dirty_bytes()
    guest = Thread(target=write, daemon=True)
    guest.start()
    options = ["plan", "--run-dir", str(rig.env.run_dir), "--rate", "100M", "--for", "0.6", "vm1"]
    try:
        assert sync.main([*options, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert sync.main(options) == 0
    finally:
        done.set()
        guest.join(10)
    assert found["write_rate"] > 0
    assert found["full"]["first_bytes"] == SIZE_BYTES // 2
    assert found["full"]["converges"]
    assert "a full copy: 6 MiB at 100 MiB/s" in capsys.readouterr().out
    assert rig.dirty_bytes() - before_bytes <= 4096
