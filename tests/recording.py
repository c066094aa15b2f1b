"""An image file whose writes and flushes are recorded, and what a crash may leave of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tapcore.formats.imagefile import ImageFile

SECTOR = 512


@dataclass
class Journal:
    """What happened to the file, in order: (offset, data), a length to which it was cut or grown, or, as a list of
    one number, a flush that covers the first so many entries."""

    entries: list[tuple[int, bytes] | int | list[int]] = field(default_factory=list)

    def durable(self, cut: int) -> int:
        """How many of the first `cut` entries no crash at `cut` can undo."""
        return max((entry[0] for entry in self.entries[:cut] if isinstance(entry, list)), default=0)

    def crash(self, image: bytes, cut: int, rng: random.Random | None) -> bytes:
        """What is left of `image` if the power fails after `cut` entries: what was flushed, and of the rest all
        (without `rng`) or any sectors."""
        data = bytearray(image)
        for number, entry in enumerate(self.entries[:cut]):
            kept = rng is None or number < self.durable(cut)
            if isinstance(entry, int):
                if kept:
                    data = data[:entry].ljust(entry, b"\0")
            elif isinstance(entry, tuple):
                offset, new = entry
                for at in range(0, len(new), SECTOR):
                    part = new[at : at + SECTOR]
                    if kept or (rng is not None and rng.random() < 0.5):
                        data.extend(bytes(max(0, offset + at + len(part) - len(data))))
                        data[offset + at : offset + at + len(part)] = part
        return bytes(data)


class RecordingFile(ImageFile):
    """Records into `journal`. Flushes are recorded but not done."""

    journal: ClassVar[Journal]

    def write_inline(self, iov: Sequence[memoryview], offset: int) -> int:
        count = super().write_inline(iov, offset)
        self.journal.entries.append((offset, b"".join(iov)[:count]))
        return count

    def write(self, iov: Sequence[memoryview], offset: int, length: int, *, fua: bool = False) -> int:
        assert not fua
        self.journal.entries.append((offset, b"".join(iov)))
        return super().write(iov, offset, length)

    def sync(self) -> int:
        self.journal.entries.append([len(self.journal.entries)])
        return 0

    def truncate(self, length: int) -> None:
        self.journal.entries.append(length)
        super().truncate(length)

    def discard(self, offset: int, length: int) -> int:
        self.journal.entries.append((offset, bytes(length)))
        return super().discard(offset, length)

    def zeroes(self, offset: int, length: int, flags: int) -> int:
        self.journal.entries.append((offset, bytes(length)))
        return super().zeroes(offset, length, flags)
