"""The text after a level's colon, taken apart.

    aio:/a path, with anything: in it|        a path alone is never taken apart
    aio:direct,/vm/disk.img                   options come first; the path is the rest, from '/' or './' on
    delay:read=5,jitter=2|                    options alone
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tapcore.errors import UsageError

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def path_params(driver: str, params: str, allowed: Sequence[str] = ()) -> tuple[dict[str, str], str]:
    """The options and the path of `[option,…]path`; an option is `key` or `key=value` with a key of `allowed`.

    A path begins with '/' or '.'. UsageError for an unknown option, a path that is missing or cannot be one.
    """
    start = re.search(r"(?:^|,)(?=[/.])", params)
    if start is None:
        what = f"no path in {params!r}" if params else "no path given"
        raise UsageError(what, hint=f"for example {driver}:/path/to/disk.img; a path begins with / or ./")
    path = params[start.end() :]
    if "\0" in path:
        raise UsageError(f"the path {path!r} has a NUL byte in it")
    return options(driver, params[: start.start()], allowed), path


def options(driver: str, params: str, allowed: Sequence[str]) -> dict[str, str]:
    """`key=value,key,…` as a dictionary; a key without '=' has the value ''. UsageError for a key that is not
    `allowed` or comes twice."""
    found: dict[str, str] = {}
    for text in params.split(",") if params.strip() else []:
        key, _, value = (part.strip() for part in text.partition("="))
        if key not in allowed:
            known = ", ".join(allowed) or "it has none"
            raise UsageError(f"unknown option {text.strip()!r}", hint=f"options of {driver}: {known}")
        if key in found:
            raise UsageError(f"option {key!r} is given twice")
        found[key] = value
    return found


def whole(name: str, text: str) -> int:
    """A whole number, not negative. UsageError names the option."""
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise UsageError(f"{name} {text!r} is not a whole number", hint=f"for example {name}=10")
    return int(text)


def decimal(name: str, text: str) -> float:
    """A number, not negative. UsageError names the option."""
    if not re.fullmatch(r"[0-9]{1,19}(\.[0-9]*)?", text):
        raise UsageError(f"{name} {text!r} is not a number", hint=f"for example {name}=0.5")
    return float(text)


def size_bytes(name: str, text: str) -> int:
    """`4096`, `64K`, `10M`, `2G`, `1T` as bytes. UsageError names the option."""
    match = re.fullmatch(r"([0-9]{1,19})([KMGT]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{name} {text!r} is not a size", hint="a number of bytes, or one with K, M, G or T: 10G")
    return int(match[1]) << _UNITS[match[2].upper()]
