"""Power loss at every point: the image opens, holds what was flushed, and has leaks at worst."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from contract.runner import Runner
from formats_model import History, drive
from recording import SECTOR, Journal, RecordingFile
from support import need

from tapcore.driver import Env, OpenFlag
from tapcore.drivers.qcow2 import Qcow2
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create


class Recorded(Qcow2):
    name = "qcow2-recorded"
    file_kind = RecordingFile


def prepare(path: Path, kind: str, size: int) -> None:
    backing = None
    if "overlay" in kind:
        backing = "base.raw"
        (path.parent / backing).write_bytes(random.Random(7).randbytes(size // 2))
    subclusters = kind.startswith("subclusters")
    create(str(path), size, cluster_bits=14 if subclusters else 9 if kind == "growing" else 10,
           refcount_bits=16 if "snapshot" in kind else 64, backing=backing,
           backing_format="raw" if backing else None, extended_l2=subclusters,
           data_file="a.data" if "data" in kind else None, data_file_raw="raw" in kind)
    if "snapshot" in kind:
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 9 1k {size // 2}", str(path)], check=True,
                       capture_output=True, timeout=20)
        subprocess.run(["qemu-img", "snapshot", "-c", "one", str(path)], check=True, timeout=20)


@pytest.mark.parametrize(("kind", "size", "count", "step"), [
    ("plain", 65536, 60, 1), ("overlay", 65536, 60, 1), ("snapshot", 65536, 60, 1), ("growing", 4 << 20, 20, 60),
    ("subclusters overlay", 131072, 60, 1), ("subclusters snapshot", 131072, 60, 1),
    ("data overlay", 65536, 60, 1), ("subclusters raw data", 131072, 60, 1)])
def test_whatever_a_crash_leaves_is_whole(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int, count: int, step: int
) -> None:
    need("qemu-img", "qemu-io")
    path = tmp_path / "a.qcow2"
    prepare(path, kind, size)
    data_path = tmp_path / "a.data"
    before, data_before = path.read_bytes(), data_path.read_bytes() if data_path.exists() else None
    RecordingFile.journal = journal = Journal()
    data_journal = Journal(others=[journal])
    journal.others.append(data_journal)
    monkeypatch.setitem(RecordingFile.journals, "a.data", data_journal)
    runner = Runner(env, f"qcow2-recorded:{path}")
    history = History(bytearray(runner.read(0, size)))
    history.flushed.append((0, bytes(history.disk)))
    rng = random.Random(kind)
    if kind == "growing":
        drive(runner, journal, history, rng, 10)
        data = rng.randbytes(size - 65536)
        history.changes.append((len(journal.entries), 0, data))
        assert runner.write(0, data) == 0
        history.disk[: len(data)] = data
    drive(runner, journal, history, rng, count)
    runner.close()
    assert qemu_check(path) == 0
    assert check(str(path)).leaks == 0
    crashed = tmp_path / "crashed.qcow2"
    cuts = range(0, len(journal.entries) + 1, step)
    qemu_cuts = set(rng.sample(cuts, 6))
    for cut in cuts:
        for seed in (None, cut):
            power = None if seed is None else random.Random(seed)
            crashed.write_bytes(journal.crash(before, cut, power))
            if data_before is not None:
                data_path.write_bytes(data_journal.crash(data_before, cut, power))
            report = check(str(crashed))
            assert report.errors == 0, (cut, seed, report.messages)
            again = Runner(env, f"qcow2:{crashed}", OpenFlag.RDONLY)
            disk = again.read(0, size)
            again.close()
            allowed = history.allowed(cut)
            wrong = [at for at in range(0, size, SECTOR) if disk[at : at + SECTOR] not in allowed[at // SECTOR]]
            assert wrong == [], (cut, seed)
            if "raw" in kind:
                raw = data_path.read_bytes()
                assert all(raw[at : at + SECTOR] in allowed[at // SECTOR] for at in range(0, size, SECTOR))
            if cut in qemu_cuts:
                assert qemu_check(crashed) in (0, 3)


def qemu_check(path: Path) -> int:
    """0: nothing wrong; 3: leaks; 2: errors."""
    return subprocess.run(["qemu-img", "check", str(path)], cwd=path.parent, capture_output=True,
                          timeout=20).returncode
