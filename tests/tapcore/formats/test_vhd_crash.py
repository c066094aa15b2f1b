"""Power loss at every point: the image opens, holds what was flushed, and has leaks at worst."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner
from formats_model import History, drive
from recording import SECTOR, Journal, RecordingFile
from support import need
from vhd_images import BLOCK, fill, make_overlay

from tapcore.driver import Env, OpenFlag
from tapcore.drivers.vhd import Vhd
from tapcore.formats.vhd.check import check
from tapcore.formats.vhd.create import create

RECOVERABLE = ("the footer at the end", "the footer's copy at the start", "the batmap: its checksum")


class Recorded(Vhd):
    name = "vhd-recorded"
    file_kind = RecordingFile


def prepare(env: Env, path: Path, kind: str, size: int) -> None:
    if kind == "differencing":
        (path.parent / "base.raw").write_bytes(random.Random(7).randbytes(3 * BLOCK))
        make_overlay(path, size, "base.raw", "aio")
        image = path.read_bytes()  # with the footer where the first block's bitmap comes to lie
        path.write_bytes(image[:-512] + bytes((3584 - len(image[:-512])) % 4096) + image[-512:])
    elif kind == "batmap":
        create(str(path), size)
        fill(env, path, random.Random(7).randbytes(size))
    else:
        create(str(path), size, variant=kind, block_bytes=BLOCK)


def wrong_sectors(disk: bytes, allowed: list[set[bytes]]) -> list[int]:
    return [at for at in range(0, len(disk), SECTOR) if disk[at : at + SECTOR] not in allowed[at // SECTOR]]


@pytest.mark.parametrize(("kind", "size", "count", "step"), [
    ("dynamic", 4 * BLOCK + 512, 80, 1), ("differencing", 4 * BLOCK + 512, 80, 1), ("fixed", BLOCK, 40, 1),
    ("batmap", 2 << 20, 40, 3)])
def test_whatever_a_crash_leaves_is_whole(env: Env, kind: str, size: int, count: int, step: int) -> None:
    need("qemu-img")
    with TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "a.vhd"
        prepare(env, path, kind, size)
        before = path.read_bytes()
        RecordingFile.journal = journal = Journal()
        runner = Runner(env, f"vhd-recorded:{path}")
        history = History(bytearray(runner.read(0, size)))
        history.flushed.append((0, bytes(history.disk)))
        rng = random.Random(kind)
        drive(runner, journal, history, rng, count)
        runner.close()
        cuts = range(0, len(journal.entries) + 1, step)
        qemu_cuts = set(rng.sample(cuts, 4))
        for cut in cuts:
            for seed in (None, cut):
                crashed = Path(name) / "crashed.vhd"
                crashed.write_bytes(journal.crash(before, cut, None if seed is None else random.Random(seed)))
                look_at(env, crashed, history.allowed(cut), with_qemu=cut in qemu_cuts and kind != "differencing")
                if cut % 5 == 0:
                    go_on(env, crashed)
        report = check(str(path))
        assert (report.errors, report.leaks) == (0, 0), report.messages


def look_at(env: Env, crashed: Path, allowed: list[set[bytes]], *, with_qemu: bool) -> None:
    report = check(str(crashed))
    assert all(message.startswith(RECOVERABLE) or "hold none" in message for message in report.messages), report
    runner = Runner(env, f"vhd:{crashed}", OpenFlag.RDONLY)
    assert wrong_sectors(runner.read(0, runner.size), allowed) == []
    runner.close()
    if with_qemu:
        raw = crashed.with_suffix(".raw")
        subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", str(crashed), str(raw)], check=True,
                       timeout=20)
        assert wrong_sectors(raw.read_bytes(), allowed) == []


def go_on(env: Env, crashed: Path) -> None:
    """What was left is repaired, written, and then has nothing wrong but leaks."""
    runner = Runner(env, f"vhd:{crashed}")
    disk = bytearray(runner.read(0, runner.size))
    disk[700:9000] = b"n" * 8300
    assert runner.write(700, b"n" * 8300) == 0
    runner.close()
    assert check(str(crashed)).errors == 0
    repaired = check(str(crashed), repair=True)
    assert repaired.errors == 0
    again = Runner(env, f"vhd:{crashed}", OpenFlag.RDONLY)
    assert again.read(0, again.size) == disk
    again.close()


def test_leaks_at_the_end_are_cut_off_by_a_repair(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), 4 * BLOCK, block_bytes=BLOCK)
    fill(env, path, b"x" * 5000)
    length = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"g" * 3 * BLOCK)
    report = check(str(path))
    assert (report.errors, report.leaks) == (1, 2) and "the footer at the end" in report.messages[0]
    report = check(str(path), repair=True)
    assert (report.errors, report.leaks, report.repaired) == (0, 0, 3)
    assert path.stat().st_size == length
    assert check(str(path)).messages == []
    runner = Runner(env, f"vhd:{path}", OpenFlag.RDONLY)
    assert runner.read(0, 5000) == b"x" * 5000
    runner.close()
