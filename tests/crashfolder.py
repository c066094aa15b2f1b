"""A folder in which every change is recorded, whoever makes it: of files, of their lengths and of names; and what
a power loss may leave of it.

Nothing is durable but by fsync or fdatasync: what a file holds by that of the file, names by that of the folder.
Of the rest any sectors, lengths and names may be there and others not. Within one thread.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from recording import SECTOR

from tapcore import rawfile


@dataclass(frozen=True)
class Write:
    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Length:
    file: int
    length: int


@dataclass(frozen=True)
class Names:
    """Names that lead to another file from here on, or (None) to none; all at once."""

    files: dict[str, int | None]


@dataclass(frozen=True)
class Sync:
    """Of a file, or (None) of the folder's names."""

    file: int | None


class CrashFolder:
    """Records from `start` on, in `entries`. Flushes are recorded but not done."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.entries: list[Write | Length | Names | Sync] = []
        self._patch = monkeypatch
        self._ids: dict[int, int] = {}
        """By inode number, of files that have a name."""
        self._before: list[bytes] = []
        self._names: dict[str, int] = {}

    def start(self) -> None:
        for path in sorted(self.folder.iterdir()):
            self._names[path.name] = self._ids[path.stat().st_ino] = len(self._before)
            self._before.append(path.read_bytes())
        for name in ("pwrite", "pwritev"):
            self._patch.setattr(os, name, self._writing(getattr(os, name)))
        for name in ("truncate", "ftruncate"):
            self._patch.setattr(os, name, self._cutting(getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            self._patch.setattr(os, name, self._sync)
        for name in ("rename", "link", "unlink"):
            self._patch.setattr(os, name, self._naming(name, getattr(os, name)))
        self._patch.setattr(os, "open", self._opening(os.open))
        self._patch.setattr(rawfile, "fallocate", self._allocating(rawfile.fallocate))

    def _file(self, fd: int) -> int:
        return self._ids[os.fstat(fd).st_ino]

    def _writing(self, call: Callable[..., int]) -> Callable[..., int]:
        def write(fd: int, data: bytes | Sequence[memoryview], offset: int, flags: int = 0) -> int:
            assert not flags
            count = call(fd, data, offset)
            whole = data if isinstance(data, bytes) else b"".join(data)
            self.entries.append(Write(self._file(fd), offset, whole[:count]))
            return count

        return write

    def _cutting(self, call: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def cut(fd: int, length: int) -> None:
            call(fd, length)
            self.entries.append(Length(self._file(fd), length))

        return cut

    def _allocating(self, call: Callable[[int, int, int, int], None]) -> Callable[[int, int, int, int], None]:
        def allocate(fd: int, mode: int, offset: int, length: int) -> None:
            call(fd, mode, offset, length)
            within = min(length, os.fstat(fd).st_size - offset)
            self.entries.append(Write(self._file(fd), offset, bytes(max(0, within))))

        return allocate

    def _sync(self, fd: int) -> None:
        self.entries.append(Sync(None if stat.S_ISDIR(os.fstat(fd).st_mode) else self._file(fd)))

    def _opening(self, call: Callable[..., int]) -> Callable[..., int]:
        def open_file(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            creates = flags & os.O_CREAT and Path(path).parent == self.folder and not Path(path).exists()
            fd = call(path, flags, *rest, **more)
            if creates:
                self._ids[os.fstat(fd).st_ino] = len(self._before)
                self.entries.append(Names({Path(path).name: len(self._before)}))
                self._before.append(b"")
            return fd

        return open_file

    def _naming(self, kind: str, call: Callable[..., None]) -> Callable[..., None]:
        def change(path: Any, *target: Any, **more: Any) -> None:
            if Path(path).parent != self.folder:
                call(path, *target, **more)
                return
            file = self._ids[Path(path).stat().st_ino] if Path(path).exists() else None
            call(path, *target, **more)
            files: dict[str, int | None] = {} if kind == "link" else {Path(path).name: None}
            self.entries.append(Names(files | {Path(place).name: file for place in target}))

        return change

    def crash(self, cut: int, rng: random.Random | None) -> dict[str, bytes]:
        """What is left by name if the power fails after `cut` entries: what was made durable, and of the rest all
        (without `rng`) or anything."""
        durable: dict[int | None, int] = {}
        for number, entry in enumerate(self.entries[:cut]):
            if isinstance(entry, Sync):
                durable[entry.file] = number
        files = [bytearray(data) for data in self._before]
        names: dict[str, int | None] = dict(self._names)
        for number, entry in enumerate(self.entries[:cut]):
            of = None if isinstance(entry, Names) else entry.file
            kept = rng is None or number < durable.get(of, 0)
            if isinstance(entry, Write):
                _apply(files[entry.file], entry, None if kept else rng)
            elif kept or (rng is not None and rng.random() < 0.5):
                if isinstance(entry, Names):
                    names |= entry.files
                elif isinstance(entry, Length):
                    data = files[entry.file]
                    data[entry.length :] = bytes(max(0, entry.length - len(data)))
        return {name: bytes(files[file]) for name, file in names.items() if file is not None}


def _apply(data: bytearray, entry: Write, rng: random.Random | None) -> None:
    """A write, or with `rng` any sectors of it."""
    step = SECTOR if rng is not None else max(1, len(entry.data))
    for at in range(0, len(entry.data), step):
        if rng is None or rng.random() < 0.5:
            part, offset = entry.data[at : at + step], entry.offset + at
            data.extend(bytes(max(0, offset + len(part) - len(data))))
            data[offset : offset + len(part)] = part
