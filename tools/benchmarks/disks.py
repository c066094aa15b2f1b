"""The raw disks that are copied, and whether a copy is equal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import xxhash

from tools.benchmarks.processes import RunFailed

STRIPE_BYTES: Final = 1 << 20
KINDS: Final[dict[str, tuple[int, int]]] = {"full": (10, 0), "30 % allocated": (3, 0), "50 % zero": (5, 5)}
"""Of ten stripes, how many hold noise, and how many hold written zeroes; the others are holes."""


def make(path: Path, size_bytes: int, kind: str) -> int:
    """Write a disk; returns how many bytes of noise it holds."""
    noisy, zero = KINDS[kind]
    noise_bytes = 0
    with path.open("wb") as file:
        for number in range(size_bytes // STRIPE_BYTES):
            # Three is prime to ten: the kinds of stripes alternate.
            place = number * 3 % 10
            if place < noisy + zero:
                file.seek(number * STRIPE_BYTES)
                file.write(os.urandom(STRIPE_BYTES) if place < noisy else bytes(STRIPE_BYTES))
                noise_bytes += STRIPE_BYTES * (place < noisy)
        file.truncate(size_bytes)
    return noise_bytes


def make_empty(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)


def must_be_equal(source: Path, target: Path) -> None:
    """RunFailed if the copy differs: such a run does not count."""
    if _digest(source) != _digest(target):
        raise RunFailed("the copy differs from the disk")


def _digest(path: Path) -> bytes:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while data := file.read(STRIPE_BYTES):
            digest.update(data)
    return digest.digest()
