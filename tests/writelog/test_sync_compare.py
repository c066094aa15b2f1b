"""A sync to a target that has most of the disk already: only what differs goes over the link."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from livewriter import LiveWriter
from sync_rig import SIZE_BYTES, Rig, Script, events, fail_with

from tapcore.driver import Env
from writelog import sync_link, wire
from writelog.hashtree import GRAIN_BYTES, LEAF_BYTES
from writelog.sync_compare import LEAST_PART, ONE_OF, Comparison
from writelog.wire import Barrier, Data, Digest, Packed, Probe, Probed, Zero

COMPARE = ("--compare", "--compress", "off", "--json", "vm1")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def content() -> bytes:
    """Of a disk whose last quarter is empty."""
    return Random(3).randbytes(SIZE_BYTES * 3 // 4) + bytes(SIZE_BYTES // 4)


@pytest.fixture
def rig(env: Env, tmp_path: Path, content: bytes) -> Iterator[Rig]:
    image = tmp_path / "disk.img"
    image.write_bytes(content)
    rig = Rig(env, image)
    yield rig
    rig.close()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


def old_copy(path: Path, content: bytes, places: list[int], length: int = LEAF_BYTES) -> Path:
    """One in which `length` bytes from each of `places` on are others."""
    old = bytearray(content)
    for place in places:
        old[place : place + length] = bytes(byte ^ 0xFF for byte in old[place : place + length])
    path.write_bytes(old)
    return path


@pytest.mark.parametrize(("places", "length", "sent_bytes"), [
    ([], 0, 0),
    ([0, 5 * LEAF_BYTES + 17, SIZE_BYTES // 2], 1, 3 * LEAF_BYTES),
    ([3 << 20], 1 << 20, 1 << 20),
    ([SIZE_BYTES - (1 << 20)], LEAF_BYTES, 0),
])
def test_only_what_differs_moves(
    rig: Rig, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str], places: list[int], length: int,
    sent_bytes: int
) -> None:
    copy = old_copy(tmp_path / "copy.img", content, places, length)
    assert rig.sync(*COMPARE, "--verify", rig.replica(f"aio:{copy}")) == 0
    report = events(capsys.readouterr().out)[-1]
    assert copy.read_bytes() == content
    assert (report["sent_bytes"], report["extra_bytes"]) == (sent_bytes, 0)
    assert report["wire_bytes"] <= sent_bytes + SIZE_BYTES // 1000
    assert report["equal_bytes"] + report["zero_bytes"] == SIZE_BYTES - sent_bytes
    assert report["zero_bytes"] >= SIZE_BYTES // 8


def test_an_old_copy_of_another_name_is_compared_if_it_may_be_overwritten(
    rig: Rig, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = old_copy(tmp_path / "copy.img", content, [])
    endpoint = rig.replica(f"aio:{copy}")
    assert rig.sync("--keep-running", *COMPARE, endpoint) == 0
    with rig.log() as log:
        log.fill()
    assert rig.sync(*COMPARE, endpoint) == 1
    assert rig.sync("--overwrite", *COMPARE, endpoint) == 0
    assert events(capsys.readouterr().out)[-1]["sent_bytes"] == 0
    assert copy.read_bytes() == content


def test_a_guest_that_writes_all_the_while_loses_nothing(rig: Rig, tmp_path: Path, content: bytes) -> None:
    copy = old_copy(tmp_path / "copy.img", content, list(range(0, SIZE_BYTES // 2, 1 << 20)))
    endpoint = rig.replica(f"aio:{copy}")
    guest = LiveWriter(rig.uri, content, trims=False)
    assert rig.sync("--keep-running", *COMPARE, "--rate", "20M", endpoint) == 0
    disk = guest.stop()
    assert rig.sync("--keep-running", *COMPARE, "--verify", endpoint) == 0
    assert copy.read_bytes() == disk


@pytest.mark.parametrize("durable", [True, False])
def test_writes_with_each_answer_arrive(rig: Rig, script: Script, content: bytes, durable: bool) -> None:
    """While nothing is durable before the barrier no portion is over before it."""
    random = Random(4)
    script.durable = durable
    script.memory[:] = content
    for place in range(0, SIZE_BYTES // 2, 300_000):
        script.memory[place] ^= 1
    play = script._play
    places = [random.randrange(SIZE_BYTES // 512) * 512 for _ in range(100)]
    with rig.guest() as guest:
        def meddle(message: Any, payload: Any) -> Any:
            for _ in range(3 if places and isinstance(message, Probe | Data) else 0):
                guest.write(places[-1], random.randbytes(512))
            if places:
                places.pop()
            return play(message, payload)

        script._play = meddle  # type: ignore[method-assign]
        assert rig.sync("--verify", *COMPARE, script.endpoint) == 0
    assert script.memory == rig.image.read_bytes()


def test_what_was_compared_counts_only_when_it_is_durable(rig: Rig, script: Script, content: bytes) -> None:
    script.memory[:] = content
    script.durable = False
    script.on[Barrier] = fail_with(errno.EIO, "no")
    assert rig.sync(*COMPARE, script.endpoint) == 1
    assert rig.dirty_bytes() == SIZE_BYTES


@pytest.mark.parametrize("when", [Probe, Barrier])
def test_goes_on_after_the_connection_dropped(
    rig: Rig, script: Script, content: bytes, capsys: pytest.CaptureFixture[str], when: type[Any]
) -> None:
    script.memory[: SIZE_BYTES // 2] = content[: SIZE_BYTES // 2]

    def drop(_: object) -> None:
        del script.on[when]
        raise Script.Drop

    script.on[when] = drop
    assert rig.sync("--verify", *COMPARE, script.endpoint) == 0
    assert script.connections == 2
    assert script.memory == content
    report = events(capsys.readouterr().out)[-1]
    assert report["sent_bytes"] == SIZE_BYTES // 4


@pytest.mark.parametrize(("answer", "text"), [
    (lambda probe: Probed(probe.seq + 1, b"\0"), "was not sent so"),
    (lambda probe: Probed(probe.seq, b"\0\0\0"), "was not sent so"),
    (lambda probe: Probed(probe.seq, b"\xff" * 16), "was not sent so"),
])
def test_a_senseless_answer_ends_it(
    rig: Rig, script: Script, capsys: pytest.CaptureFixture[str], answer: Callable[[Probe], Probed], text: str
) -> None:
    script.on[Probe] = answer
    assert rig.sync(*COMPARE, script.endpoint) == 1
    assert text in capsys.readouterr().err
    assert rig.dirty_bytes() == SIZE_BYTES
    assert rig.guest_goes_on()


def test_an_answer_that_the_replica_did_not_give_is_found_at_the_barrier(
    rig: Rig, script: Script, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if a bit was flipped on the way: the sync takes for equal what is not."""
    script.memory[:] = content
    script.memory[0] ^= 1
    give = script._answer
    script._answer = lambda peer, answer: give(  # type: ignore[method-assign]
        peer, Probed(answer.seq, bytes(len(answer.differing))) if isinstance(answer, Probed) else answer)
    assert rig.sync(*COMPARE, script.endpoint) == 1
    err = capsys.readouterr().err
    assert "did not apply what was sent" in err and "make it anew with --overwrite --compare" in err
    assert rig.guest_goes_on()


