"""Where control sockets live."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tapcore.errors import UsageError

VARIABLE = "TAPDISK_RUN_DIR"


def default_run_dir() -> Path:
    """$TAPDISK_RUN_DIR, or /run/tapdisk for root, or $XDG_RUNTIME_DIR/tapdisk; made with mode 0700 if missing.

    UsageError if there is no such variable, or the directory cannot be made or belongs to somebody else.
    """
    override = os.environ.get(VARIABLE)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if override:
        path = Path(override)
    elif os.geteuid() == 0:
        path = Path("/run/tapdisk")
    elif runtime:
        path = Path(runtime) / "tapdisk"
    else:
        raise UsageError("no run directory: XDG_RUNTIME_DIR is not set", hint=f"set {VARIABLE} to a directory")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise UsageError(f"cannot make the run directory: {error.strerror}", path=str(path),
                         hint=f"set {VARIABLE} to another one") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.geteuid()):
        raise UsageError("the run directory belongs to somebody else", path=str(path),
                         hint=f"set {VARIABLE} to another one")
    return path
