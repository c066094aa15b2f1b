r"""Chains: `log:|qcow2:/vm/disk.qcow2` as text, and as drivers opened on top of each other.

    guest ▶ log ▶ qcow2 ▶ …           levels, left to right as written: `Filter.next`
                    └ backing ▶ …      parents, opened by the chain, read-only: `Driver.backing`

In the text `\|` stands for a `|` of a path, and `\\` for a `\`; before anything else a `\` is itself.

What is below the filters can be exchanged while they stay (`Chain.stand_on`): a log goes on, with its
clients, when a snapshot puts another image under it.
"""

from __future__ import annotations

import errno
import logging
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tapcore.driver import Driver, Env, Filter, OpenFlag, ParentId, find_driver, leaf_of
from tapcore.errors import ChainError, WritelogError

logger = logging.getLogger(__name__)

MAX_PARENT_DEPTH = 64
"""Parents below one level."""


@dataclass(frozen=True)
class Level:
    """One `driver:params` of a chain's text."""

    driver: str
    params: str

    def __str__(self) -> str:
        quoted = self.params.replace("\\", r"\\").replace("|", r"\|")
        return f"{self.driver}:{quoted}"


def _split(text: str) -> list[str]:
    """The parts between those `|` that are not quoted, without their quotes."""
    parts = [""]
    for token in re.findall(r"\\[\\|]|[^\\|]+|.", text, re.DOTALL):
        if token == "|":
            parts.append("")
        else:
            parts[-1] += token[1] if re.fullmatch(r"\\[\\|]", token) else token
    return parts


def parse(text: str) -> list[Level]:
    """The levels of `a:params|b:params`, leftmost first. ChainError names the level that is wrong."""
    if not text.strip():
        raise ChainError("the chain is empty", hint="write it like log:|aio:/path/to/disk.img")
    levels: list[Level] = []
    parts = _split(text)
    for number, part in enumerate(parts, start=1):
        where = f"level {number} of {text!r}"
        if not part.strip():
            raise ChainError(f"{where} is empty", hint="levels are separated by one '|'")
        driver, colon, params = part.partition(":")
        if not colon:
            raise ChainError(f"{where}, {part!r}, has no ':'", hint="a level is driver:params")
        try:
            kind = find_driver(driver.strip())
        except ChainError as error:
            raise ChainError(f"{where}: {error.message}", hint=error.hint) from None
        if kind.is_filter and number == len(parts):
            raise ChainError(f"{where}: filter {kind.name!r} has nothing below it",
                             hint=f"for example {part.strip()}|aio:/path/to/disk.img")
        if not kind.is_filter and number < len(parts):
            raise ChainError(f"{where}: {kind.name!r} takes no level below it",
                             hint="only a filter can stand left of a '|'")
        levels.append(Level(kind.name, params))
    return levels


class Chain:
    """An open chain. `head` is the level nearest the guest, `drivers` every open one, top first; `filters` are the
    levels above the image, which is called `leaf`."""

    def __init__(self, text: str, head: Driver, drivers: list[Driver]) -> None:
        self.text = text
        self.head = head
        self.drivers = drivers
        self.info = head.info
        self.leaf = leaf_of(head)
        self.filters = [driver for driver in levels_from(head) if isinstance(driver, Filter)]

    def stand_on(self, lower: Driver) -> None:
        """Let the filters stand on `lower`, which is open and of the same size, from now on; to be called with
        nothing in flight and after `quiesce`. What they stood on is the caller's to close. `info` stays: it is
        what the guest was told."""
        level = lower
        for upper in reversed(self.filters):
            upper.bind(level)
            level = upper
        self.head = level
        self.drivers = [*self.filters, *levels_from(lower)]
        leaf = leaf_of(lower)
        if leaf is not self.leaf:
            self.leaf = leaf
            self.text = "|".join(str(Level(driver.name, driver.params)) for driver in [*self.filters, leaf])

    def find(self, name: str) -> list[Driver]:
        """The open drivers called `name`, nearest the guest first."""
        return [driver for driver in self.drivers if driver.name == name]

    def counters(self) -> dict[str, dict[str, int]]:
        """The drivers' figures, of those that have some."""
        return {f"{driver.name}:{driver.params}": found for driver in self.drivers if (found := driver.counters())}

    def quiesce(self, done: Callable[[], None]) -> None:
        """`done()` once no driver has I/O of its own in flight; to be called when the guest's is at an end."""
        left = list(self.drivers)

        def next_one() -> None:
            if left:
                left.pop(0).quiesce(next_one)
            else:
                done()

        next_one()

    def close(self) -> None:
        """Close every level, top first; the first failure is raised after all were closed."""
        failure: Exception | None = None
        for driver in self.drivers:
            try:
                driver.close()
            except Exception as error:
                logger.error("closing %s:%s failed: %s", driver.name, driver.params, error)
                failure = failure or error
        self.drivers = []
        if failure is not None:
            raise failure


def levels_from(driver: Driver | None) -> Iterator[Driver]:
    """`driver` and all that is open below it, filters' next levels and parents."""
    while driver is not None:
        yield driver
        driver = driver.next if isinstance(driver, Filter) else driver.backing


