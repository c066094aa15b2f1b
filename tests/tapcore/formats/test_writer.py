"""The shared writer: many requests at once, in every format, with next to no room for tables."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from contract.runner import Runner
from formats_model import History, Model, drive_batches
from recording import SECTOR, Journal, RecordingFile

from tapcore.driver import Env, OpenFlag, find_driver
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow2.create import create
from tapcore.formats.tables import Tables
from tapcore.formats.tools import Backing, find_tools
from tapcore.request import BACKGROUND, DISCARD, FLUSH, FUA, NO_HOLE, READ, WRITE, ZEROES, Request

SIZE = 24 << 20
KINDS = {
    "qcow2": ("qcow2", {"cluster_size": "4K"}, ""),
    "qcow2 overlay": ("qcow2", {"cluster_size": "4K"}, "aio"),
    "qcow2 subclusters": ("qcow2", {"cluster_size": "16K", "extended_l2": "on"}, "aio"),
    "qcow2 data file": ("qcow2", {"cluster_size": "4K", "data_file": "data"}, "aio"),
    "qcow overlay": ("qcow", {}, "aio"),
    "vhd": ("vhd", {}, ""),
    "vhd overlay": ("vhd", {}, "aio"),
    "vmdk": ("vmdk", {"grain_size": "4K", "zeroed_grain": "on"}, ""),
    "vmdk overlay": ("vmdk", {"grain_size": "4K"}, "vmdk"),
}


def make(env: Env, path: Path, kind: str, size: int = SIZE) -> tuple[str, bytes]:
    """An image, over a backing of half its size if it has one; its driver, and what its disk holds."""
    driver, options, below = KINDS[kind]
    content = random.Random(1).randbytes(size // 2) if below else b""
    if below == "aio":
        (path.parent / "base").write_bytes(content)
    elif below:
        find_tools(below).create(str(path.parent / "base"), size // 2)
        runner = Runner(env, f"{below}:{path.parent / 'base'}")
        assert runner.write(0, content) == 0
        runner.close()
    find_tools(driver).create(str(path), size, backing=Backing("base", below) if below else None, options=options)
    return driver, content.ljust(size, b"\0")


def operation(rng: random.Random) -> tuple[int, int, int, int, int]:
    """Often on the border of two tables, whatever the format."""
    op = rng.choice((READ, WRITE, WRITE, WRITE, ZEROES, DISCARD, FLUSH))
    unit = rng.choice((1, 512, 4096))
    length = rng.choice((1, 3, 16)) * unit
    offset = rng.choice((0, 2 << 20)) * rng.randrange(1, 12) - rng.randrange(length + 1) // unit * unit
    if offset <= 0 or offset + length > SIZE:
        offset = rng.randrange((SIZE - length) // unit) * unit
    flags = rng.choice({READ: (0, BACKGROUND), WRITE: (0, 0, FUA, BACKGROUND), ZEROES: (0, NO_HOLE, BACKGROUND),
                        DISCARD: (0, FUA), FLUSH: (0,)}[op])
    return op, offset, length, flags, rng.randrange(1 << 30)


@pytest.mark.parametrize("kind", KINDS)
def test_many_requests_at_once_with_room_for_six_tables(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real = Tables.__init__
    monkeypatch.setattr(Tables, "__init__", lambda self, capacity: real(self, 6))
    path = tmp_path / "a"
    driver, content = make(env, path, kind)
    rng = random.Random(kind)
    for _ in range(2):
        runner = Runner(env, f"{driver}:{path}")
        model = Model(runner, content)
        model.run([operation(rng) for _ in range(250)])
        content = bytes(model.disk)
        runner.close()
        report = find_tools(driver).check(str(path))
        assert (report.errors, report.leaks) == (0, 0), report.messages
        again = Runner(env, f"{driver}:{path}", OpenFlag.RDONLY)
        assert b"".join(again.read(at, 65536) for at in range(0, SIZE, 65536)) == content
        again.close()


@pytest.mark.parametrize("kind", KINDS)
def test_power_loss_amid_many_requests(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, data_path, size = tmp_path / "a", tmp_path / "data", 128 << 10
    driver, content = make(env, path, kind, size)
    before, data_before = path.read_bytes(), data_path.read_bytes() if data_path.exists() else b""
    RecordingFile.journal = journal = Journal()
    data_journal = Journal(others=[journal])
    journal.others.append(data_journal)
    monkeypatch.setitem(RecordingFile.journals, "data", data_journal)
    with monkeypatch.context() as patch:
        patch.setattr(find_driver(driver), "file_kind", RecordingFile)
        runner = Runner(env, f"{driver}:{path}")
        history = History(bytearray(content), [(0, content)])
        drive_batches(runner, journal, history, random.Random(kind), 20)
        runner.close()
    for cut in range(0, len(journal.entries) + 1, 3):
        for power in (None, random.Random(cut)):
            path.write_bytes(journal.crash(before, cut, power))
            data_path.write_bytes(data_journal.crash(data_before, cut, power))
            report = find_tools(driver).check(str(path))
            # A VHD whose footer a new block has overwritten is read by the copy at its start.
            damage = [text for text in report.messages if "footer at the end" not in text]
            assert report.errors <= len(report.messages) - len(damage), (cut, damage)
            runner = Runner(env, f"{driver}:{path}", OpenFlag.RDONLY)
            disk, allowed = runner.read(0, size), history.allowed(cut)
            wrong = [at for at in range(0, size, SECTOR) if disk[at : at + SECTOR] not in allowed[at // SECTOR]]
            assert wrong == [], cut
            runner.close()


class FailingFile(ImageFile):
    """Does not write, at random, at the given rate."""

    rng: ClassVar[random.Random]
    rate: ClassVar[float] = 0

    def write_inline(self, iov: Sequence[memoryview], offset: int) -> int:
        return 0 if self.rng.random() < self.rate else super().write_inline(iov, offset)

    def write(self, iov: Sequence[memoryview], offset: int, length: int, *, fua: bool = False) -> int:
        return errno.ENOSPC if self.rng.random() < self.rate else super().write(iov, offset, length, fua=fua)

    def zeroes(self, offset: int, length: int, flags: int) -> int:
        return errno.EIO if self.rng.random() < self.rate else super().zeroes(offset, length, flags)


@pytest.mark.parametrize("kind", KINDS)
def test_writes_that_fail_harm_nothing_but_themselves(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Data, tables, commits: what failed may be there or not; all else is as it was, and flushed in the end."""
    path = tmp_path / "a"
    driver, content = make(env, path, kind)
    monkeypatch.setattr(find_driver(driver), "file_kind", FailingFile)
    rng = FailingFile.rng = random.Random(kind)
    runner = Runner(env, f"{driver}:{path}")
    disk, failed = bytearray(content), 0
    for _ in range(40):
        monkeypatch.setattr(FailingFile, "rate", 0.3)
        batch: list[Request] = []
        while len(batch) < 8:
            op, offset, length, flags, seed = operation(rng)
            if op == FLUSH or all(offset + length <= other.offset or other.offset + other.length <= offset
                                  for other in batch):
                iov = [memoryview(bytearray(random.Random(seed).randbytes(length)))] if op in (READ, WRITE) else []
                batch.append(Request(op, offset, 0 if op == FLUSH else length, iov, flags))
        codes = runner.run(*batch)
        failed += sum(map(bool, codes))
        monkeypatch.setattr(FailingFile, "rate", 0)
        for request, code in zip(batch, codes, strict=True):
            start, end = request.offset, request.offset + request.length
            if request.op == WRITE and not code:
                disk[start:end] = b"".join(request.iov)
            elif request.op == ZEROES and not code:
                disk[start:end] = bytes(request.length)
            elif request.op not in (READ, FLUSH):
                disk[start:end] = runner.read(start, end - start)
    assert failed > 20 and runner.flush() == 0
    runner.close()
    assert find_tools(driver).check(str(path)).errors == 0
    again = Runner(env, f"{driver}:{path}", OpenFlag.RDONLY)
    assert b"".join(again.read(at, 65536) for at in range(0, SIZE, 65536)) == disk
    again.close()


def test_who_waits_for_a_unit_goes_on_when_its_holder_fails(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    runner = Runner(env, f"qcow2:{path}")
    file = runner.head.file  # type: ignore[attr-defined]
    real, go, calls = file.write, threading.Event(), []

    def write(iov: list[memoryview], offset: int, length: int, **options: bool) -> int:
        calls.append(offset)
        if len(calls) > 1:
            return int(real(iov, offset, length, **options))
        assert go.wait(20)
        return errno.ENOSPC

    monkeypatch.setattr(file, "write", write)
    first = Request(WRITE, 0, 512, [memoryview(b"a" * 512)], BACKGROUND)
    second = Request(WRITE, 512, 512, [memoryview(b"b" * 512)], BACKGROUND)
    runner.start(first, second)
    go.set()
    runner.wait()
    assert (first.error, second.error) == (errno.ENOSPC, 0)
    assert runner.read(0, 1536) == bytes(512) + b"b" * 512 + bytes(512)
    runner.close()
