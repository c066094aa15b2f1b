"""VHD both ways with QEMU, which calls it vpc: what either side creates and writes the other reads identically."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from contract.runner import Runner
from processes import Tapdisk
from support import need
from vhd_images import edit_footer, footer_of, make_overlay

from tapcore.driver import Env, OpenFlag
from tapcore.formats.vhd.check import check
from tapcore.formats.vhd.create import create
from tapcore.formats.vhd.layout import Footer
from tapcore.formats.vhd.tools import VhdTools

SIZE = 5 << 20
SIZES = (512, 68 * 512, SIZE, (5 << 20) + 512, (504 << 20) + 512, 1 << 30, 8 << 30, (127 << 30) + 512, 137 << 30,
         1 << 40, 2040 << 30)


@pytest.fixture(autouse=True)
def programs() -> None:
    need("qemu-img", "qemu-io")


def qemu(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def size_there(path: Path) -> int:
    found: int = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "vpc", path))["virtual-size"]
    return found


def size_here(env: Env, path: Path) -> int:
    runner = Runner(env, f"vhd:{path}", OpenFlag.RDONLY)
    runner.close()
    return runner.size


class Both:
    """One image, written by both sides in turns, and what the disk must hold."""

    def __init__(self, env: Env, path: Path, seed: object) -> None:
        self.env = env
        self.path = path
        self.size = size_here(env, path)
        self.disk = bytearray(self.size)
        self.rng = random.Random(str(seed))

    def extent(self, unit: int) -> tuple[int, int]:
        offset = self.rng.randrange(self.size // unit) * unit
        length = self.rng.choice((unit, 4096, 70000, 3 << 20)) // unit * unit or unit
        return offset, min(length, self.size - offset)

    def write_here(self, count: int = 40) -> None:
        runner = Runner(self.env, f"vhd:{self.path}")
        for _ in range(count):
            offset, length = self.extent(self.rng.choice((1, 512)))
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
        assert runner.read(0, self.size) == self.disk
        runner.close()

    def write_there(self, count: int = 15) -> None:
        commands: list[str] = []
        for _ in range(count):
            offset, length = self.extent(512)
            byte = self.rng.randrange(256)
            commands += ["-c", f"write -P {byte} {offset} {length}"]
            self.disk[offset : offset + length] = bytes([byte]) * length
        qemu("qemu-io", "-f", "vpc", *commands, self.path)

    def compare(self) -> None:
        self.compare_disk()
        report = check(str(self.path))
        assert (report.errors, report.leaks) == (0, 0), report.messages

    def compare_disk(self) -> None:
        raw = self.path.parent / "expected.raw"
        raw.write_bytes(self.disk)
        qemu("qemu-img", "compare", "-f", "vpc", "-F", "raw", self.path, raw)
        assert size_here(self.env, self.path) == size_there(self.path) == self.size
        runner = Runner(self.env, f"vhd:{self.path}", OpenFlag.RDONLY)
        assert runner.read(0, self.size) == self.disk
        runner.close()

    def turns(self) -> None:
        self.write_here()
        self.compare()
        self.write_there()
        self.compare()
        self.write_here()
        self.compare()


@pytest.mark.parametrize("options", ["subformat=dynamic", "subformat=fixed", "subformat=dynamic,force_size=on",
                                     "subformat=fixed,force_size=on"])
def test_images_made_there(env: Env, tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.vhd"
    qemu("qemu-img", "create", "-q", "-f", "vpc", "-o", options, path, SIZE)
    Both(env, path, options).turns()


@pytest.mark.parametrize(("variant", "block_bytes"), [
    ("fixed", 2 << 20), ("dynamic", 2 << 20), ("dynamic", 512 << 10), ("dynamic", 64 << 10)])
def test_images_made_here(env: Env, tmp_path: Path, variant: str, block_bytes: int) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), SIZE, variant=variant, block_bytes=block_bytes)
    Both(env, path, (variant, block_bytes)).turns()


@pytest.mark.parametrize("size", SIZES)
def test_sizes_agree(env: Env, tmp_path: Path, size: int) -> None:
    """Whoever made it, and whether the geometry says it or current_size."""
    here, there, forced = (tmp_path / name for name in ("here.vhd", "there.vhd", "forced.vhd"))
    create(str(here), size)
    assert size_here(env, here) == size_there(here) == size
    qemu("qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", forced, size)
    assert size_here(env, forced) == size_there(forced) == size
    qemu("qemu-img", "create", "-q", "-f", "vpc", there, size)
    assert size_here(env, there) == size_there(there) >= size


@pytest.mark.parametrize("creator", [b"vpc ", b"vs  ", b"qemu", b"win ", b"d2v ", b"CTXS", b"tap\0", b"wa\0\0",
                                     b"qem2"])
def test_who_made_it_says_which_size_counts(env: Env, tmp_path: Path, creator: bytes) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), SIZE + 512)

    def change(footer: Footer) -> None:
        footer.creator_application = creator

    edit_footer(path, change)
    found = size_here(env, path)
    if creator != b"wa\0\0":  # this QEMU takes the geometry of Azure's images; newer ones do not
        assert found == size_there(path)
    assert (found == SIZE + 512) == (creator not in (b"vpc ", b"vs  ", b"qemu"))


def test_the_geometry_is_the_one_that_qemu_writes(tmp_path: Path) -> None:
    for size in (68 * 512, SIZE, 100 << 20, 1 << 30, 20 << 30):
        there, here = tmp_path / f"there{size}.vhd", tmp_path / f"here{size}.vhd"
        qemu("qemu-img", "create", "-q", "-f", "vpc", there, size)
        theirs = footer_of(there)
        create(str(here), theirs.current_size)
        ours = footer_of(here)
        assert (ours.cylinders, ours.heads, ours.sectors_per_track) == (
            theirs.cylinders, theirs.heads, theirs.sectors_per_track)


@pytest.mark.parametrize("options", ["subformat=dynamic", "subformat=fixed"])
@pytest.mark.parametrize("made", ["here", "there"])
def test_resized_images(env: Env, tmp_path: Path, made: str, options: str) -> None:
    """What is added reads as zeroes on both sides, after growing, shrinking and growing again."""
    path = tmp_path / "a.vhd"
    if made == "there":
        qemu("qemu-img", "create", "-q", "-f", "vpc", "-o", options, path, SIZE)
    else:
        VhdTools.create(str(path), SIZE, options={"variant": options.split("=")[1]})
    both = Both(env, path, (made, options))
    both.write_there()
    both.write_here()
    for size in (9 << 20, (3 << 20) + 1024, (7 << 20) + 512):
        VhdTools.resize(str(path), size, shrink=True)
        both.disk = both.disk[:size].ljust(size, b"\0")
        both.size = size
        both.compare_disk()
        both.write_there()
        both.write_here()
        both.compare_disk()


def test_a_footer_that_is_missing_at_the_end(env: Env, tmp_path: Path) -> None:
    """As after a crash: either side reads it by the copy at the start."""
    path = tmp_path / "a.vhd"
    create(str(path), SIZE)
    both = Both(env, path, "footer")
    both.write_here()
    path.write_bytes(path.read_bytes()[:-512])
    raw = tmp_path / "a.raw"
    raw.write_bytes(both.disk)
    qemu("qemu-img", "compare", "-f", "vpc", "-F", "raw", path, raw)
    both.write_here()
    both.compare()


def test_one_image_is_not_written_by_both(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), SIZE)
    runner = Runner(env, f"vhd:{path}")
    command = ["qemu-io", "-f", "vpc", "-c", "write 0 512", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=30)
    assert done.returncode != 0 and b"lock" in done.stderr
    runner.close()


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "differencing"])
def test_served_under_a_log_and_killed(
    env: Env, tmp_path: Path, serve: Callable[..., Tapdisk], kind: str
) -> None:
    """NBD clients write and verify; what was flushed before a kill is there, on both sides."""
    path, size, rng = tmp_path / "a.vhd", 8 << 20, random.Random(kind)
    disk = bytearray(size)
    if kind == "differencing":
        disk[: 5 << 20] = rng.randbytes(5 << 20)
        (tmp_path / "base.raw").write_bytes(disk[: 5 << 20])
        make_overlay(path, size, "base.raw", "aio", block_bytes=2 << 20)
    else:
        create(str(path), size, variant=kind)
    tapdisk = serve(f"log:|vhd:{path}")
    qemu("qemu-io", "-f", "raw", "-c", "write -P 7 1M 3M", "-c", "read -P 7 1M 3M", "-c", "write -z -u 2M 512k",
         "-c", "discard 3M 512k", "-c", "flush", tapdisk.uri)
    disk[1 << 20 : 4 << 20] = b"\7" * (3 << 20)
    disk[2 << 20 : (2 << 20) + (512 << 10)] = bytes(512 << 10)
    with tapdisk.client() as client:
        disk[3 << 20 : (3 << 20) + (512 << 10)] = client.read(3 << 20, 512 << 10)
        for _ in range(50):
            offset = rng.randrange(size - 9000)
            disk[offset : offset + 9000] = data = rng.randbytes(9000)
            client.write(offset, data)
        client.flush()
        client.write(0, b"?" * 4096)
        tapdisk.kill()
    runner = Runner(env, f"vhd:{path}")
    assert runner.read(4096, size - 4096) == disk[4096:]
    assert runner.write(0, bytes(disk[:4096])) == 0
    runner.close()
    assert check(str(path)).errors == 0
    if kind != "differencing":
        (tmp_path / "a.raw").write_bytes(disk)
        qemu("qemu-img", "compare", "-f", "vpc", "-F", "raw", path, tmp_path / "a.raw")
