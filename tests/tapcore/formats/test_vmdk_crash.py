"""Power loss at every point: the image opens, holds what was flushed, and has leaks at worst."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from contract.runner import Runner
from formats_model import History, drive
from recording import SECTOR, Journal, RecordingFile
from support import need

from tapcore.driver import Env, OpenFlag
from tapcore.drivers.vmdk import Vmdk
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tools import Backing
from tapcore.formats.vmdk.check import check
from tapcore.formats.vmdk.create import create
from tapcore.formats.vmdk.tools import VmdkTools


class Recorded(Vmdk):
    name = "vmdk-recorded"
    file_kind = RecordingFile


def prepare(env: Env, path: Path, kind: str, size: int) -> None:
    backing = None
    if kind != "plain":
        base = path.parent / "base.vmdk"
        VmdkTools.create(str(base), size // 2)
        runner = Runner(env, f"vmdk:{base}")
        assert runner.write(0, random.Random(7).randbytes(size // 2)) == 0
        runner.close()
        backing = Backing("base.vmdk", "vmdk")
    VmdkTools.create(str(path), size, backing=backing,
                     options={"grain_size": "4K", "zeroed_grain": "on" if kind == "zeroed" else "off"})


def forget_a_table(path: Path) -> None:
    """Take the last table of both directories out of the image."""
    data = bytearray(path.read_bytes())
    for at in (48, 56):
        directory = int.from_bytes(data[at : at + 8], "little") * 512
        data[directory + 4 : directory + 8] = bytes(4)
    path.write_bytes(data)


@pytest.mark.parametrize(("kind", "size", "count", "step"), [
    ("plain", 65536, 60, 1), ("overlay", 65536, 60, 1), ("zeroed", 65536, 60, 1), ("tables", 4 << 20, 20, 7)])
def test_whatever_a_crash_leaves_is_whole(
    env: Env, tmp_path: Path, kind: str, size: int, count: int, step: int
) -> None:
    need("qemu-img")
    path = tmp_path / "a.vmdk"
    prepare(env, path, kind, size)
    if kind == "tables":
        forget_a_table(path)
    before = path.read_bytes()
    RecordingFile.journal = journal = Journal()
    runner = Runner(env, f"vmdk-recorded:{path}")
    history = History(bytearray(runner.read(0, size)))
    history.flushed.append((0, bytes(history.disk)))
    rng = random.Random(kind)
    drive(runner, journal, history, rng, count)
    runner.close()
    crashed = tmp_path / "crashed.vmdk"
    cuts = range(0, len(journal.entries) + 1, step)
    qemu_cuts = set(rng.sample(cuts, 6))
    for cut in cuts:
        for seed in (None, cut):
            crashed.write_bytes(journal.crash(before, cut, None if seed is None else random.Random(seed)))
            report = check(str(crashed))
            assert report.errors == 0, (cut, seed, report.messages)
            allowed = history.allowed(cut)
            for flags in (OpenFlag.RDONLY, OpenFlag.NONE):
                again = Runner(env, f"vmdk:{crashed}", flags)
                disk = again.read(0, size)
                again.close()
                wrong = [at for at in range(0, size, SECTOR)
                         if disk[at : at + SECTOR] not in allowed[at // SECTOR]]
                assert wrong == [], (cut, seed)
            report = check(str(crashed))
            assert report.errors == 0 and "differ" not in str(report.messages), (cut, seed)
            if cut in qemu_cuts:
                subprocess.run(["qemu-img", "check", "-q", str(crashed)], check=True, timeout=20)
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages


def test_no_write_is_there_before_the_content_id_has_changed(env: Env, tmp_path: Path) -> None:
    """At every cut at which a guest's data may be there an overlay made before sees that it is stale."""
    path, size = tmp_path / "a.vmdk", 65536
    VmdkTools.create(str(path), size)
    before = path.read_bytes()
    cid = VmdkTools.describe(str(path))["cid"]
    RecordingFile.journal = journal = Journal()
    runner = Runner(env, f"vmdk-recorded:{path}")
    data = random.Random(1).randbytes(size)
    assert runner.write(0, data) == 0 and runner.flush() == 0
    runner.close()
    crashed = tmp_path / "crashed.vmdk"
    for cut in range(len(journal.entries) + 1):
        for seed in range(3):
            left = journal.crash(before, cut, random.Random(seed) if seed else None)
            if any(data[at : at + SECTOR] in left for at in range(0, size, SECTOR)):
                crashed.write_bytes(left)
                assert VmdkTools.describe(str(crashed))["cid"] != cid, (cut, seed)


class Watched(ImageFile):
    """Says in which order its files are written and made durable."""

    events: ClassVar[list[tuple[str, str]]] = []

    def write_inline(self, iov: Sequence[memoryview], offset: int) -> int:
        self.events.append((Path(self.path).name, "data"))
        return super().write_inline(iov, offset)

    def write(self, iov: Sequence[memoryview], offset: int, length: int, *, fua: bool = False) -> int:
        self.events.append((Path(self.path).name, "write"))
        return super().write(iov, offset, length, fua=fua)

    def sync(self) -> int:
        self.events.append((Path(self.path).name, "sync"))
        return super().sync()


class Watching(Vmdk):
    name = "vmdk-watched"
    file_kind = Watched


def test_the_descriptor_is_durable_before_an_extent_gets_data(env: Env, tmp_path: Path) -> None:
    create(str(tmp_path / "a.vmdk"), 1 << 20, subformat="twoGbMaxExtentSparse", split_bytes=1 << 19)
    Watched.events.clear()
    runner = Runner(env, f"vmdk-watched:{tmp_path}/a.vmdk")
    assert runner.write((1 << 19) - 512, b"x" * 1024) == 0 and runner.flush() == 0
    runner.close()
    events = Watched.events
    first = min(events.index((f"a-s00{number}.vmdk", "data")) for number in (1, 2))
    begun = {(name, what) for name in ("a.vmdk", "a-s001.vmdk", "a-s002.vmdk") for what in ("write", "sync")}
    assert set(events[:first]) == begun
    assert events.index(("a.vmdk", "write")) < events.index(("a.vmdk", "sync"))
    for number in (1, 2):
        own = [what for name, what in events[first:] if name == f"a-s00{number}.vmdk"]
        assert own[:6] == ["data", "sync", "write", "sync", "write", "sync"], "data, redundant tables, tables"
