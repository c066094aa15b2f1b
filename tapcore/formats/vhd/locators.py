"""VHD: the parent locators of a differencing image: ways to its parent, written for other systems.

    W2ru    relative path, UTF-16LE, with \\       W2ku    absolute path, the same
    Wi2r    relative path, one byte a character    Wi2k    absolute path, the same (both deprecated)
    MacX    file URL, UTF-8; XenServer's are relative: file://./parent.vhd
    and the header's parent_unicode_name, UTF-16BE, which often is a name without a path

No I/O. Of an absolute path of another system only its name is of use, in the image's own folder.
"""

from __future__ import annotations

import ntpath
import posixpath
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

from tapcore.errors import UsageError
from tapcore.formats.vhd.layout import LOCATOR, SECTOR_BYTES, Header, round_up

MAX_LOCATOR_BYTES: Final = 16384
MAX_OFFSET: Final = 1 << 62
MAX_NAME_CHARS: Final = 255
"""Of parent_unicode_name."""
W2RU: Final = b"W2ru"
W2KU: Final = b"W2ku"
WI2R: Final = b"Wi2r"
WI2K: Final = b"Wi2k"
MACX: Final = b"MacX"
_ORDER: Final = (W2RU, MACX, WI2R, W2KU, WI2K)
"""Relative ones first: folders are moved together."""


@dataclass
class Locator:
    """A used entry of the header's table."""

    number: int
    platform_code: bytes
    data_offset: int
    data_length: int


def parse_locators(header: Header) -> list[Locator]:
    """The used entries whose codes are known and whose lengths can be right, in the order to try them."""
    found = []
    for number in range(len(header.parent_locators) // LOCATOR.size):
        entry = LOCATOR.unpack(header.parent_locators, number * LOCATOR.size)
        length = entry["platform_data_length"]
        at = entry["platform_data_offset"]
        if entry["platform_code"] in _ORDER and 0 < length <= MAX_LOCATOR_BYTES and at <= MAX_OFFSET:
            found.append(Locator(number, entry["platform_code"], at, length))
    return sorted(found, key=lambda locator: _ORDER.index(locator.platform_code))


def decode(code: bytes, data: bytes) -> str:
    """The path as it is written there; "" if it is none."""
    if code in (W2RU, W2KU):
        text = data.decode("utf-16-le", "replace")
    elif code == MACX:
        text = _path_of_url(data.decode("utf-8", "surrogateescape"))
    else:
        text = data.decode("utf-8", "surrogateescape")
    return text.split("\0", 1)[0]


def _path_of_url(url: str) -> str:
    rest = url.removeprefix("file:")
    if rest == url:
        return ""
    return unquote(rest.removeprefix("//").removeprefix("localhost"), errors="surrogateescape")


def name_of(header: Header) -> str:
    """What parent_unicode_name says."""
    return header.parent_unicode_name.decode("utf-16-be", "replace").split("\0", 1)[0]


def candidates(path: str) -> list[str]:
    """Paths to be tried for a path of a locator: relative to the image's folder, or absolute."""
    if not path:
        return []
    drive, rest = ntpath.splitdrive(path)
    if "\\" not in path and not drive:
        return [path]
    tail = rest.replace("\\", "/")
    name = posixpath.basename(tail)
    if not name or name in (".", ".."):
        return []
    if len(drive) > 2:  # a share of another host
        return [name]
    return [tail, name] if drive else [tail]


def encode(path: str, folder: str) -> list[tuple[bytes, bytes]]:
    """(platform code, data) of every locator for the parent at `path`, relative to `folder`, the image's, or
    absolute. UsageError for a path that no locator can hold."""
    if "\0" in path or not posixpath.basename(path):
        raise UsageError(f"{path!r} is not the path of a file")
    absolute = posixpath.normpath(posixpath.join(folder, path))
    relative = path if path.startswith("/") else posixpath.normpath(path)
    if not relative.startswith("/"):
        relative = f"./{relative}"
    found = [(MACX, b"file://" + quote(relative, safe="/.", errors="surrogateescape").encode())]
    try:
        if not relative.startswith("/"):
            found.append((W2RU, _windows(relative)))
        found.append((W2KU, _windows(absolute)))
    except UnicodeEncodeError as error:
        raise UsageError(f"{path!r} is not text, as the parent of a VHD must be") from error
    if max(len(data) for _, data in found) > MAX_LOCATOR_BYTES:
        raise UsageError(f"the path of the parent is too long: {len(path)} characters")
    return found


def _windows(path: str) -> bytes:
    return path.replace("/", "\\").encode("utf-16-le")


def encode_name(path: str) -> bytes:
    """parent_unicode_name for the parent at `path`."""
    return posixpath.basename(path).encode("utf-16-be", "replace")[: 2 * MAX_NAME_CHARS].ljust(512, b"\0")


def pack_locators(entries: list[tuple[bytes, bytes]], offset: int) -> tuple[bytes, bytes]:
    """(the header's table, what it points at) for data that lies at `offset`."""
    table, blob = b"", b""
    for code, data in entries:
        padded = data.ljust(round_up(len(data)), b"\0")
        # The space is in bytes, as Hyper-V and XenServer have it; the specification says sectors.
        table += LOCATOR.pack(platform_code=code, platform_data_space=len(padded), platform_data_length=len(data),
                              reserved=0, platform_data_offset=offset + len(blob))
        blob += padded
    assert len(blob) % SECTOR_BYTES == 0
    return table.ljust(192, b"\0"), blob
