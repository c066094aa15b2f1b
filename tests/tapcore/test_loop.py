"""The loop: descriptors, timers, deferred calls, other threads, failing callbacks."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapcore.loop import Loop


class Clock(Loop):
    """A loop whose time is set by the test."""

    now_s = 100.0

    def time_s(self) -> float:
        return self.now_s


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def clock() -> Iterator[Clock]:
    loop = Clock()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        yield left, right


def test_readers_are_called_while_there_is_something(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    left, right = pair
    seen: list[bytes] = []
    loop.add_reader(left.fileno(), lambda: seen.append(left.recv(1)))
    right.send(b"ab")
    loop.turn(0)
    loop.turn(0)
    loop.turn(0)
    assert seen == [b"a", b"b"]
    loop.add_reader(left.fileno(), None)
    right.send(b"c")
    loop.turn(0)
    assert seen == [b"a", b"b"]


def test_a_reader_hears_of_a_hang_up(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    seen: list[bytes] = []
    loop.add_reader(left.fileno(), lambda: seen.append(left.recv(1)))
    right.close()
    loop.turn(1)
    assert seen == [b""]


def test_writers_and_readers_of_one_descriptor(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    calls: list[str] = []
    loop.add_reader(left.fileno(), lambda: calls.append("read"))
    loop.add_writer(left.fileno(), lambda: calls.append("write"))
    loop.turn(0)
    assert calls == ["write"]
    right.send(b"x")
    loop.turn(0)
    assert calls == ["write", "write", "read"]
    loop.add_writer(left.fileno(), None)
    loop.turn(0)
    assert calls == ["write", "write", "read", "read"]
    loop.remove(left.fileno())
    loop.remove(left.fileno())
    loop.turn(0)
    assert len(calls) == 4


def test_a_writer_may_take_its_descriptors_reader_away(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    left, right = pair
    calls: list[str] = []
    loop.add_reader(left.fileno(), lambda: calls.append("read"))
    loop.add_writer(left.fileno(), lambda: loop.remove(left.fileno()))
    right.send(b"x")
    loop.turn(0)
    assert calls == []


def test_timers_run_when_due_in_their_order(clock: Clock) -> None:
    calls: list[str] = []
    clock.call_later(2, lambda: calls.append("two"))
    clock.call_later(1, lambda: calls.append("one"))
    clock.call_later(1.5, lambda: calls.append("never")).cancel()
    clock.turn(0)
    assert calls == []
    clock.now_s += 1
    clock.turn(0)
    assert calls == ["one"]
    clock.now_s += 5
    clock.turn(0)
    assert calls == ["one", "two"]


def test_a_turn_waits_no_longer_than_the_next_timer(loop: Loop) -> None:
    calls: list[str] = []
    loop.call_later(0.01, lambda: calls.append("timer"))
    loop.run_until(lambda: bool(calls), 10)
    loop.call_later(0.01, loop.stop)
    loop.run()


def test_deferred_calls_run_at_the_end_of_the_turn_and_new_ones_in_the_next(loop: Loop) -> None:
    calls: list[str] = []

    def first() -> None:
        calls.append("first")
        loop.call_soon(lambda: calls.append("second"))

    loop.call_soon(first)
    loop.turn()
    assert calls == ["first"]
    loop.turn()
    assert calls == ["first", "second"]


def test_calls_from_other_threads_all_arrive_in_order(loop: Loop) -> None:
    calls: list[tuple[int, int]] = []
    count = 2000

    def send(thread: int) -> None:
        for i in range(count):
            loop.call_threadsafe(lambda pair=(thread, i): calls.append(pair))  # type: ignore[misc]

    threads = [threading.Thread(target=send, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    loop.run_until(lambda: len(calls) == 3 * count, 20)
    for thread in threads:
        thread.join(10)
    for number in range(3):
        assert [i for thread_number, i in calls if thread_number == number] == list(range(count))


def test_another_thread_wakes_a_waiting_loop(loop: Loop) -> None:
    thread = threading.Thread(target=lambda: loop.call_threadsafe(loop.stop))
    loop.call_soon(thread.start)
    loop.run()
    thread.join(10)


def test_a_failing_callback_is_logged_and_the_loop_goes_on(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def fail() -> None:
        raise ValueError("a bug")

    loop.call_soon(fail)
    loop.call_soon(lambda: calls.append("soon"))
    loop.call_later(0, fail)
    loop.call_threadsafe(fail)
    loop.call_threadsafe(lambda: calls.append("foreign"))
    with caplog.at_level(logging.ERROR):
        loop.turn(0)
        loop.turn(0)
    assert sorted(calls) == ["foreign", "soon"]
    assert caplog.text.count("ValueError: a bug") == 3


def test_run_until_gives_up(loop: Loop) -> None:
    with pytest.raises(TimeoutError, match=r"not ready after 0\.02 s"):
        loop.run_until(lambda: False, 0.02)


def test_close_releases_the_descriptors() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    loop = Loop()
    loop.close()
    loop.remove(0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_loop_looks_for_events_before_it_sleeps_only_while_they_come_quickly(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sleeps of a given length are followed by longer looks if they are short, by none if they are long."""
    now_s = 100.0
    slept_s = 0.0
    asked = 0

    class Poller:
        def poll(self, wait_s: float, most: int) -> list[tuple[int, int]]:
            nonlocal now_s, asked
            now_s += 1e-6 if wait_s == 0 else slept_s
            asked += wait_s == 0
            return []

    def looks(sleep_s: float) -> int:
        """How often the loop asks in a turn whose sleep takes `sleep_s`."""
        nonlocal asked, slept_s
        asked, slept_s = 0, sleep_s
        loop.turn(1)
        return asked

    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    epoll = loop._epoll
    try:
        loop._epoll = Poller()  # type: ignore[assignment]
        assert looks(10e-6) == 1
        rising = [looks(10e-6) for _ in range(4)]
        assert rising == sorted(rising) and rising[-1] > rising[0] > 1
        assert max(looks(1e-6) for _ in range(20)) < 120
        for _ in range(10):
            looks(0.5)
        assert looks(0.5) == 1
    finally:
        loop._epoll = epoll
