"""qcow2 both ways with QEMU: what either side creates and writes the other reads identically, and finds whole."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from contract.runner import Runner
from support import need

from tapcore.driver import Env, OpenFlag
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.layout import AUTOCLEAR_AT, AUTOCLEAR_DATA_RAW, FEATURES
from tapcore.formats.qcow2.tools import Qcow2Tools
from tapcore.formats.tools import Backing

SIZE = 3 << 20
OPTIONS = [
    "compat=1.1", "compat=0.10", "compat=1.1,cluster_size=512,refcount_bits=1", "compat=1.1,cluster_size=2M",
    "compat=1.1,cluster_size=4k,refcount_bits=64", "compat=1.1,cluster_size=1k,refcount_bits=2",
    "compat=1.1,lazy_refcounts=on,refcount_bits=8", "compat=1.1,preallocation=metadata",
    "compat=0.10,cluster_size=1k", "extended_l2=on", "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=2M,refcount_bits=64", "extended_l2=on,cluster_size=32k,preallocation=metadata",
]


@pytest.fixture(autouse=True)
def programs() -> None:
    need("qemu-img", "qemu-io")


def qemu(*command: object, folder: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_check(path: Path) -> None:
    assert "No errors were found" in qemu("qemu-img", "check", path, folder=path.parent)


class Both:
    """One image, written by both sides in turns, and what the disk must hold."""

    def __init__(self, env: Env, path: Path, disk: bytes, seed: object) -> None:
        self.env = env
        self.path = path
        self.disk = bytearray(disk)
        self.rng = random.Random(str(seed))

    def extent(self) -> tuple[int, int]:
        offset = self.rng.randrange(SIZE // 512) * 512
        return offset, min(self.rng.choice((512, 4096, 70000 // 512 * 512, 300 * 512)), SIZE - offset)

    def write_here(self, count: int = 40) -> None:
        runner = Runner(self.env, f"qcow2:{self.path}")
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

    def write_there(self, count: int = 15) -> None:
        commands: list[str] = []
        for _ in range(count):
            offset, length = self.extent()
            if self.rng.random() < 0.7:
                byte = self.rng.randrange(1, 256)
                commands += ["-c", f"write -P {byte} {offset} {length}"]
                self.disk[offset : offset + length] = bytes([byte]) * length
            else:
                commands += ["-c", f"write -z -u {offset} {length}"]
                self.disk[offset : offset + length] = bytes(length)
        qemu("qemu-io", "-f", "qcow2", *commands, self.path, folder=self.path.parent)

    def compare(self) -> None:
        qemu_check(self.path)
        raw = self.path.parent / "expected.raw"
        raw.write_bytes(self.disk)
        qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", self.path, raw, folder=raw.parent)
        report = check(str(self.path))
        assert (report.errors, report.leaks) == (0, 0), report.messages
        runner = Runner(self.env, f"qcow2:{self.path}", OpenFlag.RDONLY)
        assert runner.read(0, SIZE) == self.disk
        runner.close()

    def turns(self) -> None:
        self.write_here()
        self.compare()
        self.write_there()
        self.compare()
        self.write_here()
        self.compare()


@pytest.mark.parametrize("options", OPTIONS)
def test_images_made_there(env: Env, tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    Both(env, path, bytes(SIZE), options).turns()


@pytest.mark.parametrize("options", [
    {}, {"version": 2}, {"cluster_bits": 9, "refcount_bits": 1}, {"cluster_bits": 9, "refcount_bits": 64},
    {"cluster_bits": 21, "refcount_bits": 32}, {"lazy_refcounts": True}, {"compression": "zstd"},
    {"extended_l2": True}, {"extended_l2": True, "cluster_bits": 14}, {"extended_l2": True, "cluster_bits": 21}])
def test_images_made_here(env: Env, tmp_path: Path, options: dict[str, int]) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, **options)  # type: ignore[arg-type]
    qemu_check(path)
    Both(env, path, bytes(SIZE), options).turns()


@pytest.mark.parametrize("options", [
    "compat=1.1", "compat=0.10,cluster_size=4k", "compat=1.1,cluster_size=512", "extended_l2=on",
    "extended_l2=on,cluster_size=16k"])
@pytest.mark.parametrize("backing_bytes", [1 << 20, SIZE + (1 << 20)])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_overlays(env: Env, tmp_path: Path, options: str, backing_bytes: int, kind: str) -> None:
    """Shorter and longer backing files, of both formats; they stay as they are."""
    content = random.Random(5).randbytes(backing_bytes)
    (tmp_path / "base.raw").write_bytes(content)
    if kind == "qcow2":
        qemu("qemu-img", "convert", "-O", "qcow2", tmp_path / "base.raw", tmp_path / "base.qcow2")
    base = tmp_path / f"base.{kind}"
    before = base.read_bytes()
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", base.name, "-F", kind, path, SIZE)
    Both(env, path, content[:SIZE].ljust(SIZE, b"\0"), (options, kind)).turns()
    assert base.read_bytes() == before


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize(("cluster_bytes", "extended_l2"), [(4096, "off"), (65536, "off"), (65536, "on")])
def test_compressed_clusters(
    env: Env, tmp_path: Path, compression: str, cluster_bytes: int, extended_l2: str
) -> None:
    rng = random.Random(6)
    content = b"".join(bytes([rng.randrange(256)]) * 3000 + rng.randbytes(1096) for _ in range(SIZE // 4096))
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(content)
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o",
         f"compression_type={compression},cluster_size={cluster_bytes},extended_l2={extended_l2}", raw, path)
    runner = Runner(env, f"qcow2:{path}", OpenFlag.RDONLY)
    assert runner.read(0, SIZE) == content
    assert b"".join(runner.read(at, 1000) for at in range(0, 99000, 1000)) == content[:99000]
    runner.close()
    Both(env, path, content, (compression, cluster_bytes)).turns()


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=16k,extended_l2=on"])
def test_internal_snapshots_stay_as_they_are(env: Env, tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    both = Both(env, path, bytes(SIZE), "snapshots")
    both.write_there(30)
    taken: dict[str, bytes] = {}
    for name in ("one", "two"):
        taken[name] = bytes(both.disk)
        qemu("qemu-img", "snapshot", "-c", name, path)
        both.turns()
    for name, content in taken.items():
        out = tmp_path / f"{name}.raw"
        qemu("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", path, out)
        assert out.read_bytes() == content
    qemu("qemu-img", "snapshot", "-d", "one", path)
    both.turns()


@pytest.mark.parametrize("made", ["here", "there"])
@pytest.mark.parametrize(("options", "backing_bytes"), [
    ("", 0), ("", 1 << 20), ("data_file_raw=on", 0), ("cluster_size=16k,extended_l2=on", 1 << 20),
    ("cluster_size=16k,extended_l2=on,data_file_raw=on", 0)])
def test_external_data_files(env: Env, tmp_path: Path, options: str, backing_bytes: int, made: str) -> None:
    """A raw one is what the guest sees, also for those who read it alone."""
    content = random.Random(9).randbytes(backing_bytes)
    (tmp_path / "base.raw").write_bytes(content)
    path, data = tmp_path / "a.qcow2", tmp_path / "a.data"
    options = ",".join(filter(None, ["data_file=a.data", options]))
    if made == "there":
        backing = ["-b", "base.raw", "-F", "raw"] if backing_bytes else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, SIZE, folder=tmp_path)
    else:
        Qcow2Tools.create(str(path), SIZE, backing=Backing("base.raw", "aio") if backing_bytes else None,
                          options=dict(option.split("=") for option in options.split(",")))
    both = Both(env, path, content.ljust(SIZE, b"\0"), (options, made))
    for turn in (both.write_here, both.write_there, both.write_here):
        turn()
        both.compare()
        if "raw" in options:
            assert data.read_bytes() == both.disk
    assert path.stat().st_size < 1 << 20, "the data is not in the image"
    assert FEATURES.unpack(path.read_bytes(), AUTOCLEAR_AT)["bits"] == AUTOCLEAR_DATA_RAW * ("raw" in options)


def test_a_data_file_is_locked_as_an_image_is(env: Env, tmp_path: Path) -> None:
    create(str(tmp_path / "a.qcow2"), SIZE, data_file="a.data")
    runner = Runner(env, f"qcow2:{tmp_path / 'a.qcow2'}")
    done = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", str(tmp_path / "a.data")],
                          capture_output=True, timeout=30)
    assert done.returncode != 0 and b"lock" in done.stderr
    runner.close()


def test_an_image_with_bitmaps(env: Env, tmp_path: Path) -> None:
    """A writer that does not keep them marks them as out of date; nothing else is lost."""
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    qemu("qemu-img", "bitmap", "--add", path, "b0")
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages
    both = Both(env, path, bytes(SIZE), "bitmaps")
    both.write_here()
    assert check(str(path)).errors == 0
    qemu("qemu-img", "check", "-r", "leaks", path)
    both.compare()


def test_an_image_that_qemu_left_dirty(env: Env, tmp_path: Path) -> None:
    """Lazy refcounts, and a qemu-io that was killed."""
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", path, SIZE)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "flush", "-c", "abort", str(path)],
                   capture_output=True, timeout=30)
    assert path.read_bytes()[79] & 1, "the image is dirty"
    both = Both(env, path, b"\7" * (1 << 20) + bytes(SIZE - (1 << 20)), "dirty")
    both.write_here()
    both.compare()


def test_one_image_is_not_written_by_both(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE)
    runner = Runner(env, f"qcow2:{path}")
    command = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=30)
    assert done.returncode != 0 and b"lock" in done.stderr
    runner.close()
