"""Which other files an image may have opened: backing files, and what else it names.

A name in an image is not the operator's: whoever made the image chose it. So a name leads only

- into the folder of the image that names it, or below,
- into the directories that the operator gave (`--backing-dirs` of tapdisk and writelog-replica, or
  $TAPDISK_BACKING_DIRS),
- to files that the operator has named himself, as levels of a chain.

Links are followed first: what counts is where the file really is. That is looked at before a file is opened, and
again when it is open, by the kernel's own name for it (/proc/self/fd): who exchanges a part of the path in between
wins nothing.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tapcore.errors import ImageError, UsageError

VARIABLE: Final = "TAPDISK_BACKING_DIRS"


class Reach:
    """`folders` are allowed besides an image's own; None: any file is. In any thread."""

    def __init__(self, folders: Iterable[Path] | None = None, named: Iterable[str] = ()) -> None:
        self._folders = None if folders is None else frozenset(folder.resolve() for folder in folders)
        self._named = set(map(Path, named))

    @property
    def named(self) -> list[str]:
        """The files that the operator has named, by the kernel's names for them."""
        return sorted(map(str, self._named))

    def add_named(self, fd: int) -> None:
        """The operator himself has named the file that is open as `fd`."""
        if self._folders is not None:
            self._named.add(_real_path(fd))

    def check(self, image: str, place: str) -> None:
        """ImageError if the file at `place`, which `image` names, must not be opened for it."""
        if self._folders is not None:
            try:
                real = Path(place).resolve()
            except (OSError, RuntimeError) as error:  # such as a loop of symbolic links
                raise ImageError(f"names {place}, which leads nowhere: {error}", path=image) from None
            self._check(image, place, real)

    def check_open(self, image: str, place: str, fd: int) -> None:
        """The same of one that is open already as `fd`: ImageError if it is not what `check` has seen."""
        if self._folders is not None:
            self._check(image, place, _real_path(fd))

    def _check(self, image: str, place: str, real: Path) -> None:
        assert self._folders is not None
        own = Path(image).parent.resolve()
        if real in self._named or any(real.is_relative_to(folder) for folder in (own, *self._folders)):
            return
        where = place if str(real) == place else f"{place} ({real})"
        raise ImageError(f"names {where}, which is not in its folder, nor where images may name files",
                         errno=errno.EPERM, path=image,
                         hint=f"if it is the right one, allow its folder: tapdisk --backing-dirs, or ${VARIABLE}")


ANYWHERE: Final = Reach(None)


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--backing-dirs`, for `given`."""
    parser.add_argument("--backing-dirs", type=parse_folders, metavar="DIR[:DIR…]",
                        help="where the images may name backing files, besides their own folders and the files of "
                             f"the chains given here (default: ${VARIABLE}, or nowhere else)")


def given(folders: Iterable[Path] | None, named: Iterable[str] = ()) -> Reach:
    """What the option, or without it the environment, allows. UsageError."""
    return Reach(folders_of_environment() or () if folders is None else folders, named)


def parse_folders(text: str) -> list[Path]:
    """The directories in `DIR[:DIR…]`; none in an empty text. UsageError if one is none."""
    folders = [Path(part) for part in text.split(":") if part]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError("is no directory", path=str(folder), hint="directories are written DIR[:DIR…]")
    return folders


def folders_of_environment() -> list[Path] | None:
    """What $TAPDISK_BACKING_DIRS says, None if it is not set. UsageError."""
    text = os.environ.get(VARIABLE)
    return None if text is None else parse_folders(text)


def _real_path(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()