def open_chain(env: Env, text: str, flags: OpenFlag = OpenFlag.NONE) -> Chain:
    """Open the chain `text`, bottom up. On failure everything opened is closed again, and the ChainError names
    the level, the driver and the cause."""
    levels = parse(text)
    opened: list[Driver] = []
    lower: Driver | None = None
    try:
        for number in range(len(levels), 0, -1):
            level = levels[number - 1]
            lower = _open_level(env, f"level {number} of {text!r}", level, flags, lower, opened)
        for driver in opened:
            with _naming(repr(text), driver.name):
                driver.begin()
    except BaseException:
        for driver in reversed(opened):
            _close_quietly(driver)
        raise
    assert lower is not None
    return Chain(text, lower, opened[::-1])


def open_image(env: Env, image: Level | ParentId, flags: OpenFlag = OpenFlag.NONE) -> Driver:
    """Open an image and its parents, for a chain's filters to stand on. ChainError, with nothing left open. In
    any thread."""
    level = Level(image.driver, image.params)
    opened: list[Driver] = []
    top = _open_level(env, repr(str(level)), level, flags, None, opened)
    try:
        for driver in opened:
            with _naming(repr(str(level)), driver.name):
                driver.begin()
    except BaseException:
        for driver in reversed(opened):
            _close_quietly(driver)
        raise
    return top


def close_image(top: Driver) -> None:
    """Close an image and its parents; the first failure is raised after all were closed."""
    Chain("", top, list(levels_from(top))).close()


def _open_level(
    env: Env, where: str, level: Level, flags: OpenFlag, lower: Driver | None, opened: list[Driver]
) -> Driver:
    """Open one level and its parents; every driver opened is appended to `opened`, parents before children."""
    top = _open_driver(env, where, level, flags, lower)
    family = [top]
    try:
        if (fd := top.fileno()) is not None:
            env.reach.add_named(fd)
        child, child_where = top, where
        seen: dict[object, Driver] = {(level.driver, level.params): top, _file_id(top): top}
        while True:
            with _naming(child_where, child.name):
                parent_id = child.get_parent_id()
            if parent_id is None:
                break
            key = (parent_id.driver, parent_id.params)
            parent_where = f"{where}, parent {len(family)} ({parent_id.params})"
            if len(family) > MAX_PARENT_DEPTH:
                raise ChainError(f"{parent_where}: more than {MAX_PARENT_DEPTH} parents",
                                 hint="merge some of them: tap-ctl stream, tap-ctl commit or qemu-img")
            if key in seen:
                raise _loop(parent_where, seen[key])
            parent_flags = flags | OpenFlag.RDONLY | OpenFlag.SHAREABLE
            parent = _open_driver(env, parent_where, Level(*key), parent_flags, None)
            family.append(parent)
            if (fd := parent.fileno()) is not None and child.path is not None:
                with _naming(child_where, child.name):
                    env.reach.check_open(child.path, parent_id.params, fd)
            file_id = _file_id(parent)
            if file_id in seen:
                raise _loop(parent_where, seen[file_id])
            seen[key] = seen[file_id] = parent
            with _naming(child_where, child.name):
                child.validate_parent(parent)
            child.backing = parent
            child, child_where = parent, parent_where
    except BaseException:
        for driver in family:
            _close_quietly(driver)
        raise
    if len(family) > 2:
        for driver in family:
            driver.share_memory(len(family))
    opened.extend(reversed(family))
    return top


def _file_id(driver: Driver) -> object:
    """What is the same of two drivers of one file, however it was named."""
    if driver.path is None:
        return driver
    status = Path(driver.path).stat()
    if stat.S_ISBLK(status.st_mode):
        return "device", status.st_rdev
    return status.st_dev, status.st_ino


def _loop(where: str, first: Driver) -> ChainError:
    return ChainError(f"{where}: the chain of parents is a loop: this is {first.params} again", errno=errno.ELOOP,
                      hint="give the image that leads back another backing: qemu-img rebase -u")


def _open_driver(env: Env, where: str, level: Level, flags: OpenFlag, lower: Driver | None) -> Driver:
    with _naming(where, level.driver):
        kind = find_driver(level.driver)
        driver = kind(env, level.params, flags)
        if isinstance(driver, Filter):
            assert lower is not None, "parse() lets no filter stand at the bottom"
            driver.attach(lower)
        driver.open()
    return driver


@contextmanager
def _naming(where: str, driver: str) -> Iterator[None]:
    """What fails inside becomes a ChainError that says where in the chain."""
    try:
        yield
    except WritelogError as error:
        raise ChainError(f"{where}: {driver}: {error.message}", errno=error.errno, path=error.path,
                         offset=error.offset, hint=error.hint) from error
    except OSError as error:
        raise ChainError(f"{where}: {driver}: {error}", errno=error.errno or errno.EIO) from error


def _close_quietly(driver: Driver) -> None:
    try:
        driver.close()
    except Exception as error:
        logger.error("closing %s:%s failed: %s", driver.name, driver.params, error)
