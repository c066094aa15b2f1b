"""The ring against a real kernel: data both ways, more calls than it has room for, and errors as numbers."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapcore import uring
from tapcore.driver import Env
from tapcore.uring import Iovec, Ring, open_ring

TIMEOUT_S = 20


@pytest.fixture
def ring(env: Env) -> Iterator[Ring]:
    ring = Ring(env.loop, 8)
    yield ring
    env.loop.run_until(lambda: not ring.in_flight, TIMEOUT_S)
    ring.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_what_is_written_is_read(env: Env, ring: Ring, fd: int) -> None:
    data = bytearray(random.Random(1).randbytes(10000))
    results: list[int] = []
    views = [memoryview(data)[:1], memoryview(data)[1:5000], memoryview(data)[5000:]]
    assert ring.write(fd, Iovec(views), 100, 0, results.append)
    ring.submit()
    env.loop.run_until(lambda: bool(results), TIMEOUT_S)
    target = bytearray(12000)
    assert ring.read(fd, Iovec([memoryview(target)]), 100, results.append)
    ring.submit()
    env.loop.run_until(lambda: len(results) == 2, TIMEOUT_S)
    assert results == [10000, 10000]
    assert target == data + bytes(2000)


def test_more_calls_than_there_is_room_for_are_refused_and_none_is_lost(env: Env, ring: Ring, fd: int) -> None:
    os.pwrite(fd, bytes(range(256)), 0)
    results: dict[int, int] = {}
    targets = [bytearray(1) for _ in range(256)]
    turns = 0
    begun = 0
    while begun < 256:
        if ring.read(fd, Iovec([memoryview(targets[begun])]), begun,
                     lambda result, number=begun: results.__setitem__(number, result)):  # type: ignore[misc]
            begun += 1
        else:
            ring.submit()
            turns += 1
            env.loop.turn(0.1)
        assert ring.in_flight <= ring.capacity
    ring.submit()
    env.loop.run_until(lambda: len(results) == 256, TIMEOUT_S)
    assert turns and set(results.values()) == {1}
    assert b"".join(targets) == bytes(range(256))


def test_a_failure_is_its_errno(env: Env, ring: Ring) -> None:
    results: list[int] = []
    assert ring.read(1 << 20, Iovec([memoryview(bytearray(1))]), 0, results.append)
    ring.submit()
    env.loop.run_until(lambda: bool(results), TIMEOUT_S)
    assert results == [-errno.EBADF]


def test_buffers_that_the_kernel_must_not_write_or_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Iovec([memoryview(b"x")])
    with pytest.raises(ValueError, match="not aligned"):
        Iovec([memoryview(bytearray(4096))[1:]], 511)


def test_where_the_kernel_has_none_there_is_none(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uring, "SYS_IO_URING_SETUP", 100000)
    assert open_ring(env.loop) is None
