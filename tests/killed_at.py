"""`python -P killed_at.py [--program MODULE] MODULE:FUNCTION:WHEN:COUNT arguments…`: a tapdisk, or another
program, that is killed, as by kill -9, before or after it calls a function for the COUNT-th time."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any


def arm(place: str) -> None:
    module_name, names, when, count = place.split(":")
    owner: Any = importlib.import_module(module_name)
    *path, name = names.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)
    left = [int(count)]

    def call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    program = "tapcore.tapdisk"
    if arguments[0] == "--program":
        program = arguments[1]
        del arguments[:2]
    arm(arguments[0])
    sys.exit(importlib.import_module(program).main(arguments[1:]))
