"""UNIX sockets that belong to one user: listening, stale sockets, peers."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from tapcore.errors import ControlError
from tapcore.layout import Layout

MAX_PATH_BYTES = 107
"""What fits into sockaddr_un.sun_path with its NUL (unix(7))."""
BACKLOG = 128

CREDENTIALS = Layout("struct ucred", "=", "pid:i uid:I gid:I", size=12)


def listen(path: Path) -> socket.socket:
    """A non-blocking socket that listens at `path`, for its owner alone (mode 0600). What a dead process left is
    replaced; ControlError if a live one listens, if something else is there, or if it cannot be bound."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ControlError("the socket's path is too long", path=str(path), errno=errno.ENAMETOOLONG,
                           hint=f"at most {MAX_PATH_BYTES} bytes: use a shorter name or directory")
    remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        # Bound under a mask, not chmod-ed afterwards: there is no moment at which others could connect.
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ControlError(f"cannot listen: {os.strerror(error.errno or errno.EIO)}", path=str(path),
                           errno=error.errno) from error
    return listener


def remove_stale(path: Path) -> None:
    """Remove the socket at `path` if nobody listens there. ControlError if somebody does, or it is no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ControlError("is there already, and is not a socket", path=str(path), errno=errno.EEXIST,
                           hint="remove it, or use another path")
    if is_alive(path):
        raise ControlError("another process listens there", path=str(path), errno=errno.EADDRINUSE,
                           hint="end it, or use another path")
    path.unlink(missing_ok=True)


def is_alive(path: Path) -> bool:
    """Whether a process listens at the socket `path`. One that is too busy to accept is alive."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(str(path))
    return code not in (errno.ECONNREFUSED, errno.ENOENT)


def peer_allowed(peer: socket.socket) -> tuple[bool, str]:
    """Whether the process at the other end belongs to this user or to root, and its description for the log."""
    who = CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return who["uid"] in (0, os.geteuid()), f"process {who['pid']} of user {who['uid']}"
