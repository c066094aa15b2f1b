"""The log driver in a chain: what it marks, when, under which name."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from timeit import repeat

import pytest
from logrig import Hollow
from support import Manual

from tapcore.chain import open_chain
from tapcore.driver import Driver, Env, Filter, OpenFlag
from tapcore.drivers.log import MAX_EXTENTS, Log
from tapcore.errors import ChainError, LogError, UsageError
from tapcore.request import DISCARD, FLUSH, READ, WRITE, ZEROES, Request
from tapcore.rundir import default_run_dir
from writelog.logstore import forget

BLOCK = 4096
MIB = 1 << 20


class Late(Filter):
    """A filter that hooks completions itself and passes them on when `release` is called."""

    def open(self) -> None:
        self.held: list[Request] = []

    def queue_write(self, request: Request) -> bool:
        done = request.done

        def hold(request: Request) -> None:
            request.done = done
            self.held.append(request)

        request.done = hold
        if self.next.queue_write(request):
            request.done = done
            return True
        return False

    def release(self) -> None:
        for request in self.held:
            request.done(request)
        self.held.clear()


def make(env: Env, leaf: Driver, params: str = "disk", flags: OpenFlag = OpenFlag.NONE) -> Log:
    log = Log(env, params, flags)
    log.attach(leaf)
    log.open()
    return log


@pytest.fixture
def leaf(env: Env) -> Manual:
    leaf = Manual(env, str(MIB), OpenFlag.NONE)
    leaf.open()
    return leaf


@pytest.fixture
def log(env: Env, leaf: Manual) -> Iterator[Log]:
    log = make(env, leaf)
    yield log
    log.close()
    forget(env.run_dir, "disk")


def dirty(log: Log) -> list[int]:
    return list(log._map.dirty.bits.search(1))


def request_of(op: int, offset: int = BLOCK, length: int = BLOCK) -> tuple[Request, list[int]]:
    """A request, and the list of the errors that it was completed with."""
    ended: list[int] = []
    iov = [memoryview(bytearray(length))]
    return Request(op, offset, length, iov, done=lambda request: ended.append(request.error)), ended


CHANGES: list[tuple[int, Callable[[Log, Request], bool]]] = [
    (WRITE, Log.queue_write), (ZEROES, Log.queue_zeroes), (DISCARD, Log.queue_discard)]


@pytest.mark.parametrize(("op", "queue"), CHANGES)
def test_a_change_that_completes_early(
    log: Log, leaf: Manual, op: int, queue: Callable[[Log, Request], bool]
) -> None:
    leaf.early = True
    request, ended = request_of(op)
    assert queue(log, request) is True
    assert (dirty(log), log.figures().in_flight, ended) == ([1], 0, [])
    assert leaf.log == [(op, BLOCK, BLOCK, 0)]
    request.done(request)
    assert ended == [0]


@pytest.mark.parametrize("code", [0, errno.EIO])
@pytest.mark.parametrize(("op", "queue"), CHANGES)
def test_a_change_that_completes_late(
    log: Log, leaf: Manual, op: int, queue: Callable[[Log, Request], bool], code: int
) -> None:
    request, ended = request_of(op)
    assert queue(log, request) is False
    assert (dirty(log), log.figures().in_flight, ended) == ([1], 1, [])
    leaf.errors = [code] if code else []
    leaf.finish()
    assert (dirty(log), log.figures().in_flight, ended) == ([1], 0, [code])
    assert log._waiting == {}


def test_a_write_is_marked_before_it_goes_down(env: Env) -> None:
    opened: list[Log] = []
    seen: list[list[int]] = []

    class Looks(Hollow):
        def queue_write(self, request: Request) -> bool:
            seen.append(dirty(opened[0]))
            return True

    opened.append(make(env, Looks(env, MIB)))
    opened[0].queue_write(request_of(WRITE)[0])
    assert seen == [[1]]
    opened[0].close()
    forget(env.run_dir, "disk")


def test_a_write_is_in_flight_until_the_levels_below_are_through_with_it(env: Env, leaf: Manual) -> None:
    late = Late(env, "", OpenFlag.NONE)
    late.attach(leaf)
    late.open()
    log = make(env, late)
    request, ended = request_of(WRITE)
    assert log.queue_write(request) is False
    leaf.finish()
    assert (log.figures().in_flight, ended) == (1, [])
    late.release()
    assert (log.figures().in_flight, ended) == (0, [0])
    log.close()
    forget(env.run_dir, "disk")


def test_a_request_can_be_queued_again_from_its_completion(log: Log, leaf: Manual) -> None:
    tries: list[int] = []

    def again(request: Request) -> None:
        tries.append(request.error)
        if request.error:
            assert log.queue_write(request) is False

    leaf.errors = [errno.EIO, errno.EIO]
    request = Request(WRITE, 0, BLOCK, [memoryview(bytes(BLOCK))], done=again)
    log.queue_write(request)
    for _ in range(3):
        leaf.finish()
    assert tries == [errno.EIO, errno.EIO, 0]
    assert log.figures().in_flight == 0


def test_other_verbs_pass_unmarked(log: Log, leaf: Manual) -> None:
    leaf.early = True
    for op, verb in ((READ, log.queue_read), (FLUSH, log.queue_flush)):
        assert verb(request_of(op)[0]) is True
    assert dirty(log) == []
    assert log.info == leaf.info


@pytest.mark.parametrize(("text", "name"), [
    ("log:|manual:1048576", "1048576"),
    ("log:|log:lower|manual:1048576", "1048576"),
    ("log:vm-1.disk,granularity=65536|manual:1048576", "vm-1.disk"),
    ("log: spaced , granularity=512|manual:1048576", "spaced"),
])
def test_the_logs_name(env: Env, text: str, name: str) -> None:
    chain = open_chain(env, text)
    [log] = [driver for driver in chain.drivers[:1] if isinstance(driver, Log)]
    assert log.log_name == name
    assert log.socket_path == env.run_dir / f"log__{name}.ctl"
    assert log.socket_path.is_socket()
    chain.close()
    assert not list(env.run_dir.iterdir())
    assert forget(env.run_dir, name)
    forget(env.run_dir, "lower")


@pytest.mark.parametrize(("path", "name"), [
    ("disk.img", "disk.img"), ("my disk:1.img,2", "my_disk_1.img_2"), (None, "64M")])
def test_a_name_from_the_image_below(env: Env, tmp_path: Path, path: str | None, name: str) -> None:
    leaf = Hollow(env, MIB)
    if path is not None:
        (tmp_path / path).touch()
        leaf.path = str(tmp_path / path)
    leaf.params = "64M"
    log = make(env, leaf, "")
    assert log.log_name == name
    log.close()
    forget(env.run_dir, name)


def test_an_images_options_are_no_part_of_its_name(env: Env, tmp_path: Path) -> None:
    """Two images that are opened with the same options are two."""
    for name in ("a.img", "b.img"):
        (tmp_path / name).write_bytes(bytes(MIB))
        chain = open_chain(env, f"log:|aio:direct,{tmp_path / name}")
        assert isinstance(chain.head, Log)
        assert chain.head.log_name == name
        chain.close()
        assert forget(env.run_dir, name)


@pytest.mark.parametrize(("params", "message"), [
    ("a/b", "log name 'a/b'"),
    ("disk,size=3", "unknown option 'size=3'"),
    ("disk,granularity", "granularity '' is no number"),
    ("disk,granularity=4k", "granularity '4k' is no number"),
    ("disk,granularity=5000", "power of two"),
    ("disk,", "unknown option ''"),
    ("x" * 101, "log name"),
])
def test_parameters_that_make_no_sense(env: Env, params: str, message: str) -> None:
    with pytest.raises(ChainError, match=message):
        open_chain(env, f"log:{params}|manual:{MIB}")


def test_one_log_twice(env: Env) -> None:
    with pytest.raises(ChainError, match=r"in use by another tapdisk.*log:NAME"):
        open_chain(env, "log:a|log:a|manual:1048576")
    assert not list(env.run_dir.iterdir())
    forget(env.run_dir, "a")


def test_two_images_of_one_name_do_not_share_their_marks(env: Env) -> None:
    for path, expected in (("/a/disk.img", []), ("/a/disk.img", [1]), ("/b/disk.img", list(range(256)))):
        leaf = Hollow(env, MIB)
        leaf.params = path
        log = make(env, leaf, "")
        assert dirty(log) == expected
        log.queue_write(request_of(WRITE)[0])
        log.close()
    forget(env.run_dir, "disk.img")


def test_opened_to_be_queried_it_takes_nothing(env: Env, leaf: Manual) -> None:
    log = make(env, leaf, flags=OpenFlag.QUERY | OpenFlag.RDONLY)
    assert log.log_name == "disk"
    assert not list(env.run_dir.iterdir())
    with pytest.raises(LogError, match="not open"):
        log.figures()
    quiesced: list[bool] = []
    log.quiesce(lambda: quiesced.append(True))
    assert quiesced == [True]
    log.close()
    assert forget(env.run_dir, "disk") is False


def test_read_only_it_still_answers(env: Env, leaf: Manual) -> None:
    log = make(env, leaf, flags=OpenFlag.RDONLY)
    assert log.figures().dirty_blocks == 0
    assert log.socket_path.is_socket()
    log.close()
    forget(env.run_dir, "disk")


def test_marks_survive_closing(env: Env, leaf: Manual) -> None:
    for expected in ([], [1]):
        log = make(env, leaf)
        assert dirty(log) == expected
        log.queue_write(request_of(WRITE)[0])
        leaf.finish()
        log.close()
    forget(env.run_dir, "disk")


def test_dirty_extents_for_block_status(log: Log) -> None:
    assert log.dirty_extents(0, MIB) == [(MIB, False)]
    log._map.dirty.mark(BLOCK, 2 * BLOCK)
    log._map.dirty.mark(5 * BLOCK, 1)
    log._map.take(log._map.open_lease(), 1, 2, 1)
    assert log.dirty_extents(0, MIB) == [
        (BLOCK, False), (2 * BLOCK, True), (2 * BLOCK, False), (BLOCK, True), (MIB - 6 * BLOCK, False)]
    assert log.dirty_extents(BLOCK + 10, 100) == [(100, True)]
    assert log.dirty_extents(3 * BLOCK + 7, 20) == [(20, False)]
    assert log.dirty_extents(3 * BLOCK - 1, 2) == [(1, True), (1, False)]


def test_dirty_extents_have_a_limit(env: Env) -> None:
    size_bytes = 8 * MAX_EXTENTS * 512
    log = make(env, Hollow(env, size_bytes), "disk,granularity=512")
    log._map.dirty.bits[::2] = 1
    extents = log.dirty_extents(0, size_bytes)
    assert MAX_EXTENTS <= len(extents) <= 2 * MAX_EXTENTS
    assert extents[:2] == [(512, True), (512, False)]
    log.close()
    forget(env.run_dir, "disk")


def test_marking_costs_next_to_nothing(env: Env) -> None:
    leaf = Hollow(env, MIB)
    log = make(env, leaf)
    request = request_of(WRITE)[0]

    def cost_ns(queue: Callable[[Request], bool]) -> float:
        return min(repeat(lambda: queue(request), number=10_000, repeat=9)) / 10_000 * 1e9

    assert cost_ns(log.queue_write) - cost_ns(leaf.queue_write) < 1000
    log.close()
    forget(env.run_dir, "disk")


# The run directory

def test_run_dir_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPDISK_RUN_DIR", str(tmp_path / "a" / "b"))
    assert default_run_dir() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_run_dir_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAPDISK_RUN_DIR", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid or 12345)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_run_dir() == tmp_path / "tapdisk"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(UsageError, match="set TAPDISK_RUN_DIR"):
        default_run_dir()


def test_run_dir_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TAPDISK_RUN_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UsageError, match="cannot make the run directory"):
        default_run_dir()
