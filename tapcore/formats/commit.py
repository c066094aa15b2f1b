"""What a flush writes of an image's metadata, and in which order.

    data (already written), stage 0 │ stage 1 │ stage 2 … │
                                    ▲ a barrier (fdatasync) before each stage but the first that has something to
                                      write, and one at the end

Power loss may undo, or half-do in units of 512 bytes, whatever was written since the last barrier. So what points
at something belongs into a later stage than that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tables import SECTOR_BYTES, Sectors, Tables

Write = tuple[int, bytes]
"""(offset in the file, data)."""


class Commit:
    """What was changed when it was made, as bytes; `run` writes it, then either `succeeded` or `failed` is due.

    `taken` are tables with what `take_dirty` took of them.
    """

    def __init__(self, stages: list[list[Write]], taken: Sequence[tuple[Tables[Any], Sectors]] = ()) -> None:
        self.stages = stages
        self.taken = taken

    def run(self, file: ImageFile, data: ImageFile) -> int:
        """Write all of it to `file`, durably; `data`, where the guest's data is, becomes durable before it. Any
        thread. Returns 0 or an errno."""
        if data is not file:
            code = data.sync()
            if code:
                return code
        for number, stage in enumerate(self.stages):
            if number and stage:
                code = file.sync()
                if code:
                    return code
            for offset, content in stage:
                code = file.write([memoryview(content)], offset, len(content))
                if code:
                    return code
        return file.sync()

    def succeeded(self) -> None:
        for tables, sectors in self.taken:
            tables.settle(sectors)

    def failed(self) -> None:
        """Everything is to be written again."""
        for tables, sectors in self.taken:
            tables.put_back(sectors)


def array_writes(
    values: array[int], offset: int, sectors: Iterable[int], to_bytes: Callable[[array[int]], bytes]
) -> Iterator[Write]:
    """The given sectors of a table that begins at `offset`."""
    per_sector = SECTOR_BYTES // values.itemsize
    for first, count in runs(sectors):
        part = values[first * per_sector : (first + count) * per_sector]
        yield offset + SECTOR_BYTES * first, to_bytes(part)


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Sorted, as (first, count) of neighbours."""
    first, count = 0, 0
    for number in sorted(numbers):
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count
