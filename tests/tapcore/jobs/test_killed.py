"""kill -9 at every step of a job: the chain opens, and holds what was flushed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.runner import Runner
from imagechains import make_chain, qemu
from livewriter import LiveWriter
from processes import Tapdisk, forget_logs
from support import need

from tapcore.control import find_disk
from tapcore.driver import Env
from tapcore.errors import ControlError
from tapcore.formats.tools import find_tools

SIZE = 2 << 20
SWITCH = "tapcore.jobs.switch:Switch"


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    need("qemu-img")
    path = tmp_path / "run-killed"
    path.mkdir(mode=0o700)
    yield path
    forget_logs(path)


def play(run_dir: Path, disk: bytes, chain: str, place: str, op: str, **params: object) -> LiveWriter:
    """Begin a job, beside a guest, in a tapdisk that is killed at `place`."""
    tapdisk = Tapdisk(run_dir, chain, "--name", "vm", killed_at=place)
    guest = LiveWriter(tapdisk.uri, disk)
    guest.wait(20)
    with contextlib.suppress(ControlError), find_disk(run_dir, "vm") as control:
        control.call(op, disk="vm", **params)
    tapdisk.process.wait(60)
    tapdisk.kill()
    guest.abandon()
    return guest


def look(env: Env, guest: LiveWriter, path: Path) -> None:
    """The image is whole, and holds what it may hold, for QEMU and here."""
    checked = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True, timeout=30)
    assert checked.returncode in (0, 3), checked.stdout + checked.stderr
    raw = path.parent / "found.raw"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw))
    assert guest.may_hold(raw.read_bytes())
    runner = Runner(env, f"qcow2:{path}")
    assert runner.read(0, SIZE) == raw.read_bytes()
    assert runner.write(0, b"x" * 512) == 0 and runner.flush() == 0
    runner.close()


@pytest.mark.parametrize("place", [
    "tapcore.jobs.snapshot:Snapshot._make:after:1", f"{SWITCH}._flushed:before:1",
    "tapcore.jobs.snapshot:close_image:after:2",
    "tapcore.jobs.snapshot:open_image:after:2", f"{SWITCH}.end:after:1"])
def test_snapshot(env: Env, tmp_path: Path, run_dir: Path, place: str) -> None:
    (bottom,), disk = make_chain(env, tmp_path, ["qcow2"], SIZE)
    top = tmp_path / "top.qcow2"
    guest = play(run_dir, disk, f"qcow2:{bottom}", place, "snapshot", path=str(top))
    look(env, guest, top)


@pytest.mark.parametrize("place", [
    f"{SWITCH}.end:after:1", "tapcore.jobs.copying:CopyJob._copied:after:1",
    "tapcore.jobs.commit:Commit._make_empty:after:1",
    f"{SWITCH}._flushed:after:2", "pathlib:Path.rename:before:2", "pathlib:Path.rename:after:2",
    "tapcore.jobs.commit:sync_folder:after:1", f"{SWITCH}.end:after:2"])
def test_commit(env: Env, tmp_path: Path, run_dir: Path, place: str) -> None:
    paths, disk = make_chain(env, tmp_path, ["qcow2"] * 3, SIZE)
    guest = play(run_dir, disk, f"qcow2:{paths[-1]}", place, "commit")
    look(env, guest, paths[-1])


@pytest.mark.parametrize("kind", ["qcow", "vhd"])
@pytest.mark.parametrize("place", ["pathlib:Path.rename:before:2", "pathlib:Path.rename:after:2"])
def test_commit_of_other_formats(env: Env, tmp_path: Path, run_dir: Path, kind: str, place: str) -> None:
    paths, disk = make_chain(env, tmp_path, ["aio" if kind == "qcow" else kind, kind], SIZE)
    guest = play(run_dir, disk, f"{kind}:{paths[-1]}", place, "commit")
    runner = Runner(env, f"{kind}:{paths[-1]}")
    assert guest.may_hold(runner.read(0, SIZE))
    runner.close()
    assert find_tools(kind).check(str(paths[-1])).errors == 0


@pytest.mark.parametrize("place", [
    f"{SWITCH}.end:after:1", "tapcore.jobs.copying:CopyJob._copied:after:2", f"{SWITCH}._flushed:after:2",
    "tapcore.jobs.stream:close_image:after:1", "tapcore.formats.qcow2.tools:Qcow2Tools.set_backing:after:1",
    f"{SWITCH}.end:after:2"])
def test_stream(env: Env, tmp_path: Path, run_dir: Path, place: str) -> None:
    paths, disk = make_chain(env, tmp_path, ["qcow2"] * 3, SIZE)
    guest = play(run_dir, disk, f"qcow2:{paths[-1]}", place, "stream")
    look(env, guest, paths[-1])
