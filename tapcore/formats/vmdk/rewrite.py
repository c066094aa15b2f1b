"""vmdk: a descriptor with other text."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from tapcore.driver import SECTOR_BYTES
from tapcore.errors import UsageError, image_error
from tapcore.formats.vmdk.load import Image


def rewrite(image: Image, change: Callable[[bytes], bytes]) -> None:
    """Write the descriptor as `change` makes it, durably. A file of its own is replaced at once; one inside an
    extent is overwritten, which a crash may leave half done. UsageError if it has no room; ImageError."""
    file = image.file
    length = min(image.descriptor_room_bytes, file.size_bytes)
    former = file.load(image.descriptor_at, length, "the descriptor").rstrip(b"\0")
    text = change(former)
    if len(text) > image.descriptor_room_bytes:
        raise UsageError(f"the descriptor has no room for it: {len(text)} bytes, where "
                         f"{image.descriptor_room_bytes} are", path=file.path, hint="choose a shorter path")
    if image.header is None:
        _replace_file(file.path, text)
        return
    length = -(-max(len(text), len(former)) // SECTOR_BYTES) * SECTOR_BYTES
    file.store(image.descriptor_at, text.ljust(length, b"\0"), "the descriptor")
    file.sync_or_raise()


def _replace_file(path: str, data: bytes) -> None:
    """Let the file have this content: after a crash it has this or the former."""
    new = Path(f"{path}.new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, Path(path).stat().st_mode & 0o777)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        except BaseException:
            new.unlink()
            raise
        finally:
            os.close(fd)
        new.rename(path)
        folder = os.open(new.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise image_error(error, path, "replace the descriptor") from error
