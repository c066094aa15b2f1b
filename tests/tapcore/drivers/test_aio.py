"""aio: what runs where, how flushes share, and what happens when the page cache does not help."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner

from tapcore import ringfile, writewatch
from tapcore.driver import Env, OpenFlag
from tapcore.drivers import aio as aio_module
from tapcore.drivers.aio import Aio
from tapcore.errors import ChainError
from tapcore.request import BACKGROUND, DISCARD, FLUSH, FUA, READ, STATUS, WRITE, ZEROES, Request
from tapcore.writewatch import MAX_DETOUR_S, STALL_S, SUSPICION_S

SIZE = 1 << 20
TIMEOUT_S = 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def disk(env: Env, image: Path) -> Iterator[Runner]:
    runner = Runner(env, f"aio:{image}")
    yield runner
    runner.close()


def write(offset: int = 0, flags: int = 0, length: int = 4096) -> Request:
    return Request(WRITE, offset, length, [memoryview(bytes(length))], flags)


def read(offset: int = 0, flags: int = 0, length: int = 4096) -> Request:
    return Request(READ, offset, length, [memoryview(bytearray(length))], flags)


def evict(path: Path) -> bool:
    """Take the file out of the page cache; False if this file system does not let go."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with suppress(OSError):
            return os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) < 4096
        return True


def test_what_the_page_cache_has_is_read_at_once(disk: Runner) -> None:
    assert disk.read(256, 4096) == bytes(range(256)) * 16
    assert (disk.early, disk.late) == (1, 0)


