"""tap-ctl restart: the program is exchanged under its clients."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Tapdisk, forget_logs, read_line
from support import need

from tapcore.control import ControlClient, find_disk
from tapcore.errors import ControlError
from tapcore.nbd.address import NbdAddress
from tapcore.nbd.client import NbdClient
from tapcore.restart import HandedDisk, HandedOn
from writelog.client import LogClient

TIMEOUT_S = 30
SIZE = 8 << 20
BLOCK = 4096


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    forget_logs(tmp_path / "run")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def tapdisk(run_dir: Path, image: Path) -> Iterator[Tapdisk]:
    served = Tapdisk(run_dir, f"vm1=log:|aio:{image}")
    yield served
    served.stop()


def restart(run_dir: Path, *which: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tapcore.tapctl", "--run-dir", str(run_dir), "restart", *which],
                          capture_output=True, text=True, check=check, timeout=2 * TIMEOUT_S)


def test_what_is_handed_on_can_be_written_down() -> None:
    handed_on = HandedOn([["unix:/run/all.nbd", 5]], ["/vm/base.img"],  # type: ignore[list-item]
                         [HandedDisk("vm1", "log:|aio:/vm/a|b", True, False, [])])
    assert HandedOn.decode(handed_on.encode()) == handed_on


def test_everything_is_there_again(tapdisk: Tapdisk, run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SIZE))
    with find_disk(run_dir, "vm1") as control:
        control.call("open", chain=f"aio:{other}", name="vm2", read_only=True,
                     nbd=[f"unix:{tmp_path}/vm2.nbd", "tcp:127.0.0.1:0"])
        control.call("pause", disk="vm1")
        before = control.call("list")
        generations = control.call("info", disk="vm1")["logs"]
    assert f"tapdisk {tapdisk.process.pid} serves vm1, vm2 again" in restart(run_dir).stdout
    with find_disk(run_dir, "vm1") as control:
        assert control.call("list") == before
        info = control.call("info", disk="vm1")
        assert info["pinned"] and info["logs"] == generations
        control.call("unpause", disk="vm1")
    with tapdisk.client() as client:
        client.write(0, b"x" * BLOCK)
    for uri in before["disks"][1]["uris"]:
        with NbdClient(uri) as client:
            assert client.read_only


def test_one_of_several_is_chosen_by_its_disk_or_pid(tapdisk: Tapdisk, run_dir: Path, tmp_path: Path) -> None:
    other = Tapdisk(run_dir, "vm2=ram:1M")
    try:
        assert "choose one by its pid" in restart(run_dir, check=False).stderr
        assert f"tapdisk {other.process.pid} serves vm2 again" in restart(run_dir, "vm2").stdout
        assert f"tapdisk {tapdisk.process.pid} serves" in restart(run_dir, str(tapdisk.process.pid)).stdout
    finally:
        other.stop()


def test_the_log_goes_on(tapdisk: Tapdisk, run_dir: Path) -> None:
    with tapdisk.client() as client:
        client.write(64 * BLOCK, b"x" * BLOCK)
    restart(run_dir)
    with find_disk(run_dir, "vm1") as control:
        socket = control.call("info", disk="vm1")["logs"][0]["socket"]
    with LogClient(socket) as log:
        assert list(log.peek()) == [(64 * BLOCK, BLOCK)]


def test_who_connects_meanwhile_waits(tapdisk: Tapdisk, run_dir: Path) -> None:
    """The socket is never away: who was cut off gets in at the first attempt."""
    stopping = threading.Event()
    refused: list[OSError] = []

    def connect_over_and_over() -> None:
        while not stopping.is_set():
            try:
                connection = NbdAddress(path=tapdisk.socket).connect(TIMEOUT_S)
            except OSError as error:
                refused.append(error)
                return
            with connection:
                connection.recv(1)

    thread = threading.Thread(target=connect_over_and_over)
    thread.start()
    try:
        for _ in range(2):
            restart(run_dir)
    finally:
        stopping.set()
        thread.join(TIMEOUT_S)
    assert refused == []


def test_a_guest_behind_qemu_notices_nothing(tapdisk: Tapdisk, run_dir: Path, tmp_path: Path, image: Path) -> None:
    """Its requests wait while QEMU's NBD client connects again; what it was told to be written is there."""
    need("qemu-storage-daemon")
    socket = tmp_path / "guest.nbd"
    server = f"server.type=unix,server.path={tapdisk.socket},export=vm1,reconnect-delay=60"
    qemu = subprocess.Popen([
        "qemu-storage-daemon", "--blockdev", f"driver=nbd,node-name=disk,{server}",
        "--nbd-server", f"addr.type=unix,addr.path={socket}",
        "--export", "type=nbd,id=e,node-name=disk,name=guest,writable=on"])
    written = 0
    stopping = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        nonlocal written
        try:
            with NbdClient(NbdAddress(path=str(socket), export="guest"), timeout_s=TIMEOUT_S) as client:
                while not stopping.is_set():
                    number = written + 1
                    client.write(number % (SIZE // BLOCK) * BLOCK, number.to_bytes(8, "little") * (BLOCK // 8))
                    written = number
        except BaseException as error:
            failures.append(error)

    try:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not socket.exists():
            assert time.monotonic() < deadline_s and qemu.poll() is None
            stopping.wait(0.01)
        thread = threading.Thread(target=write)
        thread.start()
        try:
            for _ in range(3):
                before = written
                restart(run_dir)
                while written < before + 10 and thread.is_alive():
                    stopping.wait(0.01)
        finally:
            stopping.set()
            thread.join(TIMEOUT_S)
    finally:
        qemu.terminate()
        qemu.wait(TIMEOUT_S)
    assert failures == []
    data = image.read_bytes()
    for number in range(max(1, written - SIZE // BLOCK + 1), written + 1):
        at = number % (SIZE // BLOCK) * BLOCK
        assert data[at : at + 8] == number.to_bytes(8, "little")


def test_a_sync_goes_on(tapdisk: Tapdisk, run_dir: Path, tmp_path: Path, image: Path) -> None:
    """One that is in sync connects to the log again, and sends what was written since, and no more."""
    copy = tmp_path / "copy.img"
    copy.write_bytes(bytes(SIZE))
    python = [sys.executable, "-m"]
    replica = subprocess.Popen([*python, "writelog.replica", "--insecure-loopback-only", "--listen",
                                "tcp://127.0.0.1:0", f"aio:{copy}"], stdout=subprocess.PIPE)
    sync: subprocess.Popen[bytes] | None = None
    try:
        endpoint = read_line(replica).split()[-1]
        sync = subprocess.Popen([
            *python, "writelog.sync", "--run-dir", str(run_dir), "--insecure-loopback-only", "--json", "--hold",
            "vm1", endpoint], stdout=subprocess.PIPE)
        while json.loads(read_line(sync))["state"] != "in sync":
            pass
        restart(run_dir)
        with tapdisk.client() as client:
            client.write(BLOCK, b"y" * BLOCK)
        subprocess.run([*python, "writelog.sync", "switch", "--run-dir", str(run_dir), "vm1"], check=True,
                       timeout=TIMEOUT_S, capture_output=True)
        event: dict[str, Any] = {"state": ""}
        while event["state"] != "done":
            event = json.loads(read_line(sync))
        assert sync.wait(TIMEOUT_S) == 0
    finally:
        for process in (sync, replica):
            if process is not None:
                process.terminate()
                process.communicate(timeout=TIMEOUT_S)
    assert copy.read_bytes() == image.read_bytes() == bytes(BLOCK) + b"y" * BLOCK + bytes(SIZE - 2 * BLOCK)
    assert event["connections"] == 2 and event["resumed"] is False


def test_a_disk_that_is_held_keeps_its_tapdisk(tapdisk: Tapdisk, run_dir: Path) -> None:
    with find_disk(run_dir, "vm1") as holder:
        holder.call("pause", disk="vm1", hold=True)
        refused = restart(run_dir, check=False)
        assert refused.returncode == 1 and "vm1" in refused.stderr
        holder.call("unpause", disk="vm1")
    with tapdisk.client() as client:
        client.write(0, b"x" * BLOCK)


def test_a_disk_that_cannot_be_opened_again_is_told_of(run_dir: Path, image: Path) -> None:
    served = Tapdisk(run_dir, f"vm1=log:|aio:{image}")
    image.rename(f"{image}.moved")
    failed = restart(run_dir, check=False)
    assert failed.returncode == 1
    assert "did not open them again" in failed.stderr and f"'vm1=log:|aio:{image}'" in failed.stderr
    _, error = served.process.communicate(timeout=TIMEOUT_S)
    assert served.process.returncode == 1 and str(image) in error.decode()
    with pytest.raises(ControlError):
        find_disk(run_dir, "vm1")


def test_a_backing_file_that_the_operator_named_stays_allowed(run_dir: Path, tmp_path: Path) -> None:
    need("qemu-img")
    base, folder = tmp_path / "base" / "base.qcow2", tmp_path / "top"
    base.parent.mkdir()
    folder.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "8M"], check=True, timeout=TIMEOUT_S)
    served = Tapdisk(run_dir, f"vm1=qcow2:{base}")
    try:
        with find_disk(run_dir, "vm1") as control:
            control.call("snapshot", disk="vm1", path=str(folder / "overlay.qcow2"))
        restart(run_dir)
        with ControlClient(next(run_dir.glob("*.ctl")), TIMEOUT_S) as control:
            assert "overlay.qcow2" in control.call("list")["disks"][0]["chain"]
    finally:
        served.stop()
