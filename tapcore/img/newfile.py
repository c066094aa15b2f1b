"""Files that appear when they are complete.

They are made in a folder of their own beside their place, `.NAME.….partial`, under their last names: an image may
be several files that name each other. A program that is killed leaves that folder, and nothing that looks whole.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError, image_error
from tapcore.formats.imagefile import ImageFile
from tapcore.imagelock import refuse_readers


@contextmanager
def new_file(path: str, *, replace: bool = False) -> Iterator[str]:
    """Where to make what is to be at `path`. When the block ends, the file, and those beside it, get there; if it
    raises they are removed. What is there is replaced only if that is asked for, and nobody uses it.
    ImageError."""
    target = Path(path)
    _refuse_existing(target, replace=replace)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise image_error(error, path, "make a file here") from error
    try:
        yield str(folder / target.name)
        try:
            _publish(folder, target, replace=replace)
        except OSError as error:
            raise image_error(error, path, "put the finished image in its place") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path, *, replace: bool) -> None:
    """The file that the image is named by comes last."""
    others = sorted(file.name for file in folder.iterdir() if file.name != target.name)
    for name in [*others, target.name]:
        place = target.parent / name
        _refuse_existing(place, replace=replace)
        if replace:
            (folder / name).rename(place)
        else:
            _move_without_replacing(folder / name, place)
    fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _move_without_replacing(source: Path, place: Path) -> None:
    try:
        place.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):  # a file system without hard links
            raise
        source.rename(place)


def _refuse_existing(target: Path, *, replace: bool) -> None:
    if not os.path.lexists(target):
        return
    if not replace:
        raise ImageError("the file exists", path=str(target), errno=errno.EEXIST,
                         hint="remove it first, or say --force to have it replaced when the new one is whole")
    refuse_readers(str(target))
    ImageFile.open(str(target), OpenFlag.NONE).close()  # refuses what is in use
