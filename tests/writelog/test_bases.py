"""How a copy is renamed by each sync: every order of writes, steps of syncs, crashes, lost messages and backups.

The names are changed by the functions that the log and the replica use; the rest of both is a model with one
block, whose versions are numbers. The states of the world are explored to the end, names made the same where they
play the same part, so that nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import pytest

from writelog.generations import Generations
from writelog.replica_state import State

MAX_WRITES: Final = 2
MAX_BACKUPS: Final = 1
START: Final = Generations(1, 2)
COPY: Final = State(2)


@dataclass(frozen=True)
class Host:
    """What a backup takes along: the image, and its side-car."""

    version: int = 0
    is_dirty: bool = False
    ids: Generations = START


@dataclass(frozen=True)
class Session:
    """A connection, and what is on its way on it."""

    held: int
    """What the WELCOME said."""
    base: int = 0
    """What the log has drawn; 0 before that."""
    base_sent: bool = False
    taken: int | None = None
    """The version that was read, and is leased."""
    data_sent: bool = False
    acknowledged: bool = False


@dataclass(frozen=True)
class World:
    host: Host = Host()
    copy: State = COPY
    copy_version: int = 0
    session: Session | None = None
    backup: Host | None = None
    copy_backup: tuple[State, int] | None = None
    next_name: int = 3
    writes: int = 0
    backups: int = 0
    was_restored: bool = False


def log_is_dirty(world: World) -> bool:
    return world.host.is_dirty or (world.session is not None and world.session.taken is not None)


def steps(world: World) -> Iterator[World]:
    """What can happen next."""
    host, session = world.host, world.session
    if world.writes < MAX_WRITES:
        yield replace(world, writes=world.writes + 1,
                      host=replace(host, version=world.writes + 1, is_dirty=True))
    at_rest = replace(host, is_dirty=log_is_dirty(world))
    if session is None and world.backups < MAX_BACKUPS:
        yield replace(world, backups=world.backups + 1, backup=host)
        yield replace(world, backups=world.backups + 1, copy_backup=(world.copy, world.copy_version))
    if world.backup is not None and not world.was_restored:
        yield replace(world, host=world.backup, session=None, was_restored=True)
    if world.copy_backup is not None and not world.was_restored:
        copy, version = world.copy_backup
        yield replace(world, copy=copy, copy_version=version, host=at_rest, session=None, was_restored=True)
    if session is None:
        held = world.copy.base
        if host.ids.serves(held):
            yield replace(world, session=Session(held))
        else:
            assert world.was_restored, f"a full copy without need: {world}"
        return
    yield replace(world, session=None, host=at_rest)  # the link, the sync, tapdisk or the host: leases return
    yield from sync_steps(world, session)


def sync_steps(world: World, session: Session) -> Iterator[World]:
    host = world.host
    if not session.base or (session.base_sent and session.taken is None):
        # The start; also a copy that is renamed meanwhile, or at the end.
        held = session.base or session.held
        name = world.next_name
        yield replace(world, next_name=name + 1, host=replace(host, ids=host.ids.renewed(held, name)),
                      session=replace(session, base=name, base_sent=False))
    if not session.base:
        return
    if not session.base_sent:  # it arrives: else nothing that follows does
        yield replace(world, session=replace(session, base_sent=True),
                      copy=world.copy.renamed(session.base, "vm1"))
    if host.is_dirty and session.taken is None:
        yield replace(world, host=replace(host, is_dirty=False), session=replace(session, taken=host.version))
    if session.taken is None or not session.base_sent:
        return
    if not session.data_sent:
        yield replace(world, copy_version=session.taken, session=replace(session, data_sent=True))
    elif not session.acknowledged:
        yield replace(world, session=replace(session, acknowledged=True))
    else:
        ids = host.ids
        yield replace(world, host=replace(host, ids=ids.confirmed() if ids.former else ids),
                      session=replace(session, taken=None, data_sent=False, acknowledged=False))


def check(world: World) -> None:
    """A copy that the log serves has all but what is dirty."""
    if world.host.ids.serves(world.copy.base) and not log_is_dirty(world):
        assert world.copy_version == world.host.version, f"a silent mixture: {world}"


def canonical(world: World) -> World:
    """Names matter by where they are the same, not by themselves."""
    names: dict[int, int] = {0: 0}

    def name(old: int) -> int:
        return names.setdefault(old, len(names))

    def ids(old: Generations) -> Generations:
        return Generations(1, name(old.base), (), name(old.former))

    session, backup = world.session, world.backup
    return replace(
        world, host=replace(world.host, ids=ids(world.host.ids)), copy=State(name(world.copy.base)),
        session=replace(session, held=name(session.held), base=name(session.base)) if session else None,
        backup=replace(backup, ids=ids(backup.ids)) if backup else None,
        copy_backup=(State(name(world.copy_backup[0].base)), world.copy_backup[1]) if world.copy_backup else None,
        next_name=0)


def explore() -> int:
    """How many worlds there are."""
    todo, seen = [World()], set[World]()
    while todo:
        world = todo.pop()
        check(world)
        for following in steps(world):
            known = canonical(following)
            if known not in seen:
                seen.add(known)
                todo.append(following)
    return len(seen)


def test_no_order_of_anything_makes_a_silent_mixture_or_a_needless_full_copy() -> None:
    assert explore() > 1000


def test_the_model_sees_what_a_name_for_good_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generations, "renewed", lambda self, held, base: self)
    monkeypatch.setattr(State, "renamed", lambda self, base, disk: self)
    with pytest.raises(AssertionError, match="a silent mixture"):
        explore()


def test_the_model_sees_what_a_former_name_for_good_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generations, "confirmed", lambda self: self)
    with pytest.raises(AssertionError, match="a silent mixture"):
        explore()


def test_the_model_sees_what_a_new_name_without_the_former_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generations, "renewed", lambda self, held, base: self.with_base(base))
    with pytest.raises(AssertionError, match="a full copy without need"):
        explore()
