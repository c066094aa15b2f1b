"""Guests that move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interop.guest import make_initramfs
from interop.moving import CHOOSE, SLOTS, WRITER, Begin, Move, Serve


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """For a guest with so many disks."""
    made: dict[int, Path] = {}

    def make(disks: int) -> Path:
        if disks not in made:
            script = WRITER.format(slots=SLOTS, choose=CHOOSE[disks])
            made[disks] = make_initramfs(tmp_path_factory.mktemp("guest"), script)
        return made[disks]

    return make


@pytest.fixture
def begin(tmp_path: Path, serve: Serve, initramfs: Callable[[int], Path]) -> Iterator[Begin]:
    """`begin(disks=1, *options of the QEMU at the destination)`: a guest that writes."""
    begun: list[Move] = []

    def start(disks: int = 1, *there: str) -> Move:
        begun.append(Move(tmp_path, serve, initramfs(disks), disks, *there))
        return begun[-1]

    yield start
    for move in begun:
        move.end()


@pytest.fixture
def move(begin: Begin) -> Move:
    return begin()


