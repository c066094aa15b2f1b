"""The vhd driver against plain bytes: sectors, blocks, parents, what is kept in step, what fails."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner
from formats_model import Model, disk_operations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhd_images import BLOCK, fill, first_block, make_overlay

from tapcore.driver import Driver, Env, OpenFlag
from tapcore.drivers.vhd import Vhd, VhdSync
from tapcore.formats.extents import DATA, HOLE
from tapcore.formats.vhd import changes, mapping
from tapcore.formats.vhd.check import check
from tapcore.formats.vhd.create import create
from tapcore.request import BACKGROUND, DISCARD, WRITE, Request

SIZE = 5 * BLOCK + 512
FIXTURE = [HealthCheck.function_scoped_fixture]


def make_image(env: Env, folder: Path, kind: str, parent_sectors: int) -> bytes:
    """An image of one of KINDS, over a parent of that size if it has one; what its disk holds."""
    data = random.Random(3).randbytes(parent_sectors * 512)
    path = folder / "a.vhd"
    if kind == "raw":
        (folder / "base.raw").write_bytes(data)
        make_overlay(path, SIZE, "base.raw", "aio")
    elif kind == "vhd":
        create(str(folder / "base.vhd"), len(data), block_bytes=2 * BLOCK)
        fill(env, folder / "base.vhd", data)
        make_overlay(path, SIZE, "base.vhd", "vhd")
    else:
        create(str(path), SIZE, variant=kind, block_bytes=BLOCK)
        data = b""
    return data[:SIZE].ljust(SIZE, b"\0")


KINDS = ("fixed", "dynamic", "raw", "vhd")


@settings(max_examples=80, deadline=None, suppress_health_check=FIXTURE)
@given(kind=st.sampled_from(KINDS), driver=st.sampled_from(("vhd", "vhd", "vhdsync")),
       parent_sectors=st.sampled_from((1, 300, 700)), ops=st.lists(disk_operations(SIZE), min_size=5, max_size=40))
def test_any_sequence_over_any_parent(
    env: Env, kind: str, driver: str, parent_sectors: int, ops: list[tuple[int, int, int, int, int]]
) -> None:
    with TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "a.vhd"
        disk = make_image(env, Path(name), kind, parent_sectors)
        runner = Runner(env, f"{driver}:{path}")
        model = Model(runner, disk)
        model.run(ops)
        runner.status(0, SIZE)
        assert runner.read(0, SIZE) == model.disk
        runner.close()
        report = check(str(path))
        assert (report.errors, report.leaks) == (0, 0), report.messages
        again = Runner(env, f"vhd:{path}", OpenFlag.RDONLY)
        assert again.read(0, SIZE) == model.disk
        again.close()


def test_bitmaps_are_dropped_and_read_again(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two bitmaps everything is missing all the time, and changed ones must be written first."""
    monkeypatch.setattr(mapping, "CACHE_BYTES", 0)
    monkeypatch.setattr(mapping, "MAX_REQUEST_BYTES", 2 * BLOCK)
    path = tmp_path / "a.vhd"
    size = 16 * BLOCK
    create(str(path), size, block_bytes=BLOCK)
    runner = Runner(env, f"vhd:{path}")
    data = random.Random(1).randbytes(size)
    step = 4096
    offsets = list(range(0, size, step))
    random.Random(2).shuffle(offsets)
    requests = [Request(WRITE, at, step, [memoryview(data)[at : at + step]]) for at in offsets[::2]]
    assert set(runner.run(*requests)) == {0}
    expected = bytearray(size)
    for at in offsets[::2]:
        expected[at : at + step] = data[at : at + step]
    assert b"".join(runner.read(at, step) for at in range(0, size, step)) == expected
    assert runner.flush() == 0 and len(runner.head.mapping.bitmaps) <= 2  # type: ignore[attr-defined]
    assert set(runner.run(*[Request(DISCARD, at, step) for at in offsets[::4]])) == {0}
    for at in offsets[::4]:
        expected[at : at + step] = bytes(step)
    runner.close()
    again = Runner(env, f"vhd:{path}", OpenFlag.RDONLY)
    assert b"".join(again.read(at, step) for at in range(0, size, step)) == expected
    again.close()
    assert check(str(path)).errors == 0


def test_what_a_read_needs_is_known_sector_by_sector(env: Env, tmp_path: Path) -> None:
    create(str(tmp_path / "a.vhd"), SIZE, block_bytes=BLOCK)
    runner = Runner(env, f"vhd:{tmp_path / 'a.vhd'}")
    assert runner.write(1000, b"x" * 1000) == 0
    kinds = [(kind, length) for kind, length, _ in runner.head.mapping.find(0, BLOCK)]  # type: ignore[attr-defined]
    assert kinds == [(HOLE, 512), (DATA, 1536), (HOLE, BLOCK - 2048)]
    runner.close()


