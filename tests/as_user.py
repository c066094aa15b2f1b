"""Runs a program of ours as another user: `as_user.py UID MODULE ARGUMENT…`, started by root.

That user may not be able to read the interpreter and its libraries, so all is imported before root is given up,
for good: user, group, groups, and with them every capability.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401
import importlib
import os
import pkgutil
import sys

import tapcore
import writelog


def import_all() -> None:
    for package in (tapcore, writelog):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def give_up_root(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise SystemExit("as_user: this is still root")


if __name__ == "__main__":
    import_all()
    give_up_root(int(sys.argv[1]))
    os.umask(0o077)
    sys.exit(importlib.import_module(sys.argv[2]).main(sys.argv[3:]))
