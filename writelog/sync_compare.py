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
ONE_OF: Final = 16
"""Extents of which one is compared nevertheless."""


class Comparison:
    """Learns from the answers."""

    def __init__(self) -> None:
        self._equal_part = 1.0
        self._passed = 0

    def grain(self) -> int:
        """By what pieces to compare the next extent; 0: not at all."""
        if self._equal_part < LEAST_PART:
            self._passed += 1
            if self._passed % ONE_OF:
                return 0
        return GRAIN_BYTES

    def learn(self, length: int, grain: int, differing: Extents) -> int:
        """An extent was compared so; by what pieces to compare again what differs in it, 0 to send it: leaves, if
        it is a small part, which may be a few blocks that were written since."""
        if grain < GRAIN_BYTES:
            return 0
        differing_bytes = sum(size for _, size in differing)
        self._equal_part += (1 - differing_bytes / length - self._equal_part) * min(1.0, length / SAMPLE_BYTES)
        return LEAF_BYTES if 2 * differing_bytes <= length else 0
