"""Which disks go to which replicas, as command lines say it."""

from __future__ import annotations

from collections.abc import Iterable

from tapcore.errors import UsageError


def parse_disk(text: str) -> tuple[str, str]:
    """(disk, where its replica listens) of an option NAME=tcp://HOST:PORT."""
    name, equals, endpoint = text.partition("=")
    if not name or not equals or not endpoint:
        raise UsageError(f"{text!r} names no disk and its replica", hint="write it like vm1=tcp://192.0.2.7:5599")
    return name, endpoint


def parse_disks(texts: Iterable[str]) -> dict[str, str]:
    """`parse_disk` of all. UsageError if two are the same disk, or go to the same replica."""
    disks: dict[str, str] = {}
    for text in texts:
        name, endpoint = parse_disk(text)
        if name in disks:
            raise UsageError(f"disk {name!r} is named twice", hint="a disk moves to one replica")
        if endpoint in disks.values():
            raise UsageError(f"{endpoint} is named twice", hint="each disk needs a writelog-replica of its own")
        disks[name] = endpoint
    return disks
