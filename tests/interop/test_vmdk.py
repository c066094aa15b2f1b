"""VMDK both ways with QEMU: what either side creates and writes the other reads identically, and finds whole."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from contract.runner import Runner
from nbd_servers import qemu_nbd
from processes import Tapdisk
from support import need

from tapcore.driver import Env, OpenFlag
from tapcore.formats.tools import Backing
from tapcore.formats.vmdk.check import check
from tapcore.formats.vmdk.create import create
from tapcore.formats.vmdk.stream import StreamDecoder, StreamImage
from tapcore.formats.vmdk.tools import VmdkTools

SIZE = 3 << 20
SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]


@pytest.fixture(autouse=True)
def programs() -> None:
    need("qemu-img", "qemu-io", "qemu-nbd")


def qemu(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Both:
    """One image, written by both sides in turns, and what the disk must hold. `around`: where it is written."""

    def __init__(
        self, env: Env, path: Path, disk: bytes, seed: object, size: int = SIZE, around: tuple[int, ...] = (0,)
    ) -> None:
        self.env = env
        self.path = path
        self.size = size
        self.disk = dict.fromkeys(around, bytearray())
        for start in around:
            self.disk[start] = bytearray(disk[start : start + SIZE].ljust(min(SIZE, size - start), b"\0"))
        self.rng = random.Random(str(seed))

    def extent(self) -> tuple[int, int, int]:
        """(where it is written around, offset from there, length)."""
        start = self.rng.choice(list(self.disk))
        room = len(self.disk[start])
        offset = self.rng.randrange(room // 512) * 512
        return start, offset, min(self.rng.choice((512, 4096, 70000 // 512 * 512, 300 * 512)), room - offset)

    def write_here(self, count: int = 40) -> None:
        runner = Runner(self.env, f"vmdk:{self.path}")
        for _ in range(count):
            start, offset, length = self.extent()
            kind = self.rng.choice(("write", "write", "zeroes", "discard", "flush"))
            disk = self.disk[start]
            if kind == "write":
                data = self.rng.randbytes(length)
                assert runner.write(start + offset, data) == 0
                disk[offset : offset + length] = data
            elif kind == "zeroes":
                assert runner.zeroes(start + offset, length) == 0
                disk[offset : offset + length] = bytes(length)
            elif kind == "discard":
                assert runner.discard(start + offset, length) == 0
                disk[offset : offset + length] = runner.read(start + offset, length)
            else:
                assert runner.flush() == 0
        self.read_here(runner)
        runner.close()

    def read_here(self, runner: Runner) -> None:
        for start, disk in self.disk.items():
            assert runner.read(start, len(disk)) == disk

    def write_there(self, count: int = 15) -> None:
        commands: list[str] = []
        for _ in range(count):
            start, offset, length = self.extent()
            byte = self.rng.randrange(256)
            what = "write -z" if not byte else f"write -P {byte}"
            commands += ["-c", f"{what} {start + offset} {length}"]
            self.disk[start][offset : offset + length] = bytes([byte]) * length
        qemu("qemu-io", "-f", "vmdk", *commands, self.path)

    def compare(self) -> None:
        qemu("qemu-img", "check", "-q", self.path)
        raw = self.path.parent / "expected.raw"
        with raw.open("wb") as file:
            file.truncate(self.size)
            for start, disk in self.disk.items():
                file.seek(start)
                file.write(disk)
        qemu("qemu-img", "compare", "-f", "vmdk", "-F", "raw", self.path, raw)
        report = check(str(self.path))
        assert report.errors == 0, report.messages
        runner = Runner(self.env, f"vmdk:{self.path}", OpenFlag.RDONLY)
        self.read_here(runner)
        runner.close()

    def turns(self) -> None:
        self.write_here()
        self.compare()
        self.write_there()
        self.compare()
        self.write_here()
        self.compare()


@pytest.mark.parametrize("subformat", SUBFORMATS)
@pytest.mark.parametrize("zeroed_grain", ["on", "off"])
def test_images_made_there(env: Env, tmp_path: Path, subformat: str, zeroed_grain: str) -> None:
    if zeroed_grain == "on" and subformat.endswith("Flat"):
        return
    path = tmp_path / "a.vmdk"
    options = f"subformat={subformat}" + (",zeroed_grain=on" if zeroed_grain == "on" else "")
    qemu("qemu-img", "create", "-q", "-f", "vmdk", "-o", options, path, SIZE)
    Both(env, path, bytes(SIZE), options).turns()


@pytest.mark.parametrize("options", [
    *({"subformat": subformat, "split_bytes": 1 << 20} for subformat in SUBFORMATS), {"zeroed_grain": True},
    {"grain_bytes": 4096}, {"grain_bytes": 4096, "subformat": "twoGbMaxExtentSparse", "split_bytes": 700 * 512},
    {"grain_bytes": 2 << 20, "subformat": "twoGbMaxExtentSparse"},
    {"adapter_type": "lsilogic"}])
def test_images_made_here(env: Env, tmp_path: Path, options: dict[str, int]) -> None:
    path = tmp_path / "a.vmdk"
    create(str(path), SIZE, **options)  # type: ignore[arg-type]
    qemu("qemu-img", "check", "-q", path)
    Both(env, path, bytes(SIZE), options).turns()


@pytest.mark.parametrize("subformat", SUBFORMATS)
@pytest.mark.parametrize("made", ["here", "there"])
def test_disks_of_several_extents_as_large_as_they_come(
    env: Env, tmp_path: Path, subformat: str, made: str
) -> None:
    path, size = tmp_path / "a.vmdk", 5 << 30
    if made == "here":
        VmdkTools.create(str(path), size, options={"subformat": subformat})
    else:
        qemu("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", path, size)
    borders = (1 << 20, 2 << 30, 4 << 30) if made == "there" else (1 << 20, 2047 << 20, 4094 << 20)
    both = Both(env, path, b"", subformat, size, tuple(border - (1 << 20) for border in borders))
    both.write_here()
    both.compare()
    both.write_there()
    both.compare()


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
@pytest.mark.parametrize("base_bytes", [1 << 20, SIZE + (1 << 20)])
@pytest.mark.parametrize("made", ["here", "there"])
@pytest.mark.parametrize("zeroed_grain", ["on", "off"])
def test_overlays(
    env: Env, tmp_path: Path, subformat: str, base_bytes: int, made: str, zeroed_grain: str
) -> None:
    """Shorter and longer parents; they stay as they are."""
    content = random.Random(5).randbytes(base_bytes)
    (tmp_path / "base.raw").write_bytes(content)
    base, path = tmp_path / "base.vmdk", tmp_path / "a.vmdk"
    qemu("qemu-img", "convert", "-O", "vmdk", tmp_path / "base.raw", base)
    before = base.read_bytes()
    options = {"subformat": subformat, "zeroed_grain": zeroed_grain}
    if made == "here":
        VmdkTools.create(str(path), SIZE, backing=Backing("base.vmdk", "vmdk"), options=options)
    else:
        text = ",".join(f"{key}={value}" for key, value in options.items())
        qemu("qemu-img", "create", "-q", "-f", "vmdk", "-o", text, "-b", "base.vmdk", "-F", "vmdk", path, SIZE)
    Both(env, path, content[:SIZE].ljust(SIZE, b"\0"), (options, base_bytes)).turns()
    assert base.read_bytes() == before


def test_both_sides_see_that_a_parent_was_written(env: Env, tmp_path: Path) -> None:
    base, path = tmp_path / "base.vmdk", tmp_path / "a.vmdk"
    for writer in ("here", "there"):
        create(str(base), SIZE)
        VmdkTools.create(str(path), SIZE, backing=Backing("base.vmdk", "vmdk"))
        qemu("qemu-io", "-r", "-f", "vmdk", "-c", "read 0 1M", path)
        if writer == "here":
            runner = Runner(env, f"vmdk:{base}")
            assert runner.write(0, b"x") == 0
            runner.close()
        else:
            qemu("qemu-io", "-f", "vmdk", "-c", "write 0 512", base)
        with pytest.raises(Exception, match="was written after"):
            Runner(env, f"vmdk:{path}")
        done = subprocess.run(["qemu-io", "-r", "-f", "vmdk", "-c", "read 0 1M", str(path)], capture_output=True,
                              text=True, timeout=30)
        assert "failed" in done.stdout + done.stderr
        VmdkTools.set_backing(str(path), Backing("base.vmdk", "vmdk"))
        Runner(env, f"vmdk:{path}").close()
        qemu("qemu-io", "-r", "-f", "vmdk", "-c", "read 0 1M", path)
        base.unlink()
        path.unlink()


def content_for_streams(seed: int, size: int) -> bytes:
    """Data, zeroes, and what compresses well, a few of their borders within grains."""
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        length = rng.choice((512, 65536, 130 * 512, 300000 // 512 * 512))
        out += rng.choice((rng.randbytes(length), bytes(length), bytes([rng.randrange(256)]) * length))
    return bytes(out[:size])


@pytest.mark.parametrize("size", [SIZE, 512, (40 << 20) + 1536])
def test_streams_made_here(env: Env, tmp_path: Path, size: int) -> None:
    path, raw = tmp_path / "a.vmdk", tmp_path / "a.raw"
    content = content_for_streams(1, size)
    raw.write_bytes(content)
    rng = random.Random(2)
    with StreamImage(str(path), size) as image:
        at = 0
        while at < size:
            length = min(rng.choice((512, 5000, 65536, 1 << 20)), size - at)
            image.write(at, content[at : at + length])
            at += length
    qemu("qemu-img", "check", "-q", path)
    qemu("qemu-img", "compare", "-f", "vmdk", "-F", "raw", path, raw)
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages
    runner = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
    assert runner.read(0, size) == content
    runner.status(0, size)
    runner.close()
    assert decode(path, 70001) == content


def test_streams_made_there(env: Env, tmp_path: Path) -> None:
    path, raw = tmp_path / "a.vmdk", tmp_path / "a.raw"
    content = content_for_streams(3, SIZE)
    raw.write_bytes(content)
    qemu("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
    runner = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
    assert runner.read(0, SIZE) == content
    assert b"".join(runner.read(at, 1000) for at in range(0, 99000, 1000)) == content[:99000]
    runner.close()
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages
    assert decode(path, 4096) == content
    with pytest.raises(Exception, match="written once, from front to back"):
        Runner(env, f"vmdk:{path}")


def decode(path: Path, step: int) -> bytes:
    """The disk, read from front to back in steps."""
    decoder = StreamDecoder(str(path))
    disk = bytearray()
    with path.open("rb") as file:
        while data := file.read(step):
            for offset, grain in decoder.feed(data):
                disk[len(disk) :] = bytes(offset - len(disk)) + grain
    decoder.finish()
    assert decoder.size_bytes is not None
    return bytes(disk.ljust(decoder.size_bytes, b"\0"))


def test_an_extent_of_an_esx_snapshot(env: Env, tmp_path: Path) -> None:
    """vmfsSparse (COWD), which no program here makes: by hand, and QEMU reads the same."""
    rng = random.Random(4)
    sectors, grains = 9000, {5: 40, 6: 41, 4095: 42, 8999: 43}
    image = bytearray(48 * 512)
    image[:32] = b"COWD" + b"".join(
        value.to_bytes(4, "little") for value in (1, 3, sectors, 1, 4, -(-sectors // 4096), 48))
    tables = [bytearray(16384) for _ in range(3)]
    for guest, place in grains.items():
        tables[guest // 4096][guest % 4096 * 4 : guest % 4096 * 4 + 4] = place.to_bytes(4, "little")
    image[4 * 512 : 4 * 512 + 12] = (48).to_bytes(4, "little") + bytes(4) + (80).to_bytes(4, "little")
    image += tables[0] + tables[2]
    expected = bytearray(sectors * 512)
    for guest, place in grains.items():
        data = rng.randbytes(512)
        image[place * 512 : place * 512 + 512] = data
        expected[guest * 512 : guest * 512 + 512] = data
    (tmp_path / "a-delta.vmdk").write_bytes(image)
    path, raw = tmp_path / "a.vmdk", tmp_path / "a.raw"
    path.write_text('# Disk DescriptorFile\nversion=1\nCID=0000abcd\nparentCID=ffffffff\ncreateType="vmfsSparse"\n'
                    f'\n# Extent description\nRW {sectors} VMFSSPARSE "a-delta.vmdk"\n')
    raw.write_bytes(expected)
    qemu("qemu-img", "compare", "-f", "vmdk", "-F", "raw", path, raw)
    runner = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
    assert runner.read(0, sectors * 512) == expected
    runner.close()
    assert check(str(path)).errors == 0
    with pytest.raises(Exception, match="vmfsSparse extent is not written here"):
        Runner(env, f"vmdk:{path}")


def test_one_image_is_not_written_by_both(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    create(str(path), SIZE, subformat="twoGbMaxExtentSparse")
    runner = Runner(env, f"vmdk:{path}")
    command = ["qemu-io", "-f", "vmdk", "-c", "write 0 512", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=30)
    assert done.returncode != 0 and b"lock" in done.stderr
    runner.close()


def test_a_guest_under_the_log(tmp_path: Path, serve: Callable[..., Tapdisk]) -> None:
    """An overlay served under log: over NBD, written by qemu-io; another one reads it through qemu-nbd."""
    base, path = tmp_path / "base.vmdk", tmp_path / "a.vmdk"
    qemu("qemu-img", "create", "-q", "-f", "vmdk", base, SIZE)
    qemu("qemu-io", "-f", "vmdk", "-c", "write -P 7 0 3M", base)
    VmdkTools.create(str(path), SIZE, backing=Backing("base.vmdk", "vmdk"))
    tapdisk = serve(f"log:vmdk|vmdk:{path}")
    uri = tapdisk.uri
    qemu("qemu-io", "-f", "raw", "-c", "read -P 7 0 3M", "-c", "write -P 1 100k 300k", "-c", "write -z 1M 128k",
         "-c", "flush", "-c", "read -P 1 100k 300k", "-c", "read -P 0 1M 128k", uri)
    tapdisk.stop()
    qemu("qemu-img", "check", "-q", path)
    server = qemu_nbd(path, "--format=vmdk")
    qemu("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 0 100k", "-c", "read -P 1 100k 300k",
         "-c", "read -P 7 400k 624k", "-c", "read -P 0 1M 128k", "-c", "read -P 7 1152k 1920k", f"nbd+unix:///?socket={server.path}")
    server.stop()


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_a_tapdisk_that_was_killed(
    env: Env, tmp_path: Path, serve: Callable[..., Tapdisk], subformat: str
) -> None:
    """What it had flushed is there for both sides, at once and after the image was written again."""
    path = tmp_path / "a.vmdk"
    VmdkTools.create(str(path), SIZE, options={"subformat": subformat, "zeroed_grain": "on"})
    expected = bytearray(SIZE)
    for number in range(1, 4):
        tapdisk = serve(f"log:vmdk{number}|vmdk:{path}", "--name", f"vm{number}")
        at = number * 300 * 1024
        qemu("qemu-io", "-f", "raw", "-c", f"write -P {number} {at} 700k", "-c", f"write -z {at + 65536} 100k",
             "-c", "flush", tapdisk.uri)
        tapdisk.kill()
        expected[at : at + 700 * 1024] = bytes([number]) * (700 * 1024)
        expected[at + 65536 : at + 65536 + 100 * 1024] = bytes(100 * 1024)
        assert VmdkTools.describe(str(path))["closed"] is False
        Both(env, path, bytes(expected), number).compare()
    runner = Runner(env, f"vmdk:{path}")
    assert runner.write(0, b"x") == 0
    runner.close()
    expected[0] = ord("x")
    assert VmdkTools.describe(str(path))["closed"] is True
    Both(env, path, bytes(expected), "closed").compare()
    assert "differ" not in str(check(str(path)).messages)
