"""Generation identifiers: what one copy of a disk knows of another, told by random numbers, as DRBD does it.

https://linbit.com/drbd-user-guide/drbd-guide-9_0-en/#s-gi

    current   names the data that is written here now
    base      names the state that a copy elsewhere has or is being brought to: it lacks exactly what is dirty or
              leased in the log here. 0: the log says nothing about any copy
    former    the base before this one, until the copy is known to have the new name: then it may have either
    history   former names, newest first

                     current  base  history
    a log is made       C       0    -
    a full sync begins  C       A    -        the replica notes down A, then takes what is dirty
    a later one         C       B    A        former: A, until bits are cleared; so the replica has noted down B
    handed over         B       0    C, A     nothing was dirty: both sides have all of B
    the replica is
    promoted            D       B    -        and writes: the former primary, at B, is behind it
    the former one is
    forced to go on     E       B    C, A     split: both come from B, and neither has what the other wrote

Each sync renames the copy, at both ends and durably, before it changes it. So a log that was restored from a
backup, or of a host that was cloned, names a copy that is no more, and is not believed what that one lacks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

MAX_HISTORY: Final = 8


def encode_names(names: tuple[int, ...]) -> bytes:
    """8 bytes a name; the field that takes them has room for MAX_HISTORY."""
    return b"".join(name.to_bytes(8, "little") for name in names)


def decode_names(data: bytes) -> tuple[int, ...]:
    names = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    return tuple(name for name in names if name)


class Relation(Enum):
    """What a copy is to another one."""

    SAME = "same"
    AHEAD = "ahead"
    """It has all that the other one has, and more."""
    BEHIND = "behind"
    SPLIT = "split"
    """Both come from one state, and each has what the other lacks."""
    UNRELATED = "unrelated"


def new_id() -> int:
    """A random name: 64 bits, not 0."""
    return int.from_bytes(os.urandom(8), "little") | 1


@dataclass(frozen=True)
class Generations:
    """The names that one copy goes by; see the table."""

    current: int
    base: int = 0
    history: tuple[int, ...] = ()
    former: int = 0

    def serves(self, held: int) -> bool:
        """Whether the copy at `held` lacks what is dirty or leased here, and nothing else."""
        return held != 0 and held in (self.base, self.former)

    def with_base(self, base: int) -> Generations:
        """From now on the log counts for a copy at `base`, or with 0 for none."""
        return replace(self, base=base, former=0, history=_remember(self.history, self.base, base))

    def renewed(self, held: int, base: int) -> Generations:
        """The copy at `held`, which this log serves, is to be called `base`."""
        assert self.serves(held)
        return replace(self.with_base(base), former=held)

    def confirmed(self) -> Generations:
        """The copy is known to have its new name."""
        return replace(self, former=0)

    def completed(self) -> Generations:
        """The copy at `base` lacks nothing: both have it."""
        assert self.base
        return Generations(self.base, 0, _remember(self.history, self.current, self.base))

    def parted(self, current: int) -> Generations:
        """This copy goes its own way: what is written from now on, under a new name, the others do not have."""
        base = self.base or self.current
        return Generations(current, base, _remember(self.history, self.current, base))


def _remember(history: tuple[int, ...], former: int, present: int) -> tuple[int, ...]:
    if former in (0, present, *history[:1]):
        return history
    return (former, *history)[:MAX_HISTORY]


def compare(own: Generations, peer: Generations) -> Relation:
    """What `own` is to `peer`."""
    if own.current == peer.current:
        return Relation.SAME
    if peer.current in (own.base, *own.history):
        return Relation.AHEAD
    if own.current in (peer.base, *peer.history):
        return Relation.BEHIND
    if ({own.base, *own.history} & {peer.base, *peer.history}) - {0}:
        return Relation.SPLIT
    return Relation.UNRELATED


def log_serves(own: Generations, peer: Generations) -> bool:
    """Whether what is dirty or leased in the log of `own` is all that the copy `peer` lacks."""
    return own.serves(peer.current)
