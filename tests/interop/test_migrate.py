"""A real guest moves from one QEMU and tapdisk to another QEMU and a replica, while it writes: whatever it was
told to be durable, on either side, is on the disk where it is then."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from interop.guest import Guest, make_initramfs
from processes import Tapdisk, read_line

from tapcore.control import find_disk
from writelog import migrate
from writelog.migrate_qmp import Monitor
from writelog.migrate_run import Migration

SIZE = 8 << 20
BLOCK = 4096
SLOTS = SIZE // BLOCK
WAIT_S = 60
ROUNDS = int(os.environ.get("MIGRATE_ROUNDS", "1"))
SLOWLY = "--memory-rate=8M"
"""So that there is time for something to happen meanwhile."""
KILLED_AT = """
import sys
import killed_at
from writelog import migrate
killed_at.arm(sys.argv.pop(1))
sys.exit(migrate.main())
"""
Serve = Callable[..., Tapdisk]

WRITER = """\
n=0
while true; do
  n=$((n + 1))
  {choose}
  printf 'block %08d' $n | dd of=$disk bs=4096 seek=$((n % {slots})) conv=sync,fsync,notrunc 2>/dev/null || exit 1
  echo "wrote $n."
done
"""
CHOOSE = {1: "disk=/dev/vda", 2: "[ $((n % 2)) = 1 ] && disk=/dev/vda || disk=/dev/vdb"}


class Move:
    """A guest with `disks` disks that writes, and all that is there for it to move to."""

    def __init__(self, folder: Path, serve: Serve, initramfs: Path, disks: int, *there: str) -> None:
        """`there`: options of the QEMU at the destination."""
        self.folder = folder
        self._options_there = there
        self.incoming = f"unix:{folder}/incoming"
        self.names = [f"vm{number}" for number in range(disks)]
        for name in self.names:
            for place in ("here", "there"):
                with (folder / f"{name}.{place}").open("wb") as file:
                    file.truncate(SIZE)
        self.tapdisks = [serve(f"log:{name}|aio:{folder}/{name}.here", "--name", name) for name in self.names]
        self.here = Guest(folder, initramfs, [tapdisk.uri for tapdisk in self.tapdisks])
        self.replicas = [subprocess.Popen(
            [sys.executable, "-m", "writelog.replica", "--insecure-loopback-only",
             "--listen", "tcp://127.0.0.1:0", "--name", name, "--nbd",
             f"unix:{folder}/{name}.nbd", f"aio:{folder}/{name}.there"], stdout=subprocess.PIPE)
            for name in self.names]
        self.endpoints = [read_line(replica).split()[-1] for replica in self.replicas]
        self._initramfs = initramfs
        self.there = self._wait_there()
        self.migrate: subprocess.Popen[bytes] | None = None
        self.here.wait_for(lambda text: "wrote 20." in text)

    def _wait_there(self) -> Guest:
        uris = [f"nbd+unix:///{name}?socket={self.folder}/{name}.nbd" for name in self.names]
        return Guest(self.folder, self._initramfs, uris, self.incoming, *self._options_there)

    def wait_there_again(self) -> None:
        """A new QEMU at the destination: one whose guest did not come has ended."""
        self.there.end()
        self.there = self._wait_there()

    def arguments(self, *options: str) -> list[str]:
        """Of writelog-migrate."""
        disks = [f"--disk={name}={endpoint}" for name, endpoint in zip(self.names, self.endpoints, strict=True)]
        return ["--insecure-loopback-only", "--json", "--run-dir", str(self.tapdisks[0].run_dir),
                "--qmp", self.here.monitor,
                "--to", self.incoming, *disks, *options]

    def start(self, *options: str, killed_at: str | None = None) -> subprocess.Popen[bytes]:
        """Start writelog-migrate; with `killed_at` it is killed at a place in the code: see killed_at.py."""
        program = ["-m", "writelog.migrate"] if killed_at is None else ["-c", KILLED_AT, killed_at]
        self.migrate = subprocess.Popen(
            [sys.executable, *program, *self.arguments(*options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])})
        return self.migrate

    def wait_for_event(self, state: str) -> dict[str, Any]:
        """The next event of that state."""
        assert self.migrate is not None
        while True:
            event: dict[str, Any] = json.loads(read_line(self.migrate, WAIT_S))
            if event["state"] == state:
                return event

    def finish(self) -> tuple[int, list[dict[str, Any]], str]:
        """The exit code of writelog-migrate, its events and what it said."""
        assert self.migrate is not None
        out, err = self.migrate.communicate(timeout=WAIT_S)
        return self.migrate.returncode, [json.loads(line) for line in out.splitlines()], err.decode()

    @property
    def acknowledged(self) -> list[int]:
        """The numbers that the guest has written durably, at either place."""
        return [int(number) for number in re.findall(r"wrote (\d+)\.", self.here.console + self.there.console)]

    def goes_on(self, guest: Guest) -> None:
        """AssertionError unless the guest writes at that place."""
        seen = len(re.findall("wrote", guest.console))
        guest.wait_for(lambda text: len(re.findall("wrote", text)) > seen + 5)

    def is_here(self) -> None:
        """AssertionError unless the guest runs on here, with disks of which nothing was handed over."""
        self.goes_on(self.here)
        for name in self.names:
            info = self.info(name)
            assert info["state"] == "running" and info["fenced"] is None and info["holder"] is None

    def info(self, name: str) -> dict[str, Any]:
        with find_disk(self.tapdisks[0].run_dir, name) as control:
            return control.call("info", disk=name)

    def check(self, place: str) -> None:
        """Once no QEMU runs: all that was acknowledged is on the disks there."""
        images = [(self.folder / f"{name}.{place}").read_bytes() for name in self.names]
        numbers = self.acknowledged
        for number in numbers:
            image = images[(number + 1) % len(images)]
            at = number % SLOTS * BLOCK
            found = re.match(rb"block (\d{8})", image[at : at + BLOCK])
            assert found, f"{number} was acknowledged and is not there"
            assert int(found[1]) >= number and (int(found[1]) - number) % SLOTS == 0

    def end(self) -> None:
        if self.migrate is not None:
            self.migrate.kill()
            self.migrate.communicate(timeout=WAIT_S)
        self.here.end()
        self.there.end()
        for replica in self.replicas:
            if replica.poll() is None:
                replica.terminate()
            replica.communicate(timeout=WAIT_S)


Begin = Callable[..., Move]


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """For a guest with so many disks."""
    made: dict[int, Path] = {}

    def make(disks: int) -> Path:
        if disks not in made:
            script = WRITER.format(slots=SLOTS, choose=CHOOSE[disks])
            made[disks] = make_initramfs(tmp_path_factory.mktemp("guest"), script)
        return made[disks]

    return make


@pytest.fixture
def begin(tmp_path: Path, serve: Serve, initramfs: Callable[[int], Path]) -> Iterator[Begin]:
    """`begin(disks=1, *options of the QEMU at the destination)`: a guest that writes."""
    begun: list[Move] = []

    def start(disks: int = 1, *there: str) -> Move:
        begun.append(Move(tmp_path, serve, initramfs(disks), disks, *there))
        return begun[-1]

    yield start
    for move in begun:
        move.end()


@pytest.fixture
def move(begin: Begin) -> Move:
    return begin()


def succeed(move: Move) -> dict[str, Any]:
    """Migrate and see that the guest goes on there, with all that it has written; the report."""
    move.start("--dest-qmp", move.there.monitor)
    code, events, error = move.finish()
    assert code == 0, error
    move.goes_on(move.there)
    move.end()
    move.check("there")
    return events[-1]


@pytest.mark.parametrize(("disks", "there"), [(1, []), (2, ["-S"])])
@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_guest_moves(begin: Begin, disks: int, there: list[str], number: int) -> None:
    """To a QEMU that starts it, or that waits to be told to."""
    move = begin(disks, *there)
    report = succeed(move)
    assert report["state"] == "done" and len(report["disks"]) == disks
    assert all(disk["handed_over"] for disk in report["disks"])
    assert list(report["downtime_parts_s"]) == ["stop", "wake", "quiesce", "send", "flush", "hand over", "promote",
                                                "move"]
    assert report["downtime_s"] == pytest.approx(sum(report["downtime_parts_s"].values()))
    print(f"downtime {report['downtime_s'] * 1000:.0f} ms,", {
        name: round(part_s * 1000, 1) for name, part_s in report["downtime_parts_s"].items()})


BEFORE_THE_SWITCH = [
    "writelog.migrate_run:Migration._copy_memory:after:1", "writelog.migrate_run:Migration._mark:before:1",
    "writelog.migrate_run:Migration._mark:before:2", "writelog.migrate_run:Migration._may_promote:before:1",
]
"""While the memory is copied; when the guest was stopped; when the last round was confirmed; when all disks were
handed over and no replica knows of it."""


def test_killed_before_the_switch_at_each_step_then_it_moves(begin: Begin) -> None:
    """Each time the guest runs on, and its disks are here; in the end it moves."""
    move = begin(2)
    for place in BEFORE_THE_SWITCH:
        killed = move.start("--throttle-floor=off", killed_at=place)
        assert killed.wait(WAIT_S) == -signal.SIGKILL
        _, _, error = move.finish()
        assert "the migration was cancelled; the guest runs on here" in error
        move.is_here()
        move.wait_there_again()
    succeed(move)


def test_killed_after_the_replicas_were_told(move: Move) -> None:
    """The guest stands still, here and there. What is said gets it going again."""
    killed = move.start(killed_at="writelog.migrate_run:Migration._continue:before:1")
    assert killed.wait(WAIT_S) == -signal.SIGKILL
    _, _, error = move.finish()
    assert "the disks were handed over" in error and "tap-ctl unpause --force vm0" in error
    assert move.info("vm0")["fenced"]
    with closing(Monitor(move.here.monitor)) as monitor:
        assert not monitor.call("query-status")["running"]
        move.there.end()
        move.replicas[0].terminate()
        with find_disk(move.tapdisks[0].run_dir, "vm0") as control:
            control.call("unpause", disk="vm0", force=True)
        monitor.call("migrate_cancel")
    move.is_here()
    move.end()
    move.check("here")


def test_what_fails_before_the_switch_leaves_the_guest_here(move: Move) -> None:
    """The destination or the replica is killed, or the operator loses patience, while the memory is copied."""
    run = move.start(SLOWLY)
    move.wait_for_event("copying the memory")
    run.send_signal(signal.SIGINT)
    code, events, error = move.finish()
    assert code == 130 and "interrupted; the guest runs on here" in error and events[-1]["state"] == "failed"
    move.is_here()

    move.wait_there_again()
    move.start(SLOWLY)
    move.wait_for_event("copying the memory")
    move.there.end()
    code, _, error = move.finish()
    assert code == 1 and "QEMU's migration failed" in error and "the guest runs on here" in error
    move.is_here()

    move.start()
    code, _, error = move.finish()
    assert code == 1 and "QEMU's migration failed" in error and "the guest runs on here" in error
    move.is_here()

    move.wait_there_again()
    move.start("--memory-rate=32M")
    move.wait_for_event("copying the memory")
    move.replicas[0].kill()
    code, _, error = move.finish()
    assert code == 1 and "disk 'vm0' is stalled" in error and "the guest runs on here" in error
    move.is_here()
    with closing(Monitor(move.here.monitor)) as monitor:
        capabilities = {item["capability"]: item["state"] for item in monitor.call("query-migrate-capabilities")}
        assert not capabilities["pause-before-switchover"]
        assert monitor.call("query-migrate-parameters")["max-bandwidth"] == 128 << 20
    move.end()
    move.check("here")


def test_the_guest_ends_while_it_is_copied(move: Move) -> None:
    """Its disk is whole, and here."""
    move.start(SLOWLY)
    move.wait_for_event("copying the memory")
    move.here.process.kill()
    code, _, error = move.finish()
    assert code == 1 and "the monitor is gone" in error and "the disks go on here" in error
    assert move.info("vm0")["state"] == "running" and move.info("vm0")["fenced"] is None
    move.end()
    move.check("here")


def test_the_destination_dies_when_it_has_the_disks(
    move: Move, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guest must not run here, on a disk that is elsewhere; the operator is told how to go on."""
    go_on = Migration._continue

    def kill_and_go_on(migration: Migration) -> None:
        move.there.end()
        go_on(migration)

    monkeypatch.setattr(Migration, "_continue", kill_and_go_on)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert migrate.main(move.arguments()) == 1
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])
    error = capsys.readouterr().err
    assert "the replicas of vm0 have said that they are promoted" in error
    assert "tap-ctl unpause --force vm0" in error
    written = len(move.acknowledged)
    move.replicas[0].terminate()
    with find_disk(move.tapdisks[0].run_dir, "vm0") as control:
        control.call("unpause", disk="vm0", force=True)
    with closing(Monitor(move.here.monitor)) as monitor:
        assert not monitor.call("query-status")["running"] and len(move.acknowledged) <= written + 1
        monitor.call("cont")
    move.is_here()
    move.end()
    move.check("here")
