"""What writelog-migrate refuses before anything moves, with a QEMU that has disks and no guest."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from processes import Tapdisk
from support import need

from tapcore.errors import WritelogError
from writelog import migrate
from writelog.migrate_qmp import Monitor, MonitorError, Refusal

WAIT_S = 30
QEMU = ("qemu-system-x86_64", "-machine", "none", "-display", "none")
Serve = Callable[..., Tapdisk]
Start = Callable[..., str]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*options)`: a QEMU; the address of its monitor."""
    need("qemu-system-x86_64")
    running: list[Path] = []

    def run(*options: str) -> str:
        path = tmp_path / f"{len(running)}.qmp"
        command = [*QEMU, "-daemonize", "-qmp", f"unix:{path},server=on,wait=off", *options]
        assert subprocess.run(command, check=False, timeout=WAIT_S).returncode == 0
        running.append(path)
        return f"unix:{path}"

    yield run
    for path in running:
        with closing(Monitor(f"unix:{path}")) as monitor, suppress(MonitorError):  # gone before it answers, maybe
            monitor.call("quit")


def drive(uri: str) -> tuple[str, str]:
    return "-drive", f"file={uri},format=raw,if=none"


def refused(tapdisk: Tapdisk, monitor: str, *options: str, disk: str = "vm1=tcp://127.0.0.1:1") -> int:
    return migrate.main(["--insecure-loopback-only", "--run-dir", str(tapdisk.run_dir), "--qmp", monitor,
                         "--to", f"unix:{tapdisk.run_dir}/incoming",
                         "--disk", disk, *options])


@pytest.fixture
def disk(serve: Serve, image: Path) -> Tapdisk:
    return serve(f"log:|aio:{image}", "--name", "vm1")


Said = pytest.CaptureFixture[str]


def test_no_monitor(disk: Tapdisk, tmp_path: Path, capsys: Said) -> None:
    assert refused(disk, f"unix:{tmp_path}/none") == 1
    assert "cannot connect to the monitor: No such file or directory; is QEMU running" in capsys.readouterr().err


def test_another_guests_disk(disk: Tapdisk, start: Start, capsys: Said) -> None:
    assert refused(disk, start()) == 1
    assert "the guest has no disk on the export of 'vm1'" in capsys.readouterr().err


def test_a_disk_would_stay_behind(disk: Tapdisk, start: Start, tmp_path: Path, capsys: Said) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    monitor = start(*drive(disk.uri), *drive(str(other)))
    assert refused(disk, monitor) == 1
    assert f"the guest also writes to none1 ({other})" in capsys.readouterr().err
    assert refused(disk, monitor, "--no-disk-check", "--dest-qmp", start()) == 1
    assert "the destination QEMU is running: it waits for no guest" in capsys.readouterr().err


def test_a_disk_without_a_log(serve: Serve, image: Path, start: Start, capsys: Said) -> None:
    assert refused(serve(f"aio:{image}", "--name", "vm1"), start()) == 2
    assert "disk 'vm1' has no write log" in capsys.readouterr().err


def test_disks_and_places_that_make_no_sense(disk: Tapdisk, start: Start, capsys: Said) -> None:
    monitor = start(*drive(disk.uri))
    assert refused(disk, monitor, "--disk", "vm1=tcp://127.0.0.1:2") == 2
    assert "disk 'vm1' is named twice" in capsys.readouterr().err
    assert refused(disk, monitor, disk="vm2=tcp://127.0.0.1:1") == 1
    assert "'vm2'" in capsys.readouterr().err
    assert refused(disk, monitor, disk="vm1=tcp://192.0.2.7:1") == 2
    assert "writelog pair" in capsys.readouterr().err
    assert refused(disk, monitor, "--to", "tcp:192.0.2.7:1") == 2
    assert "tls-creds" in capsys.readouterr().err
    assert refused(disk, monitor, "--to", "here") == 2
    assert "no place to migrate to" in capsys.readouterr().err


def test_nobody_listens_at_the_replica(disk: Tapdisk, start: Start, capsys: Said) -> None:
    assert refused(disk, start(*drive(disk.uri)), "--peer-timeout", "0.5") == 1
    error = capsys.readouterr().err
    assert "is writelog-replica running there?" in error and "the guest runs on here" in error


def test_another_machine(disk: Tapdisk, serve: Serve, start: Start, tmp_path: Path, capsys: Said) -> None:
    """Of another kind, with less memory, fewer processors, no network card, a smaller disk."""
    pc = ["-machine", "pc", "-accel", "tcg", "-m", "64", "-S", "-nodefaults"]
    monitor = start(*pc, "-smp", "2", "-device", "virtio-net-pci", *drive(disk.uri))
    small = tmp_path / "small.img"
    small.write_bytes(bytes(512))
    other = start(*pc, "-machine", "q35", "-m", "32", *drive(str(small)), "-incoming", "defer")
    assert refused(disk, monitor, "--dest-qmp", other) == 1
    error = capsys.readouterr().err
    for difference in ("is a pc-q35", "32 MiB of memory instead of 64 MiB", "1 processors", "in PCI slot 2.0",
                       "lacks a disk of 1,048,576 bytes (has: 512)"):
        assert difference in error
    larger = tmp_path / "copy.img"
    larger.write_bytes(bytes(1 << 20))
    twin = start(*pc, "-smp", "2", "-device", "virtio-net-pci", *drive(str(larger)), "-incoming", "defer")
    assert refused(disk, monitor, "--dest-qmp", twin, "--peer-timeout", "0.5") == 1
    assert "is writelog-replica running there?" in capsys.readouterr().err
    with closing(Monitor(twin)) as qemu:
        assert qemu.call("query-migrate")["socket-address"]


def test_a_monitor_refuses_and_goes_away(start: Start) -> None:
    with closing(Monitor(start())) as qemu:
        with pytest.raises(Refusal, match="QEMU refused cont-again"):
            qemu.call("cont-again")
        assert qemu.events(0.001) == []
        second = start()
        with closing(Monitor(second)) as other:
            other.call("stop")
            assert [name for name, _ in other.events(WAIT_S)] == ["STOP"]


def test_a_monitor_that_ends(tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    path = tmp_path / "qmp"
    with subprocess.Popen([*QEMU, "-qmp", f"unix:{path},server=on,wait=off"]) as process:
        qemu = None
        while qemu is None:
            assert process.poll() is None
            try:
                qemu = Monitor(f"unix:{path}")
            except WritelogError:
                continue
        with closing(qemu):
            process.kill()
            with pytest.raises(MonitorError, match="the monitor is gone"):
                while True:
                    qemu.events(0.05)
            with pytest.raises(MonitorError, match="the monitor is gone"):
                qemu.call("query-status")
