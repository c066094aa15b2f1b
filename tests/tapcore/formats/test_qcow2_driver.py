"""The qcow2 driver against plain bytes, and what it refuses."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner
from formats_model import Model, disk_operations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tapcore.chain import open_chain
from tapcore.driver import Driver, Env, OpenFlag
from tapcore.drivers.qcow2 import Qcow2
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.formats.commit import Commit
from tapcore.formats.qcow2 import layout
from tapcore.formats.qcow2.changes import Qcow2Commit, Qcow2Writer
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.layout import COPIED, FEATURES, HEADER_V2
from tapcore.request import BACKGROUND, DISCARD, FLUSH, READ, WRITE, ZEROES, Request

SIZE = 100 * 1024 + 512
FIXTURE = [HealthCheck.function_scoped_fixture]


IMAGES = st.fixed_dictionaries({
    "cluster_bits": st.sampled_from((9, 10, 12, 16)),
    "refcount_bits": st.sampled_from((1, 2, 4, 8, 16, 32, 64)),
    "version": st.sampled_from((2, 3)),
}) | st.fixed_dictionaries({
    "cluster_bits": st.sampled_from((14, 15, 16)),
    "extended_l2": st.just(True),
}) | st.fixed_dictionaries({
    "data_file": st.just("a.data"),
    "data_file_raw": st.booleans(),
    "extended_l2": st.booleans(),
    "cluster_bits": st.just(14),
})


def make_image(folder: Path, options: dict[str, int], backing_bytes: int) -> bytes:
    """An image, over a raw backing file if that has any bytes; what the disk holds."""
    if options.get("version") == 2:
        options = options | {"refcount_bits": 16}
    if options.get("data_file_raw"):
        backing_bytes = 0
    backing = random.Random(3).randbytes(backing_bytes)
    (folder / "base.raw").write_bytes(backing)
    named = {"backing": "base.raw", "backing_format": "raw"} if backing else {}
    create(str(folder / "a.qcow2"), SIZE, **named, **options)  # type: ignore[arg-type]
    return backing[:SIZE].ljust(SIZE, b"\0")


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE)
@given(options=IMAGES, backing_sectors=st.sampled_from((0, 0, 33, 150, 300)),
       ops=st.lists(disk_operations(SIZE), min_size=5, max_size=40))
def test_any_sequence_over_any_backing(
    env: Env, options: dict[str, int], backing_sectors: int, ops: list[tuple[int, int, int, int, int]]
) -> None:
    with TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "a.qcow2"
        disk = make_image(Path(name), options, backing_sectors * 512)
        runner = Runner(env, f"qcow2:{path}")
        model = Model(runner, disk)
        model.run(ops)
        runner.status(0, SIZE)
        assert runner.read(0, SIZE) == model.disk
        runner.close()
        report = check(str(path))
        assert (report.errors, report.leaks) == (0, 0), report.messages
        again = Runner(env, f"qcow2:{path}", OpenFlag.RDONLY)
        assert again.read(0, SIZE) == model.disk
        again.close()


def test_tables_are_dropped_and_read_again(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two L2 tables and two refcount blocks, and clusters of 512 bytes, everything is missing all
    the time, and changed tables must be written before there is room."""
    for module in ("mapping", "refcounts"):
        monkeypatch.setattr(f"tapcore.formats.qcow2.{module}.CACHE_BYTES", 0)
        monkeypatch.setattr(f"tapcore.formats.qcow2.{module}.MIN_CACHED", 2)
    path = tmp_path / "a.qcow2"
    size = 1 << 20
    create(str(path), size, cluster_bits=9, refcount_bits=64)
    runner = Runner(env, f"qcow2:{path}")
    data = random.Random(1).randbytes(size)
    step = 4096
    offsets = list(range(0, size, step))
    random.Random(2).shuffle(offsets)
    requests = [Request(WRITE, at, step, [memoryview(data)[at : at + step]]) for at in offsets]
    assert set(runner.run(*requests)) == {0}
    assert b"".join(runner.read(at, step) for at in range(0, size, step)) == data
    assert runner.flush() == 0 and runner.read(0, step) == data[:step]
    assert len(runner.head.mapping.tables) <= 2  # type: ignore[attr-defined]
    assert set(runner.run(*[Request(DISCARD, at, step) for at in offsets[::2]])) == {0}
    runner.close()
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0)


