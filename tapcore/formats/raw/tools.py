"""raw: the tools."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapcore.driver import SECTOR_BYTES, OpenFlag
from tapcore.errors import ImageError, UsageError, image_error
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tools import Backing, ImageTools, Report
from tapcore.rawfile import RawFile


class RawTools(ImageTools):
    name = "aio"
    qemu_name = "raw"

    @classmethod
    def create(
        cls, path: str, size_bytes: int, *, backing: Backing | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """A file that is one hole."""
        if backing is not None:
            raise UsageError("a raw image has no backing file", hint="choose another format: -f qcow2")
        _check_size(size_bytes)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            failure = image_error(error, path, "create the image")
            if error.errno == errno.EEXIST:
                failure.hint = "remove it first if it is not needed"
            raise failure from error
        try:
            try:
                os.truncate(fd, size_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            Path(path).unlink()
            raise image_error(error, path, f"make the file {size_bytes} bytes long") from error

    @classmethod
    def check(cls, path: str, *, repair: bool = False) -> Report:
        """There is nothing in it that could be wrong, but its size."""
        RawFile.open(path, OpenFlag.RDONLY).close()
        return Report()

    @classmethod
    def describe(cls, path: str) -> dict[str, Any]:
        return {}

    @classmethod
    def resize(cls, path: str, size_bytes: int, *, shrink: bool = False) -> None:
        _check_size(size_bytes)
        file = ImageFile.open(path, OpenFlag.NONE)
        try:
            if file.is_device:
                raise ImageError("is a block device: its size is not changed here", path=path,
                                 errno=errno.EOPNOTSUPP, hint="use what made it, such as lvresize")
            if size_bytes < file.size_bytes and not shrink:
                raise UsageError(f"{size_bytes} bytes are fewer than the {file.size_bytes} that it has: the rest "
                                 "would be lost", path=path, hint="say --shrink if that is meant")
            try:
                file.truncate(size_bytes)
            except OSError as error:
                raise image_error(error, path, f"make the file {size_bytes} bytes long") from error
            file.sync_or_raise()
        finally:
            file.close()


def _check_size(size_bytes: int) -> None:
    if size_bytes < 0 or size_bytes % SECTOR_BYTES:
        raise UsageError(f"size {size_bytes} is not a multiple of {SECTOR_BYTES} bytes")
