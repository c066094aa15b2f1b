"""The driver contract, after the `tap_disk` table of Xen's tapdisk.h.

A driver serves one level of a chain. A *leaf* (`aio`, `ram`, an image format) completes requests; a *filter*
(`log`, `delay`) has a `next` below it and overrides only the verbs that it changes: the others are bound to the
next level's when the chain opens, so a level that does nothing costs nothing.

Life: `__init__` keeps what it was given; `open` may fail and sets `info`; `begin` follows when the whole chain is
open; `quiesce` ends what the driver does of its own; `close` releases all, and is called once after a successful
`open`, never with requests in flight.

Verbs: `queue_read`, `queue_write`, `queue_flush`, `queue_discard`, `queue_zeroes`, `queue_status`, each
`(request) -> bool` as `tapcore.request` says, and `submit()`, which ends a batch: what was queued must be on its
way when it returns. Requests come bounds-checked, inside the disk and shorter than 4 GiB; a
write, discard or zeroes never reaches a driver that was opened read-only. FUA is honoured by every driver.
Requests in flight at the same time have no order. A flush covers what completed before it was queued.
A verb does not raise for a failed request: it says so with an errno. A read that `takes_zero` may be answered with
the flag IS_ZERO in place of data; a filter that looks at data calls `show_zeroes`.

Registration is the declaration: a subclass with a `name` is known to `find_driver`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntFlag
from pathlib import Path
from typing import ClassVar

from tapcore.errors import ChainError
from tapcore.loop import Loop
from tapcore.reach import ANYWHERE, Reach
from tapcore.request import Request, fail
from tapcore.workers import Workers

SECTOR_BYTES = 512


class OpenFlag(IntFlag):
    """How a level is opened (TD_OPEN_* of the original)."""

    NONE = 0
    RDONLY = 1
    STRICT = 2
    """Refuse what would otherwise be repaired or worked round."""
    QUIET = 4
    """Do not log a failure to open: the caller expects it."""
    QUERY = 8
    """Only to look (size, parent): no lock is taken, no data is read or written."""
    SHAREABLE = 16
    """Others may write the same file: for parents and cluster use; no lock against writers."""


class Feature(IntFlag):
    """What a level does natively; filters hand it up."""

    NONE = 0
    FLUSH = 1
    DISCARD = 2
    ZEROES = 4
    """Write-zeroes without a payload of zeroes."""
    FAST_ZEROES = 8
    """Can refuse a zeroing that would be slow (FAST flag)."""
    STATUS = 16
    """Block status tells holes and zeroes from data."""


@dataclass(frozen=True)
class DiskInfo:
    """What a level shows to the one above."""

    size_bytes: int
    features: Feature = Feature.NONE
    sector_bytes: int = SECTOR_BYTES
    min_block_bytes: int = 1
    """Smallest request served without a read-modify-write or a bounce buffer (a power of two)."""
    preferred_block_bytes: int = 4096
    read_only: bool = False

    def with_changes(self, **changes: object) -> DiskInfo:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ParentId:
    """Where a driver's parent image is, and the driver that reads it."""

    driver: str
    params: str


@dataclass
class Env:
    """What drivers are given of the process around them."""

    loop: Loop
    workers: Workers
    run_dir: Path = field(default_factory=lambda: Path("/run/tapdisk"))
    """Where control sockets live."""
    reach: Reach = ANYWHERE
    """Which files images may name."""


