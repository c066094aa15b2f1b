"""Hostile and damaged VHDs: refused or EIO, with the name of the field; never a loop, a write, or much memory."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhd_images import BLOCK, edit_footer, edit_header, fill, footer_of, header_of, make_overlay, patch, u32

from tapcore.chain import open_chain
from tapcore.driver import Env, OpenFlag
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.formats.vhd.create import create
from tapcore.formats.vhd.layout import (
    BATMAP,
    FOOTER,
    HEADER,
    LOCATOR,
    UNUSED,
    Footer,
    Header,
    batmap_header_at,
    checksum,
)
from tapcore.formats.vhd.tools import VhdTools, set_hidden
from tapcore.layout import Layout
from tapcore.request import DISCARD, FLUSH, READ, STATUS, WRITE, ZEROES, Request

SIZE = 5 * BLOCK
FIXTURE = [HealthCheck.function_scoped_fixture]
MAX_MEMORY_BYTES = 48 << 20
NUMBERS = st.one_of(st.integers(0, 1 << 64), st.integers(0, 4096),
                    st.sampled_from([1 << bit for bit in range(64)] + [(1 << bit) - 1 for bit in range(65)]))


@pytest.fixture
def folder(env: Env, tmp_path: Path) -> Path:
    """fixed.vhd, dynamic.vhd, batmap.vhd (with blocks of 2 MiB), and child.vhd over dynamic.vhd, with data."""
    rng = random.Random(5)
    create(str(tmp_path / "fixed.vhd"), SIZE, variant="fixed")
    create(str(tmp_path / "dynamic.vhd"), SIZE, block_bytes=BLOCK)
    create(str(tmp_path / "batmap.vhd"), SIZE)
    for name in ("fixed", "dynamic", "batmap"):
        fill(env, tmp_path / f"{name}.vhd", rng.randbytes(3 * BLOCK))
    make_overlay(tmp_path / "child.vhd", SIZE, "dynamic.vhd", "vhd")
    fill(env, tmp_path / "child.vhd", rng.randbytes(BLOCK + 5000))
    return tmp_path


NAMES = ("fixed", "dynamic", "batmap", "child")


def set_field(layout: Layout, data: bytes, name: str, value: int | bytes) -> bytes:
    """`data`, a structure of `layout`, with one field changed, cut to the field's width."""
    fields = layout.unpack(data)
    former = fields[name]
    if isinstance(former, bytes):
        raw = value if isinstance(value, bytes) else value.to_bytes(9, "big")
        fields[name] = (raw * (len(former) // max(1, len(raw)) + 1))[: len(former)]
    else:
        probe = value if isinstance(value, int) else int.from_bytes(value, "big")
        width = 64
        while width:
            try:
                return layout.pack(**dict(fields, **{name: probe & ((1 << width) - 1)})) + data[layout.size :]
            except Exception:
                width //= 2
    return layout.pack(**fields) + data[layout.size :]


def with_sum(data: bytes, at: int) -> bytes:
    return data[:at] + u32(checksum(data[:at] + data[at + 4 :])) + data[at + 4 :]


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE)
@given(data=st.data())
def test_any_field_may_be_wrong(env: Env, folder: Path, data: st.DataObject) -> None:
    """With a checksum that is right, so that it gets past the door."""
    with TemporaryDirectory(dir="/dev/shm") as name:
        path = copy_of(folder, data.draw(st.sampled_from(NAMES)), Path(name))
        header_at = footer_of(path).data_offset
        is_fixed = path.name == "fixed.vhd"
        changes = [spoil_footer] if is_fixed else [
            spoil_footer, spoil_header, spoil_header, spoil_locator, spoil_bat, spoil_bitmap, spoil_batmap]
        for change in data.draw(st.lists(st.sampled_from(changes), min_size=1, max_size=3)):
            change(path, header_at, data)
        try_all(env, path)


def copy_of(folder: Path, kind: str, to: Path) -> Path:
    for other in NAMES:
        (to / f"{other}.vhd").write_bytes((folder / f"{other}.vhd").read_bytes())
    return to / f"{kind}.vhd"


def spoil_footer(path: Path, header_at: int, data: st.DataObject) -> None:
    image = path.read_bytes()
    field = data.draw(st.sampled_from(FOOTER.names))
    footer = with_sum(set_field(FOOTER, image[-512:], field, data.draw(NUMBERS)), 64)
    where = data.draw(st.sampled_from(("end", "start", "both")))
    if where != "start":
        patch(path, len(image) - 512, footer)
    if where != "end":
        patch(path, 0, footer)


def spoil_header(path: Path, header_at: int, data: st.DataObject) -> None:
    image = path.read_bytes()
    field = data.draw(st.sampled_from(HEADER.names))
    patch(path, header_at, with_sum(set_field(HEADER, image[header_at:][:1024], field, data.draw(NUMBERS)), 36))


def spoil_locator(path: Path, header_at: int, data: st.DataObject) -> None:
    header = path.read_bytes()[header_at:][:1024]
    at = 576 + 24 * data.draw(st.integers(0, 7))
    field = data.draw(st.sampled_from(LOCATOR.names))
    value = data.draw(st.one_of(NUMBERS, st.sampled_from((b"W2ru", b"W2ku", b"MacX", b"Wi2k"))))
    patch(path, header_at, with_sum(header[:at] + set_field(LOCATOR, header[at : at + 24], field, value)
                                    + header[at + 24 :], 36))


def spoil_bat(path: Path, header_at: int, data: st.DataObject) -> None:
    table_at = HEADER.unpack(path.read_bytes(), header_at)["table_offset"]
    if table_at < 1 << 20:
        patch(path, table_at + 4 * data.draw(st.integers(0, 4)), u32(data.draw(NUMBERS) & UNUSED))


def spoil_bitmap(path: Path, header_at: int, data: st.DataObject) -> None:
    image = path.read_bytes()
    table_at = HEADER.unpack(image, header_at)["table_offset"]
    entry = int.from_bytes(image[table_at : table_at + 4], "big")
    if table_at < 1 << 20 and 512 * entry < len(image) - 512:
        patch(path, 512 * entry + data.draw(st.integers(0, 15)), bytes([data.draw(st.integers(0, 255))]))


def spoil_batmap(path: Path, header_at: int, data: st.DataObject) -> None:
    fields = HEADER.unpack(path.read_bytes(), header_at)
    at = batmap_header_at(Header(fields["table_offset"], fields["max_table_entries"], fields["block_size"]))
    image = path.read_bytes()
    if at + 1024 < len(image):
        field = data.draw(st.sampled_from(BATMAP.names))
        patch(path, at, set_field(BATMAP, image[at : at + 512], field, data.draw(NUMBERS)))


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE)
@given(data=st.data())
def test_flipped_bytes_never_do_worse_than_an_error(env: Env, folder: Path, data: st.DataObject) -> None:
    with TemporaryDirectory(dir="/dev/shm") as name:
        path = copy_of(folder, data.draw(st.sampled_from(NAMES)), Path(name))
        length = path.stat().st_size
        places = st.one_of(st.integers(0, min(8192, length - 1)), st.integers(max(0, length - 600), length - 1))
        for _ in range(data.draw(st.integers(1, 4))):
            patch(path, data.draw(places), bytes([data.draw(st.integers(0, 255))]))
        if data.draw(st.booleans()):
            path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, length))])
        try_all(env, path)


