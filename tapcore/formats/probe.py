"""Which driver reads a backing file.

An image may say it. Where it does not, the file is looked at, and that is dangerous: a guest that writes a
format's header into its raw disk would make others follow the backing file that it names. So a guess is believed
only if it leads nowhere else.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from tapcore.driver import ParentId
from tapcore.errors import ImageError, image_error

FORMATS: Final = {"raw": "aio", "file": "aio", "host_device": "aio", "qcow": "qcow", "qcow2": "qcow2",
                  "vpc": "vhd", "vmdk": "vmdk"}
"""QEMU's names of formats, and the drivers here."""
_QCOW: Final = b"QFI\xfb"
_OTHER_MAGICS: Final = (b"conectix", b"cxsparse", b"vhdxfile", b"KDMV", b"COWD", b"# Disk DescriptorFile")


def parent_of(path: str, backing_file: str, backing_format: str | None) -> ParentId:
    """The parent of the image at `path` that names `backing_file` (relative to its folder) of `backing_format`
    (QEMU's name; None: look). ImageError if it is no local file, or of a format that has no driver."""
    name = backing_file.removeprefix("file:")
    if ":" in name.partition("/")[0]:
        raise ImageError(f"the backing file {backing_file!r} is not the path of a local file", errno=errno.EINVAL,
                         path=path, hint="name a path with: qemu-img rebase -u -b PATH -F FORMAT IMAGE")
    parent = str(Path(path).parent / name)
    if not parent.startswith("/"):
        parent = "./" + parent  # a driver's path begins with one of these
    if backing_format is None:
        return ParentId(probe(parent, path), parent)
    if backing_format not in FORMATS:
        raise ImageError(f"the backing file's format {backing_format!r} is not supported", errno=errno.EINVAL,
                         path=path, hint=f"supported formats: {', '.join(FORMATS)}")
    return ParentId(FORMATS[backing_format], parent)


def probe(path: str, child: str) -> str:
    """The driver for the file at `path`, by its first bytes. ImageError if it cannot be read, or seems to be an
    image that leads to other files: that `child` must say itself."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise image_error(error, path, f"open the backing file of {child}") from error
    if start[:4] == _QCOW:
        version = int.from_bytes(start[4:8], "big")
        if version in (1, 2, 3):
            if any(start[8:16]):
                raise _undecided(path, child)
            return "qcow" if version == 1 else "qcow2"
    if start.startswith(_OTHER_MAGICS):
        raise _undecided(path, child)
    return "aio"


def _undecided(path: str, child: str) -> ImageError:
    return ImageError(f"does not say the format of its backing file {path}, which may be raw or an image that "
                      "leads to other files", errno=errno.EINVAL, path=child,
                      hint="say it with: qemu-img rebase -u -b BACKING -F FORMAT IMAGE")
