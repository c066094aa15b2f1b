"""Verifying a copy: what differs is named, by whoever it was changed, and what only seems to differ is not."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from livewriter import LiveWriter
from sync_rig import SIZE_BYTES, Rig, Script, events

from tapcore.driver import Env
from writelog.client import LogClient
from writelog.hashtree import LEAF_BYTES
from writelog.replica_state import StateStore
from writelog.sync_verify import append
from writelog.wire import Data, Probe

VERIFY = ("--json", "vm1")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def content() -> bytes:
    return Random(5).randbytes(SIZE_BYTES * 3 // 4) + bytes(SIZE_BYTES // 4)


@pytest.fixture
def rig(env: Env, tmp_path: Path, content: bytes) -> Iterator[Rig]:
    image = tmp_path / "disk.img"
    image.write_bytes(content)
    rig = Rig(env, image)
    yield rig
    rig.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = tmp_path / "copy.img"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    return path


@pytest.fixture
def endpoint(rig: Rig, copy: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Of a replica that holds a copy."""
    endpoint = rig.replica(f"aio:{copy}")
    assert rig.sync("--keep-running", "vm1", endpoint) == 0
    capsys.readouterr()
    return endpoint


def flip(path: Path, *places: int) -> None:
    """As a bad disk does it."""
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 4]))


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return events(capsys.readouterr().out)[-1]


