"""Names of disks, each of one process among all that share a run directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

from tapcore.errors import ControlError

logger = logging.getLogger(__name__)


def lock_name(run_dir: Path, name: str) -> int:
    """Make `name` this process's among all that share the run directory; the lock ends with the process.
    ControlError if another has it."""
    path = run_dir / f"{name}.lock"
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ControlError(f"cannot take the name {name!r}: {error.strerror}", errno=error.errno,
                               path=str(path)) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(fd).st_ino:
                os.ftruncate(fd, 0)
                os.write(fd, f"{os.getpid()}\n".encode())
                return fd
        except BlockingIOError:
            owner = os.pread(fd, 20, 0).decode(errors="replace").strip()
            os.close(fd)
            raise ControlError(f"there is a disk {name!r} already, of tapdisk {owner}", errno=errno.EEXIST,
                               hint="close it there, or give this one another name") from None
        except FileNotFoundError:
            logger.debug("%s was removed while it was being locked", path)
        os.close(fd)


def unlock_name(run_dir: Path, name: str, lock_fd: int) -> None:
    (run_dir / f"{name}.lock").unlink(missing_ok=True)
    os.close(lock_fd)
