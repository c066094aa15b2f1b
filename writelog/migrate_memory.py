"""The memory that QEMU copies: how far it is, and whether it gets nearer to its end. No I/O, no clock of its own.

QEMU goes over the memory in passes, each over what the guest has changed during the one before, until the rest can
be sent within its downtime limit. By itself it waits for ever, be it for a connection that carries nothing (one
that was cut off without a word is noticed after a quarter of an hour, or never), or for a guest that changes its
memory as fast as it is sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tapcore.text import size_text
from writelog.plan import NOTICEABLE

FAIR_PASSES: Final = 4
"""QEMU slows the guest down after two that were no use, and then a pass shows what that is good for."""


@dataclass(frozen=True)
class Memory:
    """What QEMU says of it."""

    sent_bytes: int
    remaining_bytes: int
    total_bytes: int
    rate: float
    """Bytes a second."""
    passes: int = 0
    dirty_rate: float = 0.0
    """What the guest changes, bytes a second; known after the first pass."""
    throttle_percent: int = 0
    """How much of their time the guest's processors are held up for it to converge."""

    def __str__(self) -> str:
        text = (f"sent {size_text(self.sent_bytes)} at {size_text(self.rate)}/s, "
                f"remaining {size_text(self.remaining_bytes)} of {size_text(self.total_bytes)}")
        if self.dirty_rate:
            text += f", the guest changes {size_text(self.dirty_rate)}/s"
        return text + (f" (slowed down by {self.throttle_percent} %)" if self.throttle_percent else "")


def memory_of(answer: Mapping[str, Any]) -> Memory | None:
    """Of the answer to query-migrate; None before there is anything to say."""
    ram = answer.get("ram")
    if not isinstance(ram, dict):
        return None
    return Memory(int(ram.get("transferred", 0)), int(ram.get("remaining", 0)), int(ram.get("total", 0)),
                  float(ram.get("mbps", 0.0)) * 1e6 / 8, int(ram.get("dirty-sync-count", 0)),
                  float(ram.get("dirty-pages-rate", 0)) * int(ram.get("page-size", 4096)),
                  int(answer.get("cpu-throttle-percentage", 0)))


class Patience:
    """Of whoever waits for the memory, from `now_s` on: ends `patience_s` after it was last seen to move, or to
    come nearer to its end."""

    def __init__(self, patience_s: float, now_s: float) -> None:
        self._patience_s = patience_s
        self._sent_bytes = -1
        self._moved_s = now_s
        self._pass = 0
        self._best_bytes = math.inf
        """What was left at the beginning of the pass that had the least to do."""
        self._best_pass = 0
        self._best_s = now_s
        self._throttle_percent = 0

    def complaint(self, now_s: float, memory: Memory | None) -> str:
        """What there is to say against waiting any longer; "" if nothing."""
        if memory is not None:
            self._look(now_s, memory)
        stalled_s = now_s - self._moved_s
        if stalled_s > self._patience_s:
            return (f"nothing of the memory was sent for {stalled_s:.0f} s: does the link carry anything, and "
                    "does the destination QEMU live?")
        no_better_s = now_s - self._best_s
        if memory is None or self._pass - self._best_pass < FAIR_PASSES or no_better_s <= self._patience_s:
            return ""
        return (f"the memory does not converge: {memory}, no less in any pass for {no_better_s:.0f} s; allow a "
                "longer pause with --downtime, more speed with --memory-rate, or to slow the guest down with "
                "--throttle-floor")

    def _look(self, now_s: float, memory: Memory) -> None:
        if memory.sent_bytes != self._sent_bytes:
            self._sent_bytes, self._moved_s = memory.sent_bytes, now_s
        if memory.passes != self._pass:
            self._pass = memory.passes
            if memory.remaining_bytes < self._best_bytes * NOTICEABLE:
                self._best_bytes = memory.remaining_bytes
                self._best_s, self._best_pass = now_s, memory.passes
        if memory.throttle_percent > self._throttle_percent:
            self._throttle_percent = memory.throttle_percent
            self._best_s, self._best_pass = now_s, memory.passes
