"""A job's copying and a guest's writes in any order of beginnings and ends: what the guest wrote wins."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Manual

from tapcore.disk import Disk
from tapcore.driver import Driver, Env, OpenFlag
from tapcore.errors import WritelogError
from tapcore.jobs import copying, gate
from tapcore.jobs.copying import COPY, SKIP, CopyJob, Plan
from tapcore.jobs.gate import Gate
from tapcore.jobs.steps import Steps, asking_own_status
from tapcore.request import DISCARD, READ, STATUS, STATUS_HOLE, WRITE, ZEROES, Request

BLOCK = 512
BLOCKS = 6


class Overlay(Manual):
    """Blocks that it does not own are read from `below`, and owned once a part of them is written."""

    name = "manual-overlay"

    def open(self) -> None:
        super().open()
        self.below: bytes | bytearray = bytes(range(1, BLOCKS + 1)) * BLOCK
        self.owned: set[int] = set()

    def queue_own_status(self, request: Request) -> bool:
        return self._queue(request)

    def _run(self, request: Request) -> None:
        first, last = request.offset // BLOCK, -(-(request.offset + request.length) // BLOCK)
        if request.op == STATUS:
            request.extents = [(BLOCK, 0 if block in self.owned else STATUS_HOLE) for block in range(first, last)]
            return
        for block in range(first, last):
            if block not in self.owned:
                self.data[block * BLOCK : (block + 1) * BLOCK] = self.below[block * BLOCK : (block + 1) * BLOCK]
        if request.op != READ:
            self.owned |= set(range(first, last))
        super()._run(request)


class Copying(CopyJob):
    """Copies what the source owns to another place, or what it does not own into it."""

    def __init__(self, env: Env, source: Driver, target: Driver) -> None:
        disk = SimpleNamespace(name="vm", vbd=SimpleNamespace(info=source.info))
        super().__init__(env, cast(Disk, disk), lambda disk: None, None)
        self.source, self.target, self.gate = source, target, Gate(env, source)

    def plan(self, offset: int, length: int, plan: Plan) -> Steps[None]:
        status = Request(STATUS, offset, length)
        yield asking_own_status(self.source, status)
        into = self.source is self.target
        plan.extend((extent_length, COPY if bool(state & STATUS_HOLE) == into else SKIP)
                    for extent_length, state in status.extents)


Action = tuple[str, int, int]


class Play:
    """The guest's writes never overlap one another in flight; the order of all ends is drawn."""

    def __init__(self, env: Env, *, into: bool) -> None:
        self.env = env
        self.top = Overlay(env, str(BLOCK * BLOCKS), OpenFlag.NONE)
        self.top.open()
        self.other = Manual(env, str(BLOCK * BLOCKS), OpenFlag.NONE)
        self.other.open()
        if not into:
            self.other.data[:] = self.top.below
            self.top.below = self.other.data
        self.job = Copying(env, self.top, self.top if into else self.other)
        self.expected = bytearray(self.top.below)
        self.flying: list[Request] = []
        self.queueing: Request | None = None
        self.in_pass = False
        self.begin(self.job.copy_disk)

    def begin(self, step: Callable[[Callable[[WritelogError | None], None]], None]) -> None:
        self.in_pass = True
        step(self.pass_ended)

    def pass_ended(self, error: WritelogError | None) -> None:
        assert error is None
        self.in_pass = False

    def write(self, at: int, length: int, op: int) -> None:
        length = min(length, BLOCK * BLOCKS - at)
        if any(at < other.offset + other.length and other.offset < at + length for other in self.flying):
            return
        data = bytes([128 + len(self.expected) % 7 + at % 100]) * length if op == WRITE else bytes(length)
        request = Request(op, at, length, [memoryview(data)] if op == WRITE else [], done=self.guest_done)
        self.flying.append(request)
        self.expected[at : at + length] = data
        self.queueing = request
        is_complete = self.job.gate.queue_write(request)
        self.queueing = None
        self.job.gate.submit()
        if is_complete:
            self.flying.remove(request)

    def guest_done(self, request: Request) -> None:
        assert request is not self.queueing, "completed before its verb returned"
        self.flying.remove(request)

    def finish(self, disk: Manual, number: int) -> None:
        if disk.pending:
            request = disk.pending.pop(number % len(disk.pending))
            disk._run(request)
            request.done(request)

    def settle(self) -> None:
        """Let everything end."""
        for _ in range(1000):
            if not (self.top.pending or self.other.pending or self.flying or self.in_pass):
                return
            self.finish(self.top, 0)
            self.finish(self.other, 0)
            self.env.loop.turn(0)
        raise AssertionError("it does not end")

    def act(self, action: Action) -> None:
        kind, a, b = action
        if kind == "write":
            self.write(a * 100 % (BLOCK * BLOCKS), 1 + b * 97, (WRITE, WRITE, ZEROES, DISCARD)[b % 4])
        elif kind == "top":
            self.finish(self.top, a)
        elif kind == "other":
            self.finish(self.other, a)
        elif kind == "early":
            self.top.early, self.other.early = bool(a & 1), bool(a & 2)
        elif kind == "mirror" and self.job.source is not self.job.target:
            self.job.gate.mirror = self.other
        elif kind == "round" and not self.in_pass:
            self.begin(self.job.copy_changed if self.job.source is not self.job.target else self.job.copy_disk)
        self.env.loop.turn(0)


actions = st.lists(st.tuples(st.sampled_from(("write", "top", "top", "other", "round", "turn", "mirror", "early")),
                             st.integers(0, 40), st.integers(0, 10)), max_size=60)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((gate, "BLOCK_BYTES"), (copying, "BLOCK_BYTES"), (copying, "WINDOW_BYTES")):
        monkeypatch.setattr(module, name, BLOCK)


every_order = settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.usefixtures("small_blocks")
@every_order
@given(actions)
def test_a_commit_copies_the_last_that_was_written(env: Env, script: list[Action]) -> None:
    play = Play(env, into=False)
    for action in script:
        play.act(action)
    play.settle()
    play.begin(play.job.copy_changed)
    play.settle()
    for block in play.top.owned:
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        assert play.other.data[part] == play.expected[part], block


@pytest.mark.usefixtures("small_blocks")
@every_order
@given(actions)
def test_a_stream_overwrites_nothing_of_the_guest(env: Env, script: list[Action]) -> None:
    play = Play(env, into=True)
    for action in script:
        play.act(action)
    play.settle()
    assert play.top.owned == set(range(BLOCKS)), "all of it is there now"
    assert play.top.data == play.expected
