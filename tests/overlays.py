"""Overlays and what is below them, with random content, and a progress that cuts a tool off."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

from contract.runner import Runner

from tapcore.driver import Env, OpenFlag
from tapcore.formats.qcow2.create import create
from tapcore.img.locate import Image, file_image
from tapcore.img.progress import Progress

SIZE = 2 << 20


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
    if kind == "qcow2":
        create(str(path), size, cluster_bits=12)
    else:
        path.write_bytes(bytes(size))
    return scribble(env, Disk(path, {"raw": "aio"}.get(kind, kind), bytes(size)), rng)


def overlay(env: Env, under: Disk, name: str, rng: Random, *, size: int = SIZE, version: int = 3) -> Disk:
    path = under.path.parent / name
    create(str(path), size, backing=under.path.name, backing_format={"aio": "raw"}.get(under.driver, under.driver),
           cluster_bits=12, version=version)
    return scribble(env, Disk(path, "qcow2", under.content[:size].ljust(size, b"\0")), rng, 12)


def shows(env: Env, disk: Disk) -> bytes:
    runner = Runner(env, disk.image.chain, OpenFlag.RDONLY)
    content = runner.read(0, runner.size)
    runner.close()
    return content
