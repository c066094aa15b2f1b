"""A replica that holds a consistent copy keeps it until the next one is complete, or says that it is none.

Real processes: a replica that is killed, also in the middle of its own steps, and its commands.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from processes import KILLED_AT, read_line
from sync_rig import SIZE_BYTES, Rig, events, free_port

from tapcore import fence
from tapcore.driver import Env
from writelog import replica

WAIT_S = 30
RESYNC_BYTES = 3 << 20


@pytest.fixture
def rig(env: Env, tmp_path: Path) -> Iterator[Rig]:
    image = tmp_path / "disk.img"
    image.write_bytes(Random(1).randbytes(SIZE_BYTES))
    rig = Rig(env, image)
    yield rig
    rig.close()


class Replica:
    """writelog-replica of `image` on one port, as often as it is started."""

    def __init__(self, folder: Path, below: str = "") -> None:
        self.image = folder / "copy.img"
        self.image.write_bytes(bytes(SIZE_BYTES))
        self.journal = folder / "copy.img.redo"
        self.chain = f"{below}aio:{self.image}"
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str, killed_at: str | None = None) -> None:
        program = ["-m", "writelog.replica"]
        if killed_at is not None:
            program = ["-P", str(KILLED_AT), "--program", "writelog.replica", killed_at]
        self.process = subprocess.Popen(
            [sys.executable, *program, "--insecure-loopback-only", "--listen", self.endpoint, *options,
             self.chain], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if killed_at is None:
            read_line(self.process)

    def end(self, number: int = signal.SIGTERM) -> str:
        assert self.process is not None
        self.process.send_signal(number)
        error = self.process.communicate(timeout=WAIT_S)[1].decode()
        assert self.process.returncode == (0 if number == signal.SIGTERM else -number), error
        self.process = None
        return error

    def status(self, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
        capsys.readouterr()
        code = replica.main(["status", "--json", str(self.image)])
        status: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert code == (0 if status["consistent"] or status["promoted"] else 1)
        return status

    def promote(self, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
        capsys.readouterr()
        code = replica.main(["promote", *options, self.chain])
        output = capsys.readouterr()
        return code, output.out + output.err


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Replica]:
    copy = Replica(tmp_path)
    yield copy
    if copy.process is not None:
        copy.process.kill()
        copy.process.communicate(timeout=WAIT_S)


def first_copy(rig: Rig, copy: Replica) -> bytes:
    """Make a consistent one; what it is of."""
    copy.start()
    assert rig.sync("--keep-running", "vm1", copy.endpoint) == 0
    return rig.image.read_bytes()


def change(rig: Rig, seed: int = 2) -> bytes:
    """The guest writes here and there; the disk then."""
    random = Random(seed)
    with rig.guest() as guest:
        for offset in random.sample(range(0, SIZE_BYTES, 64 << 10), RESYNC_BYTES >> 16):
            guest.write(offset, random.randbytes(64 << 10))
    return rig.image.read_bytes()


def break_off(rig: Rig, copy: Replica, *options: str) -> None:
    """A sync that is killed when some of it is durable at the replica."""
    with subprocess.Popen([sys.executable, "-m", "writelog.sync", "--insecure-loopback-only",
                           "--run-dir", str(rig.env.run_dir), "--rate", "1M", "--keep-running", *options,
                           "vm1", copy.endpoint], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as sync:
        for _ in range(WAIT_S * 50):
            if rig.dirty_bytes() < RESYNC_BYTES:
                break
            assert sync.poll() is None
            threading.Event().wait(0.02)
        sync.kill()
    assert 0 < rig.dirty_bytes() < RESYNC_BYTES


def test_a_resync_that_breaks_off_leaves_the_old_copy(
    rig: Rig, copy: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    old = first_copy(rig, copy)
    assert copy.status(capsys)["epoch"] > 0
    new = change(rig)
    break_off(rig, copy)
    assert copy.image.read_bytes() == old
    status = copy.status(capsys)
    assert status["consistent"] and status["journal_bytes"] > RESYNC_BYTES // 16
    copy.end(signal.SIGKILL)
    copy.start()
    assert copy.image.read_bytes() == old
    assert rig.sync("--keep-running", "--verify", "--json", "vm1", copy.endpoint) == 0
    report = events(capsys.readouterr().out)[-1]
    assert 0 < report["sent_bytes"] < RESYNC_BYTES, "what was durable was sent again"
    copy.end()
    assert copy.image.read_bytes() == new
    assert copy.status(capsys)["epoch"] == status["epoch"] + 1


def test_the_old_copy_becomes_the_disk_when_its_primary_is_lost(
    rig: Rig, copy: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    old = first_copy(rig, copy)
    change(rig)
    break_off(rig, copy)
    code, output = copy.promote(capsys)
    assert code == 1 and "in use" in output, output
    copy.end()
    code, output = copy.promote(capsys)
    assert code == 0, output
    assert "consistent: disk 'vm1' as of 20" in output and "left out: " in output
    assert copy.image.read_bytes() == old
    assert not copy.journal.exists()
    assert fence.read(str(copy.image)) is None
    assert copy.promote(capsys)[0] == 2
    assert replica.main(["--insecure-loopback-only", "--listen", copy.endpoint, copy.chain]) == 2
    assert copy.status(capsys)["promoted"]


def test_a_copy_whose_journal_is_gone_is_not_brought_up_to_date(
    rig: Rig, copy: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    """No log has what the journal held, and was acknowledged. The old copy is as good as it was."""
    old = first_copy(rig, copy)
    new = change(rig)
    break_off(rig, copy)
    copy.end()
    copy.journal.unlink()
    copy.start()
    assert rig.sync("--keep-running", "vm1", copy.endpoint) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert copy.status(capsys)["consistent"] and copy.image.read_bytes() == old
    assert rig.sync("--keep-running", "--overwrite", "vm1", copy.endpoint) == 0
    assert "is gone" in copy.end()
    assert copy.image.read_bytes() == new


def test_in_place_says_that_there_is_no_good_copy_meanwhile(
    rig: Rig, copy: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    old = first_copy(rig, copy)
    new = change(rig)
    break_off(rig, copy, "--in-place")
    assert copy.image.read_bytes() not in (old, new)
    assert not copy.status(capsys)["consistent"]
    copy.end(signal.SIGKILL)
    code, output = copy.promote(capsys)
    assert code == 1 and "inconsistent since 20" in output and "--force" in output
    assert fence.read(str(copy.image))
    copy.start()
    assert rig.sync("--keep-running", "vm1", copy.endpoint) == 0
    assert copy.status(capsys)["consistent"]
    copy.end()
    assert copy.image.read_bytes() == new


def test_a_journal_that_is_too_long_is_refused_and_may_be_given_up(
    rig: Rig, copy: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    old = first_copy(rig, copy)
    copy.end()
    new = change(rig)
    copy.start("--journal-limit", "1M")
    assert rig.sync("--keep-running", "vm1", copy.endpoint) == 1
    error = capsys.readouterr().err
    assert "journal is full" in error and "--journal-limit" in error and "--in-place" in error
    assert copy.image.read_bytes() == old
    assert copy.status(capsys)["consistent"]
    assert rig.sync("--keep-running", "--in-place", "--json", "vm1", copy.endpoint) == 0
    assert events(capsys.readouterr().out)[-1]["sent_bytes"] <= RESYNC_BYTES
    assert not copy.journal.exists() or copy.status(capsys)["journal_bytes"] == 0
    copy.end()
    assert copy.image.read_bytes() == new


STEPS = [
    "writelog.replica_redofile:RedoFile.append:after:2",
    "writelog.replica_redofile:RedoFile.append_commit:before:1",
    "writelog.replica_redofile:RedoFile.append_commit:after:1",
    "writelog.replica_redo:Replay._write:after:1", "writelog.replica_state:StateStore.store:before:2",
    "writelog.replica_redofile:RedoFile.reset:before:1", "writelog.replica_redofile:RedoFile.reset:after:1",
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.partition(":")[2])
def test_killed_at_a_step_it_has_the_old_copy_or_the_new_one(
    rig: Rig, copy: Replica, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    old = first_copy(rig, copy)
    epoch = copy.status(capsys)["epoch"]
    copy.end()
    new = change(rig)
    copy.start(killed_at=step)
    with subprocess.Popen([sys.executable, "-m", "writelog.sync", "--insecure-loopback-only",
                           "--run-dir", str(rig.env.run_dir), "--keep-running", "vm1", copy.endpoint],
                          stdout=subprocess.DEVNULL) as sync:
        try:
            assert copy.process is not None
            copy.process.communicate(timeout=WAIT_S)
            assert copy.process.returncode == -signal.SIGKILL
            is_complete = "append_commit:after" in step or "Replay" in step or "store:before" in step
            assert copy.status(capsys)["applying"] == is_complete
            copy.start()
            assert copy.image.read_bytes() in (old, new)
            assert copy.status(capsys)["consistent"]
            assert sync.wait(WAIT_S) == 0
        finally:
            sync.kill()
    assert copy.status(capsys)["epoch"] > epoch
    copy.end()
    assert copy.image.read_bytes() == new
    assert not copy.status(capsys)["journal_bytes"]


def test_a_disk_is_handed_over_with_a_journal(
    rig: Rig, copy: Replica, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was in there before is applied before the pause."""
    first_copy(rig, copy)
    new = change(rig)
    monkeypatch.setattr("writelog.sync_switch.MAX_JOURNAL_BYTES", RESYNC_BYTES // 2)
    epoch = copy.status(capsys)["epoch"]
    assert rig.sync("--json", "vm1", copy.endpoint) == 0
    report = events(capsys.readouterr().out)[-1]
    assert report["epoch"] == epoch + 2
    assert {"epoch", "apply"} <= report["pause_parts_s"].keys()
    assert copy.status(capsys)["promoted"]
    assert not copy.journal.exists()
    copy.end()
    assert copy.image.read_bytes() == new
