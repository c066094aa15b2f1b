"""Differencing images: how the parent is found, which one is believed, what is told to others."""

from __future__ import annotations

import errno
import logging
import os
import random
from pathlib import Path

import pytest
from contract.runner import Runner
from vhd_images import BLOCK, edit_header, fill, header_of, make_overlay, patch

from tapcore.chain import open_chain
from tapcore.driver import Env, OpenFlag
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.formats.vhd.create import create, look_at_parent
from tapcore.formats.vhd.layout import LOCATOR, NO_ID, Header
from tapcore.formats.vhd.locators import MACX, W2KU, W2RU, WI2R, candidates, decode, encode

SIZE = 2 * BLOCK
NO_LOCATORS = bytes(192)
NO_NAME = bytes(512)


@pytest.fixture
def child(env: Env, tmp_path: Path) -> Path:
    """An image over base.vhd in the same folder, whose first block is full of B."""
    create(str(tmp_path / "base.vhd"), SIZE, block_bytes=BLOCK)
    fill(env, tmp_path / "base.vhd", b"B" * BLOCK)
    make_overlay(tmp_path / "child.vhd", SIZE, "base.vhd", "vhd")
    return tmp_path / "child.vhd"


def tell(path: Path, *found: tuple[bytes, bytes], name: str = "") -> None:
    """Let these be the image's only locators, and `name` its parent_unicode_name."""
    header = header_of(path)
    at = header.table_offset + header.table_bytes
    table = b""
    for code, data in found:
        table += LOCATOR.pack(platform_code=code, platform_data_space=512, platform_data_length=len(data),
                              reserved=0, platform_data_offset=at)
        patch(path, at, data)
        at += 512

    def change(header: Header) -> None:
        header.parent_locators = table.ljust(192, b"\0")
        header.parent_unicode_name = name.encode("utf-16-be").ljust(512, b"\0")

    edit_header(path, change)


def reads_base(env: Env, path: Path) -> bool:
    runner = Runner(env, f"vhd:{path}", OpenFlag.RDONLY)
    try:
        return runner.read(0, SIZE) == b"B" * BLOCK + bytes(BLOCK)
    finally:
        runner.close()


def windows(path: str) -> bytes:
    return path.encode("utf-16-le")


@pytest.mark.parametrize("found", [
    [(W2RU, windows(".\\base.vhd"))],
    [(W2RU, windows("base.vhd"))],
    [(W2RU, windows("..\\{folder}\\base.vhd"))],
    [(W2KU, windows("C:\\Virtual Machines\\base.vhd"))],
    [(W2KU, windows("\\\\server\\share\\base.vhd"))],
    [(W2KU, windows("{path}"))],
    [(MACX, b"file://./base.vhd")],
    [(MACX, b"file://{path}")],
    [(MACX, b"file://localhost{path}")],
    [(MACX, b"file:{path}")],
    [(WI2R, b".\\base.vhd")],
    [(W2RU, windows(".\\gone.vhd")), (MACX, b"file://./base.vhd")],
    [(MACX, b"file://./" + b"a" * 300), (W2RU, windows("base.vhd\\b")), (W2KU, windows("C:\\base.vhd"))],
    [(MACX, b"file://./\xff%00\xfe"), (W2RU, b"\0\xd8\x01"), (W2KU, windows("C:\\base.vhd"))],
    [(b"Abcd", b"?"), (MACX, b"http://x/base.vhd"), (W2KU, windows("D:\\base.vhd"))],
])
def test_ways_to_the_parent(env: Env, child: Path, found: list[tuple[bytes, bytes]]) -> None:
    folder = child.parent
    for name, value in (("{folder}", folder.name), ("{path}", str(folder / "base.vhd"))):
        found = [(code, data.replace(windows(name), windows(value)).replace(name.encode(), value.encode()))
                 for code, data in found]
    tell(child, *found)
    assert reads_base(env, child)


def test_a_name_alone_is_looked_up_in_the_folder(env: Env, child: Path) -> None:
    tell(child, name="C:\\elsewhere\\base.vhd")
    assert reads_base(env, child)


