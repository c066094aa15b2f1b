"""qcow images written by both sides in turns."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from contract.runner import Runner
from qcow2_images import qemu

from tapcore.driver import Env, OpenFlag
from tapcore.formats.qcow2.create import create as create_qcow2
from tapcore.formats.tools import Backing, find_tools

SIZE = (1 << 20) + 8192
TOOLS = find_tools("qcow")


class Both:
    """One image, and what the disk must hold."""

    def __init__(self, env: Env, path: Path, disk: bytes, seed: object) -> None:
        self.env = env
        self.path = path
        self.disk = bytearray(disk)
        self.rng = random.Random(str(seed))

    def extent(self) -> tuple[int, int]:
        offset = self.rng.randrange(SIZE // 512) * 512
        return offset, min(self.rng.choice((512, 4096, 70000 // 512 * 512, 300 * 512)), SIZE - offset)

    def write_here(self, count: int = 20) -> None:
        runner = Runner(self.env, f"qcow:{self.path}")
        for _ in range(count):
            offset, length = self.extent()
            kind = self.rng.choice(("write", "write", "zeroes", "discard", "flush"))
            if kind == "write":
                data = self.rng.randbytes(length)
                assert runner.write(offset, data) == 0
                self.disk[offset : offset + length] = data
            elif kind == "zeroes":
                assert runner.zeroes(offset, length) == 0
                self.disk[offset : offset + length] = bytes(length)
            elif kind == "discard":
                assert runner.discard(offset, length) == 0
                self.disk[offset : offset + length] = runner.read(offset, length)
            else:
                assert runner.flush() == 0
        assert runner.read(0, SIZE) == self.disk
        runner.close()

    def write_there(self, count: int = 10) -> None:
        commands: list[str] = []
        for _ in range(count):
            offset, length = self.extent()
            byte = self.rng.randrange(1, 256)
            commands += ["-c", f"write -P {byte} {offset} {length}"]
            self.disk[offset : offset + length] = bytes([byte]) * length
        qemu("qemu-io", "-f", "qcow", *commands, self.path)

    def compare(self) -> None:
        raw = self.path.parent / "expected.raw"
        raw.write_bytes(self.disk)
        qemu("qemu-img", "compare", "-f", "qcow", "-F", "raw", self.path, raw)
        report = TOOLS.check(str(self.path))
        assert report.errors == 0, report.messages
        runner = Runner(self.env, f"qcow:{self.path}", OpenFlag.RDONLY)
        assert runner.read(0, SIZE) == self.disk
        runner.close()

    def turns(self) -> None:
        for write in (self.write_here, self.write_there, self.write_here):
            write()
            self.compare()


def test_an_image_made_there(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow"
    qemu("qemu-img", "create", "-q", "-f", "qcow", path, SIZE)
    Both(env, path, bytes(SIZE), 1).turns()
    assert TOOLS.check(str(path)).leaks == 0


@pytest.mark.parametrize("cluster_size", ["512", "2K", "4K", "64K"])
def test_an_image_made_here(env: Env, tmp_path: Path, cluster_size: str) -> None:
    path = tmp_path / "a.qcow"
    TOOLS.create(str(path), SIZE, options={"cluster_size": cluster_size})
    Both(env, path, bytes(SIZE), cluster_size).turns()
    assert TOOLS.check(str(path)).leaks == 0


@pytest.mark.parametrize("made_here", [True, False])
@pytest.mark.parametrize("backing_bytes", [1 << 19, SIZE + (1 << 19)])
@pytest.mark.parametrize("kind", ["raw", "qcow2", "qcow"])
def test_overlays(env: Env, tmp_path: Path, made_here: bool, backing_bytes: int, kind: str) -> None:
    content = random.Random(5).randbytes(backing_bytes)
    (tmp_path / "base.raw").write_bytes(content)
    base = tmp_path / f"base.{kind}"
    if kind != "raw":
        qemu("qemu-img", "convert", "-O", kind, tmp_path / "base.raw", base)
    before, path = base.read_bytes(), tmp_path / "a.qcow"
    if made_here:
        TOOLS.create(str(path), SIZE, backing=Backing(base.name, {"raw": "aio"}.get(kind, kind)))
    else:
        qemu("qemu-img", "create", "-q", "-f", "qcow", "-b", base.name, "-F", kind, path, SIZE)
    Both(env, path, content[:SIZE].ljust(SIZE, b"\0"), kind).turns()
    assert base.read_bytes() == before


def test_another_backing_is_read_there(env: Env, tmp_path: Path) -> None:
    for name, byte in (("one", b"1"), ("two", b"2")):
        (tmp_path / f"{name}.raw").write_bytes(byte * SIZE)
    create_qcow2(str(tmp_path / "three.qcow2"), SIZE)
    path = tmp_path / "a.qcow"
    qemu("qemu-img", "create", "-q", "-f", "qcow", "-b", "one.raw", "-F", "raw", path, SIZE)
    both = Both(env, path, b"1" * SIZE, "rebase")
    changes = ((Backing("two.raw", "aio"), b"2"), (Backing("three.qcow2", "qcow2"), b"\0"), (None, b"\0"))
    for backing, byte in changes:
        TOOLS.set_backing(str(path), backing)
        both.disk = bytearray(byte * SIZE)
        both.compare()
        qemu("qemu-io", "-f", "qcow", "-c", f"read -P {byte[0]} 0 {SIZE}", path)


def test_compressed_clusters(env: Env, tmp_path: Path) -> None:
    rng = random.Random(6)
    content = b"".join(bytes([rng.randrange(256)]) * 3000 + rng.randbytes(1096) for _ in range(SIZE // 4096 + 1))
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow"
    raw.write_bytes(content[:SIZE])
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow", str(raw), str(path)], timeout=60)  # says 1 always
    qemu("qemu-img", "compare", "-f", "qcow", "-F", "raw", path, raw)
    runner = Runner(env, f"qcow:{path}", OpenFlag.RDONLY)
    assert b"".join(runner.read(at, 1000) for at in range(0, 99000, 1000)) == content[:99000]
    runner.close()
    both = Both(env, path, content[:SIZE], "compressed")
    both.compare()
    both.turns()
    assert TOOLS.check(str(path), repair=True).leaks == 0
    both.compare()


def test_an_encrypted_image_is_refused(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow"
    qemu("qemu-img", "create", "-q", "-f", "qcow", "--object", "secret,id=s,data=password", "-o",
         "encrypt.format=aes,encrypt.key-secret=s", path, "1M")
    report = ""
    try:
        TOOLS.check(str(path))
    except Exception as error:
        report = str(error)
    assert "AES" in report
