"""The cache of tables: bounded, but for what must stay."""

from __future__ import annotations

from tapcore.formats.tables import Tables


def test_what_is_used_least_is_dropped() -> None:
    tables: Tables[str] = Tables(2)
    tables.put(1, "a")
    tables.put(2, "b")
    assert tables.use(1) == "a"
    tables.put(3, "c")
    assert list(tables) == [1, 3] and tables.use(2) is None


def test_what_is_changed_or_pinned_stays() -> None:
    tables: Tables[str] = Tables(2)
    for index in range(4):
        tables.put(index, "x")
        tables.pin(index) if index % 2 else tables.change(index, 7)
    for index in range(4, 9):
        tables.put(index, "x")
    assert list(tables) == [0, 1, 2, 3, 7, 8] and tables.crowded and tables.full
    tables.unpin(1)
    tables.make_room()
    assert list(tables) == [0, 2, 3, 7, 8]


def test_there_is_always_room_for_two_that_are_needed_together() -> None:
    tables: Tables[str] = Tables(3)
    for index in range(3):
        tables.put(index, "x")
        tables.change(index, 0)
    tables.put(3, "a")
    tables.put(4, "b")
    assert tables.use(3) == "a" and tables.use(4) == "b"


def test_what_is_being_written_stays_until_it_was() -> None:
    tables: Tables[str] = Tables(1)
    tables.put(1, "a")
    tables.change_all(1, 3)
    taken = tables.take_dirty()
    assert taken == {1: {0, 1, 2}} and not tables.dirty
    tables.change(1, 1)
    tables.put_back(taken)
    assert tables.dirty == {1: {0, 1, 2}} and not tables.pins
    taken = tables.take_dirty()
    for index in (2, 3, 4):
        tables.put(index, "b")
    assert list(tables) == [1, 3, 4]
    tables.settle(taken)
    assert list(tables) == [3, 4]
