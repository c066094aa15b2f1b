"""Where a read cache keeps its blocks: which block is in which slot, and the slots, in memory or in a file.

    file    0         HEADER, one page
            4096      ENTRY of each slot: the block in it and its checksum
            …         the slots, of a block each

Every checksum is of the data, the block's number and the identity of what is cached (its seed). So a slot that was
half written, or whose entry is older or newer than its data, or that is of another image, does not match, and no
order of writes to the file has to be kept. An entry of 0 is empty.

What is cached may be changed by who has the cache open, too. Before it is, the header says so, durably: of such a
file nothing is believed when it is opened again.
"""

from __future__ import annotations

import errno
import mmap
import os
from array import array
from collections import Counter
from typing import Final, Protocol

from xxhash import xxh3_64_intdigest

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError, image_error
from tapcore.formats.imagefile import ImageFile
from tapcore.imagelock import lock_image
from tapcore.layout import Layout

MAGIC: Final = b"tdrdcach"
VERSION: Final = 1
PAGE_BYTES: Final = 4096
MAX_SWEEP: Final = 128
"""Slots looked at for one that can be had; those in the second half also if they were asked for."""
_U64: Final = (1 << 64) - 1

HEADER: Final = Layout("read cache header", "<", """
    magic:8s version:I changed:I block_bytes:Q slots:Q identity:Q sum:Q :16x""", size=64)
ENTRY: Final = Layout("read cache entry", "<", "block:Q sum:Q", size=16)
"""`block` is the number of the block and 1."""


class Slots:
    """Which block is in which slot. Who is not asked for goes first (CLOCK), unless it is pinned."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.slot_of: dict[int, int] = {}
        self.block_of = array("q", [-1]) * count
        self.sums = array("Q", [0]) * count
        self._asked_for = bytearray(count)
        self._pins: Counter[int] = Counter()
        self._hand = 0

    def find(self, block: int) -> int | None:
        slot = self.slot_of.get(block)
        if slot is not None:
            self._asked_for[slot] = 1
        return slot

    def allocate(self) -> int | None:
        """A slot that is empty now, and pinned; None if none was found that is not."""
        for step in range(MAX_SWEEP):
            slot = self._hand
            self._hand = (slot + 1) % self.count
            if slot in self._pins:
                continue
            if self._asked_for[slot] and step < MAX_SWEEP // 2:
                self._asked_for[slot] = 0
                continue
            self.drop(self.block_of[slot])
            self.pin(slot)
            return slot
        return None

    def fill(self, slot: int, block: int, checksum: int) -> None:
        self.drop(block)
        self.slot_of[block] = slot
        self.block_of[slot] = block
        self.sums[slot] = checksum

    def drop(self, block: int) -> None:
        """Forget a block, if it is there."""
        slot = self.slot_of.pop(block, None)
        if slot is not None:
            self.block_of[slot] = -1
            self._asked_for[slot] = 0

    def pin(self, slot: int) -> None:
        """What is in the slot stays there until `unpin`."""
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        self._pins[slot] -= 1
        if not self._pins[slot]:
            del self._pins[slot]


class Store(Protocol):
    """The slots' content. `get` and `put` in any thread, of pinned slots."""

    is_memory: bool

    def checksum(self, block: int, data: memoryview) -> int:
        """Of what is to be found as `block`."""

    def get_now(self, slot: int, length: int) -> memoryview | None:
        """The first `length` bytes of a slot, if that takes no waiting."""

    def get(self, slot: int, data: memoryview) -> int:
        """Read a slot's beginning. Returns 0 or an errno."""

    def put(self, slot: int, block: int, data: memoryview, checksum: int) -> int:
        """Fill a slot. Returns 0 or an errno."""

    def mark_changed(self) -> None:
        """What is cached is about to be changed. ImageError."""

    def close(self) -> None:
        """Release all."""


