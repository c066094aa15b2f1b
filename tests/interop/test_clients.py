"""Real NBD clients against a real tapdisk: what they write is what is in the image, and the other way round."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from interop.guest import boot
from processes import Tapdisk
from support import need

from tapcore.nbd.client import NbdClient

SIZE = 64 << 20
Serve = Callable[..., Tapdisk]


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    need(command[0])
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert not check or outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image, sparse but for 1 MiB of noise at 8 MiB."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(8 << 20)
        file.write(os.urandom(1 << 20))
    return path


@pytest.fixture(params=["log:|aio:", "log:|sync:", "aio:direct,"])
def disk(request: pytest.FixtureRequest, serve: Serve, image: Path) -> Tapdisk:
    return serve(f"{request.param}{image}")


def test_nbdinfo_sees_what_is_served(disk: Tapdisk) -> None:
    info = json.loads(run("nbdinfo", "--json", disk.uri).stdout)
    export = info["exports"][0]
    assert info["protocol"] == "newstyle-fixed" and info["structured"] is True
    assert export["export-size"] == SIZE and export["is_read_only"] is False
    assert export["can_multi_conn"] and export["can_flush"] and export["can_fua"] and export["can_trim"]
    assert export["can_zero"] and export["can_cache"] and export["can_df"]
    assert "base:allocation" in export["contexts"]
    if disk.chain.startswith("log:"):
        assert any(context.startswith("qemu:dirty-bitmap:") for context in export["contexts"])


def test_nbdinfo_map_shows_the_holes(disk: Tapdisk) -> None:
    extents = json.loads(run("nbdinfo", "--map", "--json", disk.uri).stdout)
    assert extents[0]["offset"] == 0 and sum(extent["length"] for extent in extents) == SIZE
    data = [(extent["offset"], extent["length"]) for extent in extents if extent["type"] == 0]
    assert data == [(8 << 20, 1 << 20)]


def test_nbdcopy_both_ways_with_many_connections(disk: Tapdisk, image: Path, tmp_path: Path) -> None:
    noise, copy = tmp_path / "noise", tmp_path / "copy"
    with noise.open("wb") as file:
        for start in range(0, SIZE, 8 << 20):
            file.seek(start)
            file.write(os.urandom(3 << 20))
        file.truncate(SIZE)
    run("nbdcopy", "--connections=4", "--requests=64", "--flush", str(noise), disk.uri)
    run("nbdcopy", "--connections=4", "--requests=64", disk.uri, str(copy))
    assert copy.read_bytes() == noise.read_bytes() == image.read_bytes()


def test_qemu_img_reads_compares_and_writes(disk: Tapdisk, image: Path, tmp_path: Path) -> None:
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk.uri, str(image), "-U")
    qcow2, back = tmp_path / "out.qcow2", tmp_path / "back.img"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.uri, str(qcow2))
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", str(qcow2), disk.uri)
    run("qemu-img", "convert", "-O", "raw", str(qcow2), str(back))
    assert back.read_bytes() == image.read_bytes()
    assert qcow2.stat().st_size < 4 << 20, "holes became data"


def test_qemu_img_map_sees_the_dirty_bitmap(serve: Serve, image: Path) -> None:
    disk = serve(f"log:bm|aio:{image}")
    with NbdClient(disk.uri) as client:
        client.write(1 << 20, b"x" * 5000)
    options = (f"driver=nbd,server.type=unix,server.path={disk.socket},export={disk.name},"
               "x-dirty-bitmap=qemu:dirty-bitmap:bm")
    extents = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options).stdout)
    assert [(e["start"], e["length"]) for e in extents if not e["data"]] == [(1 << 20, 8192)]


def test_qemu_io_patterns_offsets_and_zeroes(disk: Tapdisk, image: Path) -> None:
    commands = ["write -P 0x5a 1048576 3145728", "write -P 0x11 513 1021", "write -P 7 4095 2",
                "discard 2097152 65536",
                "write -z 3145728 131072", "write -f -P 0x33 40000 512", "flush",
                "read -P 0x11 513 1021", "read -P 7 4095 2", "read -P 0 3145728 131072", "read -P 0x33 40000 512",
                "aio_write -P 0x77 8388608 65536", "aio_write -P 0x78 8454144 65536", "aio_flush",
                "read -P 0x77 8388608 65536", "read -P 0x78 8454144 65536"]
    arguments = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, disk.uri).stdout
    assert "failed" not in output and "error" not in output
    data = image.read_bytes()
    assert data[513 : 513 + 1021] == b"\x11" * 1021 and data[4095:4097] == b"\7\7"
    assert data[3145728 : 3145728 + 131072] == bytes(131072)


def test_fio_verifies_what_it_wrote(disk: Tapdisk) -> None:
    outcome = run("fio", "--name=v", "--ioengine=nbd", f"--uri={disk.uri}", "--rw=randrw", "--bsrange=512-128k",
                  "--iodepth=32", f"--size={SIZE}", "--verify=crc32c", "--verify_fatal=1",
                  "--do_verify=1", "--verify_state_save=0",
                  "--randrepeat=0")
    assert re.search(r"err= 0", outcome.stdout)


def test_discards_and_zeroes_of_gigabytes(serve: Serve, tmp_path: Path) -> None:
    """Lengths have 32 bits, and offsets 64."""
    path = tmp_path / "large.img"
    with path.open("wb") as file:
        file.truncate(6 << 30)
    disk = serve(f"log:|aio:{path}")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 5G 1M", "-c", "write -z -u 5G 1G",
        "-c", "discard 0 2147483136", disk.uri)
    with NbdClient(disk.uri, contexts=["base:allocation"]) as client:
        client.write(4 << 30, b"x" * 4096)
        client.trim(1 << 30, (4 << 30) - 512)
        client.zeroes(1 << 30, (4 << 30) - 512)
        assert client.read(4 << 30, 4096) == bytes(4096)
        assert client.block_status(0, (4 << 30) - 512) == {"base:allocation": [((4 << 30) - 512, 3)]}
    assert path.stat().st_blocks == 0


def test_read_only_exports_refuse_writers(serve: Serve, image: Path) -> None:
    before = image.read_bytes()
    disk = serve(f"aio:{image}", "--read-only")
    assert json.loads(run("nbdinfo", "--json", disk.uri).stdout)["exports"][0]["is_read_only"] is True
    assert run("qemu-io", "-f", "raw", "-c", "write 0 512", disk.uri, check=False).returncode != 0
    assert image.read_bytes() == before


def test_several_disks_of_one_process_are_listed(serve: Serve, image: Path, tmp_path: Path) -> None:
    disk = serve(f"a=log:a|aio:{image}", "b=ram:16M")
    listed = json.loads(run("nbdinfo", "--list", "--json", disk.server_uri).stdout)["exports"]
    assert {(export["export-name"], export["export-size"]) for export in listed} == {("a", SIZE), ("b", 16 << 20)}


def test_a_guest_keeps_its_files(serve: Serve, tmp_path: Path) -> None:
    """A Linux guest writes files and syncs them; they are in the image, and their blocks in the log."""
    need("mke2fs", "fsck.ext4", "debugfs")
    image = tmp_path / "guest.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    run("mke2fs", "-q", "-t", "ext4", str(image))
    disk = serve(f"log:guest|aio:{image}")
    output = boot(tmp_path, "mount -t ext4 -o discard /dev/vda /mnt && "
                  "dd if=/dev/urandom of=/mnt/noise bs=4k count=3000 conv=fsync && "
                  "dd if=/dev/urandom of=/mnt/gone bs=64k count=20 conv=fsync && rm /mnt/gone && "
                  "md5sum /mnt/noise && umount /mnt", disk.uri)
    match = re.search(r"([0-9a-f]{32})  /mnt/noise", output)
    assert match
    extents = disk.client(contexts=["qemu:dirty-bitmap:guest"]).block_status(0, SIZE)["qemu:dirty-bitmap:guest"]
    assert sum(length for length, dirty in extents if dirty) > 3000 * 4096
    disk.stop()
    run("fsck.ext4", "-f", "-n", str(image))
    run("debugfs", "-R", f"dump noise {tmp_path / 'noise'}", str(image))
    assert run("md5sum", str(tmp_path / "noise")).stdout.startswith(match[1])