class Driver:
    """A leaf. `params` is the text after the first colon of its level; `flags` as in OpenFlag."""

    name: ClassVar[str] = ""
    is_filter: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Driver]]] = {}
    keeps_tables: ClassVar[bool] = False
    """Where data is in the image's file is in this process's memory, until a flush."""

    info: DiskInfo
    path: str | None = None
    """The image, where there is a file: set by `open`."""
    backing: Driver | None = None
    """The opened parent image, read-only, where `get_parent_id` named one. Set by the chain."""

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__ and cls.name:
            Driver.registry[cls.name] = cls

    def __init__(self, env: Env, params: str, flags: OpenFlag) -> None:
        self.env = env
        self.params = params
        self.flags = flags

    @property
    def read_only(self) -> bool:
        return bool(self.flags & OpenFlag.RDONLY)

    def open(self) -> None:
        """Set `info`, or raise WritelogError or OSError with nothing left open. Of an image format and of what can
        be its parent it may run in a worker: it blocks, and touches nothing but its own."""
        raise NotImplementedError(self.name)

    def close(self) -> None:
        """Release all that `open` took. Called once, with nothing in flight; of an image format it may run in a
        worker, like `open`."""

    def counters(self) -> dict[str, int]:
        """Figures for people, by name."""
        return {}

    def share_memory(self, images: int) -> None:
        """It is one of so many images below each other: use that much less memory for caches. Follows `open`."""

    def fileno(self) -> int | None:
        """The descriptor of the image's file, which has its locks; None where there is no file."""
        return None

    def get_parent_id(self) -> ParentId | None:
        """The parent image to open below, or None (TD_NO_PARENT)."""
        return None

    def begin(self) -> None:
        """Called once all levels of the chain are open: what opening changes in an image is changed here, not in
        `open`, so that a chain that is refused changes nothing. May raise as `open` does; `close` follows."""

    def validate_parent(self, parent: Driver) -> None:
        """Raise ChainError if `parent` cannot be this image's parent."""

    def queue_read(self, request: Request) -> bool:
        return fail(request, errno.EOPNOTSUPP)

    def queue_write(self, request: Request) -> bool:
        return fail(request, errno.EOPNOTSUPP)

    def queue_flush(self, request: Request) -> bool:
        return fail(request, errno.EOPNOTSUPP)

    def queue_discard(self, request: Request) -> bool:
        return fail(request, errno.EOPNOTSUPP)

    def queue_zeroes(self, request: Request) -> bool:
        return fail(request, errno.EOPNOTSUPP)

    def queue_status(self, request: Request) -> bool:
        """Fill `request.extents`. Default: all of it is data."""
        request.extents = [(request.length, 0)]
        return True

    def submit(self) -> None:
        """End of a batch."""

    def quiesce(self, done: Callable[[], None]) -> None:
        """Begin no more I/O of this driver's own (not the guest's), and call `done` when none is in flight. Comes
        before `close`; a driver that does I/O only for the requests it was given has nothing to do."""
        done()


VERBS = ("queue_read", "queue_write", "queue_flush", "queue_discard", "queue_zeroes", "queue_status", "submit")
"""By request.op, then submit."""


class Filter(Driver):
    """A level that passes on to `next` whatever it does not override."""

    is_filter = True
    next: Driver

    def attach(self, lower: Driver) -> None:
        """Take `lower` as the next level, and its info; `open` follows."""
        self.info = lower.info
        self.bind(lower)

    def bind(self, lower: Driver) -> None:
        """Take `lower` as the next level, and its verbs where this class has none of its own. Of an open filter it
        takes the place of the former one, with nothing in flight and after `quiesce`, which this ends."""
        self.next = lower
        for verb in VERBS:
            if getattr(type(self), verb) is getattr(Driver, verb):
                setattr(self, verb, getattr(lower, verb))

    def open(self) -> None:
        """Called after `attach`. May change `info`."""


def leaf_of(level: Driver) -> Driver:
    """The level at the bottom of a chain: the image."""
    while isinstance(level, Filter):
        level = level.next
    return level


def find_driver(name: str) -> type[Driver]:
    """The driver called `name`; ChainError lists the known ones."""
    import tapcore.drivers

    if name not in Driver.registry:
        tapcore.drivers.load(name)
    try:
        return Driver.registry[name]
    except KeyError:
        tapcore.drivers.load_all()
        known = ", ".join(sorted(Driver.registry))
        raise ChainError(f"unknown driver {name!r}", hint=f"known drivers: {known}") from None
