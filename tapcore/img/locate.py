"""What an argument of a tool names: an image file and its format, or a chain.

    disk.qcow2                        a file; its format is what -f says, or what it looks like
    nbd:unix:/run/vm1.nbd             a chain, as tapdisk takes it: it begins with a driver's name and a colon
    nbd+unix:///vm1?socket=/run/s     an NBD URI, as nbd: takes it
    ./nbd:unix                        a file, whatever its name
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tapcore.chain import Level, parse
from tapcore.driver import Driver, find_driver
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.formats.probe import look
from tapcore.formats.tools import ImageTools, find_tools

logger = logging.getLogger(__name__)

NBD_URI: Final = re.compile(r"nbd(s|\+unix)?://")
SUFFIXES: Final = {".qcow2": "qcow2", ".qcow": "qcow", ".vhd": "vhd", ".vpc": "vhd", ".vmdk": "vmdk"}


@dataclass(frozen=True)
class Image:
    """`chain` opens it. `path` and `driver` are those of a file that is one level."""

    chain: str
    path: str | None = None
    driver: str = ""

    def __str__(self) -> str:
        return self.path or self.chain

    @property
    def file(self) -> str:
        """The file's path. UsageError for a chain."""
        if self.path is None:
            raise UsageError(f"{self.chain!r} is a chain; this is done with an image file")
        return self.path

    @property
    def tools(self) -> type[ImageTools]:
        """The tools of the file's format. UsageError for a chain."""
        self.file  # noqa: B018
        return find_tools(self.driver)


def format_of(path: str, chosen: str | None) -> type[ImageTools]:
    """The format for a new image: as chosen, else by its name's end, else raw. UsageError for an unknown one."""
    return find_tools(chosen or SUFFIXES.get(Path(path).suffix.lower(), "raw"))


def is_chain(text: str) -> bool:
    """UsageError for what looks like a chain of an unknown driver, and is no file."""
    head, colon, _ = text.partition(":")
    if NBD_URI.match(text):
        return True
    if not colon or not re.fullmatch(r"[a-z0-9]+", head):
        return False
    try:
        find_driver(head)
    except ChainError as error:
        if Path(text).exists():
            return False
        raise UsageError(error.message, hint=f"{error.hint}; for a file of this name write ./{text}") from None
    return True


def locate(text: str, chosen: str | None = None, *, follows: bool = False) -> Image:
    """The image that `text` names, in the format `chosen`, or the one that it looks like. With `follows` the
    command goes where the image leads, and one that was not asked for is warned of. UsageError for what cannot be
    meant, ImageError if there is no such file."""
    if is_chain(text):
        if chosen is not None:
            raise UsageError(f"{text!r} is a chain, which says its formats itself",
                             hint=f"leave out the format, or write ./{text} for a file of this name")
        chain = f"nbd:{text}" if NBD_URI.match(text) else text
        levels = parse(chain)
        if len(levels) == 1 and levels[0].params.startswith(("/", ".")):
            return Image(chain, levels[0].params, levels[0].driver)
        return Image(chain)
    return file_image(text, find_tools(chosen).name if chosen is not None else _guess(text, follows))


def file_image(path: str, driver: str) -> Image:
    """The file at `path`, read by `driver`. UsageError for what is no path."""
    if not path or "\0" in path:
        raise UsageError(f"{path!r} is not a path")
    where = path if path.startswith(("/", ".")) else f"./{path}"
    return Image(str(Level(driver, where)), where, driver)


def _guess(path: str, follows: bool) -> str:
    if not Path(path).exists():
        raise ImageError("there is no such file", path=path, hint="td-img create makes one")
    guess = look(path)
    if guess.hint is not None:
        logger.warning("warning: %s is taken for raw, but %s", path, guess.hint)
    if guess.leads_on and follows:
        logger.warning("warning: %s is taken for %s by its first bytes, and leads to other files; if it is a raw "
                       "disk, its guest has written that: say -f raw, else -f %s", path, guess.driver,
                       guess.driver)
    if guess.driver not in Driver.registry:
        find_driver(guess.driver)
    return guess.driver
