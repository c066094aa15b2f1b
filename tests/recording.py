"""An image file whose writes and flushes are recorded, and what a crash may leave of them; and workers that work
when the test says so."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tapcore.formats.imagefile import ImageFile
from tapcore.workers import Workers

SECTOR = 512


@dataclass
class Journal:
    """What happened to the file, in order: (offset, data), a length to which it was cut or grown, or, as a list of
    one number, a flush that covers the first so many entries; None is what happened to another file of the same
    image, so that one cut goes through the journals of all."""

    entries: list[tuple[int, bytes] | int | list[int] | None] = field(default_factory=list)
    others: list[Journal] = field(default_factory=list)

    def add(self, entry: tuple[int, bytes] | int | list[int]) -> None:
        self.entries.append(entry)
        for other in self.others:
            other.entries.append(None)

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
    """Records into `journal`, or one of `journals` if its file's name is among them. Flushes are recorded but not
    done."""

    journal: ClassVar[Journal]
    journals: ClassVar[dict[str, Journal]] = {}

    def _record(self, entry: tuple[int, bytes] | int) -> None:
        self._journal().add(entry)

    def _journal(self) -> Journal:
        return self.journals.get(Path(self.path).name, self.journal)

    def write_inline(self, iov: Sequence[memoryview], offset: int) -> int:
        count = super().write_inline(iov, offset)
        self._record((offset, b"".join(iov)[:count]))
        return count

    def write(self, iov: Sequence[memoryview], offset: int, length: int, *, fua: bool = False) -> int:
        assert not fua
        self._record((offset, b"".join(iov)))
        return super().write(iov, offset, length)

    def sync(self) -> int:
        journal = self._journal()
        journal.add([len(journal.entries)])
        return 0

    def zeroes(self, offset: int, length: int, flags: int) -> int:
        self._record((offset, bytes(length)))
        return super().zeroes(offset, length, flags)

    def truncate(self, length: int) -> None:
        self._record(length)
        super().truncate(length)

    def discard(self, offset: int, length: int) -> int:
        self._record((offset, bytes(length)))
        return super().discard(offset, length)


class ManualWorkers(Workers):
    """`run` does the work that waits and tells of it."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], None], Callable[[], None]]] = []

    def submit(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        self.waiting.append((work, done))

    def run(self, limit: int = 1000) -> None:
        while self.waiting and limit:
            work, done = self.waiting.pop(0)
            work()
            done()
            limit -= 1

    def close(self) -> None:
        self.waiting.clear()
