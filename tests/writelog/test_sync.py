"""The sync against real disks, real replicas, and replicas that break the rules."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sync_rig import SIZE_BYTES, Rig, Script, events, fail_with, free_port

from tapcore.driver import Env
from tapcore.nbd.wire import NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES
from writelog import wire
from writelog.keyring import load_authorized, load_keys
from writelog.replica import main as replica_main
from writelog.sync_pipeline import PAGE_BYTES, Arena, split, zero_checksum
from writelog.sync_report import Progress, Report, Reporter
from writelog.sync_source import Source
from writelog.wire import (
    Ack,
    Barrier,
    Content,
    Data,
    Digest,
    Hello,
    Message,
    Promote,
    Refused,
    Release,
    Verify,
    Zero,
    checksum,
)

BLOCK_BYTES = 64 << 10
METADATA_SECTORS = 64
"""What a file system may add to a file's blocks of its own."""


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk with scattered blocks of data in its first three quarters, more than the shared area holds."""
    path = tmp_path / "disk.img"
    random = Random(1)
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
        for block in range(0, SIZE_BYTES * 3 // 4, BLOCK_BYTES):
            if random.random() < 0.5:
                file.seek(block)
                file.write(random.randbytes(BLOCK_BYTES))
    return path


@pytest.fixture
def rig(env: Env, image: Path) -> Iterator[Rig]:
    rig = Rig(env, image)
    yield rig
    rig.close()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = tmp_path / "copy.img"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    return path


# Good runs


def test_hands_a_disk_over(rig: Rig, image: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = rig.replica(f"aio:{copy}", export="unix:/nbd")
    assert rig.sync("--json", "vm1", endpoint) == 0
    *others, report = events(capsys.readouterr().out)
    assert copy.read_bytes() == image.read_bytes()
    assert copy.stat().st_blocks <= image.stat().st_blocks + METADATA_SECTORS
    info = rig.info()
    assert info["state"] == "paused"
    assert info["fenced"] == f"handed over to {endpoint}"
    states = [event["state"] for event in others]
    states = [state for index, state in enumerate(states) if state not in states[:index]]
    assert states in (["connecting", "syncing", "switching"], ["connecting", "syncing", "converging", "switching"])
    data_bytes = sum(1 for start in range(0, SIZE_BYTES, BLOCK_BYTES)
                     if any(image.read_bytes()[start : start + BLOCK_BYTES])) * BLOCK_BYTES
    assert report["state"] == "done"
    assert (report["sent_bytes"], report["zero_bytes"]) == (data_bytes, SIZE_BYTES - data_bytes)
    assert (report["extra_bytes"], report["export"], report["handed_over"]) == (0, "unix:/nbd", True)
    assert list(report["pause_parts_s"]) == ["quiesce", "send", "flush", "epoch", "hand over", "promote"]
    assert report["pause_s"] == pytest.approx(sum(report["pause_parts_s"].values()))


def test_keeps_the_disk_and_compares_when_asked_to(
    rig: Rig, image: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = rig.replica(f"aio:{copy}")
    assert rig.sync("--keep-running", "--verify", "vm1", endpoint) == 0
    text = capsys.readouterr().out
    assert "whole disks compared: equal" in text
    assert "the disk stays here" in text
    assert copy.read_bytes() == image.read_bytes()
    assert rig.dirty_bytes() == 0
    assert rig.guest_goes_on()
    assert rig.dirty_bytes() == 4096
    assert rig.sync("--keep-running", "vm1", endpoint) == 0
    assert copy.read_bytes() == image.read_bytes()


def test_compressed_extents_arrive(rig: Rig, image: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image.write_bytes((b"text that repeats" * SIZE_BYTES)[:SIZE_BYTES // 2] + bytes(SIZE_BYTES // 2))
    assert rig.sync("--compress", "on", "--verify", "--json", "vm1", rig.replica(f"aio:{copy}")) == 0
    report = events(capsys.readouterr().out)[-1]
    assert copy.read_bytes() == image.read_bytes()
    assert (report["sent_bytes"], report["extra_bytes"]) == (SIZE_BYTES // 2, 0)
    assert report["wire_bytes"] < SIZE_BYTES // 20


def test_stale_data_at_the_replica_becomes_holes(rig: Rig, image: Path, copy: Path) -> None:
    copy.write_bytes((b"stale" * SIZE_BYTES)[:SIZE_BYTES])
    assert rig.sync("vm1", rig.replica(f"aio:{copy}")) == 0
    assert copy.read_bytes() == image.read_bytes()
    assert copy.stat().st_blocks <= image.stat().st_blocks + METADATA_SECTORS


@pytest.mark.parametrize(("chain", "durable"), [
    ("log:|aio:{path}", True), ("log:|aio:{path}", False), ("log:|delay:read=1,jitter=4|aio:{path}", True),
])
def test_writes_during_the_sync_arrive(env: Env, image: Path, script: Script, chain: str, durable: bool) -> None:
    """With each extent that arrives the guest submits writes somewhere, and waits for none.

    While nothing is durable before the barrier, blocks that are written again stay leased, and need a second one;
    with jitter the reads end in any order.
    """
    rig = Rig(env, image, chain)
    script.durable = durable
    random = Random(2)
    guest = rig.guest()
    play = script._play

    def meddle(message: Message, payload: Any) -> Message | None:
        for _ in range(5):
            offset = random.randrange(SIZE_BYTES // 512 - 16) * 512
            if isinstance(message, Data) and guest.in_flight < 200:
                data = random.randbytes(random.randrange(1, 16) * 512)
                guest.submit(NBD_CMD_WRITE, offset, len(data), data)
            elif isinstance(message, Zero) and guest.in_flight < 200:
                guest.submit(NBD_CMD_WRITE_ZEROES, offset, 8192)
        return play(message, payload)

    script._play = meddle  # type: ignore[method-assign]
    assert rig.sync("--verify", "vm1", script.endpoint) == 0
    assert guest.in_flight >= 100
    guest.close()
    assert script.memory == image.read_bytes()
    rig.close()


@pytest.mark.parametrize("when", [Data, Barrier, Promote])
@pytest.mark.parametrize("known", [True, False])
def test_goes_on_after_the_connection_dropped(
    rig: Rig, image: Path, script: Script, when: type[Any], known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def drop(_: object) -> None:
        del script.on[when]
        if not known:
            script.forget()
        raise Script.Drop

    script.on[when] = drop
    code = rig.sync("--json", "vm1", script.endpoint)
    output = capsys.readouterr()
    last = events(output.out)[-1]
    if when is Promote and not known:
        assert code == 1
        assert "handed over, but" in output.err
        assert rig.info()["fenced"]
        return
    assert code == 0
    assert script.connections == last["connections"] == 2
    assert script.memory == image.read_bytes()
    assert "stalled" in [event["state"] for event in events(output.out)]


# Failures


def failing(rig: Rig, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    """Run a sync that fails, see that the guest goes on, and return the line on stderr."""
    assert rig.sync(*arguments) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert rig.info()["fenced"] is None
    assert rig.guest_goes_on()
    return line


@pytest.mark.parametrize(("kind", "rule", "text"), [
    (Hello, lambda _: Refused(2, "the disk has 1 byte", "a hint"), "the disk has 1 byte; a hint"),
    (Data, fail_with(errno.ENOSPC, "the replica cannot write: No space"), "No space"),
    (Data, lambda message: Ack(message.seq + 1000, 0, 0, 0), "acknowledges seq"),
    (Data, lambda message: wire.seal(b"garbage"), "msgpack"),
    (Barrier, fail_with(errno.EIO, "the replica cannot flush"), "cannot flush"),
    (Barrier, lambda message: Digest(message.seq, bytes(16)), "did not apply what was sent"),
    (Verify, lambda _: Content(bytes(16)), "differs"),
])
def test_a_fault_of_the_replica_is_told_and_nothing_is_forgotten(
    rig: Rig, script: Script, capsys: pytest.CaptureFixture[str],
    kind: type[Any], rule: Callable[[Any], Any], text: str
) -> None:
    script.on[kind] = rule
    script.durable = False
    before_bytes = rig.dirty_bytes()
    assert text in failing(rig, capsys, "--verify", "vm1", script.endpoint)
    if kind in (Hello, Data, Verify):
        assert rig.dirty_bytes() == {Hello: before_bytes or 4096, Data: SIZE_BYTES, Verify: 4096}[kind]
    else:
        assert rig.dirty_bytes() == SIZE_BYTES


def test_only_what_is_durable_is_forgotten(
    rig: Rig, image: Path, script: Script, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.durable = False
    script.on[Barrier] = fail_with(errno.EIO, "no")
    failing(rig, capsys, "vm1", script.endpoint)
    assert rig.dirty_bytes() == SIZE_BYTES
    assert rig.sync("vm1", rig.replica(f"aio:{copy}")) == 0
    assert copy.read_bytes() == image.read_bytes()


def test_a_silent_replica_is_given_up(rig: Rig, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.on[Hello] = lambda _: None
    script._answer = lambda peer, answer: None  # type: ignore[method-assign]
    assert "silent for" in failing(rig, capsys, "--peer-timeout", "0.5", "vm1", script.endpoint)


def test_nobody_there(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(rig, capsys, "--peer-timeout", "0.3", "vm1", f"tcp://127.0.0.1:{free_port()}")
    assert "nobody answers there; is writelog-replica running" in line


def test_not_a_replica(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "silent" in failing(rig, capsys, "--peer-timeout", "0.3", "vm1", f"tcp://127.0.0.1:{port}")


def test_a_lost_promotion_is_told(rig: Rig, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.on[Promote] = fail_with(errno.EIO, "no")
    assert rig.sync("vm1", script.endpoint) == 1
    line = capsys.readouterr().err
    assert "handed over, but the replica did not say that it took over" in line
    assert "tap-ctl" in line
    assert rig.info()["fenced"]
    assert not rig.guest_goes_on()


def test_a_release_without_answer_is_no_failure(rig: Rig, script: Script) -> None:
    def drop(_: object) -> None:
        raise Script.Drop

    script.on[Release] = drop
    assert rig.sync("--keep-running", "vm1", script.endpoint) == 0
    assert rig.guest_goes_on()


def test_gives_up_when_the_time_is_over(rig: Rig, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.on[Barrier] = lambda _: None
    line = failing(rig, capsys, "--max-time", "0.3", "vm1", script.endpoint)
    assert "not done after 0.3 s" in line
    assert "--max-time" in line


def test_gives_up_when_it_does_not_converge(
    rig: Rig, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a budget that only tests may have."""
    monkeypatch.setattr("writelog.replica.MIN_DOWNTIME_S", 0.0)
    monkeypatch.setattr("writelog.sync.must_take", lambda *_: None)
    line = failing(rig, capsys, "--downtime", "0", "--patience", "0.3", "vm1", script.endpoint)
    assert "does not converge" in line
    assert "/s are sent" in line


