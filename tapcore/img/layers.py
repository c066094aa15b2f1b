"""An overlay and what is below it: commit and rebase.

What the overlay itself has, an `Own` tells commit. A `Below` between two images of a chain adds one to the depth
in the states of a block status on its way up:

    overlay ▶ Below ▶ backing ▶ Below ▶ its backing        state = (depth << DEPTH_SHIFT) | hole | zero

Neither changes what the disk shows until that is durable: commit leaves the overlay as it is, rebase first copies
what the new backing has not, and then changes the backing's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tapcore.chain import Chain
from tapcore.driver import DiskInfo, Driver, Filter, OpenFlag
from tapcore.errors import UsageError
from tapcore.formats.tools import Backing
from tapcore.imagelock import refuse_readers
from tapcore.img.compare import NOWHERE, first_difference
from tapcore.img.convert import count_data
from tapcore.img.copy import TASKS, Disk, copy, flush, granule_of, new_buffer
from tapcore.img.locate import Image, file_image
from tapcore.img.progress import Progress
from tapcore.img.session import Batch, Session, Steps, Task, ended_well
from tapcore.img.walk import DATA, PIECE_BYTES, SKIP, ZERO, Piece, Walk, data_or_zero
from tapcore.request import BACKGROUND, READ, STATUS_HOLE, STATUS_ZERO, WRITE, Request

DEPTH_SHIFT: Final = 8
BELOW: Final = OpenFlag.RDONLY | OpenFlag.SHAREABLE
"""How images below others are opened."""


class Below(Filter):
    """What stands between an image and its backing: counts depth in block status."""

    def queue_status(self, request: Request) -> bool:
        done = request.done

        def deepen(request: Request) -> None:
            request.done = done
            request.extents = [(length, state + (1 << DEPTH_SHIFT)) for length, state in request.extents]

        def deepen_late(request: Request) -> None:
            deepen(request)
            done(request)

        request.done = deepen_late
        if not self.next.queue_status(request):
            return False
        deepen(request)
        return True


class Own(Filter):
    """An image without what shows through it: HOLE where it has nothing, ZERO where it has zeroes. What is below
    is not asked."""

    def queue_status(self, request: Request) -> bool:
        own: Callable[[Request], bool] = getattr(self.next, "queue_own_status", self.next.queue_status)
        return own(request)


def mark_depths(chain: Chain) -> list[Driver]:
    """Let the block status of `chain` say how deep each part lies. Returns its images, the overlay first."""
    images = [chain.leaf]
    while (backing := images[-1].backing) is not None:
        mark = Below(backing.env, "", backing.flags)
        mark.attach(backing)
        images[-1].backing = mark
        images.append(backing)
    return images


@dataclass(frozen=True)
class Committed:
    overlay: str
    backing: str
    data_bytes: int


def commit(session: Session, overlay: Image, progress: Progress) -> Committed:
    """Copy the overlay's own parts into its backing, durably. The overlay stays as it is. UsageError if it has no
    backing, ImageError if anyone uses either."""
    backing, size_bytes = _look_below(session, overlay)
    if backing.info.size_bytes < size_bytes:
        refuse_readers(backing.image.file)
        backing.image.tools.resize(backing.image.file, size_bytes)
    into = session.open(backing.image.chain)
    chain = session.open(overlay.chain, OpenFlag.RDONLY)
    own = Own(session.env, "", chain.leaf.flags)
    own.attach(chain.leaf)

    def walk() -> Walk:
        return Walk(session, own, str(overlay), kind_of=_own_parts)

    progress.start(count_data(session, walk()) if progress.is_on else 0)
    copy(session, Disk(chain.head, str(overlay)), Disk(into.head, str(backing.image)), walk(), progress,
         granule_bytes=granule_of(into.info))
    session.close(into)
    session.close(chain)
    overlay.tools.accept_backing(overlay.file)
    progress.end()
    return Committed(str(overlay), str(backing.image), progress.done_bytes)


def _own_parts(state: int) -> int:
    """For a Walk over an Own."""
    return SKIP if state & STATUS_HOLE else data_or_zero(state)


class _Under(NamedTuple):
    image: Image
    info: DiskInfo


def _look_below(session: Session, overlay: Image) -> tuple[_Under, int]:
    """The backing of an overlay, and the overlay's size. UsageError if it has none."""
    chain = session.open(overlay.chain, OpenFlag.RDONLY | OpenFlag.QUERY)
    size_bytes, backing = chain.info.size_bytes, chain.leaf.backing
    if backing is None:
        raise UsageError(f"{overlay} has no backing file to be committed to")
    found = _Under(file_image(backing.path or backing.params, backing.name), backing.info)
    session.close(chain)
    return found, size_bytes


@dataclass(frozen=True)
class Rebased:
    image: str
    backing: str | None
    copied_bytes: int
    """What had to be copied because the new backing has other data there."""


