"""Names of copies: what one is to another, through the life of a replication."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from writelog.generations import (
    MAX_HISTORY,
    Generations,
    Relation,
    compare,
    decode_names,
    encode_names,
    log_serves,
    new_id,
)

A, B, C, D, E = range(1, 6)
MIRROR = {Relation.AHEAD: Relation.BEHIND, Relation.BEHIND: Relation.AHEAD}


def test_the_life_of_a_replication() -> None:
    primary = Generations(A)
    fresh_copy = Generations(new_id())
    assert compare(primary, fresh_copy) is Relation.UNRELATED
    syncing = primary.with_base(B)
    copy = Generations(B)
    assert compare(syncing, copy) is Relation.AHEAD and log_serves(syncing, copy)
    handed_over = syncing.completed()
    assert handed_over == Generations(B, 0, (A,))
    assert compare(handed_over, copy) is Relation.SAME and not log_serves(handed_over, copy)
    promoted = Generations(D, B)
    assert compare(handed_over, promoted) is Relation.BEHIND
    assert compare(promoted, handed_over) is Relation.AHEAD and log_serves(promoted, handed_over)
    forced = handed_over.parted(E)
    assert forced == Generations(E, B, (A,))
    assert compare(forced, promoted) is compare(promoted, forced) is Relation.SPLIT
    assert not log_serves(forced, promoted)


def test_a_copy_that_was_left_behind_needs_all() -> None:
    """A second full sync, to another replica, makes the first one's name history."""
    primary = Generations(A).with_base(B).with_base(C)
    assert primary.history == (B,)
    assert compare(primary, Generations(B)) is Relation.AHEAD and not log_serves(primary, Generations(B))


def test_a_log_without_base_serves_nobody() -> None:
    assert not log_serves(Generations(A), Generations(0))
    assert Generations(A).with_base(B).with_base(0) == Generations(A, 0, (B,))


def test_a_disk_forced_on_twice_stays_split() -> None:
    promoted = Generations(D, B)
    assert compare(Generations(B).parted(E).parted(C), promoted) is Relation.SPLIT


ids = st.integers(1, 6)


@given(ids, ids | st.just(0), st.lists(ids, max_size=4), ids, ids | st.just(0), st.lists(ids, max_size=4))
def test_both_sides_agree(a: int, b: int, c: list[int], d: int, e: int, f: list[int]) -> None:
    own, peer = Generations(a, b, tuple(c)), Generations(d, e, tuple(f))
    there, back = compare(own, peer), compare(peer, own)
    if there not in MIRROR or back is not there:
        assert back is MIRROR.get(there, there)


@given(st.lists(st.integers(1, (1 << 64) - 1), max_size=MAX_HISTORY))
def test_names_as_bytes(names: list[int]) -> None:
    assert decode_names(encode_names(tuple(names)).ljust(8 * MAX_HISTORY, b"\0")) == tuple(names)


def test_history_is_bounded() -> None:
    generations = Generations(A)
    for name in range(10, 40):
        generations = generations.with_base(name)
    assert len(generations.history) == MAX_HISTORY and generations.history[0] == 38
