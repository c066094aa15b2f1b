"""Every error that a user can meet.

    WritelogError
    ├── UsageError        the caller asked for something that makes no sense (bad option, bad name)
    ├── ChainError        a chain could not be parsed or opened
    ├── ImageError        an image is missing, damaged, locked or not what it says it is
    ├── ProtocolError     a peer sent bytes that the protocol forbids
    ├── ControlError      a tapdisk refused or could not carry out a control request
    ├── LogError          the write log, its region or its bitmap
    └── ReplicationError  a replica or a sync that cannot go on

Each carries `errno`, and `path`, `offset` (bytes) and `hint` where they are known. `str(error)` is the one
line that a tool prints before it exits with a non-zero code.
"""

from __future__ import annotations

import errno as errno_codes
import os


class WritelogError(Exception):
    """Base of the tree; `message` says what was wrong, `hint` what to do."""

    default_errno = errno_codes.EIO

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        path: str | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.errno = self.default_errno if errno is None else errno
        self.path = path
        self.offset = offset
        self.hint = hint

    def __str__(self) -> str:
        text = self.message
        if self.path is not None and self.path not in text:
            text = f"{self.path}: {text}"
        if self.offset is not None:
            text = f"{text} (at byte {self.offset})"
        if self.hint is not None:
            text = f"{text}; {self.hint}"
        return text


class UsageError(WritelogError):
    default_errno = errno_codes.EINVAL


class ChainError(WritelogError):
    default_errno = errno_codes.EINVAL


class ImageError(WritelogError):
    pass


class ProtocolError(WritelogError):
    default_errno = errno_codes.EPROTO


class ControlError(WritelogError):
    pass


class LogError(WritelogError):
    pass


class ReplicationError(WritelogError):
    pass


def image_error(error: OSError, path: str, what: str) -> ImageError:
    """The ImageError that says that `what` (an action, such as "open") failed on `path`."""
    code = error.errno or errno_codes.EIO
    return ImageError(f"cannot {what}: {os.strerror(code)}", errno=code, path=path)