def try_all(env: Env, path: Path) -> None:
    """Everything that can be done with an image: it works, or is refused with an error of ours and no change."""
    before = path.read_bytes()
    tracemalloc.start()
    reading: list[Callable[[], object]] = [
        lambda: VhdTools.check(str(path)), lambda: VhdTools.describe(str(path)),
        lambda: use(env, path, OpenFlag.RDONLY)]
    for action in reading:
        attempt(action)
        assert path.read_bytes() == before
    changing: list[Callable[[], object]] = [
        lambda: use(env, path, OpenFlag.NONE), lambda: VhdTools.check(str(path), repair=True),
        lambda: VhdTools.resize(str(path), 9 * BLOCK, shrink=True), lambda: set_hidden(str(path), True),
        lambda: VhdTools.set_backing(str(path), None)]
    for action in changing:
        now = path.read_bytes()
        if not attempt(action):
            assert path.read_bytes() == now
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_MEMORY_BYTES
    assert path.stat().st_blocks * 512 < 40 << 20


def attempt(action: Callable[[], object]) -> bool:
    try:
        action()
    except (ChainError, ImageError, UsageError) as error:
        assert str(error)
        return False
    return True


def use(env: Env, path: Path, flags: OpenFlag) -> None:
    """Raises only if the image cannot be opened; what fails later is an errno of a request."""
    runner = Runner(env, f"vhd:{path}", flags)
    try:
        ends = {min(runner.size, SIZE) & -512, runner.size & -512}
        for end in ends:
            start = max(0, end - 6 * BLOCK) & -512
            runner.run(*[Request(READ, at, 4096, [memoryview(bytearray(4096))])
                         for at in range(start, end - 4096, 4096)])
            if end > start:
                runner.run(Request(STATUS, start, end - start))
            if not flags & OpenFlag.RDONLY:
                runner.run(*[Request(WRITE, at, 700, [memoryview(b"w" * 700)])
                             for at in range(start, end - 1024, 3 * 4096)])
                runner.run(*[Request(DISCARD, at, 2048) for at in range(start, end - 4096, 10 * 4096)])
                runner.run(*[Request(ZEROES, at, 2048) for at in range(start, end - 4096, 7 * 4096)])
        runner.run(Request(FLUSH))
    finally:
        try:
            runner.close()
        except ImageError as error:
            assert str(error)


