"""What can be done with an image file besides serving it: made, checked, described, given another backing or size.

A format declares its tools as a subclass of `ImageTools` in `tapcore/formats/NAME/tools.py`. As with drivers the
declaration is the registration. What a format cannot do it leaves out: the base class refuses it by name. All of
it blocks; a program that serves guests calls it in a worker.
"""

from __future__ import annotations

import errno
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Final, Protocol, Self

import tapcore.formats
from tapcore.errors import ImageError, UsageError
from tapcore.layout import Buffer

MAX_MESSAGES: Final = 100


@dataclass
class Report:
    """What a check found. `errors` endanger data; `leaks` are units of space in use by nothing; `repaired` is how
    many of both there were and are no more. `messages` are the first of them."""

    errors: int = 0
    leaks: int = 0
    repaired: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, message: str, *, leak: bool = False) -> None:
        if leak:
            self.leaks += 1
        else:
            self.errors += 1
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)


@dataclass(frozen=True)
class Backing:
    """A parent image: `path` as it is to be written into the image (relative to the image's folder, or absolute),
    and the name of the `driver` that reads it."""

    path: str
    driver: str


class Packer(Protocol):
    """A new image that is written compressed, from front to back. A context manager: what leaves it well is whole
    and durable, what raises leaves no file. ImageError."""

    unit_bytes: int
    """Of what is compressed as one; all that is written at a time are whole units, but for the disk's end."""

    def write(self, offset: int, data: Buffer) -> None:
        """The disk has `data` at `offset`, which is not before the end of what was written. What is left out reads
        as zeroes."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ImageTools:
    """The tools of one format. Every method takes the image's path, and raises UsageError for what no image of
    this format can be, ImageError for what goes wrong with the file; then nothing is half-made or changed."""

    name: ClassVar[str] = ""
    """Of the driver."""
    qemu_name: ClassVar[str] = ""
    """What qemu-img calls the format."""
    options: ClassVar[Mapping[str, str]] = {}
    """Options of `create`, and what each means, its default included."""
    file_options: ClassVar[tuple[str, ...]] = ()
    """Those that name further files, which `create` makes: relative to the image's folder, or absolute."""
    registry: ClassVar[dict[str, type[ImageTools]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.name:
            ImageTools.registry[cls.name] = cls

    @classmethod
    def create(
        cls, path: str, size_bytes: int, *, backing: Backing | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Make an empty image, durably. `path` must not exist."""
        raise cls._cannot(path, "create")

    @classmethod
    def packer(cls, path: str, size_bytes: int, options: Mapping[str, str], *, compress: bool) -> Packer | None:
        """Make an image to be written compressed, if `compress` or the options ask for that. None: it is made by
        `create`, and written through its driver."""
        if compress:
            raise cls._cannot(path, "write compressed")
        return None

    @classmethod
    def check(cls, path: str, *, repair: bool = False) -> Report:
        """What is wrong with the image. With `repair` what can be put right without loss is."""
        raise cls._cannot(path, "check")

    @classmethod
    def describe(cls, path: str) -> dict[str, Any]:
        """What the image says of itself, for people, ready for JSON: version, variant, sizes of units in bytes …
        Nothing of it is needed to read the image."""
        return {}

    @classmethod
    def set_backing(cls, path: str, backing: Backing | None) -> None:
        """Write another backing into the image, without a look at what either holds."""
        raise cls._cannot(path, "change the backing of")

    @classmethod
    def accept_backing(cls, path: str) -> None:
        """The backing was written to on purpose: for a format that notices, it is the right one again as it is."""

    @classmethod
    def resize(cls, path: str, size_bytes: int, *, shrink: bool = False) -> None:
        """Give the disk another size; what is added reads as zeroes, what is behind a smaller size is given up.
        UsageError for a smaller size without `shrink`."""
        raise cls._cannot(path, "resize")

    @classmethod
    def _cannot(cls, path: str, what: str) -> ImageError:
        return ImageError(f"there is no way here to {what} an image of the format {format_name(cls.name)}",
                          path=path, errno=errno.EOPNOTSUPP,
                          hint="td-img convert makes an image of another format")


def find_tools(name: str) -> type[ImageTools]:
    """The tools of the format `name`, by the driver's name or qemu-img's. UsageError lists the known ones."""
    for module in pkgutil.iter_modules(tapcore.formats.__path__):
        if module.ispkg:
            importlib.import_module(f"{tapcore.formats.__name__}.{module.name}.tools")
    for tools in ImageTools.registry.values():
        if name in (tools.name, tools.qemu_name):
            return tools
    known = ", ".join(sorted(map(format_name, ImageTools.registry)))
    raise UsageError(f"unknown format {name!r}", hint=f"known formats: {known}")


def format_name(driver: str) -> str:
    """What people call the format that `driver` reads."""
    return "raw" if driver in ("aio", "sync") else driver
