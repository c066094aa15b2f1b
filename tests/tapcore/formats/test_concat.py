"""Disks made of parts of others."""

from __future__ import annotations

import errno
import random

from contract.runner import Runner
from support import Manual

from tapcore.driver import Env, OpenFlag
from tapcore.formats.concat import Concat, Window
from tapcore.request import DISCARD, FLUSH, READ, STATUS, WRITE, Request

SIZES = (1000, 512, 3000)
TOTAL = sum(SIZES)


class Joined(Concat):
    """`joined:` three manual disks."""

    name = "joined"

    def __init__(self, env: Env, params: str, flags: OpenFlag) -> None:
        parts = [Manual(env, str(size), flags) for size in SIZES]
        for part in parts:
            part.open()
        super().__init__(env, flags, parts)
        self.manual = parts

    def open(self) -> None:
        pass


def make(env: Env, early: bool) -> tuple[Runner, list[Manual]]:
    runner = Runner(env, "joined:")
    assert isinstance(runner.head, Joined)
    for part in runner.head.manual:
        part.early = early
    return runner, runner.head.manual


def test_early_it_is_one_disk(env: Env) -> None:
    runner, _ = make(env, early=True)
    disk, rng = bytearray(TOTAL), random.Random(1)
    for _ in range(200):
        offset = rng.randrange(TOTAL)
        length = rng.randrange(1, TOTAL - offset + 1)
        cuts = [rng.randrange(length) for _ in range(3)]
        assert runner.read(offset, length, cuts=cuts) == disk[offset : offset + length]
        data = rng.randbytes(length)
        assert runner.write(offset, data, cuts=cuts) == 0
        disk[offset : offset + length] = data
    assert b"".join(bytes(part.data) for part in runner.head.manual) == disk  # type: ignore[attr-defined]
    assert runner.flush() == 0
    assert runner.status(100, TOTAL - 100) == [(TOTAL - 100, 0)]
    runner.close()


def test_late_parts_end_one_request_in_any_order(env: Env) -> None:
    runner, parts = make(env, early=False)
    data = random.Random(2).randbytes(2000)
    write = Request(WRITE, 800, 2000, [memoryview(data)])
    runner.start(write)
    for number, left in ((2, 2), (0, 1), (1, 0)):
        assert parts[number].finish() == 1
        assert runner.late == (0 if left else 1)
    read = Request(READ, 800, 2000, [memoryview(bytearray(2000))])
    status = Request(STATUS, 990, 600)
    flush = Request(FLUSH)
    runner.start(read, status, flush)
    for part in parts:
        part.finish()
    runner.wait()
    assert b"".join(read.iov) == data
    assert status.extents == [(600, 0)]
    runner.close()


def test_an_error_of_one_part_is_the_request_s(env: Env) -> None:
    runner, parts = make(env, early=False)
    parts[1].errors.append(errno.ENOSPC)
    parts[2].early = True
    request = Request(DISCARD, 0, TOTAL)
    runner.start(request)
    for part in parts:
        part.finish()
    runner.wait()
    assert request.error == errno.ENOSPC
    runner.close()


def test_only_parts_that_have_something_are_submitted(env: Env) -> None:
    runner, parts = make(env, early=True)
    before = [part.submits for part in parts]
    runner.read(1000, 10)
    assert [part.submits for part in parts] == [before[0], before[1] + 1, before[2]]
    runner.close()


def test_more_parts_than_calls_can_be_nested(env: Env) -> None:
    parts = [Manual(env, "512", OpenFlag.NONE) for _ in range(3000)]
    for part in parts:
        part.open()
        part.early = True
    disk = Concat(env, OpenFlag.NONE, parts)
    request = Request(WRITE, 0, 3000 * 512, [memoryview(bytes(3000 * 512))])
    assert disk.queue_write(request) and not request.error
    quiet: list[bool] = []
    disk.quiesce(lambda: quiet.append(True))
    assert quiet == [True]
    disk.close()
    assert all(part.closed for part in parts)


def test_a_window_is_a_disk_of_its_own(env: Env) -> None:
    lower = Manual(env, "4096", OpenFlag.NONE)
    lower.open()
    lower.data[:] = random.Random(3).randbytes(4096)
    window = Window(lower, 1000, 500)
    assert window.info.size_bytes == 500
    view = memoryview(bytearray(500))
    done: list[Request] = []
    request = Request(READ, 0, 500, [view], done=done.append)
    assert not window.queue_read(request)
    window.submit()
    lower.finish()
    assert done == [request] and view == lower.data[1000:1500]
    window.close()
    assert lower.closed
