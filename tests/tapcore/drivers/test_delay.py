"""delay: late, in the order of time, and undone until then."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.runner import Runner

from tapcore.driver import Env
from tapcore.drivers.delay import Delay
from tapcore.errors import ChainError
from tapcore.loop import Loop
from tapcore.request import BACKGROUND, FLUSH, READ, WRITE, Request
from tapcore.workers import Workers


class Clock(Loop):
    """A loop whose time is set by the test."""

    now_s = 50.0

    def time_s(self) -> float:
        return self.now_s

    def pass_ms(self, milliseconds: float) -> None:
        self.now_s += milliseconds / 1000
        self.turn(0)


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Clock]:
    clock = Clock()
    yield clock
    clock.close()


def open_disk(clock: Clock, text: str) -> Runner:
    return Runner(Env(clock, Workers(clock, 2)), text)


def test_a_delayed_write_has_not_happened_until_it_has(clock: Clock) -> None:
    disk = open_disk(clock, "delay:write=10|ram:1M")
    disk.start(Request(WRITE, 0, 3, [memoryview(b"new")]))
    clock.pass_ms(9)
    assert disk.late == 0 and disk.read(0, 3) == bytes(3)
    clock.pass_ms(2)
    assert disk.late == 1 and disk.read(0, 3) == b"new" and disk.early == 2
    disk.close()


def test_each_op_has_its_own_delay_and_all_is_for_the_others(clock: Clock) -> None:
    disk = open_disk(clock, "delay:all=5,read=20,write=0|ram:1M")
    read, flush = Request(READ, 0, 3, [memoryview(bytearray(3))]), Request(FLUSH)
    disk.start(read, flush, Request(WRITE, 0, 3, [memoryview(b"new")]))
    assert disk.early == 1
    clock.pass_ms(6)
    assert disk.late == 1
    clock.pass_ms(15)
    assert disk.late == 2 and bytes(read.iov[0]) == b"new"
    disk.close()


def test_jitter_is_seeded_and_lets_requests_overtake(clock: Clock) -> None:
    def order(seed: int) -> list[int]:
        disk = open_disk(clock, f"delay:all=1,jitter=50,seed={seed}|ram:1M")
        ended: list[int] = []

        def done(request: Request) -> None:
            ended.append(request.cookie)
            disk.done(request)

        for number in range(8):
            request = Request(FLUSH)
            request.cookie = number
            disk.start(request)
            request.done = done
        for _ in range(60):
            clock.pass_ms(1)
        disk.close()
        return ended

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(8)) != order(1)


def test_what_goes_down_late_may_end_later_still(env: Env, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * 4096)
    disk = Runner(env, f"delay:all=0.1|aio:{image}")
    assert disk.read(0, 4096, flags=BACKGROUND) == b"x" * 4096
    assert disk.flush() == 0 and disk.write(0, b"y" * 512) == 0
    assert (disk.early, disk.late) == (0, 3)
    disk.close()


def test_errors_come_through(clock: Clock) -> None:
    disk = open_disk(clock, "delay:all=1|error:|ram:1M")
    flush = Request(FLUSH)
    disk.start(flush)
    clock.pass_ms(2)
    assert disk.late == 1 and flush.error == errno.EIO
    disk.close()


def test_delays_change_at_any_time(clock: Clock) -> None:
    disk = open_disk(clock, "delay:|ram:1M")
    delay = disk.chain.head
    assert isinstance(delay, Delay)
    disk.start(Request(FLUSH))
    delay.delays_s[FLUSH] = 1
    disk.start(Request(FLUSH))
    assert disk.early == 1
    clock.pass_ms(1001)
    assert disk.late == 1
    disk.close()


@pytest.mark.parametrize("params, message", [
    ("10", "unknown option '10'; options of delay: read, write, flush, discard, zeroes, status, all, jitter, "),
    ("read=slow", "read 'slow' is not a number"),
    ("all=-1", "all '-1' is not a number"),
    ("seed=1.5", "seed '1.5' is not a whole number"),
])
def test_bad_options(env: Env, params: str, message: str) -> None:
    with pytest.raises(ChainError) as caught:
        Runner(env, f"delay:{params}|ram:1M")
    assert f"delay: {message}" in str(caught.value)
