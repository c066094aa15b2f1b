"""The fence of an image: a small text file beside it that says that the disk lives elsewhere now.

    /vm/disk.img          the image
    /vm/disk.img.fenced   "handed over to tcp://b:7007"

It is there before a hand-over is answered, and every tapdisk that opens the image for writing, with whatever
chain, heeds it: the disk is paused until somebody forces it to go on, which removes the file. That the file exists
is what counts; its first line says why. Beside a block device nothing can be kept: its fence is in the state
directory ($TAPDISK_STATE_DIR, or /var/lib/tapdisk), under the device's path with '_' for '/'.

An image is known by its path, symbolic links resolved; a device by the path that it was opened with, since what
that leads to changes from boot to boot. Everything here blocks, for as long as a flush of a disk takes.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from tapcore.durablefile import remove_file, replace_file
from tapcore.errors import ImageError, image_error

SUFFIX: Final = ".fenced"
MAX_BYTES: Final = 4096
"""Of the file, as far as it is read."""
STATE_DIR_VARIABLE: Final = "TAPDISK_STATE_DIR"


def fence_path(image: str) -> Path:
    """Where the fence of an image is, if there is one. ImageError if the image cannot be looked at."""
    try:
        is_device = stat.S_ISBLK(Path(image).stat().st_mode)
    except OSError as error:
        raise image_error(error, image, "look at the image") from error
    if is_device:
        folder = Path(os.environ.get(STATE_DIR_VARIABLE) or "/var/lib/tapdisk")
        return folder / (str(Path(image).absolute()).strip("/").replace("/", "_") + SUFFIX)
    return Path(os.path.realpath(image) + SUFFIX)


def read(image: str) -> str | None:
    """Why the image is fenced, or None if it is not. One whose fence cannot be looked at counts as fenced."""
    try:
        path = fence_path(image)
        with path.open("rb") as file:
            text = file.read(MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(image_error(error, str(path), "read the fence of the image"))
    except ImageError as error:
        return str(error)
    lines = text.decode(errors="replace").splitlines()
    return lines[0] if lines and lines[0].strip() else f"fenced by {path}"


def write(image: str, why: str) -> None:
    """Fence the image, durably. ImageError, and no fence, if that cannot be done; one that cannot be taken away
    again either is named in the error."""
    path = fence_path(image)
    line = " ".join(why.split())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, f"{line}\n".encode()[:MAX_BYTES])
    except OSError as error:
        failure = image_error(error, str(path), "record the hand-over")
        failure.hint = "the folder must be one that tapdisk may write to"
        with contextlib.suppress(OSError):
            remove_file(path)
            raise failure from error
        failure.hint = "it may be there all the same: remove it unless the disk is to stay fenced"
        raise failure from error


def clear(image: str) -> None:
    """Take the fence away, durably, if there is one. ImageError if that cannot be done."""
    path = fence_path(image)
    try:
        if path.exists():
            remove_file(path)
    except OSError as error:
        raise image_error(error, str(path), "remove the fence of the image") from error
