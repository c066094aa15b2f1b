"""Overlays and what is below them, with random content, and a progress that cuts a tool off."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

from contract.runner import Runner

from tapcore.driver import Env, OpenFlag
from tapcore.formats.tools import Backing, find_tools
from tapcore.img.locate import Image, file_image
from tapcore.img.progress import Progress

SIZE = 2 << 20
SMALL_UNITS = {"qcow2": {"cluster_size": "4K"}, "vhd": {"block_size": "64K"}, "vmdk": {"grain_size": "4K"}}


class Cut(Exception):
    """The program ends here."""


class CutOff(Progress):
    """Ends at the advance number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def advance(self, length: int) -> None:
        super().advance(length)
        self.left -= 1
        if self.left < 0:
            raise Cut


class Disk(NamedTuple):
    path: Path
    driver: str
    content: bytes

    @property
    def image(self) -> Image:
        return file_image(str(self.path), self.driver)


def scribble(env: Env, disk: Disk, rng: Random, count: int = 25) -> Disk:
    runner = Runner(env, disk.image.chain)
    content = bytearray(disk.content)
    for _ in range(count):
        offset = rng.randrange(len(content) // 512) * 512
        length = min(rng.choice((512, 4096, 65536, 200 * 512)), len(content) - offset)
        if rng.random() < 0.7:
            data = rng.randbytes(length)
            assert runner.write(offset, data) == 0
            content[offset : offset + length] = data
        else:
            assert runner.zeroes(offset, length) == 0
            content[offset : offset + length] = bytes(length)
    runner.close()
    return disk._replace(content=bytes(content))


def base(env: Env, folder: Path, name: str, kind: str, rng: Random, size: int = SIZE) -> Disk:
    path = folder / name
    tools = find_tools(kind)
    tools.create(str(path), size, options=SMALL_UNITS.get(kind, {}))
    return scribble(env, Disk(path, tools.name, bytes(size)), rng)


def overlay(
    env: Env, under: Disk, name: str, rng: Random, *, size: int = SIZE, kind: str = "qcow2", **options: str
) -> Disk:
    path = under.path.parent / name
    find_tools(kind).create(str(path), size, backing=Backing(under.path.name, under.driver),
                            options=SMALL_UNITS.get(kind, {}) | options)
    return scribble(env, Disk(path, kind, under.content[:size].ljust(size, b"\0")), rng, 12)


def shows(env: Env, disk: Disk) -> bytes:
    runner = Runner(env, disk.image.chain, OpenFlag.RDONLY)
    content = runner.read(0, runner.size)
    runner.close()
    return content