def test_data_of_new_blocks_is_aligned(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), 8 << 20)
    runner = Runner(env, f"vhd:{path}")
    for at in (5 << 20, 0):
        assert runner.write(at, b"x") == 0
    hosts = [host for kind, _, host in runner.head.mapping.find(0, 8 << 20) if kind == DATA]  # type: ignore[attr-defined]
    assert len(hosts) == 2 and all(host % 4096 == 0 for host in hosts)
    runner.close()


def test_discard_gives_the_space_back_and_the_block_is_used_again(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), 8 << 20)
    fill(env, path, b"x" * (4 << 20))
    full, length = path.stat().st_blocks, path.stat().st_size
    runner = Runner(env, f"vhd:{path}")
    assert runner.discard(0, 4 << 20) == 0 and runner.flush() == 0
    assert runner.status(0, 8 << 20) == [(8 << 20, 3)]
    assert path.stat().st_blocks < full / 4
    assert runner.write(0, b"y" * (4 << 20)) == 0
    runner.close()
    assert path.stat().st_size == length


def test_the_batmap_tells_which_blocks_are_full(env: Env, tmp_path: Path) -> None:
    """It is complete after closing, spares the bitmaps, and is right at once when a block is full no longer."""
    path = tmp_path / "a.vhd"
    create(str(path), 8 << 20)
    fill(env, path, b"x" * (4 << 20))
    runner = Runner(env, f"vhd:{path}")
    assert list(runner.head.mapping.full) == [1, 1, 0, 0]  # type: ignore[attr-defined]
    before = runner.late
    assert runner.read(0, 4 << 20) == b"x" * (4 << 20)
    assert runner.late == before and not runner.head.mapping.bitmaps  # type: ignore[attr-defined]
    assert runner.discard(512, 512) == 0 and runner.flush() == 0
    assert check_copy(path) == []
    runner.close()
    again = Runner(env, f"vhd:{path}", OpenFlag.RDONLY)
    assert list(again.head.mapping.full) == [0, 1, 0, 0]  # type: ignore[attr-defined]
    again.close()


def test_a_block_that_has_no_bit_in_the_batmap(env: Env, tmp_path: Path) -> None:
    """tapdisk counts its bytes by whole 16 MiB of the disk."""
    path, size = tmp_path / "a.vhd", (8 << 30) + (2 << 20)
    create(str(path), size)
    for byte in (b"1", b"2"):
        runner = Runner(env, f"vhd:{path}")
        assert runner.write(size - (4 << 20), byte * (4 << 20)) == 0
        assert runner.read(size - 512, 512) == byte * 512
        runner.close()
        assert check(str(path)).messages == []


def check_copy(path: Path) -> list[str]:
    """What is wrong with the file as it is now, though someone has it open."""
    copy = path.with_name("copy.vhd")
    copy.write_bytes(path.read_bytes())
    return check(str(copy)).messages


def test_without_a_parent_absent_sectors_are_zero_in_the_file(env: Env, tmp_path: Path) -> None:
    """Programs that do not look at the bits see the same disk."""
    path = tmp_path / "a.vhd"
    create(str(path), BLOCK, block_bytes=BLOCK)
    runner = Runner(env, f"vhd:{path}")
    model = Model(runner, bytes(BLOCK))
    rng = random.Random(8)
    for _ in range(60):
        offset = rng.randrange(BLOCK)
        kind = rng.choice((WRITE, WRITE, DISCARD))
        model.run([(kind, offset, min(rng.choice((1, 700, 9000)), BLOCK - offset), 0, rng.randrange(1 << 30))])
    runner.close()
    start = first_block(path) + 512
    assert path.read_bytes()[start : start + BLOCK] == model.disk


def test_zeroes_over_a_parent_write_no_data(env: Env, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"B" * (16 << 20))
    path = tmp_path / "a.vhd"
    make_overlay(path, 16 << 20, "base.raw", "aio", block_bytes=2 << 20)
    runner = Runner(env, f"vhd:{path}")
    assert runner.zeroes(1000, (15 << 20) + 5) == 0 and runner.flush() == 0
    assert runner.read(0, 16 << 20) == b"B" * 1000 + bytes((15 << 20) + 5) + b"B" * ((1 << 20) - 1005)
    runner.close()
    assert path.stat().st_blocks * 512 < 1 << 20


def test_writers_of_one_new_sector_queue_and_none_is_lost(env: Env, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"B" * BLOCK)
    path = tmp_path / "a.vhd"
    make_overlay(path, BLOCK, "base.raw", "aio")
    runner = Runner(env, f"vhd:{path}")
    pieces = [Request(WRITE, at, 100, [memoryview(bytes([at % 251]) * 100)], BACKGROUND if at % 3 else 0)
              for at in range(0, 60000, 300)]
    assert set(runner.run(*pieces)) == {0}
    expected = bytearray(b"B" * BLOCK)
    for at in range(0, 60000, 300):
        expected[at : at + 100] = bytes([at % 251]) * 100
    assert runner.read(0, BLOCK) == expected
    runner.close()


