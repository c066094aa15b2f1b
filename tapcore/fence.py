"""The fence of an image: a small text file beside it that says that the disk lives elsewhere now.

    /vm/disk.img          the image
    /vm/disk.img.fenced   "handed over to tcp://b:7007"
                          "state 5ab30c4dd1cf8c15 of 2049:1234"

It is there before a hand-over is answered, and every tapdisk that opens the image for writing, with whatever
chain, heeds it: the disk is paused until somebody forces it to go on, which removes the file. That the file exists
is what counts; its first line says why. The second one, if there is one, names the state of the disk that the
image (device and inode) holds, durably and to the byte (writelog.generations): it is a copy that lacks what has
changed since. Everything here blocks, for as long as a flush of a disk takes.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Final

from tapcore.beside import beside
from tapcore.durablefile import remove_file, replace_file, sync_folder
from tapcore.errors import ImageError, image_error

SUFFIX: Final = ".fenced"
MAX_BYTES: Final = 4096
"""Of the file, as far as it is read."""
MAX_WHY_CHARS: Final = 900


def read(image: str) -> str | None:
    """Why the image is fenced, or None if it is not. One whose fence cannot be looked at counts as fenced."""
    try:
        path = beside(image, SUFFIX)
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


def state_of(image: str) -> int:
    """The name of the state that the fenced image holds; 0 if that is not known."""
    try:
        with beside(image, SUFFIX).open("rb") as file:
            text = file.read(MAX_BYTES)
        found = re.search(rb"^state ([0-9a-f]{16}) of (\S+)$", text, re.MULTILINE)
        return int(found[1], 16) if found and found[2].decode() == _identity(image) else 0
    except (OSError, ImageError):
        return 0


def time_ms(image: str) -> int:
    """When the image was fenced, by the clock of this host; 0 if it is not."""
    try:
        return beside(image, SUFFIX).stat().st_mtime_ns // 1_000_000
    except (OSError, ImageError):
        return 0


def _identity(image: str) -> str:
    status = Path(image).stat()
    return f"{status.st_dev}:{status.st_ino}"


def write(image: str, why: str, state: int = 0) -> None:
    """Fence the image, which holds the disk at `state` if that is not 0, durably. ImageError, and no fence, if
    that cannot be done; one that cannot be taken away again either is named in the error."""
    path = beside(image, SUFFIX)
    text = " ".join(why.split())[:MAX_WHY_CHARS] + "\n"
    try:
        if state:
            text += f"state {state:016x} of {_identity(image)}\n"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        failure = image_error(error, str(path), "record the hand-over")
        failure.hint = f"tapdisk has to be able to write to {path.parent}"
        with contextlib.suppress(OSError):
            remove_file(path)
            raise failure from error
        failure.hint = "it may be there all the same: remove it unless the disk is to stay fenced"
        raise failure from error


def keep(image: str) -> str | None:
    """As `read`, and a fence that is there is durable afterwards, whoever wrote it. ImageError if it is not."""
    why = read(image)
    if why is not None:
        path = beside(image, SUFFIX)
        try:
            sync_folder(path.parent)
        except OSError as error:
            raise image_error(error, str(path), "make the fence durable") from error
    return why


def clear(image: str) -> None:
    """Take the fence away, durably, if there is one. ImageError if that cannot be done."""
    path = beside(image, SUFFIX)
    try:
        if path.exists():
            remove_file(path)
    except OSError as error:
        raise image_error(error, str(path), "remove the fence of the image") from error
