"""`python -P killed_at.py MODULE:FUNCTION:WHEN:COUNT tapdisk-arguments…`: a tapdisk that is killed, as by kill -9,
before or after it calls a function for the COUNT-th time. `arm` has any program do so, or something else."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from tapcore.tapdisk import main


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
    arm(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
