"""A tapdisk is killed again and again while a guest writes and a client copies.

No acknowledged write is lost, what the copy lacks is dirty, and when only the process died, nothing else is.

    FAULT_ROUNDS=500 FAULT_SEED=7 pytest tests/faults

Half of the time the host "dies" with it: then shared memory is gone too, and the side-car counts. (What was not
flushed is not lost here: that is for tests/writelog/test_activity.py.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from faultworld import World

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
