"""The fence of an image: a small text file beside it that says that the disk lives elsewhere now.

    /vm/disk.img          the image
    /vm/disk.img.fenced   "handed over to tcp://b:7007"

It is there before a hand-over is answered, and every tapdisk that opens the image for writing, with whatever
chain, heeds it: the disk is paused until somebody forces it to go on, which removes the file. That the file exists
is what counts; its first line says why. Everything here blocks, for as long as a flush of a disk takes.
"""

from __future__ import annotations

import contextlib
from typing import Final

from tapcore.beside import beside
from tapcore.durablefile import remove_file, replace_file, sync_folder
from tapcore.errors import ImageError, image_error

SUFFIX: Final = ".fenced"
MAX_BYTES: Final = 4096
"""Of the file, as far as it is read."""


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


def write(image: str, why: str) -> None:
    """Fence the image, durably. ImageError, and no fence, if that cannot be done; one that cannot be taken away
    again either is named in the error."""
    path = beside(image, SUFFIX)
    line = " ".join(why.split())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, f"{line}\n".encode()[:MAX_BYTES])
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
