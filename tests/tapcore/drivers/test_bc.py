"""The read cache: what it keeps, what it forgets; and what it serves is right, whatever happens to its file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from contract.runner import Runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import Tapdisk
from support import Manual

from tapcore.control import find_disk
from tapcore.driver import Env, OpenFlag
from tapcore.drivers.bc import ReadCache
from tapcore.errors import ChainError
from tapcore.request import BACKGROUND, READ, WRITE, Request

BLOCK = 4096
SIZE = 64 * BLOCK
CONTENT = random.Random(1).randbytes(SIZE)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


def cache_of(runner: Runner) -> ReadCache:
    return cast(ReadCache, runner.head)


def counts(runner: Runner) -> tuple[int, int, int]:
    """hits, misses, damaged."""
    found = cache_of(runner).counters()
    return found["hits"], found["misses"], found["damaged"]


class Slow:
    """A cache above memory that answers when the test says so."""

    def __init__(self, env: Env, blocks: int = 8, options: str = "size=32K") -> None:
        self.runner = Runner(env, f"bc:block=4K,{options}|manual:{blocks * BLOCK}")
        self.below = Manual.opened[-1]
        for block in range(blocks):
            self.below.data[block * BLOCK : (block + 1) * BLOCK] = bytes([block + 1]) * BLOCK

    def read(self, offset: int, length: int, flags: int = 0) -> Request:
        request = Request(READ, offset, length, [memoryview(bytearray(length))], flags)
        self.runner.start(request)
        return request

    def write(self, offset: int, data: bytes) -> Request:
        request = Request(WRITE, offset, len(data), [memoryview(data)])
        self.runner.start(request)
        return request

    @property
    def reads_below(self) -> int:
        return sum(op == READ for op, *_ in self.below.log)


def data_of(request: Request) -> bytes:
    assert not request.error
    return b"".join(request.iov)


def test_a_block_is_fetched_once_for_all_who_wait_and_then_served(env: Env) -> None:
    slow = Slow(env)
    first, second, third = slow.read(0, 100), slow.read(4000, 200), slow.read(50, 8000)
    assert slow.below.log == [(READ, 0, BLOCK, 0), (READ, BLOCK, BLOCK, 0)]
    slow.below.finish()
    slow.runner.wait()
    assert data_of(first) == b"\1" * 100 and data_of(second) == b"\1" * 96 + b"\2" * 104
    assert data_of(third) == b"\1" * 4046 + b"\2" * 3954
    again = slow.read(1000, 4096)
    assert data_of(again) == b"\1" * 3096 + b"\2" * 1000 and slow.reads_below == 2
    assert slow.runner.chain.counters() == {"bc:block=4K,size=32K": {"hits": 2, "misses": 5, "damaged": 0}}
    slow.runner.close()


def test_missing_neighbours_are_fetched_together(env: Env) -> None:
    slow = Slow(env)
    slow.read(2 * BLOCK, BLOCK)
    slow.below.finish()
    slow.runner.wait()
    slow.read(0, 8 * BLOCK)
    assert slow.below.log[1:] == [(READ, 0, 2 * BLOCK, 0), (READ, 3 * BLOCK, 5 * BLOCK, 0)]
    slow.below.finish()
    slow.runner.close()


def test_what_nobody_asks_for_again_goes_first(env: Env) -> None:
    slow = Slow(env, options="size=16K")
    slow.below.early = True
    for block in (0, 1, 2, 3):
        slow.read(block * BLOCK, 1)
    slow.read(0, 1)
    for block in (4, 5, 6):
        slow.read(block * BLOCK, 1)
        assert len(cache_of(slow.runner)._slots.slot_of) == 4
    before = slow.reads_below
    slow.read(0, 1)
    assert slow.reads_below == before, "it was asked for twice"
    slow.runner.close()


def test_background_reads_pass_by(env: Env) -> None:
    slow = Slow(env)
    slow.below.early = True
    for _ in range(2):
        slow.read(0, 100, BACKGROUND)
    assert slow.below.log == [(READ, 0, 100, BACKGROUND)] * 2 and counts(slow.runner) == (0, 0, 0)
    slow.runner.close()


def test_a_write_during_a_fetch(env: Env) -> None:
    """The fetch may have read the former data: it is not kept, and who comes after the write gets another."""
    slow = Slow(env)
    before = slow.read(0, 10)
    write = slow.write(0, b"new" * 4)
    pending = slow.below.pending
    slow.below._run(pending[0])
    fetch, changing = pending
    del pending[:]
    slow.below._run(changing)
    changing.done(changing)
    after = slow.read(0, 10)
    assert len(pending) == 1, "a fetch of its own"
    slow.below.finish()
    fetch.done(fetch)
    slow.runner.wait()
    assert write.error == 0 and data_of(before) == b"\1" * 10 and data_of(after) == b"newnewnewn"
    assert data_of(slow.read(0, 10)) == b"newnewnewn"
    slow.runner.close()


def test_where_a_block_cannot_be_read_what_was_asked_for_perhaps_can(env: Env) -> None:
    runner = Runner(env, "bc:block=64K|error:op=read,offset=8192-12288|ram:1M")
    assert runner.read(0, 4096) == bytes(4096)
    request = Request(READ, 8000, 1000, [memoryview(bytearray(1000))])
    assert runner.run(request) != [0]
    runner.close()


Action = tuple[str, int, int]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(("read", "read", "write", "run", "run", "end", "end")),
                          st.integers(0, 1), st.integers(0, 3)), max_size=60))
def test_a_read_shows_every_write_that_ended_before_it(env: Env, script: list[Action]) -> None:
    slow = Slow(env, blocks=2, options="size=8K")
    old = [{block + 1} for block in range(2)]
    """What a read that begins now may find."""
    value = 10
    writing: dict[Request, tuple[int, int]] = {}
    reading: dict[Request, tuple[int, set[int]]] = {}
    ran: list[Request] = []
    """Done below, and not yet said to be."""

    def look() -> None:
        for request in [request for request in writing if request not in slow.runner._waiting]:
            block, number = writing.pop(request)
            old[block] = {number}
        for request in [request for request in reading if request not in slow.runner._waiting]:
            block, allowed = reading.pop(request)
            assert set(data_of(request)) <= allowed

    for kind, block, number in script:
        if kind == "read":
            request = slow.read(block * BLOCK + 100 * number, 50)
            reading[request] = (block, old[block].copy())
        elif kind == "write" and block not in [found for found, _ in writing.values()]:
            value = value % 250 + 1
            writing[slow.write(block * BLOCK, bytes([value]) * BLOCK)] = (block, value)
            old[block].add(value)
            for at, allowed in reading.values():
                if at == block:
                    allowed.add(value)
        elif kind == "run" and slow.below.pending:
            request = slow.below.pending.pop((block * 4 + number) % len(slow.below.pending))
            slow.below._run(request)
            ran.append(request)
        elif kind == "end" and ran:
            request = ran.pop((block * 4 + number) % len(ran))
            request.done(request)
        look()
    for request in ran:
        request.done(request)
    while slow.below.pending:
        slow.below.finish()
    look()
    for block in range(2):
        reading[slow.read(block * BLOCK, 10)] = (block, old[block])
        slow.below.finish()
        look()
    slow.runner.close()


# The file


def chain(disk: Path, options: str = "size=128K", between: str = "") -> str:
    return f"bc:block=4K,{options},file={disk.parent}/cache|{between}aio:{disk}"


def fill(env: Env, text: str, offsets: list[int] | None = None) -> None:
    """Read, so that it is kept."""
    runner = Runner(env, text, OpenFlag.RDONLY)
    for offset in offsets or [0, 5 * BLOCK + 7, 20 * BLOCK]:
        assert runner.read(offset, 1000) == CONTENT[offset : offset + 1000]
    runner.close()


def test_the_file_is_used_again(env: Env, disk: Path) -> None:
    fill(env, chain(disk))
    runner = Runner(env, chain(disk, between="error:|"), OpenFlag.RDONLY)
    assert runner.read(5 * BLOCK, BLOCK) == CONTENT[5 * BLOCK : 6 * BLOCK]
    assert runner.read(100, 100) == CONTENT[100:200] and counts(runner) == (2, 0, 0)
    runner.close()


@pytest.mark.parametrize("change", ["content", "replaced", "other", "size", "block", "id"])
def test_a_file_of_another_content_is_not_used(env: Env, disk: Path, change: str) -> None:
    fill(env, chain(disk))
    content, options = CONTENT, "size=128K"
    if change in ("content", "replaced", "other"):
        content = random.Random(2).randbytes(SIZE)
    if change == "replaced":
        (disk.parent / "new").write_bytes(content)
        (disk.parent / "new").rename(disk)
    elif change == "other":
        disk = disk.with_name("other.img")
    elif change in ("size", "block", "id"):
        options = {"size": "size=64K", "block": "size=128K,id=", "id": "size=128K,id=two"}[change]
    if change in ("content", "other"):
        disk.write_bytes(content)
    text = chain(disk, options)
    runner = Runner(env, text.replace("block=4K", "block=8K") if change == "block" else text, OpenFlag.RDONLY)
    assert runner.read(0, SIZE) == content
    assert counts(runner)[0] == 0
    runner.close()


def test_after_a_write_nothing_of_the_file_is_believed(env: Env, disk: Path) -> None:
    fill(env, chain(disk))
    runner = Runner(env, chain(disk))
    assert runner.read(0, 10) == CONTENT[:10] and counts(runner) == (1, 0, 0)
    assert runner.write(BLOCK, b"x" * 10) == 0
    assert runner.read(BLOCK, 12) == b"x" * 10 + CONTENT[BLOCK + 10 : BLOCK + 12]
    crashed = (disk.parent / "cache").read_bytes()
    runner.close()
    for content in (None, crashed):
        if content is not None:
            (disk.parent / "cache").write_bytes(content)
        again = Runner(env, chain(disk), OpenFlag.RDONLY)
        assert again.read(BLOCK, 10) == b"x" * 10 and counts(again) == (0, 1, 0)
        again.close()


def test_a_mark_that_cannot_be_made_lets_no_write_through(
    env: Env, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(env, chain(disk))
    monkeypatch.setattr("tapcore.formats.imagefile.ImageFile.sync", lambda file: 5)
    assert runner.write(0, b"x") == 5
    monkeypatch.undo()
    assert runner.read(0, 1) == CONTENT[:1] and runner.write(0, b"x") == 0
    runner.close()


@pytest.mark.parametrize("where", ["data", "sum", "block", "all"])
def test_what_is_damaged_is_read_from_below(env: Env, disk: Path, where: str) -> None:
    fill(env, chain(disk))
    cache = disk.parent / "cache"
    data = bytearray(cache.read_bytes())
    if where == "all":
        data[4096:] = random.Random(3).randbytes(len(data) - 4096)
    else:
        at = {"data": data.index(CONTENT[:BLOCK]) + 5, "sum": 4096 + 9, "block": 4096 + 1}[where]
        data[at] ^= 1
    cache.write_bytes(data)
    runner = Runner(env, chain(disk), OpenFlag.RDONLY)
    assert runner.read(0, SIZE) == CONTENT
    assert runner.read(0, SIZE) == CONTENT
    assert where == "all" or counts(runner)[2] == (where != "block")
    runner.close()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1 << 32))
def test_whatever_a_crash_leaves_of_the_file_is_right_or_seen_to_be_wrong(env: Env, disk: Path, seed: int) -> None:
    """Any sectors of an older and a newer state of the file, between which blocks were replaced."""
    rng = random.Random(seed)
    cache = disk.parent / "cache"
    cache.unlink(missing_ok=True)
    disk.write_bytes(CONTENT)
    text = chain(disk, "size=16K")
    fill(env, text, [rng.randrange(60) * BLOCK for _ in range(3)])
    older = cache.read_bytes()
    fill(env, text, [rng.randrange(60) * BLOCK for _ in range(8)])
    newer = cache.read_bytes()
    assert len(older) == len(newer)
    cache.write_bytes(b"".join(rng.choice((older, newer))[at : at + 512] for at in range(0, len(older), 512)))
    runner = Runner(env, text, OpenFlag.RDONLY)
    for block in rng.sample(range(64), 64):
        assert runner.read(block * BLOCK, BLOCK) == CONTENT[block * BLOCK : (block + 1) * BLOCK]
    runner.close()


def test_a_snapshot_below_ends_the_belief_in_the_file(env: Env, disk: Path, tmp_path: Path) -> None:
    fill(env, chain(disk))
    other = tmp_path / "other.img"
    other.write_bytes(CONTENT)
    runner = Runner(env, chain(disk))
    replacement = Runner(env, f"aio:{other}")
    former = runner.chain.leaf
    runner.chain.stand_on(replacement.head)
    former.close()
    assert runner.read(0, 10) == CONTENT[:10] and counts(runner) == (1, 0, 0), "what is kept is right"
    assert runner.write(0, b"x" * 10) == 0 and runner.read(0, 10) == b"x" * 10
    runner.close()
    again = Runner(env, chain(disk), OpenFlag.RDONLY)
    assert again.read(0, 10) == CONTENT[:10] and counts(again)[0] == 0
    again.close()


def test_one_file_belongs_to_one_disk(env: Env, disk: Path) -> None:
    runner = Runner(env, chain(disk), OpenFlag.RDONLY)
    with pytest.raises(ChainError, match=r"bc: the cache .*/cache is in use; give each disk a file of its own"):
        Runner(env, chain(disk), OpenFlag.RDONLY)
    runner.close()


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: path.write_bytes(bytes(5000)), "is not a read cache, and not empty; remove it if"),
    (lambda path: path.write_bytes(b"data"), "is not a read cache, and not empty; remove it if"),
    (lambda path: path.symlink_to("disk.img"), "cannot open the cache: Too many levels of symbolic links"),
    (lambda path: path.mkdir(), "cannot open the cache: Is a directory"),
])
def test_other_files_are_left_alone(env: Env, disk: Path, make: Callable[[Path], object], message: str) -> None:
    cache = disk.parent / "cache"
    make(cache)
    before = cache.read_bytes() if cache.is_file() else None
    with pytest.raises(ChainError, match=message):
        Runner(env, chain(disk), OpenFlag.RDONLY)
    assert before is None or cache.read_bytes() == before
    assert disk.read_bytes() == CONTENT


@pytest.mark.parametrize(("text", "message"), [
    ("bc:block=5K|ram:1M", "block '5K' is not a power of two from 4K to 1M"),
    ("bc:size=4K|ram:1M", "size '4K' is not 1 to 16777216 blocks of 65536 bytes"),
    ("bc:file=x|ram:1M", "file 'x' is not a path; a path begins with"),
    ("bc:file={folder}/c|ram:1M", "whether ram:1M has changed cannot be seen; give its content an id"),
    ("bc:colour=red|ram:1M", "unknown option 'colour=red'"),
])
def test_options_that_cannot_be(env: Env, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ChainError, match=message):
        Runner(env, text.format(folder=tmp_path))
    assert not (tmp_path / "c").exists()


def test_a_killed_tapdisk_leaves_what_it_has_read(serve: Callable[..., Tapdisk], disk: Path) -> None:
    tapdisk = serve(chain(disk), "--read-only", "--name", "vm")
    with tapdisk.client() as client:
        assert client.read(0, 100) == CONTENT[:100]
        for _ in range(100_000):
            if any((disk.parent / "cache").read_bytes()[4096:8192]):
                break
            client.read(0, 1)
    tapdisk.kill()
    again = serve(chain(disk), "--read-only", "--name", "vm")
    with again.client() as client, find_disk(again.run_dir, "vm") as control:
        assert client.read(50, 100) == CONTENT[50:150]
        (figures,) = control.call("stats", disk="vm")["disks"]["vm"]["drivers"].values()
        assert figures == {"hits": 1, "misses": 0, "damaged": 0}
