"""May buffered writes be done in the loop's thread?

A write goes into the page cache and returns at once, mostly. While the kernel makes writers wait for write-back
they are better done by workers.
"""

from __future__ import annotations

import resource
from time import monotonic
from typing import Final

STALL_S: Final = 0.005
"""A batch whose writes took this much longer than copying is slow."""
SUSPICION_S: Final = 1.0
"""For so long after a slow batch it is watched whether the next slow one waited, or had no processor."""
COPY_BYTES_PER_S: Final = 500e6
"""Into the page cache, slowest."""
MIN_DETOUR_S: Final = 1.0
MAX_DETOUR_S: Final = 8.0
"""How long writes go to workers after a wait; twice as long if they wait again soon after the last detour."""

class WriteWatch:
    """Before each write `inline or begin()`, or `allows(length)`, which counts its bytes too; after each batch
    `end_batch()`. The clock is read at a batch's first write and at its end, not at every write."""

    def __init__(self) -> None:
        self.inline = False
        """A batch has begun whose writes are done in the loop's thread."""
        self.batch_bytes = 0
        """Written by it so far."""
        self._began_s = 0.0
        self._waits_before: int | None = None
        """This thread's waits before the batch, while there is suspicion."""
        self._suspicion_end_s = 0.0
        self._on_detour = False
        self._detour_s = MIN_DETOUR_S
        self._detour_end_s = 0.0

    def begin(self) -> bool:
        """The first write of a batch comes: may it be done in the loop's thread?"""
        if self._on_detour:
            return False
        self._began_s = now_s = monotonic()
        self.batch_bytes = 0
        self._waits_before = _waits() if now_s < self._suspicion_end_s else None
        self.inline = True
        return True

    def allows(self, length: int) -> bool:
        """May `length` bytes be written in the loop's thread now?"""
        if not self.inline and not self.begin():
            return False
        self.batch_bytes += length
        return True

    def end_batch(self) -> None:
        if self._on_detour:
            now_s = monotonic()
            if now_s >= self._detour_end_s:
                self._on_detour = False
                self._suspicion_end_s = now_s + SUSPICION_S
        elif self.inline:
            self.inline = False
            self._judge(monotonic())

    def _judge(self, now_s: float) -> None:
        """Did the batch's writes wait for write-back? Then the next ones take the detour, for a while."""
        if now_s - self._began_s <= STALL_S + self.batch_bytes / COPY_BYTES_PER_S:
            return
        if self._waits_before is None or _waits() == self._waits_before:
            self._suspicion_end_s = now_s + SUSPICION_S
            return
        self._on_detour = True
        just_tried = now_s - self._detour_end_s < SUSPICION_S
        self._detour_s = min(2 * self._detour_s, MAX_DETOUR_S) if just_tried else MIN_DETOUR_S
        self._detour_end_s = now_s + self._detour_s


def _waits() -> int:
    """How often this thread has waited so far, for whatever."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
