"""The qcow driver against plain bytes and against power loss, and what it refuses."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner
from formats_model import History, Model, disk_operations, drive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recording import SECTOR, Journal, RecordingFile

from tapcore.chain import open_chain
from tapcore.driver import Env, OpenFlag
from tapcore.drivers.qcow import Qcow
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.formats.qcow.create import create
from tapcore.formats.qcow.layout import BACKING_FORMAT, HEADER, XEN_HEADER
from tapcore.formats.tools import Backing, find_tools
from tapcore.request import DISCARD, READ, WRITE, Request

SIZE = 100 * 1024 + 512
TOOLS = find_tools("qcow")


class Recorded(Qcow):
    name = "qcow-recorded"
    file_kind = RecordingFile


def make_image(folder: Path, cluster_bits: int, backing_bytes: int = 0, size: int = SIZE) -> tuple[Path, bytes]:
    """An image, over a raw backing file if that has any bytes; what the disk holds."""
    path, base = folder / "a.qcow", random.Random(3).randbytes(backing_bytes)
    (folder / "base.raw").write_bytes(base)
    create(str(path), size, backing=Backing("base.raw", "aio") if base else None, cluster_bits=cluster_bits)
    return path, base[:size].ljust(size, b"\0")


def patched(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def is_clean(path: Path) -> bool:
    report = TOOLS.check(str(path))
    return (report.errors, report.leaks) == (0, 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cluster_bits=st.sampled_from((9, 10, 12, 16)), backing_sectors=st.sampled_from((0, 0, 33, 150, 300)),
       ops=st.lists(disk_operations(SIZE), min_size=5, max_size=40))
def test_any_sequence_over_any_backing(
    env: Env, cluster_bits: int, backing_sectors: int, ops: list[tuple[int, int, int, int, int]]
) -> None:
    with TemporaryDirectory(dir="/dev/shm") as name:
        path, disk = make_image(Path(name), cluster_bits, backing_sectors * 512)
        runner = Runner(env, f"qcow:{path}")
        model = Model(runner, disk)
        model.run(ops)
        runner.status(0, SIZE)
        assert runner.read(0, SIZE) == model.disk
        runner.close()
        assert is_clean(path)
        again = Runner(env, f"qcow:{path}", OpenFlag.RDONLY)
        assert again.read(0, SIZE) == model.disk
        again.close()


def test_tables_are_dropped_and_read_again(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapcore.formats.qcow.mapping.CACHE_BYTES", 0)
    monkeypatch.setattr("tapcore.formats.qcow.mapping.MIN_CACHED", 2)
    size = 16 << 20
    path, _ = make_image(tmp_path, 9, size=size)
    runner = Runner(env, f"qcow:{path}")
    data = random.Random(1).randbytes(size)
    offsets = list(range(0, size, 65536))
    random.Random(2).shuffle(offsets)
    writes = [Request(WRITE, at, 4096, [memoryview(data)[at : at + 4096]]) for at in offsets]
    assert set(runner.run(*writes)) == {0}
    assert set(runner.run(*[Request(DISCARD, at, 4096) for at in offsets[::2]])) == {0}
    for at in offsets:
        assert runner.read(at, 4096) == (bytes(4096) if at in offsets[::2] else data[at : at + 4096])
    assert runner.flush() == 0 and runner.read(0, 512) is not None
    assert len(runner.head.mapping.tables) <= 2  # type: ignore[attr-defined]
    runner.close()
    report = TOOLS.check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages


def test_discarded_clusters_are_used_again_and_give_their_space_back(env: Env, tmp_path: Path) -> None:
    path, _ = make_image(tmp_path, 12, size=8 << 20)
    runner = Runner(env, f"qcow:{path}")
    assert runner.write(0, b"x" * (4 << 20)) == 0 and runner.flush() == 0
    full, length = path.stat().st_blocks, path.stat().st_size
    assert runner.discard(0, 4 << 20) == 0 and runner.flush() == 0
    released: list[bool] = []
    runner.chain.quiesce(lambda: released.append(True))
    env.loop.run_until(lambda: bool(released), 20)
    assert runner.write(4 << 20, b"y" * (2 << 20)) == 0
    runner.close()
    assert path.stat().st_blocks < full * 3 / 4
    assert path.stat().st_size <= length + 65536
    assert is_clean(path)


@pytest.mark.parametrize(("cluster_bits", "backing_bytes"), [(9, 0), (9, 32768), (12, 32768)])
def test_whatever_a_crash_leaves_is_whole(
    env: Env, tmp_path: Path, cluster_bits: int, backing_bytes: int
) -> None:
    size = 65536
    path, _ = make_image(tmp_path, cluster_bits, backing_bytes, size)
    before = path.read_bytes()
    RecordingFile.journal = journal = Journal()
    runner = Runner(env, f"qcow-recorded:{path}")
    history = History(bytearray(runner.read(0, size)))
    history.flushed.append((0, bytes(history.disk)))
    drive(runner, journal, history, random.Random(cluster_bits), 60)
    runner.close()
    crashed = tmp_path / "crashed.qcow"
    for cut in range(len(journal.entries) + 1):
        for seed in (None, cut):
            crashed.write_bytes(journal.crash(before, cut, None if seed is None else random.Random(seed)))
            report = TOOLS.check(str(crashed))
            assert report.errors == 0, (cut, seed, report.messages)
            again = Runner(env, f"qcow:{crashed}", OpenFlag.RDONLY)
            disk = again.read(0, size)
            again.close()
            allowed = history.allowed(cut)
            wrong = [at for at in range(0, size, SECTOR) if disk[at : at + SECTOR] not in allowed[at // SECTOR]]
            assert wrong == [], (cut, seed)
    assert TOOLS.check(str(crashed), repair=True).errors == 0
    assert is_clean(path) and is_clean(crashed)


def test_a_failed_write_leaves_the_disk_as_it_was(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make_image(tmp_path, 12)
    runner = Runner(env, f"qcow:{path}")
    file = runner.head.file  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(file, "write_inline", lambda iov, offset: 0)
        patch.setattr(file, "write", lambda iov, offset, length, **options: errno.ENOSPC)
        assert runner.write(4096, b"x" * 8192) == errno.ENOSPC
    assert runner.read(0, 65536) == bytes(65536)
    assert runner.write(4096, b"y" * 8192) == 0
    runner.close()
    assert is_clean(path)


def test_chains_of_qcow_keep_the_formats_of_their_backings(env: Env, tmp_path: Path) -> None:
    """Behind the name, where only this side looks."""
    (tmp_path / "0").write_bytes(b"0" * 65536)
    create(str(tmp_path / "1"), 65536, backing=Backing("0", "aio"), cluster_bits=9)
    for level in range(2, 31):
        create(str(tmp_path / f"{level}"), 65536, backing=Backing(f"{level - 1}", "qcow"))
    runner = Runner(env, f"qcow:{tmp_path / '30'}")
    assert len(runner.chain.drivers) == 31
    assert runner.write(4096, b"t" * 4096) == 0
    assert runner.read(0, 65536) == b"0" * 4096 + b"t" * 4096 + b"0" * 57344
    runner.close()


def test_a_backing_format_that_is_not_said_is_looked_at(env: Env, tmp_path: Path) -> None:
    path, disk = make_image(tmp_path, 12, SIZE)
    patched(path, HEADER.size + len("base.raw"), bytes(BACKING_FORMAT.size))
    runner = Runner(env, f"qcow:{path}")
    assert runner.read(0, SIZE) == disk
    runner.close()
    create(str(tmp_path / "middle"), SIZE, backing=Backing("base.raw", "aio"))
    (tmp_path / "middle").replace(tmp_path / "base.raw")
    with pytest.raises(ChainError, match="does not say the format of its backing file"):
        open_chain(env, f"qcow:{path}")


@pytest.mark.parametrize("name", [None, "other.raw", "n" * 1000])
def test_another_backing_is_switched_to_at_once(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    path, _ = make_image(tmp_path, 9, SIZE)
    before, crashed = path.read_bytes(), tmp_path / "crashed.qcow"
    RecordingFile.journal = journal = Journal()
    with monkeypatch.context() as patch:
        patch.setattr("tapcore.formats.qcow.create.ImageFile", RecordingFile)
        TOOLS.set_backing(str(path), Backing(name, "aio") if name else None)
    names = set()
    for cut in range(len(journal.entries) + 1):
        for seed in range(3):
            crashed.write_bytes(journal.crash(before, cut, random.Random(seed) if seed else None))
            assert TOOLS.check(str(crashed)).errors == 0
            names.add(backing_of(env, crashed))
    assert names == {"base.raw", name} and backing_of(env, path) == name
    assert is_clean(path)


def backing_of(env: Env, path: Path) -> str | None:
    driver = Qcow(env, str(path), OpenFlag.RDONLY)
    driver.open()
    driver.close()
    return driver.header.backing_file


def test_tapdisks_variant_is_read(env: Env, tmp_path: Path) -> None:
    """A second header, and an L1 table in either order; writing is refused."""
    path, _ = make_image(tmp_path, 12)
    runner = Runner(env, f"qcow:{path}")
    assert runner.write(0, b"x" * 4096) == 0
    runner.close()
    image = bytearray(path.read_bytes())
    fields = HEADER.unpack(image)
    entry = image[fields["l1_table_offset"] : fields["l1_table_offset"] + 8]
    at = len(image)
    for flags, l1 in ((3, entry), (1, entry[::-1])):
        HEADER.pack_into(image, 0, **fields | {"l1_table_offset": at})
        XEN_HEADER.pack_into(image, HEADER.size, xmagic=b"XEN\xfb", cksum=0, min_cluster_alloc=1, flags=flags)
        path.write_bytes(image[:at] + l1 + bytes(4088))
        runner = Runner(env, f"qcow:{path}", OpenFlag.RDONLY)
        assert runner.read(0, 8192) == b"x" * 4096 + bytes(4096)
        runner.close()
        assert TOOLS.describe(str(path))["variant"] == "xen"
        with pytest.raises(ChainError, match="read-only"):
            open_chain(env, f"qcow:{path}")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


@pytest.mark.parametrize(("offset", "data", "what"), [
    (0, b"QFIx", "magic"), (4, u32(2), "version 2"), (8, u64(1 << 50) + u32(4), "backing_file_offset"),
    (8, u64(48) + u32(5000), "backing_file_size 5000"),
    (8, u64(48) + u32(4), "NUL byte"), (24, u64(0), "size 0"), (24, u64(1000), "multiple of 512"),
    (24, u64(1 << 63), "absurd"), (24, u64(1 << 50), "more than 32 MiB"), (32, b"\x08", "cluster_bits 8"),
    (32, b"\x11", "cluster_bits 17"), (33, b"\x05", "l2_bits 5"), (33, b"\x0e", "l2_bits 14"), (36, u32(1), "AES"),
    (36, u32(7), "crypt_method 7"), (40, u64(0), "l1_table_offset"), (40, u64(50), "l1_table_offset"),
    (40, u64(1 << 62), "l1_table_offset"),
])
def test_a_header_that_cannot_be_right_is_named(
    env: Env, tmp_path: Path, offset: int, data: bytes, what: str
) -> None:
    path, _ = make_image(tmp_path, 12)
    patched(path, offset, data)
    before = path.read_bytes()
    with pytest.raises(ChainError, match=what):
        open_chain(env, f"qcow:{path}")
    for action in (TOOLS.check, TOOLS.describe, lambda path: TOOLS.set_backing(path, None)):
        with pytest.raises(ImageError, match=what):
            action(str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("entry", [1 << 50, 1234, 512, 1 << 63, 1 << 63 | 1 << 51 | 1 << 40, 1 << 63 | 5 << 51])
def test_a_bad_entry_is_an_error_where_it_is_used_alone(env: Env, tmp_path: Path, entry: int) -> None:
    path, _ = make_image(tmp_path, 12)
    runner = Runner(env, f"qcow:{path}")
    assert runner.write(0, b"x" * 8192) == 0
    runner.close()
    image = path.read_bytes()
    l1 = HEADER.unpack(image)["l1_table_offset"]
    l2 = int.from_bytes(image[l1 : l1 + 8], "big")
    patched(path, l2, u64(entry))
    runner = Runner(env, f"qcow:{path}")
    assert runner.run(Request(READ, 0, 4096, [memoryview(bytearray(4096))])) == [errno.EIO]
    assert runner.write(0, b"y" * 100) == errno.EIO and runner.discard(0, 4096) == errno.EIO
    assert runner.read(4096, 4096) == b"x" * 4096
    runner.close()
    report = TOOLS.check(str(path))
    assert report.errors == 1 and TOOLS.check(str(path), repair=True).errors == 1
    patched(path, l1, u64(entry & ~(1 << 63) | 1))
    assert TOOLS.check(str(path)).errors == 1


def test_overlaps_are_errors_and_leaks_are_freed(env: Env, tmp_path: Path) -> None:
    path, _ = make_image(tmp_path, 12)
    runner = Runner(env, f"qcow:{path}")
    assert runner.write(0, b"x" * 8192) == 0
    runner.close()
    image = path.read_bytes()
    l1 = HEADER.unpack(image)["l1_table_offset"]
    l2 = int.from_bytes(image[l1 : l1 + 8], "big")
    patched(path, l2 + 8, image[l2 : l2 + 8])
    assert TOOLS.check(str(path)).errors == 1
    patched(path, l2 + 8, bytes(8))
    report = TOOLS.check(str(path))
    assert (report.errors, report.leaks) == (0, 1)
    report = TOOLS.check(str(path), repair=True)
    assert (report.errors, report.leaks, report.repaired) == (0, 0, 1) and is_clean(path)


def test_create_refuses_what_no_image_can_be(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow")
    tries: list[Callable[[], None]] = [
        lambda: TOOLS.create(path, 1000), lambda: TOOLS.create(path, 0), lambda: TOOLS.create(path, 1 << 55),
        lambda: TOOLS.create(path, SIZE, options={"cluster_size": "128K"}),
        lambda: TOOLS.create(path, SIZE, options={"cluster_size": "5000"}),
        lambda: TOOLS.create(path, SIZE, backing=Backing("x" * 1024, "aio")),
        lambda: TOOLS.create(path, SIZE, backing=Backing("x", "ram")),
        lambda: TOOLS.create(path, SIZE, backing=Backing("x", "aio"), options={"cluster_size": "4K"})]
    for attempt in tries:
        with pytest.raises(UsageError):
            attempt()
    assert list(tmp_path.iterdir()) == []
    TOOLS.create(path, SIZE)
    with pytest.raises(ImageError, match="exists"):
        TOOLS.create(path, SIZE)
    with pytest.raises(ImageError, match="clusters have 4096 bytes"):
        TOOLS.set_backing(path, Backing("x", "aio"))
