"""What a replica tells who only asks whether it could take a disk: nothing begins by that, and nothing changes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from writelog.wire import MAX_INT


def room(image: str | None) -> tuple[int, int]:
    """(free, held): the bytes that the image's file system has to give, and those that the image has of it. What
    is no file, or cannot be looked at, has no end. Blocks."""
    if image is None:
        return MAX_INT, 0
    try:
        status, system = Path(image).stat(), os.statvfs(image)
    except OSError:
        return MAX_INT, 0
    if not stat.S_ISREG(status.st_mode):
        return MAX_INT, 0
    return system.f_bavail * system.f_frsize, status.st_blocks * 512
