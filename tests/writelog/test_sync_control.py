"""A sync that is steered: held, paused, set, switched, cancelled, waited for; and its hooks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sync_rig import SIZE_BYTES, Rig, Steered

from tapcore.driver import Env
from tapcore.errors import ControlError
from writelog import sync
from writelog.plan import Limits
from writelog.replica_state import StateStore
from writelog.sync_command import ask
from writelog.sync_control import ControlSocket, Wishes, find_sync

WAIT_S = 20.0


@pytest.fixture
def rig(env: Env, tmp_path: Path) -> Iterator[Rig]:
    image = tmp_path / "disk.img"
    image.write_bytes(Random(1).randbytes(SIZE_BYTES))
    rig = Rig(env, image)
    yield rig
    rig.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = tmp_path / "copy.img"
    path.write_bytes(bytes(SIZE_BYTES))
    return path


def command(rig: Rig, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = sync.main([arguments[0], "--run-dir", str(rig.env.run_dir), *arguments[1:]])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_held_until_it_is_told_to_switch(rig: Rig, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = Steered(rig, "--hold", "vm1", rig.replica(f"aio:{copy}"))
    assert held.until("in sync")["is_held"]
    with rig.guest() as guest:
        guest.write(0, b"later" * 1000)
    assert rig.info()["state"] == "running"
    waited: list[dict[str, Any]] = []
    waiter = threading.Thread(target=lambda: waited.append(held.ask("wait")), daemon=True)
    waiter.start()
    code, out, _ = command(rig, capsys, "status", "vm1")
    assert (code, "in sync" in out, "held until" in out) == (0, True, True)
    code, out, _ = command(rig, capsys, "switch", "--wait", "vm1")
    assert (code, "handed over" in out) == (0, True)
    code, report, err = held.end()
    assert (code, report["handed_over"]) == (0, True), err
    waiter.join(WAIT_S)
    assert waited[0]["handed_over"]
    assert copy.read_bytes() == rig.image.read_bytes()
    code, _, err = command(rig, capsys, "status", "vm1")
    assert (code, "no sync of disk 'vm1' is running" in err) == (1, True)


def test_paused_set_resumed_and_cancelled(rig: Rig, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steered = Steered(rig, "--rate", "1M", "vm1", rig.replica(f"aio:{copy}"))
    steered.until("syncing")
    assert steered.ask("pause")["is_paused"]
    steered.until("paused")
    options = ["--rate", "100M", "--downtime", "1.5", "--throttle-floor", "off"]
    assert command(rig, capsys, "set", *options, "vm1")[0] == 0
    status = steered.ask("status")
    assert (status["rate_cap"], status["downtime"], status["state"]) == (100 << 20, 1.5, "paused")
    for wrong in ({"rate": "fast"}, {"colour": 1}, {"downtime": float("1e99")}, {"rate": True}):
        with pytest.raises(ControlError, match="cannot set"):
            steered.ask("set", **wrong)
    assert steered.ask("set", rate=1 << 20)["rate_cap"] == 1 << 20
    steered.ask("resume")
    steered.until("syncing")
    steered.ask("cancel")
    code, report, err = steered.end()
    assert (code, report["state"]) == (130, "failed")
    assert "interrupted" in err
    assert rig.guest_goes_on()


def test_a_terminal_that_hangs_up_interrupts_it(rig: Rig, copy: Path) -> None:
    steered = Steered(rig, "--rate", "1M", "vm1", rig.replica(f"aio:{copy}"))
    steered.until("syncing")
    steered.process.send_signal(signal.SIGHUP)
    assert steered.end()[0] == 130
    assert rig.guest_goes_on()


def test_a_set_of_nothing_is_wrong_usage(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        command(rig, capsys, "set", "vm1")
    assert exited.value.code == 2 and "--downtime" in capsys.readouterr().err


def test_started_in_the_background(rig: Rig, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = rig.replica(f"aio:{copy}")
    code, out, err = command(rig, capsys, "start", "--insecure-loopback-only", "--hold", "vm1", endpoint)
    assert code == 0, err
    path = find_sync(rig.env.run_dir, "vm1")
    waited: list[dict[str, Any]] = []
    waiter = threading.Thread(target=lambda: waited.append(ask(path, "wait", WAIT_S)), daemon=True)
    waiter.start()
    code, _, err = command(rig, capsys, "start", "--insecure-loopback-only", "vm1", endpoint)
    assert (code, "is running already" in err) == (1, True)
    ask(path, "switch", WAIT_S)
    waiter.join(WAIT_S)
    assert waited[0]["handed_over"]
    assert copy.read_bytes() == rig.image.read_bytes()
    os.waitpid(int(out.split()[0]), 0)


@pytest.mark.parametrize("result", [0, 3])
def test_hooks(rig: Rig, copy: Path, tmp_path: Path, result: int) -> None:
    before, after, log = tmp_path / "before", tmp_path / "after", tmp_path / "log"
    before.write_text(f'#!/bin/sh\necho before "$1" >> {log}\nexit {result}\n')
    after.write_text(f'#!/bin/sh\necho after "$WRITELOG_DISK" "$2" >> {log}\nexit 1\n')
    before.chmod(0o755)
    after.chmod(0o755)
    endpoint = rig.replica(f"aio:{copy}")
    options = ["--before-switch", str(before), "--after-switch", str(after)]
    code, _, err = Steered(rig, *options, "vm1", endpoint).end()
    assert code == (1 if result else 0)
    assert log.read_text() == "before vm1\n" + ("" if result else f"after vm1 {endpoint}\n")
    if result:
        assert "the hook before the switch-over ended with 3" in err
        assert rig.guest_goes_on()
    else:
        assert "the hook after the switch-over ended with 1" in err


@pytest.mark.parametrize("way", ["--keep-running", "interrupted"])
def test_a_hook_is_undone_if_the_guest_goes_on_here(rig: Rig, copy: Path, tmp_path: Path, way: str) -> None:
    """Such as a process that was stopped, for its monitor can do no more."""
    with subprocess.Popen(["sleep", "60"]) as guest:
        hooks = {"before": "STOP", "undo": "CONT"}
        for name, number in hooks.items():
            path = tmp_path / name
            interrupt = "kill -INT $PPID" if (name, way) == ("before", "interrupted") else ""
            say = f"echo {name} $1 >> {tmp_path}/log"
            path.write_text(f"#!/bin/sh\nkill -{number} {guest.pid}\n{say}\n{interrupt}\n")
            path.chmod(0o755)
        options = ["--before-switch", str(tmp_path / "before"), "--undo-switch", str(tmp_path / "undo")]
        options += [way] if way.startswith("-") else []
        code, _, _ = Steered(rig, *options, "vm1", rig.replica(f"aio:{copy}")).end()
        assert code == (0 if way == "--keep-running" else 130)
        assert (tmp_path / "log").read_text() == "before vm1\nundo vm1\n"
        assert rig.guest_goes_on()
        assert Path(f"/proc/{guest.pid}/stat").read_text().split()[2] != "T"
        guest.kill()


def test_a_moment() -> None:
    assert sync.moment("2999-01-01T00:00") > sync.moment("23:59") - 1
    for wrong in ("25:00", "soon", "2001-01-01T00:00"):
        with pytest.raises(Exception, match=r"time|passed"):
            sync.moment(wrong)


def test_a_path_that_is_too_long_is_no_reason_not_to_sync(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120)
    control = ControlSocket((path,), Wishes(Limits()), dict, lambda: None)
    control.turn()
    control.close({})
    assert not path.exists()


@pytest.mark.parametrize("line", [
    b"garbage\n", b"[]\n", b"\xff\n", b'{"op": "nosuch"}\n', b'{"op": "status", "x": 1}\n', b'{"op": []}\n',
])
def test_garbage_is_refused_and_others_are_served(tmp_path: Path, line: bytes) -> None:
    control = ControlSocket((tmp_path / "c.ctl",), Wishes(Limits()), lambda: {"state": "x"}, lambda: None)
    answers = []
    for sent in (line, b'{"op": "status"}\n'):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "c.ctl"))
            client.sendall(sent)
            control._turned_s = 0.0
            control.turn()
            answers.append(json.loads(client.recv(4096)))
    assert (answers[0]["ok"], answers[1]["ok"]) == (False, True)
    control.close({})
    assert not (tmp_path / "c.ctl").exists()


def test_while_it_is_held_the_replica_gets_an_epoch_now_and_then(rig: Rig, copy: Path, tmp_path: Path) -> None:
    """Each the disk of one instant; what is written since then is not in its image."""
    store = StateStore(tmp_path / "copy.img.replica", copy, SIZE_BYTES)
    endpoint = rig.replica(f"aio:{copy}", store=store, journal=tmp_path / "copy.img.redo")
    held = Steered(rig, "--hold", "--epoch", "0.1", "vm1", endpoint)
    for number in range(1, 4):
        for _ in range(int(WAIT_S / 0.02)):
            if held.process.poll() is not None or store.state.epoch > number:
                break
            threading.Event().wait(0.02)
        assert store.state.is_consistent and store.state.epoch > number
        with rig.guest() as guest:
            guest.write(number << 16, bytes([number]) * 4096)
    held.ask("switch")
    code, report, error = held.end()
    assert code == 0, error
    assert report["epoch"] > 3
    assert copy.read_bytes() == rig.image.read_bytes()
