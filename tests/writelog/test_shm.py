"""Shared memory: names, rights, the region's parts, and bitmaps that outlive their process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tapcore.errors import LogError
from writelog import shm
from writelog.logstore import HEADER, LogStore, forget

GIB = 1 << 30


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    forget(tmp_path, "disk")


def shm_path(name: str) -> Path:
    return Path(f"/dev/shm{name}")


def open_store(
    run_dir: Path, size_bytes: int = GIB, granularity_bytes: int = 4096, identity: str = "a"
) -> LogStore:
    return LogStore(run_dir, "disk", size_bytes, granularity_bytes, identity)


# The region

def test_the_layout_is_that_of_the_protocol() -> None:
    assert shm.REGION_BYTES == 8 * 1024 * 1024
    assert shm.MAX_RANGES == 262_144
    assert shm.RING_OFFSET == 4 * 1024 * 1024
    assert shm.DATA_OFFSET == 4 * 1024 * 1024 + 4096
    assert shm.DATA_BYTES == 4_190_208
    assert shm.RESULT_OFFSET + shm.RESULT.size == shm.RING_OFFSET + 64


def test_a_region_is_the_owners_alone_and_shared() -> None:
    name = f"/log_test_{os.getpid()}.wlog"
    region = shm.Region.create(name)
    try:
        status = shm_path(name).stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_size == shm.REGION_BYTES
        assert status.st_blocks * 512 >= shm.REGION_BYTES
        other = shm.Region.attach(name)
        region.data[5] = 77
        assert other.data[5] == 77
        assert (len(region.export), len(region.page), len(region.data)) == (4 << 20, 4096, 4_190_208)
        other.close()
    finally:
        shm.unlink_shared(name)
        region.close()
    with pytest.raises(LogError, match="cannot open the region"):
        shm.Region.attach(name)


def test_a_view_outlives_close() -> None:
    name = f"/log_test_{os.getpid()}.wlog"
    region = shm.Region.create(name)
    shm.unlink_shared(name)
    view = region.data[:4]
    region.close()
    view[:] = b"late"
    assert bytes(view) == b"late"


def test_a_region_that_is_too_short() -> None:
    name = f"/log_test_{os.getpid()}.wlog"
    os.close(shm.create_shared(name))
    try:
        with pytest.raises(LogError, match="shorter than"):
            shm.Region.attach(name)
    finally:
        shm.unlink_shared(name)


def test_no_room() -> None:
    name = f"/log_test_{os.getpid()}.wlog"
    fd = shm.create_shared(name)
    try:
        with pytest.raises(LogError, match=r"no room for .* coarser granularity"):
            shm.allocate(fd, 1 << 60, name)
    finally:
        os.close(fd)
        shm.unlink_shared(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "x" * 101, "a\0b", "é", "a|b"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(LogError, match="log name"):
        shm.check_name(name)


def test_names_differ_by_run_dir_and_log(tmp_path: Path) -> None:
    names = {shm.bitmap_name(folder, name) for folder in (tmp_path, tmp_path / "b") for name in ("x", "y")}
    assert len(names) == 4
    assert all(name.startswith("/writelog_") and name.endswith(".bitmap") for name in names)


# The bitmaps

def test_a_fresh_log_is_empty_and_0600(run_dir: Path) -> None:
    store = open_store(run_dir)
    assert not store.map.dirty.bits.any()
    assert store.generation != 0
    assert stat.S_IMODE(shm_path(store.name).stat().st_mode) == 0o600
    store.close()


def test_what_was_marked_or_taken_is_dirty_after_reopening(run_dir: Path) -> None:
    store = open_store(run_dir)
    generation = store.generation
    store.map.dirty.mark(5 * 4096, 1)
    store.map.dirty.mark(9 * 4096, 1)
    lease = store.map.open_lease()
    store.map.take(lease, 9, 10, 1)
    store.close()
    store = open_store(run_dir)
    assert list(store.map.dirty.bits.search(1)) == [5, 9]
    assert not store.map.taken.bits.any()
    assert store.generation == generation
    store.close()


CHILD = """
import sys, pathlib
from writelog.logstore import LogStore
store = LogStore(pathlib.Path(sys.argv[1]), "disk", 1 << 30, 4096, "a")
store.map.dirty.mark(5 * 4096, 1)
store.map.dirty.mark(9 * 4096, 1)
store.map.take(store.map.open_lease(), 9, 10, 1)
print("ready", flush=True)
sys.stdin.read()
"""


def test_fault_6_kill_9_loses_nothing_and_frees_the_log(run_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run_dir)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == b"ready\n"
    with pytest.raises(LogError, match="in use by another tapdisk"):
        open_store(run_dir)
    with pytest.raises(LogError, match="in use by another tapdisk"):
        forget(run_dir, "disk")
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    store = open_store(run_dir)
    assert list(store.map.dirty.bits.search(1)) == [5, 9]
    store.close()


def _damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"nonsense")


def _truncate(path: Path) -> None:
    os.truncate(path, 100)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("spoil", [_damage, _truncate, _empty])
def test_a_damaged_bitmap_makes_everything_dirty(
    run_dir: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(run_dir)
    name, generation = store.name, store.generation
    store.close()
    spoil(shm_path(name))
    store = open_store(run_dir)
    assert store.map.dirty.bits.count() == store.map.blocks
    assert store.generation != generation
    assert "every block counts as dirty" in caplog.text
    store.close()
    store = open_store(run_dir)
    store.map.clear()
    store.close()
    store = open_store(run_dir)
    assert not store.map.dirty.bits.any()
    store.close()


@pytest.mark.parametrize("changed", [(2 * GIB, 4096, "a"), (GIB, 65536, "a"), (GIB, 4096, "b")])
def test_another_disk_makes_everything_dirty(run_dir: Path, changed: tuple[int, int, str]) -> None:
    store = open_store(run_dir)
    store.map.dirty.mark(0, 1)
    store.map.take(store.map.open_lease(), 0, 1, 1)
    store.close()
    store = open_store(run_dir, *changed)
    assert store.map.dirty.bits.count() == store.map.blocks
    assert not store.map.taken.bits.any()
    store.close()


def test_bits_past_the_end_are_no_blocks(run_dir: Path) -> None:
    store = open_store(run_dir, 5 * 4096)
    name = store.name
    store.close()
    with shm_path(name).open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8192)
    store = open_store(run_dir, 5 * 4096)
    assert store.map.dirty.bits.count() == 5
    store.close()


def test_a_bitmap_of_somebody_else_is_refused(run_dir: Path) -> None:
    store = open_store(run_dir)
    path = shm_path(store.name)
    store.close()
    path.chmod(0o644)
    try:
        with pytest.raises(LogError, match="not this user's alone"):
            open_store(run_dir)
    finally:
        path.chmod(0o600)


def test_a_disk_that_is_no_multiple_of_a_sector(run_dir: Path) -> None:
    with pytest.raises(LogError, match="multiple of 512"):
        open_store(run_dir, GIB + 100)


def test_no_room_for_a_new_bitmap_leaves_nothing(run_dir: Path) -> None:
    with pytest.raises(LogError, match="no room"):
        open_store(run_dir, 1 << 60, 512)
    assert forget(run_dir, "disk") is False


def test_regions_of_dead_processes_are_removed(run_dir: Path) -> None:
    stale, other = shm.region_name(run_dir, "disk", 1), shm.region_name(run_dir, "disk2", 1)
    for name in (stale, other):
        os.close(shm.create_shared(name))
    try:
        open_store(run_dir).close()
        assert not shm_path(stale).exists()
        assert shm_path(other).exists()
    finally:
        shm.unlink_shared(other)


def test_forget(run_dir: Path) -> None:
    store = open_store(run_dir)
    name = store.name
    store.close()
    assert forget(run_dir, "disk") is True
    assert not shm_path(name).exists()
    assert forget(run_dir, "disk") is False


def test_a_disk_of_nothing(run_dir: Path) -> None:
    store = open_store(run_dir, 0)
    assert store.map.blocks == 0
    store.map.clear()
    store.close()


def test_the_header_is_one_cache_line() -> None:
    assert HEADER.size == 144
