"""Memory that requests and replies of a connection lie in, used again and again."""

from __future__ import annotations

import mmap

KEEP_BYTES = 4 << 20
"""Larger buffers are not kept for the next request."""
KEEP_COUNT = 16


class Buffer:
    """Page-aligned memory. `users` counts the requests and replies in it; `pos` is the end of what is in use."""

    __slots__ = ("memory", "pos", "size", "users", "view")

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.view = memoryview(self.memory)
        self.size = size
        self.users = 0
        self.pos = 0


class Pool:
    """Buffers without users, the most recently used first: its pages are still in the CPU's cache."""

    def __init__(self) -> None:
        self._free: list[Buffer] = []

    def take(self, size: int) -> Buffer:
        """A buffer of at least `size` bytes, with no users."""
        for index in range(len(self._free) - 1, -1, -1):
            if self._free[index].size >= size:
                return self._free.pop(index)
        return Buffer(max(mmap.PAGESIZE, 1 << (size - 1).bit_length()))

    def give(self, buffer: Buffer) -> None:
        """Take back a buffer that nobody uses any more."""
        assert buffer.users == 0
        if buffer.size <= KEEP_BYTES and len(self._free) < KEEP_COUNT:
            buffer.pos = 0
            self._free.append(buffer)
