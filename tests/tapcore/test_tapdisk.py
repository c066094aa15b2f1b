"""`tapdisk` as a process: what it prints, how it ends, and what it leaves behind."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Tapdisk, read_line

from tapcore.control import ControlClient, find_disk, processes
from tapcore.nbd import wire
from tapcore.nbd.client import NbdClient, NbdError
from tapcore.tapdisk import parse_arguments, split_name

TIMEOUT_S = 20
SIZE = 4 << 20

Serve = Callable[..., Tapdisk]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run-serve"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose tapdisks are ended after the test."""
    run_dir = tmp_path / "run-background"
    yield run_dir
    for process in processes(run_dir):
        watch = os.pidfd_open(process.pid)
        with ControlClient(process.path, TIMEOUT_S) as client:
            client.call("shutdown")
        assert select.select([watch], [], [], TIMEOUT_S)[0], "it did not end"
        os.close(watch)


def tapdisk(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A tapdisk that ends by itself."""
    return subprocess.run([sys.executable, "-m", "tapcore.tapdisk", *arguments], capture_output=True, text=True,
                          check=False, timeout=TIMEOUT_S)


def files(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()}


def until(disk: Tapdisk, ready: Callable[[dict[str, Any]], bool]) -> None:
    """Ask for the disk's figures until `ready`, for a bounded time."""
    deadline_s = time.monotonic() + TIMEOUT_S
    with find_disk(disk.run_dir, disk.name) as control:
        while not ready(stats := control.call("stats")["disks"][disk.name]):
            assert time.monotonic() < deadline_s, stats


# Serving


def test_one_disk_is_served_at_its_own_socket_under_its_name_or_none(
    serve: Serve, run_dir: Path, image: Path
) -> None:
    disk = serve(f"aio:{image}")
    assert disk.uri == f"nbd+unix:///disk.img?socket={run_dir}/disk.img.nbd"
    assert files(run_dir) == {"disk.img.lock", "disk.img.nbd", f"tapdisk-{disk.process.pid}.ctl"}
    with NbdClient(disk.server_uri) as client:
        client.write(0, b"hello")
    disk.stop()
    assert files(run_dir) == set()
    assert image.read_bytes()[:5] == b"hello"


def test_addresses_can_be_given(serve: Serve, tmp_path: Path) -> None:
    disk = serve("ram:1M", "--name", "vm1", "--nbd", f"unix:{tmp_path}/vm1.nbd", "--nbd", "tcp:127.0.0.1:0",
                 "--read-only")
    assert disk.name == "vm1" and disk.uri.startswith("nbd://127.0.0.1:")
    for uri in (disk.uri, f"nbd+unix:///vm1?socket={tmp_path}/vm1.nbd"):
        with NbdClient(uri) as client:
            assert client.read_only
    disk.stop()
    assert not (tmp_path / "vm1.nbd").exists()


def test_several_disks_are_served_by_name_at_one_socket(serve: Serve, run_dir: Path, image: Path) -> None:
    odd = image.rename(image.with_name("a=b.img"))
    disk = serve(f"aio:{odd}", "one=ram:1M", "two=ram:2M")
    lines = [disk.name, *(read_line(disk.process).split()[0] for _ in range(2))]
    assert sorted(lines) == ["a_b.img", "one", "two"]
    assert disk.socket == f"{run_dir}/tapdisk-{disk.process.pid}.nbd"
    for name, size_bytes in (("a_b.img", SIZE), ("one", 1 << 20), ("two", 2 << 20)):
        with NbdClient(f"nbd+unix:///{name}?socket={disk.socket}") as client:
            assert client.size_bytes == size_bytes


@pytest.mark.parametrize(("text", "expected"), [
    ("aio:/x", (None, "aio:/x")),
    ("aio:/a=b", (None, "aio:/a=b")),
    ("a=aio:/x", ("a", "aio:/x")),
    ("a=aio:/b=c", ("a", "aio:/b=c")),
    ("a=delay:all=1|ram:1M", ("a", "delay:all=1|ram:1M")),
    ("delay:all=1|ram:1M", (None, "delay:all=1|ram:1M")),
    ("=ram:1M", ("", "ram:1M")),
    ("nix", (None, "nix")),
])
def test_names_and_chains_are_told_apart(text: str, expected: tuple[str | None, str]) -> None:
    assert split_name(text) == expected


def test_the_number_of_retries_and_their_interval_arrive(serve: Serve) -> None:
    disk = serve("error:op=write|ram:1M", "--max-retries", "2", "--retry-interval", "0.01")
    with disk.client() as client, pytest.raises(NbdError) as caught:
        client.write(0, b"x")
    assert caught.value.errno == errno.EIO
    with find_disk(disk.run_dir, disk.name) as control:
        assert control.call("stats")["disks"][disk.name]["retries"] == 2


# Failing


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["aio:/none/disk.img"], 1, "No such file"),
    (["ram:1M", "aio:/none/disk.img"], 1, "No such file"),
    (["nix:1"], 1, "unknown driver 'nix'"),
    (["a=ram:1M", "a=ram:1M"], 1, "there is a disk 'a' already"),
    (["--nbd", "unix:/none/x", "ram:1M"], 1, "cannot listen"),
    (["--nbd", "what", "ram:1M"], 2, "not an NBD address"),
    (["--name", "a/b", "ram:1M"], 2, "cannot be the name"),
    (["--name", "a", "b=ram:1M"], 2, "--name is for one CHAIN"),
    (["--name", "a", "ram:1M", "ram:2M"], 2, "--name is for one CHAIN"),
    (["--max-retries", "-1", "ram:1M"], 2, "not a whole number"),
    (["--retry-interval", "nan", "ram:1M"], 2, "not a number of seconds"),
    ([], 2, "a CHAIN is needed"),
])
@pytest.mark.parametrize("mode", [[], ["--daemon"]], ids=["foreground", "daemon"])
def test_a_start_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, mode: list[str], arguments: list[str], code: int, message: str
) -> None:
    outcome = tapdisk("--run-dir", str(tmp_path / "run"), *mode, *arguments)
    assert outcome.returncode == code and outcome.stdout == ""
    assert message in outcome.stderr.splitlines()[-1] and "Traceback" not in outcome.stderr
    assert not (tmp_path / "run").exists() or files(tmp_path / "run") == set()


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = tapdisk("--run-dir", str(tmp_path / "file" / "run"), "ram:1M")
    assert outcome.returncode == 2 and "cannot make the run directory" in outcome.stderr


