"""The raw disks that are copied, and whether a copy is equal."""

from __future__ import annotations

import errno
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
    """Of what is not zero, and where: a large disk may be empty."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        size_bytes, offset = path.stat().st_size, 0
        while offset < size_bytes:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA) // STRIPE_BYTES * STRIPE_BYTES
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            file.seek(offset)
            data = file.read(STRIPE_BYTES)
            if data.strip(b"\0"):
                digest.update(f"{offset} ".encode() + data)
            offset += len(data)
        digest.update(str(size_bytes).encode())
    return digest.digest()
