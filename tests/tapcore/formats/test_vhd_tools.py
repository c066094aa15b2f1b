"""VHD's tools: what is made, said, checked, repaired and changed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from contract.runner import Runner
from vhd_images import (
    BLOCK,
    edit_footer,
    fill,
    first_block,
    footer_of,
    header_of,
    make_overlay,
    patch,
    u32,
)

from tapcore.chain import open_chain
from tapcore.driver import Env, OpenFlag
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tools import Backing, find_tools
from tapcore.formats.vhd.create import create
from tapcore.formats.vhd.layout import DIFFERENCING, Footer, batmap_header_at, geometry
from tapcore.formats.vhd.tools import VhdTools, set_hidden

SIZE = 4 * BLOCK
DATA = random.Random(4).randbytes(3 * BLOCK)


@pytest.fixture
def image(env: Env, tmp_path: Path) -> Path:
    """A dynamic image, three of its four blocks full."""
    create(str(tmp_path / "a.vhd"), SIZE, block_bytes=BLOCK)
    fill(env, tmp_path / "a.vhd", DATA)
    return tmp_path / "a.vhd"


def disk_of(env: Env, path: Path, flags: OpenFlag = OpenFlag.RDONLY) -> bytes:
    runner = Runner(env, f"vhd:{path}", flags)
    try:
        return runner.read(0, runner.size)
    finally:
        runner.close()


def test_they_are_found_by_both_names() -> None:
    assert find_tools("vhd") is find_tools("vpc") is VhdTools


def test_what_an_image_says_of_itself(env: Env, image: Path) -> None:
    said = VhdTools.describe(str(image))
    json.dumps(said)
    assert said["variant"] == "dynamic" and said["creator_application"] == "tap" and not said["hidden"]
    assert (said["block_bytes"], said["blocks"], said["blocks_allocated"]) == (BLOCK, 4, 3)
    make_overlay(image.with_name("child.vhd"), SIZE, "a.vhd", "vhd")
    child = VhdTools.describe(str(image.with_name("child.vhd")))
    json.dumps(child)
    assert child["variant"] == "differencing" and child["parent_unique_id"] == said["unique_id"]
    assert child["backing"] == str(image) and child["parent_name"] == "a.vhd"
    assert child["locators"]["W2ru"] == ".\\a.vhd" and child["locators"]["MacX"] == "./a.vhd"
    create(str(image.with_name("fixed.vhd")), SIZE, variant="fixed")
    assert VhdTools.describe(str(image.with_name("fixed.vhd")))["variant"] == "fixed"


def test_the_mark_of_xenserver(image: Path) -> None:
    set_hidden(str(image), True)
    assert VhdTools.describe(str(image))["hidden"]
    assert image.read_bytes()[:512] == image.read_bytes()[-512:]
    set_hidden(str(image), False)
    assert not VhdTools.describe(str(image))["hidden"]


def test_create_refuses_what_no_image_can_be(tmp_path: Path) -> None:
    path = str(tmp_path / "a.vhd")
    for size, options in ((1000, {}), ((2040 << 30) + 512, {}), (1 << 20, {"variant": "sparse"}),
                          (1 << 20, {"block_size": "32K"}), (1 << 20, {"block_size": "100K"}),
                          (1 << 20, {"block_size": "1G"}), (2000 << 30, {"block_size": "64K"})):
        with pytest.raises(UsageError):
            VhdTools.create(path, size, options=options)
    (tmp_path / "base").write_bytes(bytes(512))
    with pytest.raises(UsageError, match="fixed VHD has no parent"):
        VhdTools.create(path, 512, backing=Backing("base", "aio"), options={"variant": "fixed"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]
    VhdTools.create(path, 1 << 20)
    with pytest.raises(ImageError, match="exists"):
        VhdTools.create(path, 1 << 20)


def test_the_geometry_of_the_specification() -> None:
    """Its three ranges of small disks, the large ones, and the largest."""
    assert geometry(68 * 512) == (1, 4, 17)
    assert geometry(500 << 20) == (1015, 16, 63)
    assert geometry(100 << 20) == (1003, 12, 17)
    assert geometry(200 << 20) == (825, 16, 31)
    assert geometry(40 << 30) == (20560, 16, 255)
    assert geometry(2040 << 30) == (65535, 16, 255)


# Copies

def lose_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


def lose_start(path: Path) -> None:
    patch(path, 0, b"x" * 512)


def change_start(path: Path) -> None:
    def change(footer: Footer) -> None:
        footer.hidden = 1

    edit_footer(path, change, at_end=False)


def spoil_end(path: Path) -> None:
    patch(path, len(path.read_bytes()) - 100, b"x")


@pytest.mark.parametrize(("spoil", "what"), [
    (lose_end, "the footer at the end"), (spoil_end, "the footer at the end"), (lose_start, "copy at the start"),
    (change_start, "the footer at the end: differs from its copy")])
def test_a_footer_is_taken_from_its_copy(
    env: Env, image: Path, spoil: Callable[[Path], None], what: str
) -> None:
    """Reading changes nothing; opening for writing, and a repair, put the other copy right; STRICT refuses."""
    spoil(image)
    spoilt = image.read_bytes()
    with pytest.raises(ChainError, match=what):
        open_chain(env, f"vhd:{image}", OpenFlag.STRICT)
    assert disk_of(env, image)[: 3 * BLOCK] == DATA
    report = VhdTools.check(str(image))
    assert report.errors == 1 and what in report.messages[0]
    assert image.read_bytes() == spoilt
    assert disk_of(env, image, OpenFlag.NONE)[: 3 * BLOCK] == DATA
    assert VhdTools.check(str(image)).messages in ([], ["1 places for blocks hold none, 1 of them at the end"])
    image.write_bytes(spoilt)
    assert VhdTools.check(str(image), repair=True).repaired >= 1
    assert VhdTools.check(str(image)).messages == []
    assert disk_of(env, image)[: 3 * BLOCK] == DATA


def test_a_guest_is_not_taken_for_the_image(env: Env, image: Path) -> None:
    """It may write a footer to the start of a fixed image, and into a block that a crash leaves at the end."""
    fixed = image.with_name("fixed.vhd")
    create(str(fixed), SIZE, variant="fixed")
    fill(env, fixed, image.read_bytes()[: 2 * BLOCK])
    assert VhdTools.describe(str(fixed))["variant"] == "fixed" and VhdTools.check(str(fixed)).messages == []
    assert disk_of(env, fixed)[: 2 * BLOCK] == image.read_bytes()[: 2 * BLOCK]
    fill(env, fixed, b"v_poison")
    assert disk_of(env, fixed)[:8] == b"v_poison"
    forged = footer_of(image)
    forged.disk_type, forged.unique_id, forged.data_offset = DIFFERENCING, b"g" * 16, 8192
    with image.open("ab") as file:
        file.write(bytes(3584) + forged.pack())
    report = VhdTools.check(str(image))
    assert report.messages[0] == "the footer at the end: differs from its copy"
    assert disk_of(env, image, OpenFlag.NONE)[: 3 * BLOCK] == DATA
    assert VhdTools.check(str(image)).errors == 0


@pytest.mark.parametrize("variant", ["fixed", "dynamic"])
def test_the_old_footer_of_511_bytes(env: Env, tmp_path: Path, variant: str) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), SIZE, variant=variant, block_bytes=BLOCK)
    fill(env, path, DATA[:BLOCK])
    path.write_bytes(path.read_bytes()[:-1])
    assert VhdTools.check(str(path)).messages == []
    assert disk_of(env, path)[:BLOCK] == DATA[:BLOCK]
    fill(env, path, DATA)
    assert disk_of(env, path)[: 3 * BLOCK] == DATA
    assert VhdTools.check(str(path)).messages == []


def test_a_sum_that_did_not_count_hidden(image: Path, env: Env) -> None:
    """As early tools of XenServer left it."""
    data = image.read_bytes()
    patch(image, len(data) - 512 + 85, b"\1")
    patch(image, 85, b"\1")
    assert VhdTools.describe(str(image))["hidden"]
    assert disk_of(env, image)[: 3 * BLOCK] == DATA


# The batmap

@pytest.fixture
def batmap(env: Env, tmp_path: Path) -> Path:
    create(str(tmp_path / "b.vhd"), 4 << 20)
    fill(env, tmp_path / "b.vhd", b"x" * (2 << 20))
    return tmp_path / "b.vhd"


def test_a_batmap_that_cannot_be_right_is_done_without(env: Env, batmap: Path) -> None:
    at = batmap_header_at(header_of(batmap))
    data = batmap.read_bytes()
    for offset, wrong in ((at + 24, b"\1\2\3\4"), (at + 512, b"\xff"), (at + 8, u32(7) + u32(7)),
                          (at + 16, u32(0)), (at + 20, u32(0x00020000)), (at, b"tdbatmax")):
        batmap.write_bytes(data)
        patch(batmap, offset, wrong)
        report = VhdTools.check(str(batmap))
        assert report.errors == 1 and report.messages[0].startswith("the batmap:")
        runner = Runner(env, f"vhd:{batmap}", OpenFlag.RDONLY)
        assert list(runner.head.mapping.full) == [0, 0]  # type: ignore[attr-defined]
        assert runner.read(0, 4 << 20) == b"x" * (2 << 20) + bytes(2 << 20)
        runner.close()
    batmap.write_bytes(data)
    patch(batmap, at + 512, b"\xff")
    assert VhdTools.check(str(batmap), repair=True).errors == 0
    assert VhdTools.check(str(batmap)).messages == []


def test_a_batmap_that_calls_a_block_full_which_is_not(env: Env, batmap: Path) -> None:
    patch(batmap, first_block(batmap), b"\x7f")
    report = VhdTools.check(str(batmap))
    assert (report.errors, report.messages) == (1, ["the batmap: block 0 is not full"])
    report = VhdTools.check(str(batmap), repair=True)
    assert (report.errors, report.repaired) == (0, 1)
    assert VhdTools.check(str(batmap)).messages == []
    assert disk_of(env, batmap)[:1024] == bytes(512) + b"x" * 512


# Another size, another backing

@pytest.mark.parametrize("raw", [False, True])
def test_a_differencing_image_is_resized(env: Env, image: Path, raw: bool) -> None:
    if raw:
        base = image.with_name("base.raw")
        base.write_bytes(disk_of(env, image))
    path = image.with_name("child.vhd")
    make_overlay(path, SIZE, "base.raw" if raw else "a.vhd", "aio" if raw else "vhd")
    fill(env, path, b"c" * 700)
    disk = b"c" * 700 + DATA[700:] + bytes(BLOCK)
    for size in (SIZE + 512, 20 * BLOCK, SIZE):
        VhdTools.resize(str(path), size, shrink=True)
        assert disk_of(env, path) == disk.ljust(size, b"\0")[:size]
        assert VhdTools.check(str(path)).errors == 0
    VhdTools.resize(str(path), BLOCK + 512, shrink=True)
    with pytest.raises(ImageError, match="parent is larger"):
        VhdTools.resize(str(path), SIZE)
    assert disk_of(env, path) == disk[: BLOCK + 512]


def test_a_disk_is_made_smaller_only_by_who_says_so(env: Env, image: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(UsageError, match="would be lost"):
        VhdTools.resize(str(image), BLOCK)
    for size in (1000, (2040 << 30) + 512):
        with pytest.raises(UsageError):
            VhdTools.resize(str(image), size)
    assert image.read_bytes() == before


def test_what_is_added_is_zero_though_the_last_block_has_more(env: Env, tmp_path: Path) -> None:
    """As in QEMU's images, whose bitmaps are full from the beginning."""
    path = tmp_path / "a.vhd"
    create(str(path), 3 << 20)
    fill(env, path, b"x" * (3 << 20))
    at = first_block(path) + (2 << 20) + 4096
    patch(path, at, b"\xff" * 512 + b"x" * (2 << 20))
    VhdTools.resize(str(path), 6 << 20)
    assert disk_of(env, path) == b"x" * (3 << 20) + bytes(3 << 20)