def test_a_failed_write_leaves_the_disk_as_it_was(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its block's place is zeroed and taken again."""
    path = tmp_path / "a.vhd"
    create(str(path), SIZE, block_bytes=BLOCK)
    runner = Runner(env, f"vhd:{path}")
    file = runner.head.file  # type: ignore[attr-defined]
    with monkeypatch.context() as broken:
        broken.setattr(file, "write_inline", lambda iov, offset: 0)
        broken.setattr(file, "write", lambda iov, offset, length, **options: errno.ENOSPC)
        for _ in range(10):
            assert runner.write(4096, b"x" * 8192) == errno.ENOSPC
    assert runner.read(0, BLOCK) == bytes(BLOCK)
    assert runner.flush() == 0
    for at in range(0, SIZE, BLOCK):
        assert runner.write(at + 4096, b"y" * min(8192, SIZE - at - 4096)) == 0 if SIZE - at > 4096 else True
    assert runner.head.writer.end < 20 * BLOCK  # type: ignore[attr-defined]
    assert runner.flush() == 0
    runner.close()
    assert check(str(path)).errors == 0


def test_a_file_that_can_grow_no_more_is_full_and_not_damaged(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.vhd"
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    make_overlay(path, SIZE, "base.raw", "aio")
    runner = Runner(env, f"vhd:{path}")
    assert runner.write(0, b"x" * 512) == 0
    with monkeypatch.context() as patch:
        patch.setattr(changes, "MAX_FILE_BYTES", path.stat().st_size)
        assert runner.write(BLOCK, b"y" * 100) == errno.ENOSPC
        assert runner.write(BLOCK - 512, b"y" * 1024) == errno.ENOSPC, "nor a part of it"
        assert runner.zeroes(BLOCK, BLOCK) == errno.ENOSPC
        assert runner.write(1024, b"x" * 512) == 0, "where there is a block"
        assert runner.flush() == 0
    assert runner.read(BLOCK - 512, 1024) == b"b" * 1024
    assert runner.write(BLOCK, b"y" * 100) == 0
    runner.close()
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0)


def test_a_failed_flush_is_said_and_the_next_one_writes_all(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), SIZE, block_bytes=BLOCK)
    runner = Runner(env, f"vhd:{path}")
    assert runner.write(0, b"x" * BLOCK) == 0
    with monkeypatch.context() as broken:
        broken.setattr(runner.head.file, "write",  # type: ignore[attr-defined]
                       lambda iov, offset, length, **options: errno.ENOSPC)
        assert runner.flush() == errno.ENOSPC
    assert runner.flush() == 0
    copy = tmp_path / "copy.vhd"
    copy.write_bytes(path.read_bytes())
    again = Runner(env, f"vhd:{copy}", OpenFlag.RDONLY)
    assert again.read(0, BLOCK) == b"x" * BLOCK
    again.close()
    runner.close()


def test_lookups_of_what_is_cached_make_no_io(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create(str(path), SIZE, block_bytes=BLOCK)
    runner = Runner(env, f"vhd:{path}")
    assert runner.write(0, b"x" * 3 * BLOCK) == 0
    before = runner.late
    assert runner.read(4096, 4096) == b"x" * 4096
    assert runner.read(60000, 20000) == b"x" * 20000
    assert runner.write(100, b"y" * 5000) == 0
    runner.status(0, SIZE)
    assert runner.late == before, "all of it was early"
    runner.close()


def test_a_block_status_does_not_begin_anew_for_ever(env: Env, tmp_path: Path) -> None:
    """1 GiB of blocks whose bitmaps are yet to be read: the answers are cut, and complete together."""
    path = tmp_path / "a.vhd"
    create(str(path), 1 << 30)
    runner = Runner(env, f"vhd:{path}")
    for at in range(0, 1 << 30, 2 << 20):
        assert runner.write(at, b"x" * 512) == 0
    runner.close()
    again = Runner(env, f"vhd:{path}", OpenFlag.RDONLY)
    extents = again.status(0, 1 << 30)
    assert extents == [(512, 0), ((2 << 20) - 512, 3)] * 512
    assert again.late == 16
    again.close()


def test_a_large_image_takes_little_memory(env: Env, tmp_path: Path) -> None:
    """2040 GiB, the largest there is: the BAT of 4 MiB and a byte a block."""
    path = tmp_path / "a.vhd"
    create(str(path), 2040 << 30)
    runner = Runner(env, f"vhd:{path}")
    assert runner.size == 2040 << 30
    assert runner.write((2040 << 30) - 512, b"z" * 512) == 0 and runner.flush() == 0
    found = runner.head.mapping  # type: ignore[attr-defined]
    assert found.bat.itemsize * len(found.bat) + len(found.full) < 6 << 20
    runner.close()
    assert path.stat().st_blocks * 512 < 6 << 20


def test_the_drivers_are_known_by_their_names() -> None:
    assert Driver.registry["vhd"] is Vhd and Driver.registry["vhdsync"] is VhdSync
