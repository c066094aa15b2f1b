"""Where the files that belong to an image are: beside it.

    /vm/disk.img            the image
    /vm/disk.img.SUFFIX     what belongs to it

Beside a block device nothing can be kept: there it is the state directory ($TAPDISK_STATE_DIR, or
/var/lib/tapdisk), and the device's path with '_' for '/'. An image is known by its path, symbolic links resolved;
a device by the path that it was opened with, since what that leads to changes from boot to boot.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from tapcore.errors import image_error

STATE_DIR_VARIABLE: Final = "TAPDISK_STATE_DIR"
DEFAULT_STATE_DIR: Final = "/var/lib/tapdisk"


def beside(image: str, suffix: str, name: str = "") -> Path:
    """The file of an image that ends in `suffix`, called `name` if that is given. ImageError if the image cannot
    be looked at."""
    try:
        is_device = stat.S_ISBLK(Path(image).stat().st_mode)
    except OSError as error:
        raise image_error(error, image, "look at the image") from error
    if is_device:
        folder = Path(os.environ.get(STATE_DIR_VARIABLE) or DEFAULT_STATE_DIR)
        own_name = str(Path(image).absolute()).strip("/").replace("/", "_")
    else:
        path = Path(os.path.realpath(image))
        folder, own_name = path.parent, path.name
    return folder / f"{name or own_name}{suffix}"
