"""Several disks of one guest, in processes of their own, with one switch-over: what their replicas have is of one
moment, and whatever is killed, all disks are here or all are there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from processes import Tapdisk, read_line

from tapcore.control import find_disk
from tapcore.errors import ControlError
from tapcore.nbd.client import NbdClient, NbdError
from writelog import replica, sync
from writelog.sync_command import ask
from writelog.sync_control import find_sync
from writelog.sync_report import FAILED, IN_SYNC, STALLED, SWITCHING

NAMES = ("vm1", "vm1-data", "vm1-log")
SIZE_BYTES = 4 << 20
SLOT_BYTES = 4096
SLOTS = 64
DATA_BYTES = 2 << 20
"""Where the guest writes, on each disk."""
WAIT_S = 30.0
STEP_S = 0.02
KILLED_AT = """
import sys
import killed_at
from writelog import sync
killed_at.arm(sys.argv.pop(1))
sys.exit(sync.main())
"""
SHORT_HOLD = """
import sys
from writelog import sync, sync_source
sync_source.HOLD_MARGIN_S = 0.2
sys.exit(sync.main())
"""
LATE = """
import sys, threading
from writelog import sync
from writelog.sync_source import Source
pause = Source.pause
def late(source, timeout_s):
    if source.name == {name!r}:
        threading.Event().wait(0.2)
    pause(source, timeout_s)
