"""`tap-ctl` as a process, against real tapdisks."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Tapdisk

from tapcore import unixsocket
from tapcore.control import find_disk
from tapcore.nbd.client import NbdClient
from writelog.logstore import forget

TIMEOUT_S = 20
SIZE = 1 << 20

Serve = Callable[..., Tapdisk]


class TapCtl:
    """Runs tap-ctl in one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "tapcore.tapctl", "--run-dir", str(self.run_dir), *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False,
                              timeout=TIMEOUT_S)

    def __call__(self, *arguments: str) -> str:
        """The output of a command that must succeed."""
        outcome = self.run(*arguments)
        assert outcome.returncode == 0 and outcome.stderr == "", outcome.stderr
        return outcome.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self("--json", *arguments))

    def fails(self, *arguments: str, code: int = 1) -> str:
        """The one line of a command that must fail."""
        outcome = self.run(*arguments)
        assert outcome.returncode == code and outcome.stdout == "", outcome
        assert code == 2 or outcome.stderr.count("\n") == 1, outcome.stderr
        return outcome.stderr


@pytest.fixture
def ctl(tmp_path: Path) -> TapCtl:
    return TapCtl(tmp_path / "run-serve")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def spawned(ctl: TapCtl) -> Iterator[list[int]]:
    """Pids of tapdisks in the background; each must have ended after the test."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        try:
            watch = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ctl.run("shutdown", str(pid))
        assert select.select([watch], [], [], TIMEOUT_S)[0], "it did not end"
        os.close(watch)


def test_list_as_a_table_and_as_json(ctl: TapCtl, serve: Serve) -> None:
    assert ctl("list").split() == ["NAME", "PID", "STATE", "SIZE", "CLIENTS", "CHAIN", "NBD"]
    assert ctl.json("list") == {"tapdisks": []}
    one = serve("ram:1M", "--name", "one", "--read-only")
    two = serve("ram:1536", "--name", "second")
    with two.client():
        heading, first, second = sorted(ctl("list").splitlines(), key=lambda line: (line[0] != "N", line))
        assert first.split() == ["one", str(one.process.pid), "running,", "read-only", "1", "MiB", "0", "ram:1M",
                                 one.uri]
        assert second.split() == ["second", str(two.process.pid), "running", "1.5", "KiB", "1", "ram:1536",
                                  two.uri]
        assert first.index("ram:1M") == second.index("ram:1536") == heading.index("CHAIN")
        tapdisks = ctl.json("list")["tapdisks"]
    assert {tapdisk["pid"]: [disk["name"] for disk in tapdisk["disks"]] for tapdisk in tapdisks} == {
        one.process.pid: ["one"], two.process.pid: ["second"]}


def test_json_may_stand_before_or_behind_the_command(ctl: TapCtl, serve: Serve) -> None:
    serve("ram:1M")
    assert json.loads(ctl("list", "--json")) == json.loads(ctl("--json", "list"))


def test_open_info_and_close(ctl: TapCtl, serve: Serve, tmp_path: Path, image: Path) -> None:
    disk = serve("ram:1M")
    name, uri = ctl("open", "--name", "new", "--nbd", f"unix:{tmp_path}/new.nbd", f"aio:{image}").split()
    assert name == "new" and uri == f"nbd+unix:///new?socket={tmp_path}/new.nbd"
    NbdClient(uri).disconnect()
    info = ctl.json("info", "new")
    assert info["chain"] == f"aio:{image}" and info["pid"] == disk.process.pid and info["uris"] == [uri]
    lines = ctl("info", "new").splitlines()
    assert f"size          {SIZE} (1 MiB)" in lines and "read only     no" in lines and "fenced        -" in lines
    assert ctl("close", "new") == "new is closed\n"
    assert ctl.json("open", "--read-only", f"aio:{image}")["read_only"] is True
    assert ctl.json("close", "disk.img") == {"disk": "disk.img"}
    assert "serves a disk 'new'; there are 1M" in ctl.fails("close", "new")


def test_a_log_is_shown_and_forgotten(ctl: TapCtl, serve: Serve, image: Path) -> None:
    serve("ram:1M")
    try:
        ctl("open", f"log:tapctl-test|aio:{image}")
        assert f"logs          tapctl-test at {ctl.run_dir}/log__tapctl-test.ctl" in ctl("info", "disk.img")
        ctl("close", "--forget", "disk.img")
        assert forget(ctl.run_dir, "tapctl-test") is False
    finally:
        forget(ctl.run_dir, "tapctl-test")


def test_pause_and_unpause_with_another_chain(ctl: TapCtl, serve: Serve, image: Path) -> None:
    disk = serve(f"ram:{SIZE}", "--name", "vm1")
    assert ctl("pause", "vm1") == "vm1 is paused\n"
    assert ctl.json("pause", "vm1") == {"state": "paused"}
    assert "'ram:2M' has 2097152 bytes" in ctl.fails("unpause", "vm1", "--chain", "ram:2M")
    assert ctl.json("info", "vm1")["state"] == "paused"
    assert ctl("unpause", "vm1", "--chain", f"aio:{image}") == "vm1 is running\n"
    with disk.client() as client:
        client.write(0, b"moved")
    assert image.read_bytes()[:5] == b"moved"


def test_a_disk_that_was_handed_over_goes_on_by_force_alone(ctl: TapCtl, serve: Serve) -> None:
    serve("ram:1M", "--name", "vm1")
    with find_disk(ctl.run_dir, "vm1") as sync:
        sync.call("pause", disk="vm1", hold=True)
        assert "is held by process" in ctl.fails("unpause", "vm1")
        sync.call("handover", disk="vm1", to="tcp://b")
    assert "paused, handed over to tcp://b" in ctl("list")
    assert "handed over to tcp://b" in ctl.fails("unpause", "vm1")
    assert ctl("unpause", "--force", "vm1") == "vm1 is running\n"


def test_stats(ctl: TapCtl, serve: Serve) -> None:
    disk = serve("ram:1M", "--name", "vm1")
    serve("ram:1M", "--name", "vm2")
    with disk.client() as client:
        client.write(0, b"x" * 4096)
        client.read(0, 1)
    lines = [line.split() for line in ctl("stats").splitlines()]
    assert ["vm1", "write", "1", "4", "KiB", "0"] in [line[:6] for line in lines]
    assert ["vm1", "read", "1", "1", "B", "0"] in [line[:6] for line in lines]
    assert ["vm2", "running", "0", "0", "0", "0", "0"] in lines
    assert set(ctl.json("stats")["disks"]) == {"vm1", "vm2"}
    only = ctl.json("stats", "vm1")["disks"]
    assert list(only) == ["vm1"] and only["vm1"]["ops"]["write"]["bytes"] == 4096


def test_map(ctl: TapCtl, serve: Serve, image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(65536)
        file.write(b"x" * 65536)
    serve(f"aio:{image}")
    expected = [["0", "65536", "hole,", "zero"], ["65536", "65536", "data"], ["131072", "917504", "hole,", "zero"]]
    heading, *lines = ctl("map", "disk.img").splitlines()
    assert heading.split() == ["OFFSET", "LENGTH", "STATE"] and [line.split() for line in lines] == expected
    assert ctl.json("map", "disk.img", "--offset", "4096", "--length", "65536")["extents"] == [
        {"offset": 4096, "length": 61440, "hole": True, "zero": True},
        {"offset": 65536, "length": 4096, "hole": False, "zero": False}]
    assert "not all on the disk" in ctl.fails("--json", "map", "disk.img", "--length", str(SIZE + 1))


def test_spawn_and_shutdown(ctl: TapCtl, spawned: list[int], image: Path) -> None:
    [disk] = ctl.json("spawn", "--read-only", f"aio:{image}")["disks"]
    spawned.append(disk["pid"])
    assert disk["name"] == "disk.img" and disk["read_only"] is True
    NbdClient(disk["uris"][0]).disconnect()
    name, uri = ctl("spawn", "--name", "two", "ram:1M").split()
    assert (name, uri) == ("two", f"nbd+unix:///two?socket={ctl.run_dir}/two.nbd")
    second = ctl.json("info", "two")["pid"]
    spawned.append(second)
    message = ctl.fails("open", "ram:1M")
    assert "2 tapdisks run" in message and str(second) in message and str(disk["pid"]) in message
    assert ctl("open", "--pid", str(second), "ram:2M").startswith("2M nbd+unix:")
    assert "no tapdisk 1 runs" in ctl.fails("shutdown", "1")
    assert ctl("shutdown", str(second)) == f"tapdisk {second} has closed its disks and ends\n"
    assert [tapdisk["pid"] for tapdisk in ctl.json("list")["tapdisks"]] == [disk["pid"]]
    assert ctl.json("shutdown") == {"pid": disk["pid"]}
    assert "start one: tap-ctl spawn" in ctl.fails("shutdown")


def test_a_spawn_that_fails(ctl: TapCtl) -> None:
    assert "No such file" in ctl.fails("spawn", "aio:/none/disk.img")
    assert "a CHAIN is needed" in ctl.fails("spawn", code=2)


@pytest.mark.parametrize("arguments", [[], ["nix"], ["list", "--nix"], ["info"], ["map", "d", "--offset", "x"],
                                       ["--timeout", "nan", "list"]])
def test_a_wrong_command_line(ctl: TapCtl, arguments: list[str]) -> None:
    assert "usage: tap-ctl" in ctl.fails(*arguments, code=2)


def test_help_has_examples(ctl: TapCtl) -> None:
    assert "examples:" in ctl("--help") and "--forget" in ctl("close", "--help")


def test_dead_tapdisks_are_reported_and_silent_ones_are_an_error(ctl: TapCtl, serve: Serve) -> None:
    disk = serve("ram:1M")
    unixsocket.listen(ctl.run_dir / "tapdisk-1.ctl").close()
    outcome = ctl.run("list")
    assert outcome.returncode == 0 and disk.uri in outcome.stdout
    assert outcome.stderr.startswith("tap-ctl: ") and "this tapdisk died" in outcome.stderr
    with unixsocket.listen(ctl.run_dir / "tapdisk-1.ctl"):
        outcome = ctl.run("--timeout", "0.2", "list")
        assert outcome.returncode == 1 and disk.uri in outcome.stdout
        assert "no answer to 'list' within 0.2 s" in outcome.stderr


def test_a_table_on_a_terminal(ctl: TapCtl, serve: Serve) -> None:
    serve("ram:1M", "--name", "vm1")
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(ctl.command("list"), stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    output = b""
    while select.select([ours], [], [], TIMEOUT_S)[0]:
        try:
            data = os.read(ours, 4096)
        except OSError:  # EIO: the terminal's other end is closed
            break
        output += data
    os.close(ours)
    _, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, error
    assert b"vm1" in output and b"\x1b[1m" in output and b"1 MiB" in output


def test_snapshot_commit_stream_and_jobs(ctl: TapCtl, serve: Serve, image: Path, tmp_path: Path) -> None:
    serve(f"log:|aio:{image}", "--name", "vm")
    top = tmp_path / "top.qcow2"
    assert ctl("jobs").split() == ["DISK", "JOB", "STATE", "SEEN", "COPIED", "SECONDS", "PAUSE", "ms", "PHASE"]
    chain = f"log:disk.img|qcow2:{top}"
    assert re.fullmatch(rf"vm was paused for [\d.]+ ms; its chain is {re.escape(chain)}\n",
                        ctl("snapshot", "vm", str(top), "--option", "cluster_size=4K"))
    assert ctl("commit", "vm", "--rate", "100M").endswith(f"its chain is log:disk.img|aio:{image}\n")
    job = ctl.json("jobs", "vm")["jobs"][0]
    assert job["kind"] == "commit" and job["state"] == "done" and job["emptied"] == str(top)
    assert ctl("jobs").splitlines()[1].split()[:4] == ["vm", "commit", "done", "100"]
    assert "the image is in use" not in ctl.fails("snapshot", "vm", str(top))
    top.unlink()
    assert ctl.json("snapshot", "vm", str(top))["overlay"] == str(top)
    assert ctl.json("stream", "vm")["chain"] == chain
    assert "no parent to be copied from" in ctl.fails("stream", "vm")
    assert "has no job" in ctl.fails("cancel", "vm")
    assert "is not a size" in ctl.fails("stream", "vm", "--rate", "fast", code=2)
