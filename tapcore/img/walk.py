"""A disk's pieces, one after the other, by its block status.

    status   |····hole····|==data==|··zero··|====data====|
    pieces   [    ZERO   ][  DATA   ][ ZERO ][DATA][DATA ]     edges between them are multiples of the granule

Tasks take pieces from one Walk in turns. A granule that is partly zero is DATA.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from tapcore.driver import SECTOR_BYTES, Driver
from tapcore.errors import ImageError
from tapcore.img.session import Lock, Session, Steps, ended_well
from tapcore.request import STATUS, STATUS_ZERO, Request

DATA: Final = 0
ZERO: Final = 1
SKIP: Final = 2
"""Of no interest."""

PIECE_BYTES: Final = 1 << 20
MAX_RUN_BYTES: Final = 1 << 30
"""The longest piece that is not DATA, and the most that one block status asks about."""


class Piece(NamedTuple):
    offset: int
    length: int
    kind: int


def data_or_zero(state: int) -> int:
    """What an extent's state means to who wants the content."""
    return ZERO if state & STATUS_ZERO else DATA


class Walk:
    """The pieces of [start, stop). `piece_bytes`, which no DATA piece exceeds or crosses a multiple of, is a
    multiple of `granule_bytes`; both are powers of two. `name` is the disk's, for errors."""

    def __init__(
        self, session: Session, disk: Driver, name: str, start: int = 0, stop: int | None = None, *,
        granule_bytes: int = SECTOR_BYTES, piece_bytes: int = PIECE_BYTES,
        kind_of: Callable[[int], int] = data_or_zero,
    ) -> None:
        self._disk = disk
        self._name = name
        self._position = start
        self._stop = disk.info.size_bytes if stop is None else stop
        self._granule_bytes = granule_bytes
        self._piece_bytes = piece_bytes
        self._kind_of = kind_of
        self._known: deque[tuple[int, int]] = deque()
        """(end, kind) of the extents from the position on."""
        self._lock = Lock(session)

    def next(self) -> Steps[Piece | None]:
        """The next piece; None at the end. ImageError if the block status fails."""
        try:
            yield self._lock
            while self._position < self._stop:
                known = self._known
                while known and known[0][0] <= self._position:
                    known.popleft()
                if known:
                    return self._take(*known[0])
                yield from self._look()
            return None
        finally:
            self._lock.release()

    def _look(self) -> Steps[None]:
        request = Request(STATUS, self._position, min(self._stop - self._position, MAX_RUN_BYTES))
        yield [(self._disk, request)]
        ended_well(request, self._name)
        end = self._position
        for length, state in request.extents:
            end = min(end + length, self._stop)
            kind = self._kind_of(state)
            if self._known and self._known[-1][1] == kind:
                self._known.pop()
            self._known.append((end, kind))
        if end == self._position:
            raise ImageError("block status says nothing", path=self._name, offset=end)

    def _take(self, end: int, kind: int) -> Piece:
        start = self._position
        if kind != DATA:
            stop = end if end == self._stop else end & -self._granule_bytes
            if stop <= start:
                kind = DATA
        if kind == DATA:
            border = (start & -self._piece_bytes) + self._piece_bytes
            stop = min(-(-end & -self._granule_bytes), border, self._stop)
        self._position = min(stop, start + MAX_RUN_BYTES)
        return Piece(start, self._position - start, kind)
