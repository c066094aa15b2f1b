"""The vbd: every request ends exactly once, whatever happens in between."""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Manual, Owner

from tapcore.driver import Env
from tapcore.errors import ChainError, ControlError, WritelogError
from tapcore.loop import Loop
from tapcore.request import DISCARD, FLUSH, PERMANENT, READ, STATUS, WRITE, ZEROES, Extent
from tapcore.vbd import CLOSED, PAUSED, PAUSING, RUNNING, Vbd
from tapcore.workers import Workers

SIZE = 1 << 16


@pytest.fixture
def vbd(env: Env) -> Iterator[Vbd]:
    vbd = Vbd(env, "disk", retry_interval_s=0.01, max_retries=3, stall_report_s=0.02)
    vbd.open(f"manual:{SIZE}")
    yield vbd
    for driver in Manual.opened:
        driver.finish()
    vbd.close(lambda: None)
    Manual.opened.clear()


def leaf() -> Manual:
    return Manual.opened[-1]


class Flag:
    """A callback that remembers that it was called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_early_requests_come_back_at_once(vbd: Vbd) -> None:
    leaf().early = True
    owner = Owner(vbd)
    write = owner.make(WRITE, 512, b"x" * 512)
    assert vbd.submit([write]) == [write]
    read = owner.make(READ, 512, 512)
    assert vbd.submit([read]) == [read]
    assert bytes(read.iov[0]) == b"x" * 512
    assert owner.late == [] and vbd.in_flight == 0 and leaf().submits == 2


def test_late_requests_go_to_their_owner(vbd: Vbd) -> None:
    owner = Owner(vbd)
    write, flush = owner.make(WRITE, 0, b"y" * 4096), owner.make(FLUSH)
    assert vbd.submit([write, flush]) == []
    assert vbd.in_flight == 2
    leaf().finish()
    assert owner.late == [write, flush] and vbd.in_flight == 0
    assert vbd.statistics.requests[WRITE] == 1 and vbd.statistics.bytes[WRITE] == 4096


def test_neighbours_in_a_batch_are_merged_and_each_part_ends(vbd: Vbd) -> None:
    owner = Owner(vbd)
    batch = [owner.make(WRITE, 4096 * i, bytes([i + 1]) * 4096) for i in range(4)]
    batch += [owner.make(WRITE, 32768, b"z" * 512), owner.make(READ, 0, 512), owner.make(READ, 512, 512)]
    assert vbd.submit(batch) == []
    assert [(op, offset, length) for op, offset, length, _ in leaf().log] == [
        (WRITE, 0, 16384), (WRITE, 32768, 512), (READ, 0, 1024)]
    leaf().finish()
    assert owner.late == batch
    assert bytes(batch[-1].iov[0]) == bytes([1]) * 512
    assert vbd.statistics.merged == 4


def test_requests_with_different_flags_or_gaps_are_not_merged(vbd: Vbd) -> None:
    owner = Owner(vbd)
    vbd.submit([owner.make(WRITE, 0, b"a" * 512), owner.make(WRITE, 512, b"b" * 512, flags=1),
                owner.make(WRITE, 1536, b"c" * 512), owner.make(READ, 2048, 512)])
    assert len(leaf().log) == 4


def test_a_merged_request_that_fails_fails_only_for_the_guilty_part(vbd: Vbd) -> None:
    owner = Owner(vbd)
    batch = [owner.make(WRITE, 512 * i, bytes([i]) * 512) for i in range(3)]
    vbd.submit(batch)
    leaf().errors = [errno.EINVAL, 0, errno.EINVAL, 0]
    leaf().finish()
    leaf().finish()
    assert [request.error for request in batch] == [0, errno.EINVAL, 0]
    assert sorted(owner.late, key=lambda r: r.offset) == batch


def test_an_early_merged_request_that_fails_is_split_too(vbd: Vbd) -> None:
    owner = Owner(vbd)
    leaf().early = True
    leaf().errors = [errno.EROFS, 0, 0, errno.EROFS]
    batch = [owner.make(WRITE, 512 * i, bytes([i]) * 512) for i in range(3)]
    done = vbd.submit(batch)
    assert sorted(done, key=lambda r: r.offset) == batch
    assert [request.error for request in batch] == [0, 0, errno.EROFS]


def test_pause_holds_new_requests_and_waits_for_those_in_flight(vbd: Vbd) -> None:
    owner, paused = Owner(vbd), Flag()
    first, second = owner.make(WRITE, 0, b"1" * 512), owner.make(WRITE, 512, b"2" * 512)
    vbd.submit([first])
    vbd.pause(paused)
    assert vbd.state == PAUSING and paused.count < 1
    assert vbd.submit([second]) == []
    assert len(leaf().log) == 1 and vbd.waiting == 1
    leaf().finish()
    assert paused.count == 1 and vbd.state == PAUSED and owner.late == [first]
    vbd.resume()
    assert vbd.state == RUNNING
    leaf().finish()
    assert owner.late == [first, second] and second.error == 0


def test_resume_before_the_pause_is_complete_calls_it_off(vbd: Vbd) -> None:
    owner, paused = Owner(vbd), Flag()
    vbd.submit([owner.make(WRITE, 0, b"1" * 512)])
    vbd.pause(paused)
    vbd.resume()
    leaf().finish()
    assert paused.count == 1
    assert vbd.state == RUNNING


def test_block_status_of_a_paused_disk(vbd: Vbd) -> None:
    vbd.pause(lambda: None)
    answers: list[tuple[int, list[Extent]]] = []
    vbd.status_map(0, SIZE, lambda code, extents: answers.append((code, extents)))
    leaf().finish()
    assert answers == [(0, [(SIZE, 0)])]


def replace(vbd: Vbd, text: str) -> WritelogError | None:
    answers: list[WritelogError | None] = []
    vbd.replace_chain(text, answers.append)
    assert len(answers) == 1
    return answers[0]


def test_a_paused_disk_goes_on_with_another_chain(vbd: Vbd) -> None:
    owner, old = Owner(vbd), leaf()
    vbd.pause(lambda: None)
    vbd.submit([owner.make(WRITE, 0, b"n" * 512)])
    assert replace(vbd, f"manual:{SIZE}") is None
    assert old.closed and leaf() is not old and vbd.state == PAUSED
    vbd.resume()
    leaf().finish()
    assert leaf().data[:512] == b"n" * 512 and old.log == [] and len(owner.late) == 1


@pytest.mark.parametrize("text", ["manual:broken", "nosuch:x", f"manual:{SIZE * 2}"])
def test_a_chain_that_does_not_fit_leaves_the_old_one(vbd: Vbd, text: str) -> None:
    owner = Owner(vbd)
    vbd.pause(lambda: None)
    vbd.submit([owner.make(WRITE, 0, b"n" * 512)])
    failure = replace(vbd, text)
    assert isinstance(failure, WritelogError)
    assert vbd.state == PAUSED and vbd.chain.text == f"manual:{SIZE}"
    vbd.resume()
    leaf().finish()
    assert [request.error for request in owner.late] == [0]


def test_a_disk_that_lost_its_chain_waits_for_another(vbd: Vbd, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(vbd)
    vbd.pause(lambda: None)
    vbd.submit([owner.make(WRITE, 0, b"n" * 512)])
    monkeypatch.setattr(Manual, "refusing", True)
    assert replace(vbd, f"manual:{SIZE}") is not None
    assert vbd.state == PAUSED and owner.late == []
    with pytest.raises(ControlError, match="no open chain"):
        vbd.resume()
    monkeypatch.setattr(Manual, "refusing", False)
    assert replace(vbd, f"manual:{SIZE}") is None
    vbd.resume()
    leaf().finish()
    assert [request.error for request in owner.late] == [0] and leaf().data[:512] == b"n" * 512


def test_what_was_written_is_durable_before_its_chain_goes(vbd: Vbd) -> None:
    """The flush of another chain covers other files: it would be a lie about writes of the former one."""
    owner, old = Owner(vbd), leaf()
    answers: list[WritelogError | None] = []
    vbd.submit([owner.make(WRITE, 0, b"w" * 512)])
    old.finish()
    vbd.pause(lambda: None)
    vbd.replace_chain(f"manual:{SIZE}", answers.append)
    assert [op for op, *_ in old.log] == [WRITE, FLUSH] and not old.closed and answers == []
    old.finish()
    assert old.closed and answers == [None] and vbd.state == PAUSED
    assert replace(vbd, f"manual:{SIZE}") is None


def test_a_flush_that_failed_when_its_chain_went_fails_the_next_one(vbd: Vbd) -> None:
    owner, old = Owner(vbd), leaf()
    old.early = True
    vbd.submit([owner.make(WRITE, 0, b"w" * 512)])
    vbd.pause(lambda: None)
    old.errors = [errno.EIO]
    assert replace(vbd, f"manual:{SIZE}") is None
    assert replace(vbd, f"manual:{SIZE}") is None
    vbd.resume()
    leaf().early = True
    first, second = owner.make(FLUSH), owner.make(FLUSH)
    assert vbd.submit([first, second]) == [second, first]
    assert [first.error, second.error] == [errno.EIO, 0] and first.tries == 0


def test_a_chain_that_cannot_be_opened_at_all_leaves_a_disk_that_takes_another(
    vbd: Vbd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    vbd.pause(lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr("tapcore.vbd.open_chain", broken)
        assert replace(vbd, f"manual:{SIZE}") is not None
    assert vbd.state == PAUSED
    assert replace(vbd, f"manual:{SIZE}") is None


def test_writes_of_an_owner_that_is_gone_do_not_come_after_newer_ones(env: Env, vbd: Vbd) -> None:
    """A client whose connection broke sends its write again over a new one, then overwrites it."""
    gone, back, disk = Owner(vbd), Owner(vbd), leaf()
    disk.early = True
    disk.errors = [errno.EIO]
    stale = gone.make(WRITE, 0, b"1" * 512)
    assert vbd.submit([stale]) == [] and vbd.waiting == 1
    vbd.abandon(gone)
    assert gone.late == [stale] and stale.error == errno.ESHUTDOWN and vbd.waiting == 0
    newer = back.make(WRITE, 0, b"2" * 512)
    assert vbd.submit([newer]) == [newer]
    timed = Flag()
    env.loop.call_later(0.05, timed)
    turn_until(env, lambda: timed.count > 0)
    assert disk.data[:512] == b"2" * 512 and len(disk.log) == 2


def test_abandoned_requests_end_once_wherever_they_are(vbd: Vbd) -> None:
    gone, other, disk = Owner(vbd), Owner(vbd), leaf()
    merged = [gone.make(WRITE, 0, b"a" * 512), gone.make(WRITE, 512, b"b" * 512)]
    single = gone.make(WRITE, 4096, b"c" * 512)
    vbd.submit([*merged, single])
    vbd.pause(lambda: None)
    held, kept = gone.make(READ, 0, 512), other.make(READ, 0, 512)
    vbd.submit([held, kept])
    vbd.abandon(gone)
    assert gone.late == [held]
    disk.errors = [errno.EIO, errno.EIO]
    disk.finish()
    assert vbd.state == PAUSED and vbd.waiting == 1
    assert set(gone.late) == {*merged, single, held} and all(request.error for request in gone.late)
    vbd.resume()
    disk.finish()
    assert other.late == [kept] and len(disk.log) == 3


def test_only_a_paused_disk_takes_another_chain(vbd: Vbd) -> None:
    with pytest.raises(ControlError, match="pause it first"):
        vbd.replace_chain("manual:512", lambda error: None)


def turn_until(env: Env, ready: Callable[[], bool]) -> None:
    env.loop.run_until(ready, 5)


def test_transient_errors_are_tried_again_until_they_pass(env: Env, vbd: Vbd) -> None:
    owner, disk = Owner(vbd), leaf()
    disk.early = True
    disk.errors = [errno.EIO, errno.ENOSPC, 0]
    request = owner.make(WRITE, 0, b"r" * 512)
    assert vbd.submit([request]) == []
    turn_until(env, lambda: bool(owner.late))
    assert request.error == 0 and len(disk.log) == 3 and vbd.statistics.retries == 2
    assert disk.data[:512] == b"r" * 512


def test_transient_errors_end_after_the_last_try(env: Env, vbd: Vbd) -> None:
    owner, disk = Owner(vbd), leaf()
    disk.errors = [errno.EIO] * 10
    request = owner.make(READ, 0, 512)
    vbd.submit([request])

    def turn() -> bool:
        disk.finish()
        return bool(owner.late)

    turn_until(env, turn)
    assert request.error == errno.EIO and len(disk.log) == 4 and vbd.statistics.errors[READ] == 1


@pytest.mark.parametrize("code", sorted(PERMANENT))
def test_permanent_errors_fail_at_once(vbd: Vbd, code: int) -> None:
    leaf().early = True
    leaf().errors = [code]
    request = Owner(vbd).make(WRITE, 0, b"p" * 512)
    assert vbd.submit([request]) == [request]
    assert request.error == code and len(leaf().log) == 1


def test_a_pause_keeps_requests_that_wait_for_their_next_try(env: Env, vbd: Vbd) -> None:
    owner, disk, paused = Owner(vbd), leaf(), Flag()
    disk.early = True
    disk.errors = [errno.EIO]
    request = owner.make(WRITE, 0, b"r" * 512)
    vbd.submit([request])
    vbd.pause(paused)
    assert paused.count == 1
    timed = Flag()
    env.loop.call_later(0.05, timed)
    turn_until(env, lambda: timed.count > 0)
    assert len(disk.log) == 1 and vbd.waiting == 1 and owner.late == []
    vbd.resume()
    assert owner.late == [request] and request.error == 0


def test_close_drains_then_closes_and_fails_what_comes_later(vbd: Vbd) -> None:
    owner, closed, disk = Owner(vbd), Flag(), leaf()
    flying, held = owner.make(WRITE, 0, b"c" * 512), owner.make(WRITE, 512, b"d" * 512)
    vbd.submit([flying])
    vbd.close(closed)
    vbd.submit([held])
    assert closed.count < 1 and not disk.closed
    disk.finish()
    assert closed.count == 1 and disk.closed and vbd.state == CLOSED
    assert flying.error == 0 and held.error == errno.ESHUTDOWN and owner.late == [flying, held]
    after = owner.make(READ, 0, 512)
    assert vbd.submit([after]) == [after] and after.error == errno.ESHUTDOWN
    with pytest.raises(ControlError):
        vbd.pause(lambda: None)
    with pytest.raises(ControlError):
        vbd.resume()
    again = Flag()
    vbd.close(again)
    assert again.count == 1


def test_close_makes_what_was_written_durable(vbd: Vbd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manual, "fileno", lambda self: 0)
    owner, closed, disk = Owner(vbd), Flag(), leaf()
    vbd.submit([owner.make(WRITE, 0, b"c" * 512)])
    disk.finish()
    vbd.close(closed)
    assert [op for op, *_ in disk.log] == [WRITE, FLUSH] and not disk.closed
    disk.finish()
    assert closed.count == 1 and disk.closed


def test_a_second_close_waits_for_the_first(vbd: Vbd) -> None:
    owner, first, second = Owner(vbd), Flag(), Flag()
    vbd.submit([owner.make(WRITE, 0, b"c" * 512)])
    vbd.close(first)
    vbd.close(second)
    leaf().finish()
    assert [first.count, second.count] == [1, 1]


def test_the_watchdog_reports_a_request_that_hangs_once(
    env: Env, vbd: Vbd, caplog: pytest.LogCaptureFixture
) -> None:
    owner = Owner(vbd)
    with caplog.at_level(logging.WARNING):
        vbd.submit([owner.make(WRITE, 4096, b"s" * 512)])
        turn_until(env, lambda: vbd.statistics.stalls > 0)
        timed = Flag()
        env.loop.call_later(0.05, timed)
        turn_until(env, lambda: timed.count > 0)
        leaf().finish()
    assert vbd.statistics.stalls == 1
    reports = [record.message for record in caplog.records]
    assert any("write 512 bytes at 4096" in text and "no progress" in text for text in reports)
    assert any("ended after all" in text for text in reports)


def test_the_watchdog_reports_again_when_the_request_is_used_again(env: Env, vbd: Vbd) -> None:
    """A request that hung between its tries and then ended is a new one when its owner submits it once more."""
    owner, disk = Owner(vbd), leaf()
    vbd.retry_interval_s = 0.06
    disk.early, disk.errors = True, [errno.EIO]
    request = owner.make(WRITE, 4096, b"s" * 512)
    vbd.submit([request])
    turn_until(env, lambda: bool(owner.late))
    assert vbd.statistics.stalls == 1
    owner.late.clear()
    disk.early, request.tries = False, 0
    vbd.submit([request])
    turn_until(env, lambda: vbd.statistics.stalls == 2)


def test_a_chain_that_does_not_open_leaves_nothing(env: Env) -> None:
    vbd = Vbd(env, "disk")
    with pytest.raises(ChainError, match="manual"):
        vbd.open("manual:broken")
    assert vbd.state == CLOSED


def test_stats_are_ready_for_json(vbd: Vbd) -> None:
    leaf().early = True
    vbd.submit([Owner(vbd).make(READ, 0, 4096)])
    stats = vbd.stats()
    assert stats["ops"]["read"]["requests"] == 1 and stats["ops"]["read"]["bytes"] == 4096
    assert sum(stats["ops"]["read"]["histogram_ns"].values()) == 1
    assert stats["ops"]["read"]["latency_us"]["p99"] > 0


OPS = st.sampled_from([READ, WRITE, FLUSH, DISCARD, ZEROES, STATUS])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("batch"), st.lists(st.tuples(OPS, st.integers(0, 15)), min_size=1, max_size=6)),
        st.tuples(st.just("finish"), st.integers(1, 5)),
        st.tuples(st.just("errors"), st.lists(st.sampled_from([0, errno.EIO, errno.EINVAL]), max_size=4)),
        st.tuples(st.sampled_from(["pause", "resume", "early", "late", "turn", "replace"]), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(0, 99))
def test_every_request_ends_exactly_once(steps: list[tuple[str, object]], seed: int) -> None:
    """Whatever batches, completions, errors, pauses and chain swaps come: nothing is lost or ends twice."""
    loop = Loop()
    env = Env(loop, Workers(loop, 1))
    vbd = Vbd(env, "disk", retry_interval_s=0.0, max_retries=2)
    vbd.open(f"manual:{SIZE}")
    owner = Owner(vbd)
    made, early = [], []
    letters = random.Random(seed)
    for what, argument in steps:
        if what == "batch":
            assert isinstance(argument, list)
            batch = [
                owner.make(op, block * 4096, bytes([letters.randrange(256)]) * 4096 if op == WRITE
                           else 0 if op == FLUSH else 4096)
                for op, block in argument
            ]
            made += batch
            early += vbd.submit(batch)
        elif what == "finish":
            assert isinstance(argument, int)
            leaf().finish(argument)
        elif what == "errors":
            assert isinstance(argument, list)
            leaf().errors = list(argument)
        elif what in ("early", "late"):
            leaf().early = what == "early"
        elif what == "pause":
            vbd.pause(lambda: None)
        elif what == "resume":
            vbd.resume()
        elif what == "turn":
            loop.turn(0)
        elif what == "replace" and vbd.state == PAUSED:
            answers: list[WritelogError | None] = []
            vbd.replace_chain(f"manual:{SIZE}", answers.append)
            leaf().finish()  # the flush of the former chain, if it needs one
            assert answers == [None]
    closed = Flag()
    vbd.resume()
    leaf().errors = []
    for _ in range(20):
        leaf().finish()
        loop.turn(0)
    vbd.close(closed)
    assert closed.count == 1
    ended = early + owner.late
    assert len(ended) == len(set(ended)) == len(made)
    env.workers.close()
    loop.close()
    Manual.opened.clear()


# Throttling

def test_writes_beyond_the_rate_wait_for_their_turn(vbd: Vbd) -> None:
    leaf().early = True
    owner = Owner(vbd)
    vbd.limit_writes(100_000)
    first, second, third = (owner.make(WRITE, place * 4096, bytes(4096)) for place in (0, 4, 8))
    read, flush = owner.make(READ, 0, 512), owner.make(FLUSH)
    assert vbd.submit([first, second, third, read, flush]) == [first, second, read, flush]
    assert (vbd.waiting, vbd.in_flight, owner.late) == (1, 0, [])
    vbd.env.loop.run_until(lambda: owner.late == [third], 5)
    assert vbd.waiting == 0


def test_a_throttle_that_ends_lets_all_go(vbd: Vbd) -> None:
    leaf().early = True
    owner = Owner(vbd)
    vbd.limit_writes(1)
    writes = [owner.make(WRITE, place * 1024, bytes(512)) for place in range(4)]
    assert vbd.submit(writes) == writes[:1]
    vbd.limit_writes(1)
    assert owner.late == writes[1:2], "a new rate begins with a full bucket"
    vbd.limit_writes(None)
    assert owner.late == writes[1:]
    fast = owner.make(WRITE, 0, bytes(SIZE))
    assert vbd.submit([fast]) == [fast]


def test_a_slowed_write_waits_out_a_pause_and_ends_with_its_owner_or_the_disk(vbd: Vbd) -> None:
    leaf().early = True
    owner, other = Owner(vbd), Owner(vbd)
    vbd.limit_writes(20_000)
    vbd.submit([owner.make(WRITE, 0, bytes(2048))])
    slowed, gone = owner.make(WRITE, 4096, b"x" * 512), other.make(WRITE, 0, bytes(512))
    assert vbd.submit([slowed]) == vbd.submit([gone]) == []
    vbd.abandon(other)
    assert other.late == [gone] and gone.error == errno.ESHUTDOWN
    paused = Flag()
    vbd.pause(paused)
    assert paused.count == 1
    vbd.env.loop.run_until(lambda: vbd.throttle is not None and not vbd.throttle.waiting, 5)
    assert (vbd.waiting, owner.late, leaf().data[4096]) == (1, [], 0)
    vbd.resume()
    vbd.env.loop.run_until(lambda: owner.late == [slowed], 5)
    vbd.limit_writes(1)
    last = [owner.make(WRITE, 8192, bytes(512)) for _ in range(2)]
    vbd.submit(last)
    vbd.close(lambda: None)
    assert owner.late[-1] is last[1] and last[1].error == errno.ESHUTDOWN


def test_flushes_of_a_fenced_disk_end_well_and_writes_wait(vbd: Vbd) -> None:
    owner = Owner(vbd)
    vbd.pause(lambda: None)
    flush, write = owner.make(FLUSH), owner.make(WRITE, 0, b"z" * 512)
    assert vbd.submit([flush, write]) == []
    vbd.fence("handed over")
    assert owner.late == [flush] and flush.error == 0
    second = owner.make(FLUSH)
    assert vbd.submit([second]) == [second] and second.error == 0
    assert vbd.waiting == 1 and leaf().log == []
