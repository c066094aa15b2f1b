"""Which driver reads a backing file.

An image may say it. Where it does not, the file is looked at, and that is dangerous: a guest that writes a
format's header into its raw disk would make others follow the backing file that it names. So a guess is believed
only if it leads nowhere else.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tapcore.driver import ParentId
from tapcore.errors import ImageError, UsageError, image_error
from tapcore.reach import ANYWHERE, Reach

FORMATS: Final = {"raw": "aio", "file": "aio", "host_device": "aio", "qcow": "qcow", "qcow2": "qcow2",
                  "vpc": "vhd", "vmdk": "vmdk"}
"""QEMU's names of formats, and the drivers here."""
_SYNCHRONOUS: Final = {"sync": "aio", "vhdsync": "vhd"}
_QCOW: Final = b"QFI\xfb"
_VHD: Final = b"conectix"
_VMDK: Final = b"KDMV"
_VMDK_TEXT: Final = b"# Disk DescriptorFile"
_OTHER_MAGICS: Final = (b"cxsparse", b"vhdxfile", b"COWD")
_LOOK_BYTES: Final = 64 << 10
_FOOTER_BYTES: Final = 512
_VHD_TYPE_AT: Final = 60
_VHD_DIFFERENCING: Final = 4
_QCOW2_FEATURES_AT: Final = 72
_QCOW2_EXTERNAL_DATA: Final = 4


@dataclass(frozen=True)
class Guess:
    """What a file looks like. `leads_on`: as an image of that format it would make others be opened, or may."""

    driver: str
    leads_on: bool = False
    hint: str | None = None
    """What else it may be."""


def format_name(driver: str) -> str:
    """QEMU's name of what the driver reads. UsageError if a backing file cannot be that."""
    known = {kind: name for name, kind in reversed(FORMATS.items())}
    name = known.get(_SYNCHRONOUS.get(driver, driver))
    if name is None:
        raise UsageError(f"a backing file cannot be what the driver {driver!r} reads",
                         hint=f"it can be what these do: {', '.join(known)}")
    return name


def parent_of(path: str, backing_file: str, backing_format: str | None, reach: Reach = ANYWHERE) -> ParentId:
    """The parent of the image at `path` that names `backing_file` (relative to its folder) of `backing_format`
    (QEMU's name; None: look). ImageError if it is no local file, not within `reach`, or of a format that has no
    driver."""
    parent = beside(path, backing_file, "backing file")
    reach.check(path, parent)
    if backing_format is None:
        return ParentId(probe(parent, path), parent)
    if backing_format not in FORMATS:
        raise ImageError(f"the backing file's format {backing_format!r} is not supported", errno=errno.EINVAL,
                         path=path, hint=f"supported formats: {', '.join(FORMATS)}")
    return ParentId(FORMATS[backing_format], parent)


def leads_inside(place: Path, folder: Path) -> bool:
    """Is `place`, wherever links lead, in `folder` or below it?"""
    try:
        return place.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # such as a loop of symbolic links
        return False


def beside(path: str, name: str, what: str) -> str:
    """A file that the image at `path` names, as a path that begins with "/" or "./"."""
    plain = name.removeprefix("file:")
    if ":" in plain.partition("/")[0]:
        raise ImageError(f"the {what} {name!r} is not the path of a local file", errno=errno.EINVAL, path=path,
                         hint="name a path with: td-img rebase -u -b PATH -F FORMAT IMAGE"
                         if what == "backing file" else None)
    found = str(Path(path).parent / plain)
    return found if found.startswith("/") else "./" + found


def look(path: str) -> Guess:
    """What the file at `path` looks like, for one who named it himself. ImageError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(_LOOK_BYTES)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _FOOTER_BYTES))
            end = file.read(_FOOTER_BYTES)
    except OSError as error:
        raise image_error(error, path, "open the image") from error
    version = int.from_bytes(start[4:8], "big")
    if start[:4] == _QCOW and version in (1, 2, 3):
        features = int.from_bytes(start[_QCOW2_FEATURES_AT : _QCOW2_FEATURES_AT + 8], "big")
        has_data_file = version == 3 and bool(features & _QCOW2_EXTERNAL_DATA)
        return Guess("qcow" if version == 1 else "qcow2", any(start[8:16]) or has_data_file)
    if start.startswith(_VHD):
        types = [int.from_bytes(footer[_VHD_TYPE_AT : _VHD_TYPE_AT + 4], "big") for footer in (start, end)
                 if footer.startswith(_VHD)]
        return Guess("vhd", _VHD_DIFFERENCING in types)
    if start.startswith(_VMDK):
        return Guess("vmdk", b"parentFileNameHint" in start)
    if start.startswith(_VMDK_TEXT):
        return Guess("vmdk", True)
    if end.startswith(_VHD):
        return Guess("aio", hint="it ends like a fixed VHD: if it is one, say -f vhd")
    return Guess("aio")


def probe(path: str, child: str) -> str:
    """The driver for the file at `path`, by its first bytes. ImageError if it cannot be read, or seems to be an
    image that may lead to other files: that `child` must say itself."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(max(map(len, _OTHER_MAGICS)))
    except OSError as error:
        raise image_error(error, path, f"open the backing file of {child}") from error
    guess = look(path)
    if guess.leads_on or guess.driver in ("vhd", "vmdk") or start.startswith(_OTHER_MAGICS):
        raise _undecided(path, child)
    return guess.driver


def _undecided(path: str, child: str) -> ImageError:
    return ImageError(f"does not say the format of its backing file {path}, which may be raw or an image that "
                      "leads to other files", errno=errno.EINVAL, path=child,
                      hint="say it with: td-img rebase -u -b BACKING -F FORMAT IMAGE")
