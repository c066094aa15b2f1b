"""A tapdisk is killed again and again while a guest writes and a client copies.

No acknowledged write is lost, what the copy lacks is dirty, and when only the process died, nothing else is.

    FAULT_ROUNDS=500 FAULT_SEED=7 pytest tests/faults

Half of the time the host "dies" with it: then shared memory is gone too, and the side-car counts. (What was not
flushed is not lost here: that is for tests/writelog/test_activity.py.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from faultworld import BLOCK_BYTES, World
from processes import Tapdisk

from tapcore.img.cli import main as img
from writelog.client import LogClient

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "6"))
SEED = int(os.environ.get("FAULT_SEED", "1"))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, Random(SEED))
    yield world
    world.close()


@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_killed_again_and_again(world: World) -> None:
    for number in range(ROUNDS):
        print(f"round {number} of seed {SEED}")
        world.run(world.random.uniform(0.02, 0.4), host_dies=world.random.random() < 0.5)
    assert world.counter > ROUNDS


@pytest.mark.parametrize("chain", ["qcow2", "vhd", "vmdk", "qcow2-log-only"])
@pytest.mark.parametrize("flushed", [False, True])
def test_what_a_copy_has_and_the_image_forgets_is_dirty(serve: Callable[..., Tapdisk], tmp_path: Path, chain: str,
                                                        flushed: bool) -> None:
    """An image's tables are in memory until a flush: kill -9 takes back what was written, also what was copied."""
    driver, _, has_no_sidecar = chain.partition("-")
    image = tmp_path / f"disk.{driver}"
    assert img(["create", "-f", {"vhd": "vpc"}.get(driver, driver), str(image), "64M"]) == 0
    text = f"vm=log:vm{',sidecar=none' if has_no_sidecar else ''}|{driver}:{image}"
    tapdisk = serve(text)
    with tapdisk.client() as guest, LogClient(tapdisk.run_dir / "log__vm.ctl") as log:
        base = log.fill()
        log.commit(log.get().lease)
        guest.write(0, b"0" * BLOCK_BYTES)
        guest.flush()
        guest.write(1 << 20, b"B" * BLOCK_BYTES)
        taken = log.get()
        assert (1 << 20, BLOCK_BYTES) in list(taken.extents)
        log.commit(taken.lease)
        assert list(log.peek()) == []
        if flushed:
            guest.flush()
    tapdisk.kill()
    tapdisk = serve(text)
    with tapdisk.client() as guest, LogClient(tapdisk.run_dir / "log__vm.ctl") as log:
        dirty = list(log.peek())
        assert log.stat().base == base
        if flushed:
            assert guest.read(1 << 20, BLOCK_BYTES) == b"B" * BLOCK_BYTES and dirty == []
        else:
            assert any(start <= 1 << 20 < start + length for start, length in dirty)
            assert sum(length for _, length in dirty) <= 2 * BLOCK_BYTES