def test_another_backing(env: Env, image: Path) -> None:
    other, path = image.with_name("other.vhd"), image.with_name("child.vhd")
    other.write_bytes(image.read_bytes())
    make_overlay(path, SIZE, "a.vhd", "vhd")
    fill(env, path, b"c" * 700)
    own_id = footer_of(path).unique_id
    image.rename(image.with_name("gone.vhd"))
    VhdTools.set_backing(str(path), Backing("other.vhd", "vhd"))
    assert disk_of(env, path)[: 3 * BLOCK] == b"c" * 700 + DATA[700:]
    VhdTools.set_backing(str(path), None)
    assert disk_of(env, path) == b"c" * 700 + DATA[700:1024] + bytes(SIZE - 1024)
    assert VhdTools.describe(str(path))["variant"] == "dynamic"
    (image.with_name("flat")).write_bytes(b"F" * BLOCK)
    VhdTools.set_backing(str(path), Backing("flat", "aio"))
    assert disk_of(env, path)[1024 : BLOCK + 512] == b"F" * (BLOCK - 1024) + bytes(512)
    assert footer_of(path).unique_id == own_id
    with pytest.raises(UsageError):
        VhdTools.set_backing(str(path), Backing("flat", "qcow2"))
    fixed = image.with_name("fixed.vhd")
    create(str(fixed), SIZE, variant="fixed")
    with pytest.raises(ImageError, match="fixed VHD has no backing"):
        VhdTools.set_backing(str(fixed), Backing("flat", "aio"))


