"""Space at the end of the file, for formats that count no references; what was given up is given out again.

    |####|free|####|free|##########| end ─▶

What is free is known in memory alone: when the image is opened again it is a leak.
"""

from __future__ import annotations

from tapcore.formats.durable import Steps
from tapcore.formats.imagefile import ImageFile

Place = tuple[int, int]
"""(host offset, length)."""


class Tail:
    """Of one file, which reads as zeroes from `end` on. Places are aligned to `align_bytes`."""

    def __init__(self, file: ImageFile, align_bytes: int, end: int | None = None) -> None:
        self._file = file
        self._align_bytes = align_bytes
        self.end = file.length_now() if end is None else end
        """Where the file will end."""
        self._free: dict[int, list[int]] = {}

    def take(self, length: int) -> tuple[int, bool]:
        """(the host offset of `length` bytes, does the file read as zeroes there)."""
        free = self._free.get(length)
        if free:
            return free.pop(), False
        host = -(-self.end // self._align_bytes) * self._align_bytes
        self.end = host + length
        return host, True

    def release(self, places: list[Place]) -> Steps:
        """Return the space of these to the file system, then let them be taken again."""
        def punch() -> None:
            for host, length in places:
                self._file.discard(host, length)

        yield punch
        for host, length in reversed(places):  # what is taken one after the other lies together
            self._free.setdefault(length, []).append(host)

    def fill(self) -> None:
        """Let the file be as long as what was taken says. OSError."""
        if self._file.length_now() < self.end:
            self._file.truncate(self.end)
