"""The states of a migration: the guest is never lost between them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from writelog.migrate_plan import FINAL, NO_RETURN, PAUSED, TABLE, Action, Event, State, how_to_go_back


def walk(events: list[Event]) -> Iterator[tuple[State, Action | None]]:
    """What happens when these events come, as far as they mean something in their state."""
    state = State.DISKS
    for event in events:
        if (state, event) in TABLE:
            state, action = TABLE[state, event]
            yield state, action


def test_a_migration_without_a_fault() -> None:
    steps = list(walk([event for event in Event if event is not Event.FAULT]))
    assert steps[-1] == (State.DONE, Action.FINISH)
    assert [action for _, action in steps] == [Action.COPY_MEMORY, Action.SEND_LAST_ROUND, Action.HAND_OVER,
                                               Action.PROMOTE, Action.CONTINUE, Action.FINISH]


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_in_whatever_order_things_happen(events: list[Event]) -> None:
    """QEMU goes on there only after all replicas were promoted; and here, only if none was."""
    actions: list[Action | None] = []
    for state, action in walk(events):
        actions.append(action)
        if action is Action.CONTINUE:
            assert Action.PROMOTE in actions
        if action is Action.UNDO:
            assert Action.PROMOTE not in actions and Action.CONTINUE not in actions
        assert (Action.PROMOTE in actions) == (state in NO_RETURN)
    assert actions.count(Action.UNDO) + actions.count(Action.STRAND) + actions.count(Action.FINISH) <= 1


def test_a_fault_is_answered_in_every_state() -> None:
    for state in State:
        assert ((state, Event.FAULT) in TABLE) == (state not in FINAL)
        assert not any(key[0] is state for key in TABLE) or state not in FINAL
    assert not PAUSED & NO_RETURN


@pytest.mark.parametrize("is_moving", [False, True])
def test_the_way_back_names_every_disk(is_moving: bool) -> None:
    text = how_to_go_back(["vm1", "vm2"], is_moving)
    assert "tap-ctl unpause --force vm1 and tap-ctl unpause --force vm2" in text
    assert ("if the guest runs there" in text) == is_moving and "'migrate_cancel' and 'cont'" in text
