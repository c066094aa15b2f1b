"""Which extents of a first pass to compare with what the replica has already, an old copy or a template, instead
of sending them. Where next to nothing is equal, comparing is given up, but for a sample now and then: the next
part of the disk may be another matter.
"""

from __future__ import annotations

from typing import Final

from writelog.hashtree import GRAIN_BYTES, LEAF_BYTES, Extents

SAMPLE_BYTES: Final = 16 << 20
"""What is equal is judged by the last so many bytes, about."""
LEAST_PART: Final = 1 / 32
"""Equal, of what was compared: below that, extents are sent as they are."""
SHORT_BYTES: Final = 4 * GRAIN_BYTES
"""An extent that is longer and has nothing equal is of something else."""
ONE_OF: Final = 16
"""Extents of which one is compared nevertheless."""


class Share:
    """How much of what was compared lately was equal, and so whether to compare the next."""

    def __init__(self) -> None:
        self._part = 1.0
        self._passed = 0

    def is_worth_it(self) -> bool:
        if self._part >= LEAST_PART:
            return True
        self._passed += 1
        return self._passed % ONE_OF == 0

    def learn(self, length: int, equal_bytes: int) -> None:
        self._part += (equal_bytes / length - self._part) * min(1.0, length / SAMPLE_BYTES)


class Comparison:
    """Learns from the answers, of a first look at extents and of closer ones at what differs in them."""

    def __init__(self) -> None:
        self._first, self._closer = Share(), Share()

    def grain(self) -> int:
        """By what pieces to compare the next extent; 0: not at all."""
        return GRAIN_BYTES if self._first.is_worth_it() else 0

    def learn(self, length: int, grain: int, differing: Extents) -> int:
        """An extent was compared so; by what pieces to compare again what differs in it, 0 to send it: leaves,
        which may be a few that were written since, unless it is long and all of it is different."""
        equal_bytes = length - sum(size for _, size in differing)
        is_first = grain >= GRAIN_BYTES
        (self._first if is_first else self._closer).learn(length, equal_bytes)
        if not is_first or not differing or not (equal_bytes or length <= SHORT_BYTES):
            return 0
        return LEAF_BYTES if self._closer.is_worth_it() else 0
