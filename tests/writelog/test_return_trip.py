"""A disk that moves to another host and back, again and again: each time only what has changed is sent.

Every host is a folder with an image and a run directory; the programs are processes of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from processes import forget_logs, read_line

from tapcore import fence
from tapcore.control import find_disk
from tapcore.nbd.client import NbdClient
from tapcore.tapctl import main as tap_ctl
from writelog.cli import main as writelog_client
from writelog.replica_state import State, judge
from writelog.shm import SHM_DIR, bitmap_name

SIZE_BYTES = 16 << 20
BLOCK_BYTES = 4096
WAIT_S = 30
CHANGES = 20
LITTLE_BYTES = 3 * CHANGES * BLOCK_BYTES
KILLED_AT = f"""
import importlib, sys
sys.path.append({str(Path(__file__).resolve().parents[1])!r})
import killed_at
killed_at.arm(sys.argv[1])
sys.exit(importlib.import_module(sys.argv[2]).main(sys.argv[3:]))
"""


class Host:
    """What is where `folder` is: an image, and the process that serves it or makes it a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.run_dir.mkdir(parents=True, mode=0o700)
        self.image = folder / "disk.img"
        self.image.touch()
        os.truncate(self.image, SIZE_BYTES)
        self.uri = f"nbd+unix:///vm1?socket={folder}/nbd"
        self.endpoint = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, module: str, *arguments: str, killed_at: str | None = None) -> str:
        """The process, with the disk vm1; what it says when it is ready."""
        program = ["-m", module] if killed_at is None else ["-c", KILLED_AT, killed_at, module]
        self.process = subprocess.Popen(
            [sys.executable, *program, "--run-dir", str(self.run_dir), "--name", "vm1",
             "--nbd", f"unix:{self.folder}/nbd", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        return read_line(self.process)

    def serve(self, log: str = "log:") -> None:
        self.start("tapcore.tapdisk", f"{log}|aio:{self.image}")

    def receive(self, *options: str, killed_at: str | None = None) -> None:
        listen = self.endpoint or "tcp://127.0.0.1:0"
        self.endpoint = self.start("writelog.replica", "--insecure-loopback-only", "--listen", listen,
                                   *options, f"aio:{self.image}", killed_at=killed_at).split()[-1]

    def start_sync(self, other: Host, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "writelog.sync", "--insecure-loopback-only", "--json", "--peer-timeout", "2",
             "--run-dir", str(self.run_dir), *options, "vm1", other.endpoint],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def sync_to(self, other: Host, *options: str) -> tuple[int, dict[str, Any], str]:
        """The exit code of a sync, its last event, and what it said."""
        with self.start_sync(other, *options) as sync:
            out, error = sync.communicate(timeout=WAIT_S)
        return sync.returncode, json.loads(out.splitlines()[-1]), error.decode()

    def write(self, seed: int) -> None:
        """Some blocks, here and there."""
        random = Random(seed)
        with NbdClient(self.uri, timeout_s=WAIT_S) as guest:
            for _ in range(CHANGES):
                guest.write(random.randrange(SIZE_BYTES // BLOCK_BYTES) * BLOCK_BYTES,
                            random.randbytes(BLOCK_BYTES))

    def control(self, *command: str) -> int:
        return tap_ctl(["--run-dir", str(self.run_dir), *command])

    def info(self) -> dict[str, Any]:
        with find_disk(self.run_dir, "vm1", WAIT_S) as control:
            return control.call("info", disk="vm1")

    def end(self) -> None:
        """As an operator would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            _, error = self.process.communicate(timeout=WAIT_S)
            assert self.process.returncode == 0, error.decode()
            self.process = None

    def die(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)
        self.process = None

    def close(self) -> None:
        if self.process is not None:
            self.die()
        forget_logs(self.run_dir)


def moved(source: Host, target: Host) -> dict[str, Any]:
    """Hand the disk over; the report of a sync that has made both images equal."""
    code, report, error = source.sync_to(target, "--verify")
    assert code == 0, error
    assert source.image.read_bytes() == target.image.read_bytes()
    return report


@pytest.fixture
def new_host(tmp_path: Path) -> Iterator[Callable[[str], Host]]:
    hosts: list[Host] = []

    def make(name: str) -> Host:
        hosts.append(Host(tmp_path / name))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def a(new_host: Callable[[str], Host]) -> Host:
    """Where the disk is at first."""
    host = new_host("a")
    host.image.write_bytes(Random(1).randbytes(SIZE_BYTES))
    host.serve()
    return host


@pytest.fixture
def b(new_host: Callable[[str], Host]) -> Host:
    """Where it is handed over to."""
    host = new_host("b")
    host.receive()
    return host


def sent_bytes(report: dict[str, Any]) -> int:
    return int(report["sent_bytes"]) + int(report["zero_bytes"])


def test_there_and_back_again_and_again(a: Host, b: Host) -> None:
    assert sent_bytes(moved(a, b)) == SIZE_BYTES
    here, there = b, a
    for seed in range(3):
        here.write(seed)
        there.end()
        there.receive()
        report = moved(here, there)
        assert report["resumed"]
        assert 0 < sent_bytes(report) <= LITTLE_BYTES
        here, there = there, here
    assert here.info()["state"] == "running"


def test_a_copy_that_was_not_promoted_leaves_no_log_behind(a: Host, b: Host) -> None:
    code, _, error = a.sync_to(b, "--keep-running")
    assert code == 0, error
    assert b.image.with_name("disk.img.writelog").exists()
    b.end()
    assert sorted(path.name for path in b.folder.iterdir()) == [
        "disk.img", "disk.img.fenced", "disk.img.redo", "disk.img.replica", "run"]
    assert not Path(f"{SHM_DIR}{bitmap_name(b.run_dir, 'vm1')}").exists()
    b.receive()
    assert moved(a, b)["resumed"]


def test_a_promoted_disk_is_one_of_tap_ctls(
    a: Host, b: Host, new_host: Callable[[str], Host], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for writelog-client, and to go on to a third host."""
    assert b.control("list") == 0
    assert "vm1" not in capsys.readouterr().out
    moved(a, b)
    assert b.control("list") == 0
    assert "vm1" in capsys.readouterr().out
    assert b.control("pause", "vm1") == 0 and b.control("unpause", "vm1") == 0
    b.write(1)
    [log] = b.info()["logs"]
    assert log["sidecar"] == f"{b.image}.writelog"
    assert writelog_client(["stat", log["socket"]]) == 0
    assert f"base         {log['base']}" in capsys.readouterr().out
    c = new_host("c")
    c.receive()
    assert sent_bytes(moved(b, c)) == SIZE_BYTES
    assert b.info()["fenced"] == f"handed over to {c.endpoint}"
    c.write(2)
    assert c.control("close", "vm1") == 0
    c.end()


def test_a_promoted_disk_goes_on_as_the_tapdisk_that_is_installed(a: Host, b: Host) -> None:
    assert b.control("restart") == 1
    moved(a, b)
    b.write(1)
    assert b.control("restart") == 0
    b.write(2)
    a.end()
    a.receive()
    report = moved(b, a)
    assert report["resumed"] and 0 < sent_bytes(report) <= 2 * LITTLE_BYTES


def test_what_was_written_is_known_after_the_promoted_disk_is_served_by_a_tapdisk(a: Host, b: Host) -> None:
    moved(a, b)
    b.write(1)
    b.end()
    b.serve()
    b.write(2)
    a.end()
    a.receive()
    report = moved(b, a)
    assert report["resumed"] and 0 < sent_bytes(report) <= 2 * LITTLE_BYTES


@pytest.mark.parametrize("dies", ["before", "after"])
@pytest.mark.parametrize("step", [
    "tapcore.drivers.log:Log.start_over:{}:2",
    "writelog.logjournal:Activity.ended:{}:2",
    "writelog.replica_state:replace_file:{}:6",
    "tapcore.fence:clear:{}:1",
    "tapcore.vbd:Vbd.resume:{}:1",
])
def test_killed_while_it_is_promoted(
    a: Host, new_host: Callable[[str], Host], step: str, dies: str
) -> None:
    """It is a copy that can be promoted yet, or the primary; and the way back is short."""
    b = new_host("b")
    b.receive(killed_at=step.format(dies))
    with a.start_sync(b) as sync:
        assert b.process is not None and b.process.wait(WAIT_S) == -signal.SIGKILL
        b.die()
        assert fence.read(str(a.image)) == f"handed over to {b.endpoint}"
        if fence.read(str(b.image)):
            b.receive()
            _, error = sync.communicate(timeout=WAIT_S)
            assert sync.returncode == 0, error.decode()
        else:
            sync.kill()
            b.serve(f"log:vm1,sidecar={b.image}.writelog")
    assert b.image.read_bytes() == a.image.read_bytes()
    b.write(6)
    a.end()
    a.receive()
    report = moved(b, a)
    assert report["resumed"] and 0 < sent_bytes(report) <= LITTLE_BYTES


@pytest.mark.parametrize("place", [
    "tapcore.fence:write:after:1", "tapcore.drivers.log:Log.complete:before:1", "tapcore.vbd:Vbd.fence:before:1",
])
def test_the_primary_is_killed_while_it_is_handed_over(
    new_host: Callable[[str], Host], b: Host, place: str
) -> None:
    """Its fence says what it has: it gets back only what has changed."""
    a = new_host("a")
    a.image.write_bytes(Random(1).randbytes(SIZE_BYTES))
    a.start("tapcore.tapdisk", f"log:|aio:{a.image}", killed_at=place)
    code, _, error = a.sync_to(b)
    assert code == 0, error
    a.die()
    b.write(1)
    a.receive()
    report = moved(b, a)
    assert report["resumed"] and 0 < sent_bytes(report) <= LITTLE_BYTES


def test_a_split_is_noticed_and_nothing_overwritten_unasked(a: Host, b: Host) -> None:
    """Both have what the other lacks. The operator says at one host that its data may go."""
    moved(a, b)
    assert a.control("unpause", "--force", "vm1") == 0
    a.write(1)
    b.write(2)
    for victim, other in ((a, b), (b, a)):
        kept = victim.image.read_bytes()
        victim.end()
        with pytest.raises(AssertionError, match="--discard-my-data"):
            victim.receive()
        victim.process = None
        assert victim.image.read_bytes() == kept
        if victim is a:
            victim.serve()
            continue
        victim.receive("--discard-my-data")
        assert not moved(other, victim)["resumed"]


def test_a_stranger_does_not_get_the_place_of_one_that_is_to_come_back(
    a: Host, b: Host, new_host: Callable[[str], Host]
) -> None:
    moved(a, b)
    a.end()
    a.receive()
    c = new_host("c")
    c.serve()
    code, _, error = c.sync_to(a)
    assert code == 1 and "--overwrite" in error
    b.write(3)
    assert moved(b, a)["resumed"]


def test_an_image_that_was_exchanged_for_another_is_not_the_one_that_was_handed_over(a: Host, b: Host) -> None:
    moved(a, b)
    a.end()
    other = a.image.with_name("other")
    other.write_bytes(bytes(SIZE_BYTES))
    other.rename(a.image)
    a.receive()
    b.write(3)
    assert not moved(b, a)["resumed"]


COPIED, PROMOTED = State(5, "vm1", history=(4,)), State(5, "vm1", True)
COPY = "made a copy of disk 'vm1' of another host"


@pytest.mark.parametrize(("record", "why", "state", "has_sidecar", "base"), [
    (None, None, 0, False, 0),
    (State(), None, 0, True, 0),
    (None, "handed over", 7, True, 7),
    (PROMOTED, "handed over", 7, True, 7),
    (COPIED, "handed over", 7, True, 7),
    (COPIED, COPY, 0, True, 5),
    (PROMOTED, COPY, 0, True, 5),
    (None, COPY, 0, True, 0),
    (COPIED, "handed over", 0, True, 0),
    (PROMOTED, "handed over", 0, True, 0),
])
def test_what_an_image_is_a_copy_of(
    record: State | None, why: str | None, state: int, has_sidecar: bool, base: int
) -> None:
    found, own = judge(record, why, state, has_sidecar)
    assert (found.base, found.promoted, own) == (base, False, "")


def test_what_is_a_disk_of_its_own() -> None:
    assert "promoted" in judge(PROMOTED, None, 0, True)[1]
    assert "served with a write log" in judge(None, None, 0, True)[1]
    forced, own = judge(COPIED, None, 0, False)
    assert forced.base not in (0, 4, 5) and not own