def test_equal_is_said_with_a_receipt(
    rig: Rig, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = tmp_path / "receipt.json"
    assert rig.verify("--receipt", str(receipt), "vm1", endpoint) == 0
    found = json.loads(receipt.read_text())
    assert (found["disk"], found["replica"], found["size_bytes"]) == ("vm1", endpoint, SIZE_BYTES)
    assert (found["outcome"], found["differences"], found["left_out_bytes"]) == ("equal", [], 0)
    assert found["base"] != "0" * 16 and len(found["session"]) == len(found["digest"]) == 32
    out = capsys.readouterr().out
    assert f"vm1 and its copy at {endpoint}: equal at {found['time']}" in out
    assert found["digest"] in out


@pytest.mark.parametrize("where", ["replica", "primary"])
def test_a_flipped_byte_is_found_and_named_and_repaired_if_asked(
    rig: Rig, endpoint: str, copy: Path, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    where: str
) -> None:
    places = (0, 5 * LEAF_BYTES + 100, 6 * LEAF_BYTES, 3 << 20, SIZE_BYTES - 1)
    flip(copy if where == "replica" else rig.image, *places)
    expected = [{"offset": offset, "length": length} for offset, length in (
        (0, LEAF_BYTES), (5 * LEAF_BYTES, 2 * LEAF_BYTES), (3 << 20, LEAF_BYTES),
        (SIZE_BYTES - LEAF_BYTES, LEAF_BYTES))]
    before = copy.read_bytes()
    assert rig.verify(*VERIFY, endpoint) == 3
    found = last(capsys)
    assert (found["outcome"], found["differences"]) == ("different", expected)
    assert found["differing_bytes"] == 5 * LEAF_BYTES
    assert copy.read_bytes() == before
    assert rig.verify("vm1", endpoint) == 3
    assert f"{5 * LEAF_BYTES} {2 * LEAF_BYTES}\n" in capsys.readouterr().out
    receipt = tmp_path / "receipt.json"
    assert rig.verify(*VERIFY, "--repair", "--receipt", str(receipt), endpoint) == 0
    assert last(capsys)["repaired_bytes"] == 5 * LEAF_BYTES
    assert json.loads(receipt.read_text())["outcome"] == "repaired"
    assert copy.read_bytes() == rig.image.read_bytes()
    assert rig.verify(*VERIFY, endpoint) == 0
    assert last(capsys)["differences"] == []


def test_a_repair_is_in_the_image_and_not_in_the_journal_alone(
    rig: Rig, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "copy.img.redo"
    store = StateStore(tmp_path / "copy.img.replica", copy, SIZE_BYTES)
    endpoint = rig.replica(f"aio:{copy}", store, journal)
    assert rig.sync("--keep-running", "vm1", endpoint) == 0
    capsys.readouterr()
    flip(copy, 7 * LEAF_BYTES)
    with rig.guest() as guest:
        guest.write(0, b"later" + bytes(507))
    assert rig.verify(*VERIFY, endpoint) == 3
    assert copy.read_bytes()[7 * LEAF_BYTES] != rig.image.read_bytes()[7 * LEAF_BYTES]
    assert rig.verify(*VERIFY, "--repair", endpoint) == 0
    found = last(capsys)
    assert (found["repaired_bytes"], found["left_out_bytes"]) == (LEAF_BYTES, LEAF_BYTES)
    assert rig.verify(*VERIFY, endpoint) == 0
    assert copy.read_bytes() == rig.image.read_bytes()
    assert rig.guest_goes_on()


def test_what_the_copy_is_known_to_lack_is_left_out(
    rig: Rig, endpoint: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rig.guest() as guest:
        guest.write(8 * LEAF_BYTES, b"new" * 1000 + bytes(1096))
    flip(copy, 9 * LEAF_BYTES)
    assert rig.verify(*VERIFY, endpoint) == 3
    found = last(capsys)
    assert found["differences"] == [{"offset": 9 * LEAF_BYTES, "length": LEAF_BYTES}]
    assert found["left_out_bytes"] == LEAF_BYTES
    assert rig.dirty_bytes() == LEAF_BYTES


@pytest.mark.parametrize("repair", [(), ("--repair",)])
def test_a_guest_that_writes_all_the_while_is_no_difference(
    rig: Rig, endpoint: str, copy: Path, content: bytes, capsys: pytest.CaptureFixture[str],
    repair: tuple[str, ...]
) -> None:
    guest = LiveWriter(rig.uri, content, trims=False)
    guest.wait(50)
    for _ in range(3):
        assert rig.verify(*VERIFY, *repair, endpoint) == 0
        assert last(capsys)["differences"] == []
    guest.stop()
    assert rig.sync("--keep-running", "vm1", endpoint) == 0
    assert rig.verify(*VERIFY, endpoint) == 0
    assert copy.read_bytes() == rig.image.read_bytes()


def scripted(rig: Rig, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert rig.sync("--keep-running", "vm1", script.endpoint) == 0
    capsys.readouterr()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


def test_a_write_between_question_and_read_is_no_difference(
    rig: Rig, endpoint: str, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has said what is dirty; then the guest writes, which the primary reads and the replica lacks."""
    flip(copy, 0)
    peek = LogClient.peek
    with rig.guest() as guest:
        def peek_and_write(log: LogClient, offset: int = 0, length: int = 0) -> Iterator[tuple[int, int]]:
            yield from peek(log, offset, length)
            if length:
                guest.write(16 * LEAF_BYTES, b"between" + bytes(505))

        monkeypatch.setattr(LogClient, "peek", peek_and_write)
        assert rig.verify(*VERIFY, endpoint) == 3
    found = last(capsys)
    assert found["differences"] == [{"offset": 0, "length": LEAF_BYTES}]
    assert found["left_out_bytes"] == LEAF_BYTES


@pytest.mark.parametrize("nth", [1, 20, 26])
@pytest.mark.parametrize("repair", [(), ("--repair",)])
def test_goes_on_after_the_connection_dropped(
    rig: Rig, script: Script, capsys: pytest.CaptureFixture[str], nth: int, repair: tuple[str, ...]
) -> None:
    scripted(rig, script, capsys)
    play = script._play
    script.memory[100] ^= 1
    script.memory[1 << 20] ^= 1
    count = 0

    def drop(message: Any, payload: Any) -> Any:
        nonlocal count
        if isinstance(message, Probe | Data):
            count += 1
            if count == nth:
                raise Script.Drop
        return play(message, payload)

    script._play = drop  # type: ignore[method-assign]
    assert rig.verify(*VERIFY, *repair, script.endpoint) == (0 if repair else 3)
    found = last(capsys)
    assert found["differences"] == [{"offset": at, "length": LEAF_BYTES} for at in (0, 1 << 20)]
    assert found["repaired_bytes"] == (2 * LEAF_BYTES if repair else 0)
    if repair:
        assert script.memory == rig.image.read_bytes()


def test_a_disk_that_cannot_be_repaired_stays_different(
    rig: Rig, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(rig, script, capsys)
    script.memory[100] ^= 1
    play = script._play

    def forget(message: Any, payload: Any) -> Any:
        answer = play(message, payload)
        if isinstance(message, Data):
            script.memory[100] ^= 1
        return answer

    script._play = forget  # type: ignore[method-assign]
    assert rig.verify(*VERIFY, "--repair", script.endpoint) == 3
    found = last(capsys)
    assert (found["differing_bytes"], found["repaired_bytes"]) == (LEAF_BYTES, 0)


def test_a_replica_without_a_copy_is_told_and_left_alone(
    rig: Rig, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dirty_bytes = rig.dirty_bytes()
    assert rig.verify(*VERIFY, rig.replica(f"aio:{copy}")) == 1
    assert "holds no copy of disk 'vm1'" in capsys.readouterr().err
    assert not any(copy.read_bytes())
    assert rig.dirty_bytes() == dirty_bytes
    assert rig.guest_goes_on()


def test_a_receipt_that_cannot_be_written_is_told(
    rig: Rig, endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rig.verify("--receipt", "/nonexistent/receipt", "vm1", endpoint) == 1
    output = capsys.readouterr()
    assert "receipt cannot be written: No such file" in output.err
    assert "equal at" in output.out


def test_a_sync_that_has_compared_gives_a_receipt(
    rig: Rig, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = tmp_path / "receipt.json"
    options = ["--keep-running", "--verify", "--receipt", str(receipt)]
    assert rig.sync(*options, "vm1", rig.replica(f"aio:{copy}")) == 0
    found = json.loads(receipt.read_text())
    assert (found["outcome"], found["disk"]) == ("equal", "vm1")
    assert found["digest"] in capsys.readouterr().out


@given(st.lists(st.integers(0, 50), unique=True))
def test_adjacent_leaves_are_one_extent(leaves: list[int]) -> None:
    extents: list[tuple[int, int]] = []
    for leaf in sorted(leaves):
        append(extents, leaf * LEAF_BYTES, LEAF_BYTES)
    assert [leaf for offset, length in extents
            for leaf in range(offset // LEAF_BYTES, (offset + length) // LEAF_BYTES)] == sorted(leaves)
    assert all(first + length < second for (first, length), (second, _) in pairwise(extents))
