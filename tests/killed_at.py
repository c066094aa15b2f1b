"""`python -P killed_at.py [--program MODULE] MODULE:FUNCTION:WHEN:COUNT arguments…`: a tapdisk, or another
program, that is killed, as by kill -9, before or after it calls a function for the COUNT-th time. `arm` does that
to the program that calls it, or something else."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, action: Callable[[], None] = die) -> None:
    module_name, names, when, count = place.split(":")
    owner: Any = importlib.import_module(module_name)
    *path, name = names.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)
    calls = itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        is_due = next(calls) == int(count)
        if is_due and when == "before":
            action()
        result = function(*arguments, **options)
        if is_due and when == "after":
            action()
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