class PowerLoss(Exception):
    pass


def test_a_parent_modified_on_purpose(env: Env, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = image.with_name("child.vhd")
    make_overlay(path, SIZE, "a.vhd", "vhd")
    length = path.stat().st_size
    os.utime(image, (0, 1_800_000_000))
    disk_of(env, path)
    assert "modified after it was made" in caplog.text
    caplog.clear()
    VhdTools.accept_backing(str(path))
    assert disk_of(env, path)[: 3 * BLOCK] == DATA and "modified" not in caplog.text
    assert path.stat().st_size == length and VhdTools.check(str(path)).messages == []
    before = image.read_bytes()
    VhdTools.accept_backing(str(image))
    assert image.read_bytes() == before


@pytest.mark.parametrize("change", [
    lambda path: VhdTools.resize(path, 9 * BLOCK),
    lambda path: VhdTools.set_backing(path, Backing("base", "aio"))])
def test_an_interrupted_change_leaves_the_former_image_or_the_new_one(
    env: Env, image: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], None]
) -> None:
    (image.with_name("base")).write_bytes(bytes(SIZE))
    before, original = disk_of(env, image), image.read_bytes()
    real = ImageFile.write
    left: list[int] = []

    def write(file: ImageFile, iov: list[memoryview], offset: int, length: int, **options: bool) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise PowerLoss
        return real(file, iov, offset, length, **options)

    for steps in range(4):
        image.write_bytes(original)
        left[:] = [steps]
        with monkeypatch.context() as broken:
            broken.setattr(ImageFile, "write", write)
            if steps < 3:
                with pytest.raises(PowerLoss):
                    change(str(image))
            else:
                change(str(image))
        disk = disk_of(env, image)
        assert disk in (before, before.ljust(9 * BLOCK, b"\0"))
        assert disk_of(env, image, OpenFlag.NONE) == disk
        assert VhdTools.check(str(image)).errors == 0