def test_what_it_has_not_is_read_late(disk: Runner, image: Path) -> None:
    if not evict(image):
        pytest.skip("the page cache does not let go")
    assert disk.read(0, SIZE) == bytes(range(256)) * (SIZE // 256)
    assert (disk.early, disk.late) == (0, 1)


def test_without_a_ring_the_rest_of_a_read_that_the_cache_has_in_part_is_for_a_worker(
    disk: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_part(fd: int, iov: Sequence[memoryview], offset: int, flags: int) -> int:
        return os.preadv(fd, [iov[0][:1000]], offset, flags)

    monkeypatch.setattr(aio_module, "_preadv", in_part)
    monkeypatch.setattr(ringfile, "open_ring", lambda loop: None)
    rest: list[int] = []
    real = os.preadv

    def note(fd: int, iov: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        rest.append(offset)
        return real(fd, iov, offset, flags)

    monkeypatch.setattr(os, "preadv", note)
    assert disk.read(512, 4096) == (bytes(range(256)) * 20)[:4096]
    assert rest == [512, 1512] and disk.late == 1


def test_on_tmpfs_nothing_waits_for_a_worker(env: Env) -> None:
    with TemporaryDirectory(dir="/dev/shm") as name:
        (Path(name) / "disk.img").write_bytes(bytes(SIZE))
        disk = Runner(env, f"aio:{name}/disk.img")
        disk.run(read(), write(), read(4096))
        assert (disk.early, disk.late) == (3, 0)
        disk.close()


def test_where_reads_may_wait_and_cannot_be_told_not_to_they_are_for_workers(
    env: Env, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_nowait(fd: int, iov: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, "no NOWAIT here")
        return real(fd, iov, offset, flags)

    real = os.preadv
    monkeypatch.setattr(os, "preadv", no_nowait)
    disk = Runner(env, f"aio:{image}")
    assert disk.read(0, 256) == bytes(range(256))
    assert (disk.early, disk.late) == (0, 1)
    disk.close()


@pytest.mark.parametrize("request_", [
    read(flags=BACKGROUND), write(flags=BACKGROUND), write(flags=FUA), Request(FLUSH), Request(DISCARD, 0, 4096),
    Request(ZEROES, 0, 4096), Request(STATUS, 0, 4096),
], ids=repr)
def test_what_may_block_is_for_workers(disk: Runner, request_: Request) -> None:
    assert disk.run(request_) == [0]
    assert (disk.early, disk.late) == (0, 1)


def test_a_durable_write_is_written_with_dsync(disk: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    flags_used: list[int] = []
    real = os.pwritev

    def note(fd: int, iov: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        flags_used.append(flags)
        return real(fd, iov, offset, flags)

    monkeypatch.setattr(os, "pwritev", note)
    disk.run(write(flags=FUA), write(8192, BACKGROUND))
    assert sorted(flags_used) == [0, os.RWF_DSYNC]


def test_many_are_on_their_way_at_once(disk: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real queue depth: all of these are in preadv together."""
    together = threading.Barrier(8)
    real = os.preadv

    def meet(fd: int, iov: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        together.wait(TIMEOUT_S)
        return real(fd, iov, offset, flags)

    monkeypatch.setattr(os, "preadv", meet)
    assert disk.run(*[read(4096 * i, BACKGROUND) for i in range(8)]) == [0] * 8


class SlowSync:
    """An os.fdatasync that waits until it is let go."""

    def __init__(self) -> None:
        self.calls = 0
        self.begun = threading.Event()
        self.go = threading.Event()
        self.error = 0

    def __call__(self, fd: int) -> None:
        self.calls += 1
        self.begun.set()
        assert self.go.wait(TIMEOUT_S)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


def test_flushes_that_wait_together_share_one_begun_after_the_last(
    disk: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = SlowSync()
    monkeypatch.setattr(os, "fdatasync", sync)
    first, later = Request(FLUSH), [Request(FLUSH) for _ in range(5)]
    disk.start(first)
    assert sync.begun.wait(TIMEOUT_S)
    disk.start(*later[:3])
    disk.start(*later[3:])
    assert sync.calls == 1, "the first began too early to serve the others"
    sync.go.set()
    disk.wait()
    assert sync.calls == 2 and disk.late == 6


def test_a_failed_flush_fails_all_that_follow_until_the_image_is_opened_again(
    env: Env, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Runner(env, f"aio:{image}")
    sync = SlowSync()
    sync.go.set()
    sync.error = errno.EIO
    with caplog.at_level(logging.CRITICAL), monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", sync)
        assert disk.run(Request(FLUSH), Request(FLUSH)) == [errno.EIO] * 2
    assert disk.flush() == errno.EIO and disk.zeroes(0, 512, FUA) == errno.EIO
    assert disk.write(0, b"x") == 0 and disk.read(0, 1) == b"x"
    disk.close()
    disk = Runner(env, f"aio:{image}")
    assert disk.flush() == 0
    disk.close()


def test_a_worker_that_fails_in_an_unforeseen_way_reports_no_success(
    disk: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(fd: int, *_: object) -> int:
        raise MemoryError

    monkeypatch.setattr(os, "pwritev", bug)
    monkeypatch.setattr(os, "fdatasync", bug)
    with caplog.at_level(logging.CRITICAL):
        assert disk.run(write(flags=FUA), Request(FLUSH)) == [errno.EIO, errno.EIO]


def test_a_file_cut_short_gives_an_error_and_no_old_bytes(disk: Runner, image: Path) -> None:
    os.truncate(image, 4096)
    assert disk.run(read(0), read(4096), read(2048), read(65536)) == [0, errno.EIO, errno.EIO, errno.EIO]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_inline_is_tried_once_more_by_a_worker_and_then_failed(
    disk: Runner, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    tried: list[str] = []

    def fail(fd: int, iov: object, offset: int, flags: int = 0) -> int:
        tried.append(threading.current_thread().name[:6])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(aio_module, "_pwritev", fail)
    monkeypatch.setattr(os, "pwritev", fail)
    assert disk.run(write()) == [code]
    assert tried == ["MainTh", "worker"]


def test_a_short_write_is_finished_by_a_worker(
    disk: Runner, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio_module, "_pwritev", lambda fd, iov, offset: os.pwritev(fd, [iov[0][:100]], offset))
    assert disk.write(1, b"new data " * 100) == 0
    assert image.read_bytes()[:902] == b"\0" + b"new data " * 100 + b"\x85"
    assert disk.late == 1


class FakeTime:
    """A clock and a kernel in which each inline write takes `write_s`, waiting if `waits`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.write_s = 0.0
        self.waits = True
        self.waited = 0
        self.reads = 0
        monkeypatch.setattr(writewatch, "monotonic", self.monotonic)
        monkeypatch.setattr(writewatch, "_waits", lambda: self.waited)
        monkeypatch.setattr(aio_module, "_pwritev", self.pwritev)

    def monotonic(self) -> float:
        self.reads += 1
        return self.now_s

    def pwritev(self, fd: int, iov: Sequence[memoryview], offset: int) -> int:
        self.now_s += self.write_s
        self.waited += self.waits and self.write_s > 0
        return os.pwritev(fd, iov, offset)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return FakeTime(monkeypatch)


def inline(disk: Runner) -> bool:
    """Does a write go inline now?"""
    early = disk.early
    assert disk.write(0, bytes(4096)) == 0
    return disk.early > early


def test_writes_that_wait_for_write_back_take_a_detour(disk: Runner, time: FakeTime) -> None:
    assert inline(disk)
    time.write_s = 3 * STALL_S
    assert inline(disk), "slow for the first time: suspicion"
    assert inline(disk), "slow again, and it waited"
    assert not inline(disk) and not inline(disk)
    time.now_s += 0.99
    assert not inline(disk)
    time.now_s += 0.02
    disk.head.submit()
    time.write_s = 0
    assert inline(disk) and inline(disk)


def test_the_detour_gets_longer_while_it_does_not_help(disk: Runner, time: FakeTime) -> None:
    time.write_s = 3 * STALL_S
    lengths_s = []
    assert inline(disk)
    for _ in range(5):
        assert inline(disk)
        began_s = time.now_s
        while not inline(disk):
            time.now_s += 0.5
            disk.head.submit()
        lengths_s.append(round(time.now_s - began_s))
        time.now_s -= time.write_s
        disk.head.submit()
        head = disk.head
        assert isinstance(head, Aio)
        time.now_s = head._watch._detour_end_s
        disk.head.submit()
    assert lengths_s[0] == 1 and max(lengths_s) == MAX_DETOUR_S and lengths_s == sorted(lengths_s)


def test_a_thread_that_was_not_given_a_processor_takes_no_detour(disk: Runner, time: FakeTime) -> None:
    time.write_s = 3 * STALL_S
    time.waits = False
    assert all(inline(disk) for _ in range(5))


def test_slow_batches_far_apart_take_no_detour(disk: Runner, time: FakeTime) -> None:
    for _ in range(3):
        time.write_s = 3 * STALL_S
        assert inline(disk)
        time.write_s = 0
        time.now_s += 2 * SUSPICION_S
        assert inline(disk)


def test_much_data_takes_its_time(disk: Runner, time: FakeTime) -> None:
    time.write_s = STALL_S / 2
    for _ in range(4):
        assert disk.run(*[write(length=SIZE) for _ in range(4)]) == [0] * 4
    assert disk.late == 0


def test_the_clock_is_read_twice_a_batch_and_never_for_reads(disk: Runner, time: FakeTime) -> None:
    disk.run(*[write(4096 * i) for i in range(50)])
    assert time.reads == 2
    disk.run(*[read(4096 * i) for i in range(50)])
    assert time.reads == 2


@pytest.mark.parametrize("text, message", [
    ("aio:{}/none.img", "level 1 of {!r}: aio: cannot open the image for writing: No such file"),
    ("aio:{}", "level 1 of {!r}: aio: is a directory, not a disk image"),
    ("aio:fast,{}/disk.img", "level 1 of {!r}: aio: unknown option 'fast'; options of aio: direct"),
    ("aio:direct", "level 1 of {!r}: aio: no path in 'direct'"),
])
def test_what_cannot_be_opened(env: Env, image: Path, text: str, message: str) -> None:
    text = text.format(image.parent)
    with pytest.raises(ChainError) as caught:
        Runner(env, text)
    assert str(caught.value).startswith(message.format(text))


def test_two_do_not_write_one_image(env: Env, disk: Runner, image: Path) -> None:
    for text in (f"aio:{image}", f"sync:{image}", f"aio:direct,{image}"):
        with pytest.raises(ChainError, match="the image is in use"):
            Runner(env, text)
    query = Runner(env, f"aio:{image}", OpenFlag.QUERY)
    assert query.size == SIZE
    query.close()


def test_direct_io_goes_past_the_page_cache(env: Env, image: Path) -> None:
    if not evict(image):
        pytest.skip("the page cache does not let go")
    disk = Runner(env, f"aio:direct,{image}")
    assert disk.chain.info.min_block_bytes >= 512
    assert disk.read(0, SIZE) == bytes(range(256)) * (SIZE // 256)
    assert disk.write(100, b"x" * 9000) == 0
    assert disk.read(99, 9002) == bytes([99]) + b"x" * 9000 + bytes([9100 % 256])
    disk.close()
    with image.open("rb") as file, pytest.raises(BlockingIOError):
        os.preadv(file.fileno(), [bytearray(4096)], 524288, os.RWF_NOWAIT)