def footer(name: str, value: object) -> Callable[[Path], None]:
    def change(fields: Footer) -> None:
        setattr(fields, name, value)

    return lambda path: edit_footer(path, change)


def header(name: str, value: object) -> Callable[[Path], None]:
    def change(fields: Header) -> None:
        setattr(fields, name, value)

    return lambda path: edit_header(path, change)


def entry(number: int, value: int) -> Callable[[Path], None]:
    return lambda path: patch(path, header_of(path).table_offset + 4 * number, u32(value))


@pytest.mark.parametrize(("change", "what"), [
    (footer("disk_type", 1), "disk_type 1"),
    (footer("disk_type", 6), "disk_type 6"),
    (footer("disk_type", 2), "copy at the start|current_size"),
    (footer("file_format_version", 0x20000), "file_format_version 0x20000"),
    (footer("data_offset", 100), "data_offset 0x64"),
    (footer("data_offset", (1 << 64) - 1), "data_offset 0xf"),
    (footer("data_offset", 0), "data_offset 0x0"),
    (footer("data_offset", 1024), "cookie is not cxsparse"),
    (footer("current_size", 1 << 60), "current_size"),
    (footer("current_size", 2041 << 30), "2040 GiB"),
    (footer("current_size", 6 * BLOCK), "max_table_entries 5 is too small"),
    (footer("creator_version", 1), "creator_version 0.1"),
    (lambda path: patch(path, path.stat().st_size - 512, b"v_poison"), "out of use"),
    (lambda path: patch(path, 530, b"x"), "header's checksum"),
    (header("header_version", 0x20000), "header_version"),
    (header("block_size", 0), "block_size 0"),
    (header("block_size", 512), "block_size 512"),
    (header("block_size", 3 * BLOCK), "block_size"),
    (header("block_size", 1 << 31), "block_size"),
    (header("max_table_entries", 4), "max_table_entries 4 is too small"),
    (header("table_offset", 0), "table_offset 0"),
    (header("table_offset", 1000), "table_offset 1000"),
    (header("table_offset", 1024), "table_offset 1024"),
    (header("table_offset", 1 << 50), "table_offset"),
    (entry(0, 0), "BAT entry 0, 0x0: overlaps the footer's copy"),
    (entry(0, 2), "BAT entry 0, 0x2: overlaps the header"),
    (entry(0, 3), "BAT entry 0, 0x3: overlaps the BAT"),
    (entry(1, 0xFFFFFFFE), "BAT entry 1, 0xfffffffe: past the end"),
    (entry(4, 100), "BAT entry .*overlaps BAT entry"),
])
def test_what_cannot_be_right_is_named(env: Env, folder: Path, change: Callable[[Path], None], what: str) -> None:
    path = folder / "dynamic.vhd"
    change(path)
    before = path.read_bytes()
    with pytest.raises(ChainError, match=what):
        open_chain(env, f"vhd:{path}")
    assert path.read_bytes() == before