def test_nothing_is_changed_that_contradicts_itself(env: Env, image: Path) -> None:
    header = header_of(image)
    patch(image, header.table_offset + 4, image.read_bytes()[header.table_offset :][:4])
    spoilt = image.read_bytes()
    changes: list[Callable[[str], None]] = [
        lambda path: VhdTools.resize(path, 9 * BLOCK), lambda path: VhdTools.set_backing(path, None),
        lambda path: set_hidden(path, True)]
    for change in changes:
        with pytest.raises(ImageError, match=r"BAT entry 0, 0x.*: overlaps BAT entry 1"):
            change(str(image))
    report = VhdTools.check(str(image), repair=True)
    assert report.errors >= 1 and image.read_bytes() == spoilt
    with pytest.raises(ChainError, match="overlaps BAT entry"):
        open_chain(env, f"vhd:{image}")
    assert image.read_bytes() == spoilt
    assert disk_of(env, image)[:BLOCK] == DATA[:BLOCK]


def test_an_image_in_use_is_not_changed(env: Env, image: Path) -> None:
    runner = Runner(env, f"vhd:{image}")
    with pytest.raises(ImageError, match="use"):
        VhdTools.resize(str(image), 9 * BLOCK)
    with pytest.raises(ImageError, match="use"):
        VhdTools.check(str(image), repair=True)
    assert VhdTools.describe(str(image))["blocks"] == 4
    runner.close()
    assert os.access(image, os.W_OK)
