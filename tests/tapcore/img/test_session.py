"""Tasks on a session: in turns, all ended when one fails, and at a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapcore.errors import ChainError, ImageError
from tapcore.img.copy import new_buffer
from tapcore.img.session import Lock, Session, Task, ended_well
from tapcore.request import READ, WRITE, Request


@pytest.fixture
def session() -> Iterator[Session]:
    with Session() as session:
        yield session


def test_a_lock_is_held_by_one_task_at_a_time(session: Session) -> None:
    disk = session.open("delay:read=1|ram:1M").head
    lock = Lock(session)
    inside: list[int] = []
    order: list[int] = []

    def task(number: int) -> Task:
        for _ in range(3):
            try:
                yield lock
                inside.append(number)
                assert len(inside) == 1
                yield [(disk, Request(READ, 0, 512, [new_buffer(512)]))]
                inside.remove(number)
                order.append(number)
            finally:
                lock.release()

    session.run(task(number) for number in range(3))
    assert sorted(order) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and not lock.held


def test_a_batch_is_complete_when_all_of_it_is(session: Session) -> None:
    slow, quick = session.open("delay:write=5|ram:1M").head, session.open("ram:1M").head
    requests = [Request(WRITE, 0, 512, [new_buffer(512)]) for _ in range(3)]
    done: list[bool] = []

    def task() -> Task:
        yield [(slow, requests[0]), (quick, requests[1]), (slow, requests[2])]
        done.append(True)
        yield []

    session.run([task()])
    assert done


def test_the_first_failure_ends_all(session: Session) -> None:
    bad, good = session.open("error:|ram:1M").head, session.open("delay:read=1|ram:1M").head
    closed: list[int] = []

    def fails() -> Task:
        request = Request(READ, 4096, 512, [new_buffer(512)])
        yield [(bad, request)]
        ended_well(request, "bad.img")

    def goes_on(number: int) -> Task:
        try:
            while True:
                yield [(good, Request(READ, 0, 512, [new_buffer(512)]))]
        finally:
            closed.append(number)

    with pytest.raises(ImageError, match=r"bad\.img: read failed: .*at byte 4096"):
        session.run([goes_on(1), fails(), goes_on(2)])
    assert sorted(closed) == [1], "the third was not begun, or closed"
    session.run([])


def test_a_signal_ends_tasks_when_nothing_is_in_flight(session: Session) -> None:
    disk = session.open("delay:read=1|ram:1M").head
    turns: list[int] = []

    def task() -> Task:
        while True:
            yield [(disk, Request(READ, 0, 512, [new_buffer(512)]))]
            turns.append(1)
            if len(turns) == 10:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        session.run([task()])
    assert len(turns) <= 11


def test_what_was_open_is_closed_when_opening_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(4096))
    with pytest.raises(ChainError), Session() as session:
        session.open(f"aio:{path}")
        session.open(f"aio:{tmp_path}/missing")
    with Session() as session:
        session.open(f"aio:{path}")