def test_a_name_that_another_process_has(serve: Serve) -> None:
    disk = serve("ram:1M", "--name", "vm1")
    outcome = tapdisk("--run-dir", str(disk.run_dir), "--name", "vm1", "ram:1M")
    assert outcome.returncode == 1
    assert f"there is a disk 'vm1' already, of tapdisk {disk.process.pid}" in outcome.stderr
    disk.client().disconnect()


# Ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_what_is_in_flight(serve: Serve, run_dir: Path, image: Path, number: int) -> None:
    disk = serve(f"delay:write=300|aio:{image}")
    client = disk.client()
    for block in range(8):
        client.submit(wire.NBD_CMD_WRITE, block * 8192, 4096, bytes([block + 1]) * 4096)
    until(disk, lambda stats: stats["in_flight"] + stats["ops"]["write"]["requests"] == 8)
    disk.process.send_signal(number)
    assert [client.wait()[1] for _ in range(8)] == [0] * 8
    with pytest.raises(NbdError):
        client.read(0, 1)
    assert disk.process.wait(TIMEOUT_S) == 0
    assert files(run_dir) == set()
    data = image.read_bytes()
    assert all(data[block * 8192 : block * 8192 + 4096] == bytes([block + 1]) * 4096 for block in range(8))


def test_a_second_signal_does_not_wait(serve: Serve) -> None:
    disk = serve("delay:write=600000|ram:1M")
    client = disk.client()
    client.submit(wire.NBD_CMD_WRITE, 0, 4, b"data")
    until(disk, lambda stats: stats["in_flight"] == 1)
    disk.process.send_signal(signal.SIGTERM)
    until(disk, lambda stats: stats["state"] == "pausing")
    disk.process.send_signal(signal.SIGTERM)
    assert disk.process.wait(TIMEOUT_S) == -signal.SIGTERM