def test_a_guest_that_would_never_let_it_end_is_slowed_down_and_freed_again(
    rig: Rig, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    slow_down = Source.slow_down

    def note(source: Source, rate: float | None) -> None:
        slow_down(source, rate)
        limits.append(rig.info()["write_limit"])
        os.kill(os.getpid(), signal.SIGTERM)

    def write() -> None:
        with rig.guest() as guest:
            while not limits:
                guest.write(random.randrange(SIZE_BYTES // BLOCK_BYTES) * BLOCK_BYTES, b"x" * BLOCK_BYTES)

    monkeypatch.setattr(Source, "slow_down", note)
    random = Random(5)
    guest = Thread(target=write, daemon=True)
    guest.start()
    options = ["--rate", "2M", "--throttle-floor", "256K", "--downtime", "0.05", "--compress", "off"]
    assert rig.sync(*options, "vm1", script.endpoint) == 130
    guest.join(10)
    assert limits[0] >= 256 << 10
    assert rig.guest_goes_on()
    assert rig.info()["write_limit"] is None


def test_breaks_long_pauses_off(rig: Rig, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    barriers: list[Barrier] = []
    script.on[Barrier] = barriers.append
    line = failing(rig, capsys, "--max-pause", "0.1", "vm1", script.endpoint)
    assert len(barriers) == 3
    assert "3 switch-overs took longer than 0.1 s" in line


def test_an_interrupt_leaves_the_guest_running(
    rig: Rig, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.on[Barrier] = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    script.durable = False
    assert "interrupted" in failing(rig, capsys, "vm1", script.endpoint, code=130)
    assert rig.dirty_bytes() == SIZE_BYTES


def test_an_unreadable_disk_is_told(
    env: Env, image: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = Rig(env, image, "log:|error:op=read,offset=0-4M|aio:{path}")
    try:
        assert "cannot be read" in failing(rig, capsys, "vm1", script.endpoint)
        assert rig.dirty_bytes() == SIZE_BYTES
    finally:
        rig.close()


def test_a_guest_whose_writes_hang_is_not_held_for_long(
    env: Env, image: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = Rig(env, image, "log:|delay:write=600|aio:{path}")
    try:
        with rig.guest() as guest:
            script.on[Hello] = lambda message: (
                guest.submit(NBD_CMD_WRITE, 0, 512, bytes(512)), script._play(message, None))[1]
            line = failing(rig, capsys, "--max-pause", "0.2", "--downtime", "5", "vm1", script.endpoint)
        assert "no answer to 'pause' within 0.2 s" in line
    finally:
        rig.close()


def test_a_replica_of_another_size_is_refused(rig: Rig, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(copy, SIZE_BYTES // 2)
    line = failing(rig, capsys, "vm1", rig.replica(f"aio:{copy}"))
    assert f"the disk has {SIZE_BYTES} bytes, the replica {SIZE_BYTES // 2}" in line
    assert "truncate -s" in line


def test_a_full_replica_is_told(rig: Rig, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = rig.replica(f"error:op=write,errno=ENOSPC|aio:{copy}")
    assert os.strerror(errno.ENOSPC) in failing(rig, capsys, "vm1", endpoint)
    assert not any(copy.read_bytes())


@pytest.mark.parametrize(("disk", "options", "code", "text"), [
    ("nosuch", [], 1, "there are vm1"), ("vm1", ["--log", "other"], 2, "no write log called 'other'"),
    ("vm1", ["--key", "/missing", "--server-key", "/missing"], 2, "/missing"),
])
def test_wrong_usage_is_told(
    rig: Rig, capsys: pytest.CaptureFixture[str], disk: str, options: list[str], code: int, text: str
) -> None:
    assert text in failing(rig, capsys, *options, disk, "tcp://127.0.0.1:1", code=code)


@pytest.mark.parametrize(("chain", "text"), [
    ("aio:{path}", "has no write log"), ("log:a|log:b|aio:{path}", "choose with --log: a, b"),
])
def test_the_log_must_be_clear(
    env: Env, image: Path, capsys: pytest.CaptureFixture[str], chain: str, text: str
) -> None:
    rig = Rig(env, image, chain)
    try:
        assert text in failing(rig, capsys, "vm1", "tcp://127.0.0.1:1", code=2)
    finally:
        rig.close()


def test_other_hosts_need_keys(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    assert "writelog pair" in failing(rig, capsys, "vm1", "tcp://192.0.2.7:1", code=2)


def test_a_second_sync_of_one_log_is_refused(
    rig: Rig, script: Script, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Source(rig.env.run_dir, "vm1")
    assert "another sync" in failing(rig, capsys, "vm1", script.endpoint)
    first.close()
    assert rig.sync("vm1", script.endpoint) == 0
    assert script.memory == image.read_bytes()


# Keys


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    for name in ("replica", "sync", "stranger"):
        assert replica_main(["keygen", str(tmp_path / "keys"), "--name", name]) == 0
    capsys.readouterr()
    return tmp_path / "keys"


def secured(rig: Rig, keys: Path, copy: Path) -> str:
    return rig.replica(f"aio:{copy}", keys=load_keys(keys / "replica.key_secret"),
                       authorize=load_authorized(keys / "sync.key").__contains__)


def test_keys_let_the_right_one_in(rig: Rig, keys: Path, image: Path, copy: Path) -> None:
    endpoint = secured(rig, keys, copy)
    options = ["--key", str(keys / "sync.key_secret"), "--server-key", str(keys / "replica.key")]
    assert rig.sync(*options, "vm1", endpoint) == 0
    assert copy.read_bytes() == image.read_bytes()


@pytest.mark.parametrize(("own", "server", "text"), [
    ("stranger", "replica", "does not know this sync's key"),
    ("sync", "stranger", "it has another key than the one that is known of it here"),
    (None, None, "may want keys"),
])
def test_wrong_keys_are_refused(
    rig: Rig, keys: Path, copy: Path, capsys: pytest.CaptureFixture[str], own: str | None, server: str | None,
    text: str
) -> None:
    endpoint = secured(rig, keys, copy)
    options = [f"--key={keys / own}.key_secret", f"--server-key={keys}/{server}.key"] if own else []
    assert text in failing(rig, capsys, *options, "vm1", endpoint)
    assert not any(copy.read_bytes())


def test_keys_for_a_replica_without(rig: Rig, keys: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = rig.replica(f"aio:{copy}")
    options = ["--key", str(keys / "sync.key_secret"), "--server-key", str(keys / "replica.key")]
    assert "or uses none" in failing(rig, capsys, *options, "vm1", endpoint)


# Parts


def test_on_a_terminal_one_line_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("writelog.sync_report.TTY_INTERVAL_S", 0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    reporter = Reporter("tty", out)
    reporter.state("syncing")
    for remaining_bytes in (3 << 20, 2 << 20):
        reporter.progress(Progress(1.0, 1 << 20, 0, remaining_bytes, 1 << 20, 0.0, 0.1, 2.0))
    report = Report("vm1", "tcp://127.0.0.1:1", 4 << 20, sent_bytes=1 << 20, extra_bytes=1 << 18)
    reporter.end(report.figures(), report.lines())
    text = out.getvalue()
    assert "syncing: sent 1 MiB at 1 MiB/s, remaining 3 MiB, 2 s left" in text
    assert text.index("3 MiB") < text.index("\x1b[2K") < text.index("2 MiB") < text.index("(+33.3 %)")


@given(st.lists(st.integers(1, 9 * PAGE_BYTES), max_size=60))
def test_arena_hands_nothing_out_twice(lengths: list[int]) -> None:
    size_bytes = 10 * PAGE_BYTES
    arena = Arena(size_bytes)
    out: list[tuple[int, int, int]] = []
    for length in lengths:
        while (part := arena.allocate(length)) is None:
            assert out, "an empty arena has room"
            arena.release(out.pop(0)[2])
        place, cost_bytes = part
        assert place % PAGE_BYTES == 0
        assert place + length <= size_bytes
        assert all(place + length <= other or other + size <= place for other, size, _ in out)
        out.append((place, length, cost_bytes))


@given(st.integers(0, 8), st.integers(1, 40), st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12))
def test_split_covers_the_extent_and_zeroes_only_what_the_map_says(
    first: int, sectors: int, pieces: list[tuple[int, bool]]
) -> None:
    offset, length = first * 512, sectors * 512
    zero: set[int] = set()
    extents, at = [], offset
    for size, is_zero in pieces:
        extents.append((at, size * 1024, is_zero))
        zero.update(range(at, at + size * 1024, 512) if is_zero else ())
        at += size * 1024
    items = list(split(offset, length, extents))
    assert items[0][1] == offset
    assert sum(size for _, _, size in items) == length
    for (_, start, size), (_, following, _) in pairwise(items):
        assert start + size == following
    for is_zero, start, size in items:
        assert size > 0
        if is_zero:
            assert zero.issuperset(range(start, start + size, 512))


def test_whole_zero_pages_are_found_by_split() -> None:
    assert list(split(0, 5 * PAGE_BYTES, [(0, PAGE_BYTES, False), (PAGE_BYTES, 3 * PAGE_BYTES, True)])) == [
        (False, 0, PAGE_BYTES), (True, PAGE_BYTES, 3 * PAGE_BYTES), (False, 4 * PAGE_BYTES, PAGE_BYTES)]
    assert zero_checksum(4096) == checksum(bytes(4096))
