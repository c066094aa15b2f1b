"""What goes through the ring, what does not, and that both do the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from contract.runner import Runner

from tapcore import ringfile
from tapcore.driver import Env
from tapcore.drivers.aio import Aio
from tapcore.request import BACKGROUND, FUA, READ, WRITE, Request
from tapcore.uring import Iovec, Ring

SIZE = 4 << 20


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets of what the ring was given."""
    offsets: list[int] = []
    push = Ring._push

    def note(self: Ring, opcode: int, fd: int, iov: Iovec, offset: int, *rest: object) -> bool:
        offsets.append(offset)
        return push(self, opcode, fd, iov, offset, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Ring, "_push", note)
    return offsets


def disk(env: Env, tmp_path: Path, options: str = "direct,") -> Runner:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return Runner(env, f"aio:{options}{path}")


def test_whole_blocks_go_through_the_ring_from_whatever_memory(
    env: Env, tmp_path: Path, taken: list[int]
) -> None:
    runner = disk(env, tmp_path)
    data = random.Random(2).randbytes(3 << 20)
    requests = [Request(WRITE, at, length, [memoryview(bytearray(b"x" + data[at : at + length]))[1:]], flags)
                for at, length, flags in ((0, 4096, 0), (65536, 131072, FUA), (1 << 20, 1 << 20, BACKGROUND))]
    assert runner.run(*requests) == [0, 0, 0]
    assert taken == [0, 65536, 1 << 20]
    for request in requests:
        end = request.offset + request.length
        assert runner.read(request.offset, request.length) == data[request.offset : end]
    runner.close()


def test_what_the_ring_cannot_take_is_done_all_the_same(env: Env, tmp_path: Path, taken: list[int]) -> None:
    runner = disk(env, tmp_path)
    before = runner.read(0, SIZE)
    taken.clear()
    assert runner.write(1, b"odd") == 0
    assert runner.write(0, bytes(3 << 20)) == 0
    assert runner.read(0, 5) == bytes(5)
    assert taken == []
    assert runner.read(3 << 20, 1 << 20) == before[3 << 20 :]
    runner.close()


def test_what_falls_short_is_done_again_by_a_worker_who_has_the_say(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = disk(env, tmp_path)
    done = ringfile.FileRing._done
    for result in (512, 0, -5):
        monkeypatch.setattr(ringfile.FileRing, "_done",
                            lambda self, request, _, result=result: done(self, request, result))
        assert runner.write(8192, bytes([result & 255]) * 4096) == 0
        monkeypatch.setattr(ringfile.FileRing, "_done", done)
        assert runner.read(8192, 4096) == bytes([result & 255]) * 4096
    runner.close()


def test_without_a_ring_workers_do_it(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ringfile, "open_ring", lambda loop: None)
    runner = disk(env, tmp_path)
    assert runner.write(4096, b"y" * 8192) == 0
    assert runner.read(4096, 8192) == b"y" * 8192
    assert isinstance(runner.head, Aio)
    runner.close()


def test_a_page_cache_that_has_it_needs_no_ring(env: Env, tmp_path: Path, taken: list[int]) -> None:
    runner = disk(env, tmp_path, "")
    runner.run(Request(READ, 0, 4096, [memoryview(bytearray(4096))], BACKGROUND))
    assert runner.write(0, b"z" * 4096) == 0
    assert runner.read(0, 4096) == b"z" * 4096
    assert taken == []
    runner.close()