def test_folders_are_moved_together_and_the_relative_way_comes_first(env: Env, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new place"
    (old / "sub").mkdir(parents=True)
    create(str(old / "base %41 ä.vhd"), SIZE, block_bytes=BLOCK)
    fill(env, old / "base %41 ä.vhd", b"B" * BLOCK)
    make_overlay(old / "sub" / "child.vhd", SIZE, "../base %41 ä.vhd", "vhd")
    old.rename(new)
    assert reads_base(env, new / "sub" / "child.vhd")


def test_a_parent_elsewhere_is_found_by_its_absolute_path(env: Env, child: Path, tmp_path: Path) -> None:
    make_overlay(tmp_path / "other.vhd", SIZE, str(tmp_path / "base.vhd"), "vhd")
    (tmp_path / "far").mkdir()
    (tmp_path / "other.vhd").rename(tmp_path / "far" / "other.vhd")
    assert reads_base(env, tmp_path / "far" / "other.vhd")


def test_the_parent_is_the_one_with_the_right_id(env: Env, child: Path, tmp_path: Path) -> None:
    """A file of the right name that is another image is passed over; if there is no other, it is refused."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "base.vhd").rename(tmp_path / "kept" / "base.vhd")
    create(str(tmp_path / "base.vhd"), SIZE, block_bytes=BLOCK)
    with pytest.raises(ChainError, match=r"its parent's id is [0-9a-f]{32}, which .*base.vhd has not"):
        open_chain(env, f"vhd:{child}")
    tell(child, (W2RU, windows(".\\base.vhd")), (W2KU, windows(str(tmp_path / "kept" / "base.vhd"))))
    assert reads_base(env, child)


def test_a_parent_that_is_gone_is_named(env: Env, child: Path, tmp_path: Path) -> None:
    (tmp_path / "base.vhd").unlink()
    with pytest.raises(ChainError, match=r"parent is not there; tried: .*/base.vhd") as caught:
        open_chain(env, f"vhd:{child}")
    assert caught.value.errno == errno.ENOENT


def test_a_parent_that_was_modified_is_warned_of(
    env: Env, child: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in blktap: it may only have been copied."""
    with caplog.at_level(logging.WARNING):
        assert reads_base(env, child)
        assert "modified" not in caplog.text
        os.utime(tmp_path / "base.vhd", (0, 1_700_000_000))
        assert reads_base(env, child)
    assert "modified after it was made" in caplog.text


def test_a_raw_parent_has_no_id(env: Env, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"B" * BLOCK)
    make_overlay(tmp_path / "child.vhd", SIZE, "base.raw", "aio")
    assert header_of(tmp_path / "child.vhd").parent_unique_id == NO_ID
    assert reads_base(env, tmp_path / "child.vhd")
    runner = Runner(env, f"vhdsync:{tmp_path / 'child.vhd'}", OpenFlag.RDONLY)
    assert [driver.name for driver in runner.chain.drivers] == ["vhdsync", "sync"]
    runner.close()


def test_a_deep_chain(env: Env, tmp_path: Path) -> None:
    """Each level has something of its own; nothing below the top is changed."""
    depth, rng = 30, random.Random(1)
    disk = bytearray(SIZE)
    create(str(tmp_path / "0.vhd"), SIZE, block_bytes=BLOCK)
    for level in range(1, depth):
        data = bytes([level]) * 512 * (depth - level)
        fill(env, tmp_path / f"{level - 1}.vhd", data)
        disk[: len(data)] = data
        make_overlay(tmp_path / f"{level}.vhd", SIZE, f"{level - 1}.vhd", "vhd")
    before = [(tmp_path / f"{level}.vhd").read_bytes() for level in range(depth - 1)]
    runner = Runner(env, f"vhd:{tmp_path / f'{depth - 1}.vhd'}")
    for _ in range(20):
        at = rng.randrange(SIZE - 3000)
        disk[at : at + 3000] = data = rng.randbytes(3000)
        assert runner.write(at, data) == 0
    assert runner.read(0, SIZE) == disk
    runner.close()
    assert before == [(tmp_path / f"{level}.vhd").read_bytes() for level in range(depth - 1)]


def test_a_loop_of_parents_is_an_error(env: Env, child: Path, tmp_path: Path) -> None:
    def own_id(header: Header) -> None:
        header.parent_unique_id = child.read_bytes()[68:84]

    edit_header(child, own_id)
    tell(child, (W2RU, windows(".\\child.vhd")))
    with pytest.raises(ChainError, match="loop"):
        open_chain(env, f"vhd:{child}", OpenFlag.RDONLY)


def test_what_cannot_be_a_parent(tmp_path: Path, child: Path) -> None:
    with pytest.raises(UsageError, match="cannot be of the format qcow2"):
        look_at_parent(str(tmp_path / "x.vhd"), "base.vhd", "qcow2")
    with pytest.raises(ImageError, match="No such file"):
        look_at_parent(str(tmp_path / "x.vhd"), "gone.vhd", "vhd")
    (tmp_path / "raw").write_bytes(bytes(4096))
    with pytest.raises(ImageError, match="no VHD footer"):
        look_at_parent(str(tmp_path / "x.vhd"), "raw", "vhd")
    with pytest.raises(UsageError, match="too long"):
        encode("./" + "a" * 9000, "/")
    for path in ("", "/", "a\0b"):
        with pytest.raises(UsageError, match="path of a file"):
            encode(path, "/vm")


def test_locators_are_written_for_all_systems() -> None:
    assert encode("sub/../base.vhd", "/vm") == [
        (MACX, b"file://./base.vhd"), (W2RU, windows(".\\base.vhd")), (W2KU, windows("\\vm\\base.vhd"))]
    assert encode("/x/base one.vhd", "/vm") == [
        (MACX, b"file:///x/base%20one.vhd"), (W2KU, windows("\\x\\base one.vhd"))]


def test_paths_of_other_systems() -> None:
    assert candidates(decode(W2KU, windows("c:\\a b\\c.vhd\0rest"))) == ["/a b/c.vhd", "c.vhd"]
    assert candidates("..\\c.vhd") == ["../c.vhd"]
    assert candidates("/a/c.vhd") == ["/a/c.vhd"]
    assert candidates("") == candidates("C:\\") == candidates("a\\..") == []


def test_what_is_refused_for_its_parent_is_not_repaired(env: Env, child: Path, tmp_path: Path) -> None:
    (tmp_path / "base.vhd").unlink()
    child.write_bytes(child.read_bytes()[:-512])
    before = child.read_bytes()
    with pytest.raises(ChainError, match="parent is not there"):
        open_chain(env, f"vhd:{child}")
    assert child.read_bytes() == before