class MemoryStore:
    is_memory = True

    def __init__(self, slots: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._memory = mmap.mmap(-1, slots * block_bytes)
        self._view = memoryview(self._memory)

    def checksum(self, block: int, data: memoryview) -> int:
        return xxh3_64_intdigest(data, seed=block)

    def get_now(self, slot: int, length: int) -> memoryview | None:
        at = slot * self._block_bytes
        return self._view[at : at + length]

    def get(self, slot: int, data: memoryview) -> int:
        at = slot * self._block_bytes
        data[:] = self._view[at : at + len(data)]
        return 0

    def put(self, slot: int, block: int, data: memoryview, checksum: int) -> int:
        at = slot * self._block_bytes
        self._view[at : at + len(data)] = data
        return 0

    def mark_changed(self) -> None:
        """Nobody finds it again."""

    def close(self) -> None:
        self._view.release()
        self._memory.close()


class FileStore:
    is_memory = False

    def __init__(self, path: str, slots: int, block_bytes: int, identity: int) -> None:
        """Open the file, or make it. ImageError if it is in use, cannot be used, or is something else."""
        self.path = path
        self._block_bytes = block_bytes
        self._identity = identity
        self._slots = slots
        self._data_at = -(-(PAGE_BYTES + slots * ENTRY.size) // PAGE_BYTES) * PAGE_BYTES
        self._buffer = memoryview(bytearray(block_bytes))
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise image_error(error, path, "open the cache") from error
        self._file = ImageFile(path, fd, 0, is_device=False, read_only=False)
        try:
            self._lock()
            self._prepare()
        except OSError as error:
            self._file.close()
            raise image_error(error, path, "use the cache") from error
        except BaseException:
            self._file.close()
            raise
        self._read_flags = self._file.quick_read_flags()

    def _lock(self) -> None:
        try:
            lock_image(self._file.fd, self.path, OpenFlag.NONE)
        except ImageError as error:
            raise ImageError(f"the cache {self.path} is in use", errno=error.errno, path=self.path,
                             hint="give each disk a file of its own") from error

    def _prepare(self) -> None:
        """Make a file that is not of this content, or says that it is not to be believed, an empty cache."""
        file, length = self._file, self._data_at + self._slots * self._block_bytes
        found_bytes, found = file.length_now(), file.load(0, HEADER.size, "the header")
        if found_bytes and found[:8] != MAGIC:
            raise ImageError("is not a read cache, and not empty", errno=errno.EEXIST, path=self.path,
                             hint="remove it if it is not needed, or name another file")
        if found != self._header(changed=0) or found_bytes != length:
            file.truncate(0)
            file.store(0, self._header(changed=0), "the header")
            file.truncate(length)

    def _header(self, changed: int) -> bytes:
        fields = {"magic": MAGIC, "version": VERSION, "changed": changed, "block_bytes": self._block_bytes,
                  "slots": self._slots, "identity": self._identity}
        return HEADER.pack(sum=xxh3_64_intdigest(HEADER.pack(sum=0, **fields)), **fields)

    def load(self, slots: Slots, blocks: int) -> None:
        """What the file says that there is; whether it is right is seen when it is read. ImageError."""
        data = self._file.load(PAGE_BYTES, self._slots * ENTRY.size, "the table")
        for slot, (number, checksum) in enumerate(ENTRY.struct.iter_unpack(data)):
            if 0 < number <= blocks:
                slots.fill(slot, number - 1, checksum)

    def checksum(self, block: int, data: memoryview) -> int:
        return xxh3_64_intdigest(data, seed=(self._identity + block) & _U64)

    def get_now(self, slot: int, length: int) -> memoryview | None:
        view, at = self._buffer[:length], self._data_at + slot * self._block_bytes
        if self._read_flags is None or not self._file.read_inline([view], at, length, self._read_flags):
            return None
        return view

    def get(self, slot: int, data: memoryview) -> int:
        return self._file.read([data], self._data_at + slot * self._block_bytes, len(data))

    def put(self, slot: int, block: int, data: memoryview, checksum: int) -> int:
        code = self._file.write([data], self._data_at + slot * self._block_bytes, len(data))
        if not code:
            entry = memoryview(ENTRY.pack(block=block + 1, sum=checksum))
            code = self._file.write([entry], PAGE_BYTES + slot * ENTRY.size, ENTRY.size)
        return code

    def mark_changed(self) -> None:
        self._file.store(0, self._header(changed=1), "that the cache is out of date")
        self._file.sync_or_raise()

    def close(self) -> None:
        self._file.close()
