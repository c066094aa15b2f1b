"""What is served in a row: how its image is made, and who serves it."""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Final

from tools.benchmarks.outcome import OURS
from tools.benchmarks.servers import LOG_NAME, Command, nbdkit, qemu_nbd, tapdisk

CHAIN_DEPTH: Final = 10
CHAIN_STRIPE_BYTES: Final = 1 << 20
"""Of a disk, by turns in each image of a chain."""


class Subject(ABC):
    """One kind of disk. A `fresh` image is made anew for each measurement, which is of its first writes."""

    name: ClassVar[str]
    fresh: ClassVar[bool] = False
    image_name: ClassVar[str]

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        self.size_bytes = size_bytes
        self.image = folder / self.image_name

    @abstractmethod
    def prepare(self) -> None:
        """Make the image."""

    @abstractmethod
    def servers(self) -> Mapping[str, Command]:
        """By name, ours first."""

    def before_job(self) -> None:  # noqa: B027
        """What is to be done before each measurement, if anything is."""

    def remove(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


class Raw(Subject):
    """A raw file full of noise."""

    name = "raw"
    image_name = "disk.img"

    def prepare(self) -> None:
        write_noise(self.image, self.size_bytes)

    def servers(self) -> Mapping[str, Command]:
        return {OURS: tapdisk(f"log:{LOG_NAME}|aio:{self.image}"), "nbdkit file": nbdkit(self.image),
                "qemu-nbd": qemu_nbd(self.image, "raw")}


class Unlogged(Raw):
    """The same; our own chain without a log takes the peer's part."""

    name = "log's cost"

    def servers(self) -> Mapping[str, Command]:
        return {OURS: super().servers()[OURS], "no log": tapdisk(f"aio:{self.image}")}


class Unrecorded(Raw):
    """The same; the peer is a log that does not outlive the host."""

    name = "side-car's cost"

    def servers(self) -> Mapping[str, Command]:
        return {OURS: super().servers()[OURS],
                "no side-car": tapdisk(f"log:{LOG_NAME}-2,sidecar=none|aio:{self.image}")}


class Direct(Raw):
    """A raw file past the page cache; the folder is to be on a real disk."""

    name = "direct"

    def servers(self) -> Mapping[str, Command]:
        return {OURS: tapdisk(f"log:{LOG_NAME}|aio:direct,{self.image}"),
                "qemu-nbd": qemu_nbd(self.image, "raw", "--cache=none", "--aio=io_uring")}


class Cold(Raw):
    """A raw file on a real disk, of which nothing is in the page cache at first."""

    name = "cold"

    def before_job(self) -> None:
        fd = os.open(self.image, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class Qcow2(Subject):
    """A qcow2 image all of whose clusters are allocated, as qemu-img makes it."""

    name = "qcow2"
    image_name = "disk.qcow2"

    def prepare(self) -> None:
        raw = self.folder / "noise.img"
        write_noise(raw, self.size_bytes)
        qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, self.image)
        raw.unlink()

    def servers(self) -> Mapping[str, Command]:
        return {OURS: tapdisk(f"log:{LOG_NAME}|qcow2:{self.image}"), "qemu-nbd": qemu_nbd(self.image, "qcow2")}


class EmptyQcow2(Qcow2):
    """A qcow2 image that holds nothing yet."""

    name = "qcow2, unallocated"
    fresh = True

    def prepare(self) -> None:
        qemu_img("create", "-f", "qcow2", self.image, self.size_bytes)


class DeepQcow2(Qcow2):
    """qcow2 images on top of each other, ten if not told otherwise, each with its part of the disk, in stripes."""

    name = f"qcow2, chain of {CHAIN_DEPTH}"

    def __init__(self, folder: Path, size_bytes: int, layers: int = CHAIN_DEPTH) -> None:
        super().__init__(folder, size_bytes)
        self._layers = layers

    def prepare(self) -> None:
        below: Path | None = None
        for number in range(self._layers):
            path = self.image if number == self._layers - 1 else self.folder / f"layer{number}.qcow2"
            backing = ["-b", below, "-F", "qcow2"] if below else []
            qemu_img("create", "-f", "qcow2", *backing, path, self.size_bytes)
            stripes = range(number * CHAIN_STRIPE_BYTES, self.size_bytes, self._layers * CHAIN_STRIPE_BYTES)
            commands: list[str] = []
            for at in stripes:
                length = min(CHAIN_STRIPE_BYTES, self.size_bytes - at)
                commands += ["-c", f"write -q -P {number + 1} {at} {length}"]
            subprocess.run(["qemu-io", "-f", "qcow2", *commands, path], check=True, capture_output=True,
                           timeout=300)
            below = path


SUBJECTS: Final[dict[str, Callable[[Path, int], Subject]]] = {
    kind.name: kind for kind in (Raw, Unlogged, Unrecorded, Direct, Cold, Qcow2, EmptyQcow2, DeepQcow2)}


def write_noise(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(size_bytes >> 20):
            file.write(os.urandom(1 << 20))


def qemu_img(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=600)
