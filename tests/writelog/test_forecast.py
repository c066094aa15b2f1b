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
from writelog.forecast import forecast
from writelog.heat import Spread
from writelog.plan import Limits
from writelog.simulate import BLOCK_BYTES, Scattered, Scene, Simulation

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