def test_there_is_one_commit_at_a_time(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one that ended later would undo what a newer one wrote."""
    for module in ("mapping", "refcounts"):
        monkeypatch.setattr(f"tapcore.formats.qcow2.{module}.CACHE_BYTES", 0)
        monkeypatch.setattr(f"tapcore.formats.qcow2.{module}.MIN_CACHED", 2)
    commits: list[int] = []
    begin, succeeded = Qcow2Writer.begin_commit, Qcow2Commit.succeeded

    def counted_begin(self: Qcow2Writer) -> Commit:
        commits.append(1)
        return begin(self)

    def counted_end(self: Qcow2Commit) -> None:
        commits.append(-1)
        succeeded(self)

    monkeypatch.setattr(Qcow2Writer, "begin_commit", counted_begin)
    monkeypatch.setattr(Qcow2Commit, "succeeded", counted_end)
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20, cluster_bits=9, refcount_bits=64)
    runner = Runner(env, f"qcow2:{path}")
    offsets = list(range(0, 1 << 20, 4096))
    random.Random(2).shuffle(offsets)
    assert set(runner.run(*[Request(WRITE, at, 4096, [memoryview(b"w" * 4096)]) for at in offsets])) == {0}
    assert set(runner.run(*[Request(DISCARD, at, 4096) for at in offsets])) == {0}
    runner.close()
    assert len(commits) > 20 and set(accumulate(commits)) == {0, 1}


def test_discard_gives_the_space_back(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 8 << 20)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"x" * (4 << 20)) == 0 and runner.flush() == 0
    full, length = path.stat().st_blocks, path.stat().st_size
    assert runner.discard(0, 4 << 20) == 0 and runner.flush() == 0
    runner.close()
    assert path.stat().st_blocks < full / 4
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(4 << 20, b"y" * (4 << 20)) == 0
    runner.close()
    assert path.stat().st_size <= length + 65536, "the clusters were used again"
    assert check(str(path)).leaks == 0


def test_a_cluster_given_up_is_not_used_again_before_that_is_durable(env: Env, tmp_path: Path) -> None:
    """Not before a flush: until then a crash would let the former owner see what the next one wrote."""
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20, cluster_bits=12)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"a" * 4096) == 0 and runner.flush() == 0
    first = runner.head.mapping.find(0, 4096)  # type: ignore[attr-defined]
    assert runner.discard(0, 4096) == 0
    for cluster in range(1, 20):
        assert runner.write(cluster * 4096, b"b" * 4096) == 0
    extents = runner.head.mapping.find(0, 1 << 20)  # type: ignore[attr-defined]
    assert not any(host <= first[0][2] < host + length for kind, length, host in extents if kind == 0)
    runner.close()


def test_a_cluster_given_up_is_not_used_again_while_it_is_read(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20, cluster_bits=12)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"a" * 4096) == 0 and runner.flush() == 0
    file = runner.head.file  # type: ignore[attr-defined]
    go = threading.Event()
    real: Callable[..., int] = file.read_padded

    def slow(iov: list[memoryview], offset: int, length: int) -> int:
        assert go.wait(20)
        return real(iov, offset, length)

    data = bytearray(4096)
    with monkeypatch.context() as patch:
        patch.setattr(file, "read_padded", slow)
        runner.start(Request(READ, 0, 4096, [memoryview(data)], BACKGROUND))
        assert runner.discard(0, 4096) == 0 and runner.flush() == 0
        for cluster in range(1, 20):
            assert runner.write(cluster * 4096, b"b" * 4096) == 0
        assert runner.flush() == 0
        go.set()
        runner.wait()
    assert data == b"a" * 4096
    runner.close()
    assert check(str(path)).leaks == 0


def test_writers_of_one_new_cluster_queue_and_none_is_lost(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    (tmp_path / "base.raw").write_bytes(b"B" * 65536)
    create(str(path), 65536, backing="base.raw", backing_format="raw")
    runner = Runner(env, f"qcow2:{path}")
    pieces = [Request(WRITE, at, 100, [memoryview(bytes([at % 251]) * 100)], BACKGROUND if at % 3 else 0)
              for at in range(0, 60000, 300)]
    assert set(runner.run(*pieces)) == {0}
    expected = bytearray(b"B" * 65536)
    for at in range(0, 60000, 300):
        expected[at : at + 100] = bytes([at % 251]) * 100
    assert runner.read(0, 65536) == expected
    assert len(runner.head.mapping.find(0, 65536)) == 1  # type: ignore[attr-defined]
    runner.close()
    assert check(str(path)).leaks == 0


def test_a_failed_write_leaves_the_disk_as_it_was(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    runner = Runner(env, f"qcow2:{path}")
    file = runner.head.file  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(file, "write_inline", lambda iov, offset: 0)
        patch.setattr(file, "write", lambda iov, offset, length, **options: errno.ENOSPC)
        assert runner.write(4096, b"x" * 8192) == errno.ENOSPC
    assert runner.read(0, 65536) == bytes(65536)
    assert runner.write(4096, b"y" * 8192) == 0
    runner.close()
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0)


def test_a_failed_flush_is_said_and_the_next_one_writes_all(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"x" * 65536) == 0
    with monkeypatch.context() as patch:
        patch.setattr(runner.head.file, "write",  # type: ignore[attr-defined]
                      lambda iov, offset, length, **options: errno.ENOSPC)
        assert runner.flush() == errno.ENOSPC
    assert runner.flush() == 0
    runner.close()
    again = Runner(env, f"qcow2:{path}", OpenFlag.RDONLY)
    assert again.read(0, 65536) == b"x" * 65536
    again.close()


def test_lookups_of_cached_tables_make_no_io(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"x" * 262144) == 0
    before = runner.late
    assert runner.read(4096, 4096) == b"x" * 4096
    assert runner.read(60000, 20000) == b"x" * 20000
    assert runner.write(100, b"y" * 5000) == 0
    runner.status(0, 1 << 20)
    assert runner.late == before, "all of it was early"
    runner.close()


def test_a_chain_of_images_with_relative_names(env: Env, tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "0.raw").write_bytes(b"0" * 65536)
    create(str(folder / "1.qcow2"), 131072, backing="0.raw", backing_format="raw", cluster_bits=12)
    runner = Runner(env, f"qcow2:{folder / '1.qcow2'}")
    assert runner.write(4096, b"1" * 4096) == 0
    runner.close()
    create(str(tmp_path / "2.qcow2"), 196608, backing="sub/1.qcow2", backing_format="qcow2", cluster_bits=9)
    runner = Runner(env, f"qcow2:{tmp_path / '2.qcow2'}")
    assert runner.write(8192, b"2" * 100) == 0
    assert runner.read(0, 196608) == b"0" * 4096 + b"1" * 4096 + b"2" * 100 + b"0" * 57244 + bytes(131072)
    assert runner.status(65536, 131072) == [(131072, 3)]
    runner.close()


def test_a_backing_format_that_is_not_said(env: Env, tmp_path: Path) -> None:
    """A raw file and an image without a backing file of its own are believed; one with is not."""
    base, middle, top = tmp_path / "base", tmp_path / "middle", tmp_path / "top"
    base.write_bytes(b"r" * 65536)
    create(str(middle), 65536, backing="base", backing_format="raw")
    create(str(top), 65536, backing="base", backing_format="raw")
    plain = bytearray(top.read_bytes())
    plain[HEADER_V2.size + 40 : HEADER_V2.size + 48] = bytes(8)  # ends the extensions before the format's name
    top.write_bytes(plain)
    runner = Runner(env, f"qcow2:{top}")
    assert runner.read(0, 65536) == b"r" * 65536
    runner.close()
    base.write_bytes(middle.read_bytes())
    with pytest.raises(ChainError, match="does not say the format of its backing file"):
        open_chain(env, f"qcow2:{top}")


def patched(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


@pytest.mark.parametrize(("offset", "data", "what"), [
    (0, b"QFIx", "magic"),
    (4, u32(4), "version 4"),
    (20, u32(8), "cluster_bits 8"),
    (20, u32(60), "cluster_bits 60"),
    (24, u64((1 << 63) + 512), "size"),
    (24, u64(1 << 50), "l1_size 1 is too small"),
    (24, u64(1000), "multiple of 512"),
    (32, u32(1), "AES"),
    (32, u32(2), "LUKS"),
    (36, u32(0xFFFFFFFF), "l1_size"),
    (40, u64(12345), "l1_table_offset"),
    (40, u64(1 << 55), "l1_table_offset"),
    (48, u64(0), "refcount_table_offset"),
    (56, u32(0xFFFFFFFF), "refcount_table_clusters"),
    (60, u32(1 << 30), "nb_snapshots"),
    (72, u64(4), "does not say which"),
    (20, u32(13) + u64(1 << 20) + u32(0) + u32(1) + u64(3 << 13) + u64(1 << 13) + u32(1) + bytes(12) + u64(16),
     "cluster_bits 13 is less than 14"),
    (72, u64(1 << 50), "incompatible feature bit 50"),
    (72, u64(2), "marked corrupt"),
    (96, u32(7), "refcount_order 7"),
    (100, u32(103), "header_length 103"),
    (104, b"\1", "compression_type 1"),
    (112, u32(0x12345678) + u32(0x7FFFFFFF), "header extension"),
    (8, u64(2) + u32(4), "backing_file_offset"),
    (8, u64(200) + u32(5000), "backing_file_size"),
])
def test_a_header_that_cannot_be_right_is_named(
    env: Env, tmp_path: Path, offset: int, data: bytes, what: str
) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    patched(path, offset, data)
    before = path.read_bytes()
    with pytest.raises(ChainError, match=what):
        open_chain(env, f"qcow2:{path}")
    assert path.read_bytes() == before


def test_an_unknown_feature_is_called_by_its_name(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    patched(path, 72, u64(1 << 40))
    patched(path, 112, u32(layout.EXT_FEATURE_NAMES) + u32(48) + b"\0\x28" + b"time travel".ljust(46, b"\0"))
    with pytest.raises(ChainError, match="time travel"):
        open_chain(env, f"qcow2:{path}")


def test_an_image_marked_corrupt_is_read_only(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    patched(path, 72, u64(2))
    runner = Runner(env, f"qcow2:{path}", OpenFlag.RDONLY)
    assert runner.read(0, 4096) == bytes(4096)
    runner.close()


def test_autoclear_bits_are_cleared_by_a_writer_alone(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    patched(path, 88, u64(1 << 9))
    Runner(env, f"qcow2:{path}", OpenFlag.RDONLY).close()
    assert FEATURES.unpack(path.read_bytes(), 88)["bits"] == 1 << 9
    Runner(env, f"qcow2:{path}").close()
    assert FEATURES.unpack(path.read_bytes(), 88)["bits"] == 0


def test_a_chain_that_is_refused_changes_nothing(env: Env, tmp_path: Path) -> None:
    """Its parent is not there: neither are its bitmaps marked as out of date nor its refcounts rebuilt."""
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20, backing="missing.raw", backing_format="raw")
    patched(path, 72, u64(1))
    patched(path, 88, u64(1))
    before = path.read_bytes()
    with pytest.raises(ChainError, match=r"missing\.raw"):
        open_chain(env, f"qcow2:{path}")
    assert path.read_bytes() == before


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_the_refcounts_of_a_dirty_image_are_rebuilt(env: Env, tmp_path: Path, refcount_bits: int) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20, cluster_bits=9, refcount_bits=refcount_bits, lazy_refcounts=True)
    data = random.Random(4).randbytes(1 << 19)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(1000, data) == 0
    runner.close()
    table = HEADER_V2.unpack(path.read_bytes())["refcount_table_offset"]
    block = int.from_bytes(path.read_bytes()[table : table + 8], "big")
    patched(path, block, bytes(512))
    patched(path, 72, u64(1))
    assert check(str(path)).errors > 0
    runner = Runner(env, f"qcow2:{path}")
    assert runner.read(1000, len(data)) == data
    assert runner.write(0, b"new" * 1000) == 0
    runner.close()
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0)
    assert FEATURES.unpack(path.read_bytes(), 72)["bits"] == 0


def l2_offset(path: Path) -> int:
    data = path.read_bytes()
    l1 = HEADER_V2.unpack(data)["l1_table_offset"]
    return int.from_bytes(data[l1 : l1 + 8], "big") & ~COPIED


@pytest.mark.parametrize("entry", [
    COPIED | 0x1234 << 9,  # no cluster's offset
    COPIED | 1 << 50,  # outside the file
    COPIED | 65536 * 5 | 2,  # reserved bits
    1 << 62 | (1 << 54) - 1,  # compressed, outside the file
])
def test_a_bad_entry_is_an_error_where_it_is_used_alone(env: Env, tmp_path: Path, entry: int) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"x" * 131072) == 0
    runner.close()
    patched(path, l2_offset(path), u64(entry))
    runner = Runner(env, f"qcow2:{path}")
    data = bytearray(4096)
    assert runner.run(Request(READ, 0, 4096, [memoryview(data)])) == [errno.EIO]
    assert runner.write(0, b"y" * 4096) == errno.EIO
    assert runner.discard(0, 65536) == errno.EIO
    assert runner.read(65536, 4096) == b"x" * 4096
    runner.close()
    assert check(str(path)).errors > 0


def test_an_image_whose_refcounts_are_wrong_is_not_written_any_more(env: Env, tmp_path: Path) -> None:
    """A free cluster that is the L2 table: nothing is written over it."""
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"x" * 65536) == 0
    runner.close()
    block = 2 * 65536
    patched(path, block + 2 * (l2_offset(path) >> 16), b"\0\0")
    before = path.read_bytes()
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(65536, b"y" * 65536) == errno.EIO
    assert runner.write(0, b"y") == errno.EIO
    assert runner.read(0, 65536) == b"x" * 65536
    runner.close()
    assert path.read_bytes() == before


@pytest.fixture(scope="module", params=[False, True])
def template(request: pytest.FixtureRequest) -> bytes:
    """A small image with some of everything that is changed by flips."""
    with TemporaryDirectory() as name:
        path = Path(name) / "a.qcow2"
        create(str(path), 65536, cluster_bits=14 if request.param else 9, extended_l2=request.param)
        from tapcore.loop import Loop
        from tapcore.workers import Workers

        loop = Loop()
        env = Env(loop, Workers(loop, 2))
        runner = Runner(env, f"qcow2:{path}")
        for at in range(0, 65536, 4096):
            assert runner.write(at, b"d" * 1024) == 0
            assert runner.zeroes(at + 1024, 512) == 0
        runner.close()
        env.workers.close()
        loop.close()
        return path.read_bytes()


@settings(max_examples=100, deadline=None, suppress_health_check=FIXTURE)
@given(data=st.data())
def test_flipped_bytes_never_do_worse_than_an_error(env: Env, template: bytes, data: st.DataObject) -> None:
    image = bytearray(template)
    tables = [at for at in range(0, len(image), 512) if 0 < image.count(0, at, at + 512) < 512]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(tables)) + data.draw(st.integers(0, 127))
        image[at] = data.draw(st.integers(0, 255))
    with TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "a.qcow2"
        path.write_bytes(image)
        attempt(lambda: check(str(path)))
        for flags in (OpenFlag.RDONLY, OpenFlag.NONE):
            attempt(lambda flags=flags: use(env, path, flags))  # type: ignore[misc]
        assert path.stat().st_blocks * 512 < 4 << 20


def attempt(action: Callable[[], object]) -> None:
    try:
        action()
    except (ChainError, ImageError) as error:
        assert str(error)


def use(env: Env, path: Path, flags: OpenFlag) -> None:
    runner = Runner(env, f"qcow2:{path}", flags)
    try:
        size = min(runner.size, 1 << 20)
        reads = [Request(READ, at, 512, [memoryview(bytearray(512))]) for at in range(0, size, 512)]
        changes = [Request(WRITE, at, 700, [memoryview(b"w" * 700)]) for at in range(0, size - 1024, 3000)]
        changes += [Request(DISCARD, at, 2048) for at in range(0, size - 4096, 10240)]
        changes += [Request(ZEROES, at, 2048) for at in range(4096, size - 4096, 10240)]
        runner.run(*reads)
        if not flags & OpenFlag.RDONLY:
            runner.run(*changes, Request(FLUSH))
    finally:
        runner.close()


def test_create_refuses_what_no_image_can_be(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow2")
    for options in ({"size_bytes": 1000}, {"version": 4}, {"cluster_bits": 8}, {"refcount_bits": 3},
                    {"compression": "lz4"}, {"version": 2, "refcount_bits": 8}, {"backing": "x"},
                    {"backing": "x", "backing_format": "tape"}, {"backing": "x" * 2000, "backing_format": "raw"},
                    {"size_bytes": 1 << 50, "cluster_bits": 9}):
        with pytest.raises(UsageError):
            create(path, **{"size_bytes": 1 << 20, **options})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    create(path, 1 << 20)
    with pytest.raises(ImageError, match="exists"):
        create(path, 1 << 20)


def test_the_driver_is_known_by_its_name() -> None:
    assert Driver.registry["qcow2"] is Qcow2
