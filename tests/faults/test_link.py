"""The link between sync and replica is cut, stalled, slow, one-way; bytes are flipped, messages doubled, reordered
and lost; it is cut after each message. With and without keys.

The guest never stops, no acknowledged write is lost, nothing wrong is applied, and the sync goes on by itself.

    FAULT_ROUNDS=100 FAULT_SEED=7 pytest tests/faults/test_link.py
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from badlink import BACK, OUT, BadLink, Meddler, Rule, cut_after, double, drop, flip, swapper
from livewriter import LiveWriter
from sync_rig import SIZE_BYTES, Rig

from tapcore.driver import Env
from tapcore.errors import ControlError
from writelog import sync_run
from writelog.keyring import create_keys, load_authorized, load_keys
from writelog.sync_command import ask
from writelog.sync_control import find_sync

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "2"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
BLOCK_BYTES = 4096
LONG_S = 60.0
"""What happens at all has happened by then."""


class World:
    """A disk whose guest never stops, its copy, and a link between them."""

    def __init__(self, env: Env, folder: Path, secured: bool) -> None:
        self.rig = Rig(env, folder / "disk.img")
        self.copy = folder / "copy.img"
        self.folder = folder
        self.secured = secured
        self.options: list[str] = []
        self.ended = threading.Event()
        if secured:
            for name in ("replica", "sync"):
                create_keys(folder / "keys", name)
            self.options = ["--key", str(folder / "keys/sync.key_secret"),
                            "--server-key", str(folder / "keys/replica.key")]
        self.link = self.link_to_new_replica("copy.img")
        self.guest = LiveWriter(self.rig.uri, self.rig.image.read_bytes(), seed=SEED)

    def link_to_new_replica(self, name: str) -> BadLink:
        self.copy = self.folder / name
        self.copy.write_bytes(bytes(SIZE_BYTES))
        options: dict[str, Any] = {"peer_timeout_s": 1.0}
        if self.secured:
            known = load_authorized(self.folder / "keys/sync.key")
            options |= {"keys": load_keys(self.folder / "keys/replica.key_secret"),
                        "authorize": known.__contains__}
        return BadLink(self.rig.replica(f"aio:{self.copy}", **options))

    def sync(self, *arguments: str) -> int:
        return self.rig.sync("--peer-timeout", "1", "--max-pause", "60", "--patience", "600", *self.options,
                             *arguments, "vm1", self.link.endpoint)

    def status(self) -> dict[str, Any]:
        return ask(find_sync(self.rig.env.run_dir, "vm1"), "status", LONG_S)

    def wait_for(self, what: Callable[[dict[str, Any]], bool]) -> None:
        """Until the status of the sync is so; the guest works meanwhile."""
        seen: object = None
        for _ in range(int(LONG_S / 0.02)):
            with contextlib.suppress(ControlError):  # it has not begun
                if what(seen := self.status()):
                    self.guest.wait(5)
                    return
            assert not self.ended.wait(0.02), "the sync has ended"
        raise AssertionError(f"it did not come so far: {seen}")

    def in_sync_after(self, connections: int) -> None:
        self.wait_for(lambda status: status["connections"] > connections and status["state"] == "in sync")

    def tell(self, story: Callable[[], None], *arguments: str) -> None:
        """A sync that is held, while `story` happens; then it is to end well, and to have copied the disk."""
        failures: list[BaseException] = []

        def told() -> None:
            try:
                self.in_sync_after(0)
                story()
                self.link.heal()
                self.wait_for(lambda status: status["state"] == "in sync")
                ask(find_sync(self.rig.env.run_dir, "vm1"), "switch", LONG_S)
            except BaseException as error:
                failures.append(error)
                self.link.heal()
                with contextlib.suppress(ControlError):
                    ask(find_sync(self.rig.env.run_dir, "vm1"), "cancel", LONG_S)

        self.ended.clear()
        thread = threading.Thread(target=told)
        thread.start()
        code = self.sync("--hold", "--keep-running", "--downtime", "5", "--json", *arguments)
        self.ended.set()
        thread.join(LONG_S)
        assert not thread.is_alive() and not failures, failures
        assert code == 0
        self.is_equal_in_the_end()

    def is_equal_in_the_end(self) -> None:
        """The guest never stopped; the log knows what the copy lacks; and one more sync sends just that."""
        disk = self.guest.stop()
        copy = self.copy.read_bytes()
        with self.rig.log() as log:
            dirty = [range(start, start + length) for start, length in log.peek()]
        lacking = [at for at in range(0, SIZE_BYTES, BLOCK_BYTES)
                   if disk[at : at + BLOCK_BYTES] != copy[at : at + BLOCK_BYTES]
                   and not any(at in extent for extent in dirty)]
        assert lacking == []
        assert self.sync() == 0
        assert self.copy.read_bytes() == disk

    def close(self) -> None:
        self.link.close()
        self.rig.close()


@pytest.fixture(params=["plain", "curve"])
def world(env: Env, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
          ) -> Iterator[World]:
    monkeypatch.setattr(sync_run, "LONGEST_TRY_S", 0.05)
    world = World(env, tmp_path, request.param == "curve")
    yield world
    world.close()


@pytest.mark.timeout(300 + 10 * ROUNDS)
def test_cut_stalled_one_way_and_slow(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    random, link = Random(SEED), world.link

    def story() -> None:
        faults = [*random.sample(("cut", "down", OUT, BACK, "both", "slow"), 6)]
        faults += random.choices(("cut", "down", OUT, BACK, "both", "slow"), k=ROUNDS - 2)
        for fault in faults:
            before = world.status()["connections"]
            if fault == "slow":
                link.is_slow = True
                world.guest.wait(50)
                link.is_slow = False
                world.wait_for(lambda status: status["state"] == "in sync")
                continue
            if fault in (OUT, BACK, "both"):
                link.stall(*((OUT, BACK) if fault == "both" else (fault,)))
            else:
                link.is_down = fault == "down"
                link.cut()
            if fault != "cut":
                world.wait_for(lambda status: status["state"] == "stalled")
                world.guest.wait(20)
                link.heal()
            world.in_sync_after(before)

    world.tell(story, "--verify")
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert "stalled" in states


@pytest.mark.timeout(300 + 20 * ROUNDS)
@pytest.mark.parametrize("what", ["flip", "double", "drop", "swap"])
def test_what_is_changed_on_the_way_is_noticed(world: World, what: str) -> None:
    """Not a byte of it is applied: the whole disks are compared in the end."""
    random, limit = Random(f"{SEED}{what}"), 5 * ROUNDS
    rule: Rule
    if what == "swap":
        rule = swapper(random, 0.1, limit)
    else:
        rule = Meddler({"flip": flip, "double": double, "drop": drop}[what], random, 0.1, limit)
    done: list[int] = []

    def watched(message: Any) -> Any:
        parts = rule(message)
        if list(parts) != [message.data]:
            done.append(message.number)
        return parts

    def story() -> None:
        world.link.rule = watched
        world.wait_for(lambda status: len(done) >= limit)

    world.tell(story, "--verify")
    assert len(done) >= limit


def some_of(counts: range, number: int, way: str) -> list[int]:
    """All of them in a long run."""
    return sorted(Random(f"{SEED}{way}").sample(counts, min(number, len(counts))))


@pytest.mark.timeout(300 + 20 * ROUNDS)
@pytest.mark.parametrize("way", [OUT, BACK])
def test_cut_after_each_message(world: World, way: str) -> None:
    """Connection after connection of one sync, each of which gets one message further."""

    def story() -> None:
        for count in some_of(range(24), 4 * ROUNDS, way):
            before = world.link.connections
            world.link.rule = cut_after(count, way)
            world.link.cut()
            world.wait_for(lambda status: world.link.connections > before + 1)  # noqa: B023

    world.tell(story, "--verify")


@pytest.mark.timeout(300 + 60 * ROUNDS)
@pytest.mark.parametrize("way", [OUT, BACK])
def test_a_hand_over_is_cut_after_each_message(world: World, way: str) -> None:
    """Either the replica has it all and has taken over, or the guest runs on."""
    disk = world.guest.stop()
    for count in some_of(range(3, 40), 2 * ROUNDS, way):
        world.link.close()
        world.link = world.link_to_new_replica(f"copy-{count}.img")
        world.link.rule = cut_once(count, way)
        if world.sync("--overwrite") == 0:
            assert world.copy.read_bytes() == disk and world.rig.info()["fenced"], count
            with world.rig.control() as control:
                control.call("unpause", disk="vm1", force=True)
        else:
            assert world.rig.info()["fenced"] is None, count
        assert world.rig.guest_goes_on()
        disk = world.rig.image.read_bytes()


def cut_once(count: int, way: str) -> Rule:
    """Only one connection ends after `count` messages in that way."""
    rule, seen = cut_after(count, way), []

    def once(message: Any) -> Any:
        if message.way == way and message.number == count:
            seen.append(count)
        return rule(message) if len(seen) == 1 else (message.data,)

    return once
