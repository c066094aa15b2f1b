"""Guests that move."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interop.guest import make_initramfs
from interop.hosts import Hosts
from interop.moving import CHOOSE, SLOTS, WRITER, Begin, Move, Serve
from interop.wire import Wire
from interop.wire import wire as make_wire


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
    """`begin(disks=1, *options of the QEMU at the destination, hosts=None)`: a guest that writes."""
    begun: list[Move] = []

    def start(disks: int = 1, *there: str, hosts: Hosts | None = None) -> Move:
        begun.append(Move(tmp_path, serve, initramfs(disks), disks, *there, hosts=hosts))
        return begun[-1]

    yield start
    for move in begun:
        move.end()


@pytest.fixture
def wire() -> Iterator[Wire]:
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    with make_wire() as made:
        yield made


@pytest.fixture
def move(begin: Begin) -> Move:
    return begin()


