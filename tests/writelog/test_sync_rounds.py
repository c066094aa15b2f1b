"""A sync that verifies its copy now and then, while it copies on and the guest writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from livewriter import LiveWriter
from sync_rig import SIZE_BYTES, STEER_S, Rig, Steered, events

from tapcore.driver import Env
from tapcore.errors import ControlError
from writelog.hashtree import LEAF_BYTES
from writelog.plan import Limits
from writelog.sync_control import Wishes

CONTENT = Random(6).randbytes(SIZE_BYTES * 3 // 4) + bytes(SIZE_BYTES // 4)


@pytest.fixture
def rig(env: Env, tmp_path: Path) -> Iterator[Rig]:
    image = tmp_path / "disk.img"
    image.write_bytes(CONTENT)
    rig = Rig(env, image)
    yield rig
    rig.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = tmp_path / "copy.img"
    path.write_bytes(bytes(SIZE_BYTES))
    return path


def spoil(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"rotten")


def until_copied(rig: Rig) -> None:
    """The replica has, durably, all that was written."""
    for _ in range(int(STEER_S / 0.02)):
        if not rig.dirty_bytes():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it does not copy")


def until(steered: Steered, rounds: int) -> dict[str, Any]:
    """What the last one has found, when so many have ended."""
    for _ in range(int(STEER_S / 0.02)):
        verification: dict[str, Any] = steered.ask("status")["verification"]
        if verification["ended"] >= rounds:
            found: dict[str, Any] = verification["last"]
            return found
        threading.Event().wait(0.02)
    raise AssertionError("it did not verify")


def test_a_sync_that_is_held_verifies_when_it_is_told_to(
    rig: Rig, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = Steered(rig, "--hold", "vm1", rig.replica(f"aio:{copy}"))
    held.until("in sync")
    guest = LiveWriter(rig.uri, CONTENT, trims=False)
    receipt = tmp_path / "receipt.json"
    assert rig.verify("--rate", "1G", "--receipt", str(receipt), "vm1") == 0
    assert json.loads(receipt.read_text())["outcome"] == "equal"
    assert "equal at" in capsys.readouterr().out
    guest.wait(1)
    disk = guest.stop()
    until_copied(rig)
    spoil(copy, 5 * LEAF_BYTES + 5)
    assert rig.verify("--json", "--rate", "1G", "vm1") == 3
    found = events(capsys.readouterr().out)[-1]
    assert found["differences"] == [{"offset": 5 * LEAF_BYTES, "length": LEAF_BYTES}]
    assert rig.verify("--rate", "1G", "--repair", "vm1") == 0
    assert f"{5 * LEAF_BYTES} {LEAF_BYTES}" in capsys.readouterr().out
    assert rig.verify("--rate", "1G", "vm1") == 0
    held.ask("switch")
    code, report, err = held.end()
    assert (code, report["handed_over"]) == (0, True), err
    assert copy.read_bytes() == disk


def test_again_and_again(rig: Rig, copy: Path) -> None:
    held = Steered(rig, "--hold", "--verify-every", "0.1", "vm1", rig.replica(f"aio:{copy}"))
    held.until("in sync")
    assert until(held, 2)["outcome"] == "equal"
    spoil(copy, 8 * LEAF_BYTES)
    ended = held.ask("status")["verification"]["ended"]
    found = until(held, ended + 2)
    assert (found["outcome"], found["differences"]) == (
        "different", [{"offset": 8 * LEAF_BYTES, "length": LEAF_BYTES}])
    held.ask("cancel")
    out, _ = held.process.communicate(timeout=STEER_S)
    assert b"a verification found that 4 KiB differ, from byte 32768 on" in out
    assert copy.read_bytes() != rig.image.read_bytes()


def test_no_sync_no_round(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    assert rig.verify("vm1") == 1
    assert "no sync of disk 'vm1' is running here" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"rate": True}, {"rate": "fast"}, {"repair": 1}, {"colour": 1}])
def test_senseless_wishes_are_refused(wrong: dict[str, Any]) -> None:
    wishes = Wishes(Limits())
    with pytest.raises(ControlError, match="cannot verify"):
        wishes.verify(wrong)
    assert wishes.verifications == 0