def test_a_shutdown_over_the_control_socket_ends_it(serve: Serve, run_dir: Path) -> None:
    disk = serve("ram:1M")
    with find_disk(run_dir, disk.name) as control:
        assert control.call("shutdown") == {"pid": disk.process.pid}
    assert disk.process.wait(TIMEOUT_S) == 0
    assert files(run_dir) == set()


def test_a_killed_one_is_noticed_and_its_disk_can_be_served_again(
    serve: Serve, run_dir: Path, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = serve(f"aio:{image}")
    dead.kill()
    assert f"tapdisk-{dead.process.pid}.ctl" in files(run_dir)
    assert processes(run_dir) == []
    assert "this tapdisk died" in caplog.text
    again = serve(f"aio:{image}")
    assert again.uri == dead.uri
    again.client().disconnect()
    assert [process.pid for process in processes(run_dir)] == [again.process.pid]


# In the background


def test_a_daemon_is_ready_when_the_command_returns(background: Path, image: Path) -> None:
    outcome = tapdisk("--run-dir", str(background), "--daemon", f"aio:{image}")
    assert outcome.returncode == 0 and outcome.stderr == ""
    name, uri = outcome.stdout.split()
    with NbdClient(uri) as client:
        client.write(0, b"hello")
    with find_disk(background, name) as control:
        pid = control.call("info", disk=name)["pid"]
    assert os.getsid(pid) == pid
    for fd, target in ((0, "/dev/null"), (1, "/dev/null"), (2, f"{background}/tapdisk-{pid}.log")):
        assert str(Path(f"/proc/{pid}/fd/{fd}").readlink()) == target
    watch = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    assert select.select([watch], [], [], TIMEOUT_S)[0]
    os.close(watch)
    assert files(background) == set()


def test_what_a_daemon_has_to_say_is_in_its_log(background: Path) -> None:
    outcome = tapdisk("--run-dir", str(background), "--daemon", "--max-retries", "1", "--retry-interval", "0.01",
                      "error:op=write|ram:1M")
    name, uri = outcome.stdout.split()
    with NbdClient(uri) as client, pytest.raises(NbdError):
        client.write(0, b"x")
    [process] = processes(background)
    with ControlClient(process.path) as control:
        assert control.call("stats", disk=name)["disks"][name]["retries"] == 1
    assert "write of 1 bytes at 0 failed" in (background / f"tapdisk-{process.pid}.log").read_text()


# Help


def test_help_on_drivers() -> None:
    listed = tapdisk("help")
    assert listed.returncode == 0
    for name in ("aio", "log", "ram"):
        assert re.search(rf"^  {name}: ", listed.stdout, re.MULTILINE)
    one = tapdisk("help", "log")
    assert one.returncode == 0 and "Use: log:|aio:" in one.stdout and "Limits:" in one.stdout
    wrong = tapdisk("help", "nix")
    assert wrong.returncode == 1 and "known drivers: aio" in wrong.stderr


def test_help_on_options() -> None:
    outcome = tapdisk("--help")
    assert outcome.returncode == 0 and "examples:" in outcome.stdout and "--daemon" in outcome.stdout


def test_defaults_of_the_command_line() -> None:
    options = parse_arguments(["ram:1M"])
    assert (options.max_retries, options.retry_interval, options.nbd) == (100, 1.0, [])
    assert not options.daemon and not options.read_only and options.disks == [(None, "ram:1M")]
