"""Disks that switch together: all or none, whatever happens before the first replica is promoted."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sync_rig import WAIT_S, Rig, Script

from tapcore.driver import Env
from tapcore.errors import WritelogError
from writelog.plan import Limits
from writelog.sync_gate import Aborted, Gate, Group, Step
from writelog.sync_group_report import DiskReporter
from writelog.sync_link import Peer
from writelog.sync_run import Sync
from writelog.sync_source import Source
from writelog.sync_stop import BrokenOff
from writelog.wire import Barrier, Digest, Hello, Message, Promote, Promoted


@pytest.fixture
def rig(env: Env, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(env, tmp_path / "disk.img")
    yield rig
    rig.close()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


class Run:
    """A sync of "vm1" in a thread, in a group with "other", which the test plays."""

    def __init__(self, rig: Rig, script: Script) -> None:
        self.group = Group(("vm1", "other"))
        self.other = self.group.gates["other"]
        self.error: WritelogError | None = None
        source = Source(rig.env.run_dir, "vm1")
        self.sync = Sync(source, Peer(script.endpoint, timeout_s=2.0), Limits(downtime_s=WAIT_S), DiskReporter(),
                         gate=self.group.gates["vm1"])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.sync.run()
        except WritelogError as error:
            self.error = error

    def reach(self, step: Step) -> None:
        """Both are at `step`; they were allowed to."""
        if step > Step.READY:
            assert self.group.allow(step)
        self.other.reach(step)
        assert self.group.wait(step, WAIT_S)

    def join(self) -> WritelogError | None:
        self._thread.join(3 * WAIT_S)
        assert not self._thread.is_alive()
        self.other.close()
        return self.error


def promotions(script: Script) -> list[Message]:
    """The PROMOTEs that the replica gets."""
    seen: list[Message] = []

    def promote(message: Promote) -> Message:
        seen.append(message)
        return Promoted("")

    script.on[Promote] = promote
    return seen


@pytest.fixture
def run(rig: Rig, script: Script) -> Run:
    return Run(rig, script)


def test_a_gate_alone_is_open() -> None:
    gate = Gate()
    gate.check()
    assert gate.may(Step.PROMOTED) and not gate.enter()
    gate.reach(Step.READY)
    assert gate.enter()
    gate.close()


def test_nobody_goes_on_before_all_have_come_so_far() -> None:
    group = Group("ab")
    first, second = group.gates["a"], group.gates["b"]
    first.reach(Step.READY)
    assert not group.allow(Step.CONFIRMED) and not first.enter()
    second.reach(Step.READY)
    assert group.allow(Step.CONFIRMED) and first.enter() and second.enter()
    first.reach(Step.COPYING)
    assert not group.have(Step.CONFIRMED) and not first.enter()
    for gate in (first, second):
        gate.close()


def test_news_wake_whoever_waits_and_are_taken_in() -> None:
    group = Group("ab")
    gate = group.gates["a"]
    assert not select.select([gate], [], [], 0)[0]
    for each in group.gates.values():
        each.reach(Step.READY)
    assert group.allow(Step.CONFIRMED)
    assert select.select([gate], [], [], 0)[0]
    gate.check()
    assert not select.select([gate], [], [], 0)[0]
    group.gates["b"].close()
    assert group.abort("enough")
    with pytest.raises(Aborted, match="enough"):
        gate.check()
    gate.close()
    assert group.abort("again"), "gates that are closed hear nothing"


def test_what_may_promote_cannot_be_aborted() -> None:
    group = Group("a")
    gate = group.gates["a"]
    for step in (Step.READY, Step.CONFIRMED, Step.HANDED_OVER):
        gate.reach(step)
    assert group.allow(Step.PROMOTED) and not group.abort("too late")
    gate.check()
    gate.close()


def test_a_switch_over_that_was_broken_off_is_left_before_the_next_one() -> None:
    group = Group("ab")
    first, second = group.gates["a"], group.gates["b"]
    assert not group.break_off(BrokenOff("none has begun"))
    for gate in (first, second):
        gate.reach(Step.READY)
    assert group.allow(Step.CONFIRMED) and first.enter()
    second.step_back()
    assert second.enter(), "it was too late to step back"
    first.reach(Step.CONFIRMED)
    assert group.break_off(BrokenOff("b is slow"))
    second.reach(Step.CONFIRMED)
    assert second.reached is Step.COPYING and not group.allow(Step.CONFIRMED), "news that come too late"
    for gate in (first, second):
        with pytest.raises(BrokenOff, match="b is slow"):
            gate.check()
        gate.check()
        gate.reach(Step.READY)
    assert group.allow(Step.CONFIRMED) and first.enter() and second.enter()
    for step in (Step.CONFIRMED, Step.HANDED_OVER, Step.PROMOTED):
        for gate in (first, second):
            gate.reach(step)
        assert step is Step.PROMOTED or group.allow(Step(step + 1))
    assert not group.break_off(BrokenOff("too late"))
    for gate in (first, second):
        gate.close()


def test_step_by_step(rig: Rig, script: Script, run: Run) -> None:
    run.reach(Step.READY)
    assert rig.guest_goes_on()
    run.reach(Step.CONFIRMED)
    assert rig.info()["state"] == "paused" and rig.info()["fenced"] is None
    run.reach(Step.HANDED_OVER)
    assert rig.info()["fenced"]
    promoted = promotions(script)
    assert not promoted
    run.reach(Step.PROMOTED)
    assert run.join() is None
    assert promoted and rig.image.read_bytes() == script.memory


@pytest.mark.parametrize("step", [Step.READY, Step.CONFIRMED, Step.HANDED_OVER])
def test_aborted_at_a_step(rig: Rig, script: Script, run: Run, step: Step) -> None:
    """The guest goes on, the replica is told nothing, and the next sync sends only what has changed."""
    promoted = promotions(script)
    for each in (Step.READY, Step.CONFIRMED, Step.HANDED_OVER):
        if each <= step:
            run.reach(each)
    assert run.group.abort("the other one failed")
    assert isinstance(run.join(), Aborted)
    assert rig.guest_goes_on() and rig.info()["fenced"] is None and not rig.info()["pinned"]
    assert not promoted
    assert rig.dirty_bytes() < 1 << 20
    assert rig.sync("--verify", "vm1", script.endpoint) == 0
    assert promoted and rig.image.read_bytes() == script.memory


@pytest.mark.parametrize("step", [Step.CONFIRMED, Step.HANDED_OVER])
def test_broken_off_at_a_step_then_it_switches(rig: Rig, script: Script, run: Run, step: Step) -> None:
    """The guest goes on here, and its disk may be handed over later, on the same connection."""
    promoted = promotions(script)
    run.reach(Step.READY)
    run.reach(Step.CONFIRMED)
    if step is Step.HANDED_OVER:
        run.reach(Step.HANDED_OVER)
        assert rig.info()["fenced"]
    assert run.group.break_off(BrokenOff("the other one is slow"))
    assert not run.group.have(Step.READY), "nobody begins anew before all have left"
    run.other.reach(Step.READY)
    assert run.group.wait(Step.READY, WAIT_S)
    assert rig.guest_goes_on() and rig.info()["fenced"] is None and not promoted
    for each in (Step.CONFIRMED, Step.HANDED_OVER, Step.PROMOTED):
        run.reach(each)
    assert run.join() is None
    assert promoted and script.connections == 1
    assert rig.info()["fenced"] and rig.image.read_bytes() == script.memory


def test_broken_off_while_the_link_is_down_after_the_hand_over(rig: Rig, script: Script, run: Run) -> None:
    """The disk is taken back though its replica cannot be asked."""
    for step in (Step.READY, Step.CONFIRMED, Step.HANDED_OVER):
        run.reach(step)
    gone = threading.Event()

    def hang_up(message: Hello) -> Message:
        gone.set()
        raise Script.Drop

    script.on[Hello] = hang_up
    script.drop()
    assert gone.wait(WAIT_S)
    assert run.group.break_off(BrokenOff("it takes too long"))
    while rig.info()["fenced"]:
        threading.Event().wait(0.01)
    assert rig.guest_goes_on()
    del script.on[Hello]
    run.other.reach(Step.READY)
    for step in (Step.READY, Step.CONFIRMED, Step.HANDED_OVER, Step.PROMOTED):
        run.reach(step)
    assert run.join() is None
    assert rig.info()["fenced"] and rig.image.read_bytes() == script.memory


@pytest.mark.parametrize("step", [Step.CONFIRMED, Step.HANDED_OVER])
def test_the_link_drops_while_the_others_are_awaited(rig: Rig, script: Script, run: Run, step: Step) -> None:
    """It comes back as far as it was."""
    run.reach(Step.READY)
    run.reach(Step.CONFIRMED)
    if step is Step.HANDED_OVER:
        run.reach(Step.HANDED_OVER)
    connections = script.connections
    script.drop()
    while script.connections == connections:
        threading.Event().wait(0.01)
    assert run.group.wait(step, WAIT_S)
    run.reach(Step.HANDED_OVER)
    run.reach(Step.PROMOTED)
    assert run.join() is None
    assert rig.info()["fenced"] and rig.image.read_bytes() == script.memory


def test_a_replica_that_fails_when_the_disk_was_handed_over(rig: Rig, script: Script, run: Run) -> None:
    """It was not told to take over, so the disk is taken back."""
    for step in (Step.READY, Step.CONFIRMED, Step.HANDED_OVER):
        run.reach(step)
    script.on[Barrier] = lambda message: Digest(message.seq, bytes(16))
    script.drop()
    error = run.join()
    assert error is not None and "did not apply what was sent" in error.message
    assert rig.guest_goes_on() and rig.info()["fenced"] is None
