"""convert: one disk's content into another, or into a new image of any format."""

from __future__ import annotations

import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tapcore.chain import Chain
from tapcore.driver import OpenFlag
from tapcore.errors import UsageError
from tapcore.formats.tools import ImageTools, Packer
from tapcore.img.copy import Disk, copy, flush, granule_of, piece_of, read_in_order, zero_out
from tapcore.img.locate import Image, file_image
from tapcore.img.newfile import new_file
from tapcore.img.progress import Progress
from tapcore.img.session import Session, Task
from tapcore.img.walk import DATA, Walk


@dataclass(frozen=True)
class Result:
    """What a convert has done."""

    source: str
    target: str
    size_bytes: int
    data_bytes: int
    """What had to be read; the rest is holes and zeroes."""
    elapsed_s: float


def is_block_device(path: str) -> bool:
    return Path(path).exists() and stat.S_ISBLK(Path(path).stat().st_mode)


def convert_to_new(
    session: Session, source: Image, path: str, tools: type[ImageTools], progress: Progress, *,
    options: Mapping[str, str], compress: bool = False, replace: bool = False,
) -> Result:
    """Make `path`, an image with the content of `source`. It is there when it is whole, and else not."""
    started_s = time.monotonic()
    for name in tools.file_options:
        if "/" in options.get(name, ""):
            raise UsageError(f"{name} {options[name]!r} is not beside the image, where the new files are made",
                             hint="make an empty image with td-img create, then convert --existing")
    chain = session.open(source.chain, OpenFlag.RDONLY)
    size_bytes = chain.info.size_bytes
    with new_file(path, replace=replace) as place:
        packer = tools.packer(place, size_bytes, options, compress=compress)
        if packer is not None:
            with packer:
                _pack_all(session, chain, source, packer, progress)
        else:
            tools.create(place, size_bytes, options=options)
            target = session.open(file_image(place, tools.name).chain)
            _copy_all(session, chain, source, target, path, progress, reads_zero=True)
            session.close(target)
    session.close(chain)
    progress.end()
    return Result(str(source), path, size_bytes, progress.done_bytes, time.monotonic() - started_s)


def convert_into(session: Session, source: Image, target: Image, progress: Progress) -> Result:
    """Write the content of `source` into a disk that exists, and zeroes behind it. UsageError if there is no
    room for it."""
    started_s = time.monotonic()
    chain = session.open(source.chain, OpenFlag.RDONLY)
    size_bytes = chain.info.size_bytes
    into = session.open(target.chain)
    room_bytes = into.info.size_bytes
    if room_bytes < size_bytes:
        raise UsageError(f"{target} has {room_bytes} bytes, too few for the {size_bytes} of {source}",
                         hint="td-img resize makes an image larger")
    _copy_all(session, chain, source, into, str(target), progress, reads_zero=False)
    if room_bytes > size_bytes:
        session.run([_clear(Disk(into.head, str(target)), size_bytes, room_bytes)])
        session.run([flush(Disk(into.head, str(target)))])
    session.close(into)
    session.close(chain)
    progress.end()
    return Result(str(source), str(target), size_bytes, progress.done_bytes, time.monotonic() - started_s)


def _clear(disk: Disk, start: int, stop: int) -> Task:
    while start < stop:
        length = min(stop - start, 1 << 30)
        yield from zero_out(disk, start, length)
        start += length


def _copy_all(
    session: Session, source: Chain, source_image: Image, target: Chain, target_name: str, progress: Progress, *,
    reads_zero: bool,
) -> None:
    granule_bytes = granule_of(target.info)

    def walk() -> Walk:
        return Walk(session, source.head, str(source_image), granule_bytes=granule_bytes,
                    piece_bytes=piece_of(granule_bytes))

    progress.start(count_data(session, walk()) if progress.is_on else 0)
    copy(session, Disk(source.head, str(source_image)), Disk(target.head, target_name), walk(), progress,
         granule_bytes=granule_bytes, reads_zero=reads_zero)


def _pack_all(session: Session, source: Chain, image: Image, packer: Packer, progress: Progress) -> None:
    def walk() -> Walk:
        return Walk(session, source.head, str(image), granule_bytes=packer.unit_bytes,
                    piece_bytes=piece_of(packer.unit_bytes))

    progress.start(count_data(session, walk()) if progress.is_on else 0)
    disk = Disk(source.head, str(image))
    for offset, data in read_in_order(session, disk, walk(), piece_of(packer.unit_bytes)):
        packer.write(offset, data)
        progress.advance(len(data))


def count_data(session: Session, walk: Walk) -> int:
    """The bytes of the DATA pieces of a walk: what progress is measured by."""
    total_bytes = 0

    def task() -> Task:
        nonlocal total_bytes
        while (piece := (yield from walk.next())) is not None:
            total_bytes += piece.length if piece.kind == DATA else 0

    session.run([task()])
    return total_bytes
