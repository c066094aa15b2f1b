"""Workers: what blocks runs elsewhere, its end is told in the loop's thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from tapcore.loop import Loop
from tapcore.workers import Workers

TIMEOUT_S = 10


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_work_runs_in_a_thread_and_its_end_in_the_loop(loop: Loop) -> None:
    workers = Workers(loop, 2)
    where: list[threading.Thread] = []

    def note() -> None:
        where.append(threading.current_thread())

    workers.submit(note, note)
    loop.run_until(lambda: len(where) == 2, TIMEOUT_S)
    assert where[0] is not threading.main_thread() and where[1] is threading.main_thread()
    workers.close()
    assert not where[0].is_alive()


def test_as_many_at_once_as_there_are_threads_and_no_more(loop: Loop) -> None:
    workers = Workers(loop, 3)
    together = threading.Barrier(3)
    running = 0
    most = 0
    lock = threading.Lock()
    ended: list[int] = []

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(TIMEOUT_S)
        with lock:
            running -= 1

    for number in range(9):
        workers.submit(work, lambda number=number: ended.append(number))  # type: ignore[misc]
    loop.run_until(lambda: len(ended) == 9, TIMEOUT_S)
    workers.close()
    assert most == 3 and sorted(ended) == list(range(9))


def test_threads_are_started_when_they_are_needed(loop: Loop) -> None:
    before = threading.active_count()
    workers = Workers(loop, 8)
    for _ in range(3):
        ended: list[int] = []
        workers.submit(lambda: None, lambda ended=ended: ended.append(1))  # type: ignore[misc]
        loop.run_until(lambda ended=ended: bool(ended), TIMEOUT_S)  # type: ignore[misc]
    assert threading.active_count() == before + 1
    workers.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [0, 1])
def test_work_is_not_lost_when_no_thread_can_be_started(
    loop: Loop, threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, left = threading.Thread.start, threads

    def refuse(thread: threading.Thread) -> None:
        nonlocal left
        if not left:
            raise RuntimeError("can't start new thread")
        left -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    workers = Workers(loop, 4)
    worked: list[int] = []
    ended: list[int] = []
    for number in range(5):
        workers.submit(lambda number=number: worked.append(number),  # type: ignore[misc]
                       lambda number=number: ended.append(number))  # type: ignore[misc]
    assert ended == []
    loop.run_until(lambda: len(ended) == 5, TIMEOUT_S)
    workers.close()
    assert worked == ended == list(range(5)) and caplog.text.count("cannot start a thread") == 1


def test_the_ends_of_many_reach_the_loop_together(loop: Loop) -> None:
    workers = Workers(loop, 1)
    turns = 0
    ended: list[int] = []
    release = threading.Event()

    def wait() -> None:
        assert release.wait(TIMEOUT_S)

    workers.submit(wait, lambda: ended.append(turns))
    for _ in range(50):
        workers.submit(lambda: None, lambda: ended.append(turns))
    release.set()
    workers.close()
    while len(ended) < 51:
        turns += 1
        loop.turn(TIMEOUT_S)
    assert turns == 1


def test_close_lets_finish_what_was_submitted(loop: Loop) -> None:
    workers = Workers(loop, 1)
    done: list[int] = []
    for number in range(20):
        workers.submit(lambda number=number: done.append(number), lambda: None)  # type: ignore[misc]
    workers.close()
    assert done == list(range(20))


def test_a_failing_task_is_logged_and_ends_all_the_same(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers(loop, 1)
    ended: list[int] = []

    def fail() -> None:
        raise ValueError("a bug")

    with caplog.at_level(logging.ERROR):
        workers.submit(fail, lambda: ended.append(1))
        workers.submit(lambda: None, lambda: ended.append(2))
        loop.run_until(lambda: ended == [1, 2], TIMEOUT_S)
    workers.close()
    assert "ValueError: a bug" in caplog.text