def rebase(
    session: Session, image: Image, backing: Backing | None, base_image: Image | None, progress: Progress
) -> Rebased:
    """Give `image` the backing that `base_image` opens, or none, without a change of what it shows: what differs
    is copied into it first. UsageError for a loop; ImageError, and then the image has its former backing, and
    shows what it did."""
    chain = session.open(image.chain)
    images = mark_depths(chain)
    base = None if base_image is None else session.open(base_image.chain, BELOW)
    if base is not None and any(same_file(driver.path, image.file) for driver in base.drivers):
        raise UsageError(f"{base_image} is {image}, or lies on it: that would be a loop")
    target = Disk(chain.head, str(image))
    under = None if base is None else Disk(base.head, str(base_image))
    rebasing = _Rebasing(session, target, under, progress)
    rebasing.run(images[1].info.size_bytes if len(images) > 1 else 0)
    session.run([flush(target)])
    if base is not None:
        session.close(base)
    session.close(chain)
    image.tools.set_backing(image.file, backing)
    progress.end()
    return Rebased(str(image), backing.path if backing else None, rebasing.copied_bytes)


def same_file(one: str | None, other: str) -> bool:
    return one is not None and Path(one).exists() and Path(one).samefile(other)


def _shows_below(state: int) -> int:
    """For a Walk where there is a backing: SKIP for the image's own."""
    return data_or_zero(state) if state >> DEPTH_SHIFT else SKIP


def _may_show_below(state: int) -> int:
    """For a Walk where there is none: an image's own zeroes look as if it had nothing there."""
    return ZERO if state & STATUS_ZERO else SKIP


class _Rebasing:
    """Copies into `target` what it shows of its present backing and `base` does not."""

    def __init__(self, session: Session, target: Disk, base: Disk | None, progress: Progress) -> None:
        self.copied_bytes = 0
        self._session = session
        self._target = target
        self._base = base
        self._progress = progress
        self._granule_bytes = min(granule_of(target.driver.info), PIECE_BYTES)

    def run(self, backing_bytes: int) -> None:
        """The present backing has `backing_bytes`."""
        size_bytes = self._target.driver.info.size_bytes
        backing_bytes = min(backing_bytes, size_bytes)
        if self._progress.is_on:
            self._progress.start(count_data(self._session, self._walk(0, backing_bytes, _shows_below)))
        for walk in (self._walk(0, backing_bytes, _shows_below),
                     self._walk(backing_bytes, size_bytes, _may_show_below)):
            self._session.run(self._task(walk) for _ in range(TASKS))

    def _walk(self, start: int, stop: int, kind_of: Callable[[int], int]) -> Walk:
        return Walk(self._session, self._target.driver, self._target.name, start, stop,
                    granule_bytes=self._granule_bytes, kind_of=kind_of)

    def _task(self, walk: Walk) -> Task:
        mine, theirs = memoryview(bytearray(PIECE_BYTES)), new_buffer(PIECE_BYTES)
        while (piece := (yield from walk.next())) is not None:
            if piece.kind == SKIP:
                continue
            if piece.kind == DATA:
                yield from self._piece(piece, mine, theirs)
                self._progress.advance(piece.length)
            elif self._base is not None:
                inside = min(piece.offset + piece.length, self._base.driver.info.size_bytes)
                rest = Walk(self._session, self._base.driver, self._base.name, piece.offset, inside,
                            granule_bytes=self._granule_bytes)
                while (part := (yield from rest.next())) is not None:
                    if part.kind == DATA:
                        yield from self._piece(part, mine, theirs)

    def _piece(self, piece: Piece, mine: memoryview, theirs: memoryview) -> Steps[None]:
        offset, length, _ = piece
        inside = 0 if self._base is None else max(0, min(length, self._base.driver.info.size_bytes - offset))
        reads = [(self._target, Request(READ, offset, length, [mine[:length]], BACKGROUND))]
        if self._base is not None and inside:
            reads.append((self._base, Request(READ, offset, inside, [theirs[:inside]], BACKGROUND)))
        theirs[inside:length] = bytes(length - inside)
        yield [(disk.driver, request) for disk, request in reads]
        for disk, request in reads:
            ended_well(request, disk.name)
        yield from self._store(offset, mine[:length], theirs[:length])

    def _store(self, offset: int, mine: memoryview, theirs: memoryview) -> Steps[None]:
        """Write what differs, zeroes too as data: to the present backing they may be no change at all."""
        if first_difference(mine, theirs) == NOWHERE:
            return
        batch: Batch = []
        for start in range(0, len(mine), self._granule_bytes):
            part = mine[start : start + self._granule_bytes]
            if first_difference(part, theirs[start : start + self._granule_bytes]) != NOWHERE:
                batch.append((self._target.driver, Request(WRITE, offset + start, len(part), [part], BACKGROUND)))
                self.copied_bytes += len(part)
        yield batch
        for _, request in batch:
            ended_well(request, self._target.name)