Source.pause = late
sys.exit(sync.main())
"""
Serve = Callable[..., Tapdisk]


class Guest:
    """Writes number n to each of its disks in turn, to the next one when the one before has acknowledged it. So of
    any moment a disk has n only if the disks before it have it too."""

    def __init__(self, uris: list[str]) -> None:
        self.number = 0
        self.failure: BaseException | None = None
        self._uris = uris
        self._stopping = threading.Event()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        clients = [NbdClient(uri, timeout_s=2 * WAIT_S) for uri in self._uris]
        try:
            while not self._stopping.is_set():
                number = self.number + 1
                for client in clients:
                    client.write(number % SLOTS * SLOT_BYTES, number.to_bytes(8, "little") * (SLOT_BYTES // 8))
                with self._news:
                    self.number = number
                    self._news.notify_all()
                self._stopping.wait(0.001)
        except NbdError as error:
            self.failure = error
        finally:
            for client in clients:
                client.close()

    def goes_on(self) -> bool:
        """Whether writes still end, on all disks."""
        with self._news:
            wanted = self.number + 3
            return self._news.wait_for(lambda: self.number >= wanted, WAIT_S)

    def stop(self) -> None:
        self._stopping.set()


def last_number(image: Path) -> int:
    """The highest number that an image has."""
    data = image.read_bytes()
    return max(int.from_bytes(data[slot * SLOT_BYTES : slot * SLOT_BYTES + 8], "little") for slot in range(SLOTS))


class Group:
    """The disks of a guest that writes, and a replica for each."""

    def __init__(self, folder: Path, serve: Serve) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        for number, name in enumerate(NAMES):
            image = self.image(name)
            written = bytes(SLOTS * SLOT_BYTES)
            image.write_bytes(written + Random(number).randbytes(DATA_BYTES - len(written)))
            os.truncate(image, SIZE_BYTES)
            with self.copy(name).open("wb") as file:
                file.truncate(SIZE_BYTES)
        with ThreadPoolExecutor() as pool:
            replicas = pool.map(self.replica, NAMES)
            self.tapdisks = list(pool.map(
                lambda name: serve(f"log:{name}|aio:{self.image(name)}", "--name", name), NAMES))
            self.replicas = dict(zip(NAMES, replicas, strict=True))
        self.run_dir = self.tapdisks[0].run_dir
        self.guest = Guest([tapdisk.uri for tapdisk in self.tapdisks])

    def image(self, name: str) -> Path:
        return self.folder / f"{name}.here"

    def copy(self, name: str) -> Path:
        return self.folder / f"{name}.there"

    def replica(self, name: str, port: int = 0) -> tuple[subprocess.Popen[bytes], str]:
        """A replica's process, and where it listens."""
        process = subprocess.Popen(
            [sys.executable, "-m", "writelog.replica", "--insecure-loopback-only", "--listen",
             f"tcp://127.0.0.1:{port}", f"aio:{self.copy(name)}"], stdout=subprocess.PIPE)
        self.processes.append(process)
        return process, read_line(process).split()[-1]

    def arguments(self, *options: str) -> list[str]:
        disks = [f"--disk={name}={endpoint}" for name, (_, endpoint) in self.replicas.items()]
        return ["--insecure-loopback-only", "--run-dir", str(self.run_dir), "--peer-timeout=2", *disks, *options]

    def start(self, *options: str, killed_at: str | None = None,
              program: Sequence[str] = ("-m", "writelog.sync")) -> subprocess.Popen[bytes]:
        """writelog-sync in a process of its own; with `killed_at` it is killed at a place in the code."""
        if killed_at is not None:
            program = ["-c", KILLED_AT, killed_at]
        process = subprocess.Popen(
            [sys.executable, *program, *self.arguments("--json", *options)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])})
        self.processes.append(process)
        return process

    def ask(self, op: str, name: str = NAMES[0], **params: Any) -> dict[str, Any]:
        return ask(find_sync(self.run_dir, name), op, WAIT_S, **params)

    def until(self, process: subprocess.Popen[bytes], is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status of that kind, for a bounded time."""
        for _ in range(int(WAIT_S / STEP_S)):
            try:
                status = self.ask("status")
            except ControlError:
                assert process.poll() is None, process.communicate()
            else:
                if is_it(status):
                    return status
            threading.Event().wait(STEP_S)
        raise AssertionError("it never was so")

    def in_state(self, process: subprocess.Popen[bytes], state: str) -> dict[str, Any]:
        return self.until(process, lambda status: status["state"] == state)

    def info(self, name: str) -> dict[str, Any]:
        with find_disk(self.run_dir, name) as control:
            return control.call("info", disk=name)

    def is_here(self) -> None:
        """AssertionError unless the guest goes on, on disks of which none is held or handed over."""
        assert self.guest.goes_on(), self.guest.failure
        for name in NAMES:
            info = self.info(name)
            assert info["fenced"] is None and info["holder"] is None and not info["pinned"], (name, info)

    def is_there(self) -> None:
        """AssertionError unless all disks are handed over, and their copies are of one moment, with all that was
        acknowledged."""
        assert [name for name in NAMES if not self.info(name)["fenced"]] == []
        self.check_copies()
        for name in NAMES:
            assert self.copy(name).read_bytes() == self.image(name).read_bytes()
        assert last_number(self.copy(NAMES[-1])) >= self.guest.number

    def check_copies(self) -> None:
        """Of one moment: a disk has a number only if the disks before it have it."""
        numbers = [last_number(self.copy(name)) for name in NAMES]
        assert numbers == sorted(numbers, reverse=True), numbers
        assert numbers[0] - numbers[-1] <= 1, numbers

    def close(self) -> None:
        self.guest.stop()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=WAIT_S)


@pytest.fixture
def group(tmp_path: Path, serve: Serve) -> Iterator[Group]:
    group = Group(tmp_path, serve)
    yield group
    group.close()


def finished(process: subprocess.Popen[bytes]) -> tuple[int, dict[str, Any], str]:
    """Its exit code, last event, and errors."""
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, json.loads(out.splitlines()[-1]), err.decode()


def test_switched_together_under_load(group: Group) -> None:
    code, report, err = finished(group.start("--verify"))
    assert code == 0, err
    assert report["handed_over"] and list(report["disks"]) == list(NAMES)
    assert all(disk["verified"] for disk in report["disks"].values())
    assert list(report["pause_parts_s"]) == ["wake", "quiesce", "send", "flush", "epoch", "hand over",
                                              "promote"]
    group.is_there()


def test_steered_as_one(group: Group, capsys: pytest.CaptureFixture[str]) -> None:
    """Each disk's name finds the sync; what is set holds for all."""
    assert sync.main(["start", *group.arguments("--hold", "--rate", "1M")]) == 0
    pid = int(capsys.readouterr().out.split()[0])
    assert sync.main(["start", *group.arguments()]) == 1
    assert "a sync of disk 'vm1' is running already" in capsys.readouterr().err
    for name in NAMES:
        status = group.ask("status", name)
        assert list(status["disks"]) == list(NAMES) and status["rate_cap"] == 1 << 20
        assert status["remaining_bytes"] == sum(disk["remaining_bytes"] for disk in status["disks"].values())
    assert group.ask("pause", NAMES[1])["is_paused"]
    options = ["--run-dir", str(group.run_dir), "--rate", "200M", "--downtime", "1.5", NAMES[2]]
    assert sync.main(["set", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *(f"{name} -> tcp" for name in NAMES), f"all -> {len(NAMES)} replicas"]
    assert "paused by the operator" in lines[-1] and "held until" in lines[-1]
    status = group.ask("resume")
    assert (status["rate_cap"], status["downtime"], status["is_paused"]) == (200 << 20, 1.5, False)
    for _ in range(int(WAIT_S / STEP_S)):
        if group.ask("status")["state"] == IN_SYNC:
            break
        threading.Event().wait(STEP_S)
    assert group.guest.goes_on() and group.ask("status")["is_held"]
    waited: list[dict[str, Any]] = []
    waiter = threading.Thread(target=lambda: waited.append(group.ask("wait", NAMES[1])), daemon=True)
    waiter.start()
    group.ask("switch", NAMES[2])
    waiter.join(WAIT_S)
    assert waited[0]["handed_over"]
    group.is_there()
    os.waitpid(pid, 0)
    assert not list(group.run_dir.glob("sync:*.ctl"))


def test_they_are_forecast_together(group: Group, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", *group.arguments("--rate", "100M", "--for", "0.6", "--json")]
    assert sync.main(options) == 0
    found = json.loads(capsys.readouterr().out)
    assert [disk["disk"] for disk in found["disks"]] == list(NAMES)
    assert all(disk["write_rate"] > 0 and disk["target"]["problem"] is None for disk in found["disks"])
    assert "resync" not in found and found["full"]["converges"]
    assert found["full"]["first_bytes"] == len(NAMES) * DATA_BYTES
    group.is_here()


BEFORE_THE_PROMOTION = [
    "writelog.sync_together:Together._begin:before:1", "writelog.sync_switch:SwitchOver._drain:before:2",
    "writelog.sync_switch:SwitchOver._drain:after:1", "writelog.sync_together:Together._allow:before:2",
    "writelog.sync_source:Source.hand_over:before:1", "writelog.sync_source:Source.hand_over:after:1",
    "writelog.sync_source:Source.hand_over:after:2", "writelog.sync_together:Together._allow:before:3",
]
"""When all are ready; in the pause; when the first disk's rest was confirmed, and when all were; before and after
the first disk was handed over, and the second; and when all were, and no replica knows of it."""


def test_killed_at_each_step_then_it_switches(group: Group) -> None:
    """Each time the guest goes on here, with all disks, and the next sync sends what is missing."""
    for place in BEFORE_THE_PROMOTION:
        killed = group.start(killed_at=place)
        output = killed.communicate(timeout=WAIT_S)
        assert killed.returncode == -signal.SIGKILL, (place, output)
        group.is_here()
    code, report, err = finished(group.start())
    assert code == 0 and all(disk["resumed"] for disk in report["disks"].values()), err
    group.is_there()


@pytest.mark.parametrize("place", [
    "writelog.sync_guard:Guard.promoting:after:1", "writelog.sync_switch:SwitchOver._promote:after:1"])
def test_killed_when_the_replicas_are_told(
    group: Group, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then all disks are there, complete, and a replica that has not heard of it is promoted by what is said."""
    killed = group.start(killed_at=place)
    _, err = killed.communicate(timeout=WAIT_S)
    assert killed.returncode == -signal.SIGKILL
    assert b"`writelog-replica promote CHAIN` makes the copy the disk" in err
    group.is_there()
    for name, (process, _) in group.replicas.items():
        process.terminate()
        process.wait(WAIT_S)
        capsys.readouterr()
        assert replica.main(["status", "--json", str(group.copy(name))]) == 0
        is_promoted = json.loads(capsys.readouterr().out)["promoted"]
        assert replica.main(["promote", f"aio:{group.copy(name)}"]) == (2 if is_promoted else 0)


def stopper(group: Group, name: str) -> Path:
    """A hook before the switch-over that stops a replica, the first time."""
    hook = group.folder / "hook"
    hook.write_text(f'''#!/bin/sh
echo "$*" >> {group.folder}/hooked
echo "$WRITELOG_DISK" >> {group.folder}/hooked
[ $(wc -l < {group.folder}/hooked) -gt 2 ] || kill -STOP {group.replicas[name][0].pid}
''')
    hook.chmod(0o755)
    return hook


def test_a_replica_is_killed_in_the_pause(group: Group) -> None:
    """The guest goes on here, and the group tries again when the replica is back."""
    run = group.start("--downtime", "5", "--before-switch", str(stopper(group, NAMES[1])))
    group.in_state(run, SWITCHING)
    process, endpoint = group.replicas[NAMES[1]]
    process.kill()
    process.wait(WAIT_S)
    group.in_state(run, STALLED)
    group.is_here()
    group.replica(NAMES[1], int(endpoint.rsplit(":", 1)[1]))
    code, report, err = finished(run)
    assert code == 0 and [disk["connections"] for disk in report["disks"].values()] == [1, 2, 1], err
    group.is_there()
    hooked = (group.folder / "hooked").read_text().splitlines()
    pairs = " ".join(f"{name} {replica[1]}" for name, replica in group.replicas.items())
    assert hooked == [pairs, " ".join(NAMES)] * 2


def test_a_pause_that_is_too_long_is_broken_off_for_all(group: Group) -> None:
    run = group.start("--downtime", "5", "--max-pause", "1", "--peer-timeout", str(WAIT_S),
                      "--before-switch", str(stopper(group, NAMES[2])))
    group.in_state(run, SWITCHING)
    group.until(run, lambda status: status["state"] != SWITCHING)
    assert group.guest.goes_on()
    group.replicas[NAMES[2]][0].send_signal(signal.SIGCONT)
    code, _, err = finished(run)
    assert code == 0, err
    group.is_there()


def test_stopped_in_the_pause(group: Group) -> None:
    """The guest goes on without the sync; that finds it out when it is continued, and switches over later."""
    run = group.start("--downtime", "5", "--max-pause", "1", "--peer-timeout", str(WAIT_S),
                      "--before-switch", str(stopper(group, NAMES[1])), program=["-c", SHORT_HOLD])
    group.in_state(run, SWITCHING)
    run.send_signal(signal.SIGSTOP)
    assert group.guest.goes_on()
    group.replicas[NAMES[1]][0].send_signal(signal.SIGCONT)
    run.send_signal(signal.SIGCONT)
    code, _, err = finished(run)
    assert code == 0, err
    group.is_there()


def test_a_tapdisk_is_killed_and_served_again(group: Group, serve: Serve) -> None:
    """The other disks wait for it, in sync."""
    run = group.start("--hold")
    group.in_state(run, IN_SYNC)
    group.tapdisks[1].kill()
    group.in_state(run, STALLED)
    group.ask("switch")
    serve(f"log:{NAMES[1]}|aio:{group.image(NAMES[1])}", "--name", NAMES[1])
    code, _, err = finished(run)
    assert code == 0, err
    for name in NAMES:
        assert group.info(name)["fenced"] and group.copy(name).read_bytes() == group.image(name).read_bytes()


def test_cancelled_in_the_pause(group: Group) -> None:
    run = group.start("--downtime", "5", "--before-switch", str(stopper(group, NAMES[0])))
    group.in_state(run, SWITCHING)
    group.ask("cancel", NAMES[1])
    code, event, err = finished(run)
    assert (code, event["state"]) == (130, FAILED) and "interrupted; the disks run on" in err
    group.is_here()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(group: Group, number: signal.Signals) -> None:
    run = group.start("--hold")
    group.in_state(run, IN_SYNC)
    run.send_signal(number)
    code, _, err = finished(run)
    assert code == 130 and "interrupted" in err
    group.is_here()


def test_a_disk_that_fails_for_good_ends_all(group: Group) -> None:
    """The error says which."""
    process, _ = group.replicas[NAMES[1]]
    process.kill()
    process.wait(WAIT_S)
    os.truncate(group.copy(NAMES[1]), SIZE_BYTES // 2)
    group.replicas[NAMES[1]] = group.replica(NAMES[1])
    code, event, err = finished(group.start())
    assert code == 1 and event["state"] == FAILED
    assert f"disk {NAMES[1]!r}: " in err and "bytes" in err, err
    group.is_here()


def test_a_hook_that_fails_ends_all(group: Group) -> None:
    code, _, err = finished(group.start("--before-switch", "/bin/false"))
    assert code == 1 and "the hook before the switch-over ended with 1; the guest goes on here" in err, err
    group.is_here()


@pytest.mark.parametrize("late", [NAMES[0], NAMES[-1]])
def test_copies_of_one_moment(group: Group, late: str) -> None:
    """The disks stay here; their copies were confirmed while all stood still, though one was paused later."""
    program = ["-c", LATE.format(name=late)]
    code, report, err = finished(group.start("--keep-running", "--downtime=5", program=program))
    assert code == 0 and not report["handed_over"], err
    group.is_here()
    group.check_copies()
    assert last_number(group.copy(NAMES[0])) > 0


@pytest.mark.parametrize(("arguments", "error"), [
    (["vm1"], "give DISK tcp://HOST:PORT, or --disk"), ([], "give DISK"),
    (["--disk", "a=tcp://127.0.0.1:1", "vm1", "tcp://127.0.0.1:2"], "give DISK"),
    (["--disk", "a=tcp://127.0.0.1:1", "--disk", "a=tcp://127.0.0.1:2"], "'a' is named twice"),
    (["--disk", "a=tcp://127.0.0.1:1", "--disk", "b=tcp://127.0.0.1:1"], "each disk needs a writelog-replica"),
])
def test_disks_that_make_no_sense(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = sync.main(["--insecure-loopback-only", *arguments])
    except SystemExit as end:
        code = end.code
    assert (code, error in capsys.readouterr().err) == (2, True)