@pytest.mark.parametrize("is_first", [True, False])
def test_no_sync_builds_on_a_copy_whose_digest_was_wrong(
    rig: Rig, script: Script, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str], is_first: bool
) -> None:
    """It was acknowledged as durable before that. What the error says makes it good."""
    copy = old_copy(tmp_path / "copy.img", content, [])
    endpoint = rig.replica(f"aio:{copy}")
    if not is_first:
        assert rig.sync("--keep-running", *COMPARE, endpoint) == 0

    def wrong(frames: Any) -> Any:
        message, payload = wire.decode(frames)
        return (replace(message, digest=bytes(len(message.digest))) if isinstance(message, Digest) else message,
                payload)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync_link, "decode", wrong)
        assert rig.sync("--keep-running", *COMPARE, endpoint) == 1
    assert rig.dirty_bytes() == SIZE_BYTES
    spoiled = bytearray(content)
    spoiled[0] ^= 1
    copy.write_bytes(spoiled)
    assert rig.sync("--keep-running", *COMPARE, endpoint) == 1, "the copy counts for nothing"
    capsys.readouterr()
    assert rig.sync("--keep-running", "--overwrite", *COMPARE, endpoint) == 0
    assert events(capsys.readouterr().out)[-1]["sent_bytes"] <= GRAIN_BYTES
    assert copy.read_bytes() == rig.image.read_bytes()


def test_where_nothing_is_equal_it_stops_comparing(rig: Rig, script: Script, content: bytes) -> None:
    kinds: list[type[Any]] = []
    play = script._play

    def note(message: Any, payload: Any) -> Any:
        kinds.append(type(message))
        return play(message, payload)

    script._play = note  # type: ignore[method-assign]
    comparison = Comparison()
    probed = 0
    for _ in range(1000):
        if comparison.grain():
            probed += 1
            assert comparison.learn(512 << 10, GRAIN_BYTES, [(0, 512 << 10)]) == 0
    assert probed < 120 + 1000 // ONE_OF
    for _ in range(2 * ONE_OF):
        if comparison.grain():
            comparison.learn(512 << 10, GRAIN_BYTES, [])
    assert all(comparison.grain() for _ in range(5))
    assert LEAST_PART < 1
    assert rig.sync(*COMPARE, script.endpoint) == 0
    assert kinds.count(Probe) <= SIZE_BYTES // (512 << 10) + 1
    assert {Data, Zero} <= set(kinds) and Packed not in kinds
    assert script.memory == content


def test_blocks_written_here_and_there_move_alone(
    rig: Rig, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """One in twenty: more than half of all 64 KiB have one."""
    random = Random(7)
    places = random.sample(range(0, SIZE_BYTES * 3 // 4, LEAF_BYTES), SIZE_BYTES * 3 // 4 // LEAF_BYTES // 20)
    copy = old_copy(tmp_path / "copy.img", content, places)
    assert rig.sync(*COMPARE, rig.replica(f"aio:{copy}")) == 0
    assert events(capsys.readouterr().out)[-1]["sent_bytes"] <= 3 * LEAF_BYTES * len(places)
    assert copy.read_bytes() == content


def test_where_leaves_are_all_others_they_are_not_compared() -> None:
    comparison = Comparison()
    half = [(0, 256 << 10)]
    closer = 0
    for _ in range(1000):
        if comparison.learn(512 << 10, GRAIN_BYTES, half):
            closer += 1
            assert comparison.learn(256 << 10, LEAF_BYTES, half) == 0
    assert closer < 240 + 1000 // ONE_OF
