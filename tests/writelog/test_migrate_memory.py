"""How far the memory is, and when it is hopeless to wait for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from writelog.migrate_memory import Memory, Patience, memory_of

PATIENCE_S = 10.0
STEP_S = 0.25


def test_figures() -> None:
    assert memory_of({}) is None and memory_of({"status": "setup"}) is None
    answer = {"ram": {"transferred": 10, "remaining": 20, "total": 30, "mbps": 8.0, "dirty-sync-count": 2,
                      "dirty-pages-rate": 3, "page-size": 4096}, "cpu-throttle-percentage": 40}
    memory = memory_of(answer)
    assert memory == Memory(10, 20, 30, 1e6, 2, 3 * 4096, 40)
    assert str(memory) == ("sent 10 B at 976.6 KiB/s, remaining 20 B of 30 B, the guest changes 12 KiB/s "
                           "(slowed down by 40 %)")
    assert str(Memory(10, 20, 30, 0.0)) == "sent 10 B at 0 B/s, remaining 20 B of 30 B"


def guest(changed_bytes: list[int], pass_s: float = 1.0, throttle: int = 0) -> Iterator[Memory]:
    """What is asked every STEP_S of a guest that has changed so much at the beginning of each pass."""
    sent = 0
    for number, start_bytes in enumerate(changed_bytes, 1):
        for step in range(int(pass_s / STEP_S)):
            sent += 1
            yield Memory(sent, int(start_bytes * (1 - step * STEP_S / pass_s)), 1000, 1.0, number,
                         throttle_percent=throttle * number)


def complaints(steps: Iterator[Memory]) -> list[str]:
    patience = Patience(PATIENCE_S, 100.0)
    return [patience.complaint(100 + number * STEP_S, memory) for number, memory in enumerate(steps)]


def test_nothing_moves() -> None:
    """Before QEMU says anything, or afterwards."""
    patience = Patience(PATIENCE_S, 100.0)
    assert not patience.complaint(109.0, None)
    assert "nothing of the memory was sent for 11 s" in patience.complaint(111.0, None)
    memory = Memory(1, 1, 1, 0.0, 1)
    assert not patience.complaint(112.0, memory) and not patience.complaint(121.0, memory)
    assert "for 11 s" in patience.complaint(123.0, memory)


@pytest.mark.parametrize("steps", [
    guest([1000], 60),
    guest([1000, 900, 800, 700, 600, 500], 30),
    guest([1000, 999, 999], 120),
    guest([1000, *[999] * 9], 2.0, throttle=10),
], ids=["a long pass", "less and less", "long passes", "slowed down more and more"])
def test_there_is_hope(steps: Iterator[Memory]) -> None:
    assert not any(complaints(steps))


def test_a_guest_that_changes_as_much_as_is_sent() -> None:
    said = complaints(guest([1000, 500, *[499] * 20]))
    assert not any(said[: int(11 / STEP_S)])
    assert "the memory does not converge" in said[-1] and "--throttle-floor" in said[-1]
