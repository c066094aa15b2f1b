"""compare: do two disks have the same content? What both say is zero is not read."""

from __future__ import annotations

from typing import Final

from tapcore.img.copy import TASKS, Disk, is_zero, new_buffer
from tapcore.img.progress import Progress
from tapcore.img.session import Session, Steps, Task, ended_well
from tapcore.img.walk import DATA, PIECE_BYTES, Piece, Walk
from tapcore.request import BACKGROUND, READ, Request

NOWHERE: Final = -1


def first_difference(one: memoryview, other: memoryview) -> int:
    """The index of the first byte that differs; NOWHERE if none does. They are of one length."""
    # A bytearray compares itself by memcmp, memoryviews byte by byte.
    whole = one.obj
    if (whole if isinstance(whole, bytearray) and len(whole) == len(one) else bytearray(one)) == other:
        return NOWHERE
    start, stop = 0, len(one)
    while stop - start > 1:
        middle = (start + stop) // 2
        if bytearray(one[start:middle]) == other[start:middle]:
            start = middle
        else:
            stop = middle
    return start


class Comparison:
    """Of `one` with `other`. `offset` is the first byte at which they differ, NOWHERE if none does. A longer disk
    differs from a shorter one where it is not zero behind its end."""

    def __init__(self, session: Session, one: Disk, other: Disk, progress: Progress) -> None:
        self.offset = NOWHERE
        self._session = session
        self._progress = progress
        self._one, self._other = one, other
        sizes = one.driver.info.size_bytes, other.driver.info.size_bytes
        self._common_bytes = min(sizes)
        self._longer = one if sizes[0] >= sizes[1] else other

    def walks(self) -> list[Walk]:
        """Over what both have, and over the rest of the longer one."""
        common_bytes = self._common_bytes
        return [Walk(self._session, self._one.driver, self._one.name, 0, common_bytes),
                Walk(self._session, self._longer.driver, self._longer.name, common_bytes)]

    def run(self) -> int:
        """Compare; returns `offset`. ImageError."""
        common, rest = self.walks()
        self._session.run(self._compare_pieces(common) for _ in range(TASKS))
        if self.offset == NOWHERE:
            self._session.run(self._find_data(rest, self._longer) for _ in range(TASKS))
        return self.offset

    def _is_late(self, piece: Piece) -> bool:
        """Is it behind a difference? Pieces are given out in order: what is before one is done, or being done."""
        return self.offset != NOWHERE and piece.offset > self.offset

    def _differs(self, offset: int) -> None:
        self.offset = offset if self.offset == NOWHERE else min(self.offset, offset)

    def _compare_pieces(self, walk: Walk) -> Task:
        mine, theirs = memoryview(bytearray(PIECE_BYTES)), new_buffer(PIECE_BYTES)
        while (piece := (yield from walk.next())) is not None and not self._is_late(piece):
            offset, length, kind = piece
            if kind != DATA:
                rest = Walk(self._session, self._other.driver, self._other.name, offset, offset + length)
                yield from self._find_data(rest, self._other, theirs)
                continue
            yield from _read_both(self._one, self._other, piece, mine, theirs)
            self._progress.advance(length)
            at = first_difference(mine[:length], theirs[:length])
            if at != NOWHERE:
                self._differs(offset + at)

    def _find_data(self, walk: Walk, disk: Disk, buffer: memoryview | None = None) -> Steps[None]:
        buffer = new_buffer(PIECE_BYTES) if buffer is None else buffer
        while (piece := (yield from walk.next())) is not None and not self._is_late(piece):
            if piece.kind != DATA:
                continue
            data = buffer[: piece.length]
            request = Request(READ, piece.offset, piece.length, [data], BACKGROUND)
            yield [(disk.driver, request)]
            ended_well(request, disk.name)
            self._progress.advance(piece.length)
            if not is_zero(data):
                self._differs(piece.offset + first_difference(data, memoryview(bytes(len(data)))))


def _read_both(one: Disk, other: Disk, piece: Piece, mine: memoryview, theirs: memoryview) -> Steps[None]:
    offset, length, _ = piece
    requests = [Request(READ, offset, length, [buffer[:length]], BACKGROUND) for buffer in (mine, theirs)]
    yield [(one.driver, requests[0]), (other.driver, requests[1])]
    ended_well(requests[0], one.name)
    ended_well(requests[1], other.name)
