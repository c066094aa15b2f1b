"""A real guest moves from one QEMU and tapdisk to another QEMU and a replica, while it writes: whatever it was
told to be durable, on either side, is on the disk where it is then."""

from __future__ import annotations

import os
import re
import signal
from contextlib import closing
from typing import Any

import pytest
from interop.guest import Guest
from interop.moving import BLOCK, SIZE, SLOWLY, WAIT_S, Begin, Move

from writelog import migrate
from writelog.migrate_qmp import Monitor
from writelog.migrate_run import Migration

ROUNDS = int(os.environ.get("MIGRATE_ROUNDS", "1"))


def succeed(move: Move) -> dict[str, Any]:
    """Migrate and see that the guest goes on there, with all that it has written; the report."""
    move.start("--dest-qmp", move.there.monitor)
    code, events, error = move.finish()
    assert code == 0, error
    move.goes_on(move.there)
    move.end()
    move.check("there")
    return events[-1]


@pytest.mark.parametrize(("disks", "there"), [(1, []), (2, ["-S"])])
@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_guest_moves(begin: Begin, disks: int, there: list[str], number: int) -> None:
    """To a QEMU that starts it, or that waits to be told to."""
    move = begin(disks, *there)
    report = succeed(move)
    assert report["state"] == "done" and len(report["disks"]) == disks
    assert all(disk["handed_over"] for disk in report["disks"])
    assert list(report["downtime_parts_s"]) == ["stop", "wake", "quiesce", "send", "flush", "epoch", "hand over",
                                                "promote", "move", *(["start"] if there else [])]
    assert report["downtime_s"] == pytest.approx(sum(report["downtime_parts_s"].values()))
    print(f"downtime {report['downtime_s'] * 1000:.0f} ms,", {
        name: round(part_s * 1000, 1) for name, part_s in report["downtime_parts_s"].items()})


AT_SWITCHES = 4
"""How many blocks may be under way, or were not yet told of, when a guest is stopped here and there."""


def first_written(guest: Guest) -> int:
    """The number of the first block that it was told to be durable there."""
    match = re.search(r"wrote (\d+)\.", guest.console)
    assert match
    return int(match[1])


def test_there_and_back_and_there_again(move: Move) -> None:
    """What is sent after the first move is what the guest has written since the last."""
    before = 0
    for number in range(2 + ROUNDS):
        move.start("--dest-qmp", move.there.monitor)
        code, events, error = move.finish()
        assert code == 0, error
        move.goes_on(move.there)
        first = first_written(move.there)
        [disk] = events[-1]["disks"]
        sent_bytes = disk["sent_bytes"] + disk["zero_bytes"]
        print(f"move {number}: {first - before} blocks written, {sent_bytes // BLOCK} sent")
        if number:
            assert disk["resumed"] and 0 < sent_bytes <= (first - before + AT_SWITCHES) * BLOCK
        else:
            assert sent_bytes >= SIZE
        before = first
        move.turn()
    move.end()
    move.check(move.places[0])


BEFORE_THE_SWITCH = [
    "writelog.migrate_run:Migration._copy_memory:after:1", "writelog.migrate_run:Migration._mark:before:1",
    "writelog.migrate_run:Migration._mark:before:2", "writelog.migrate_run:Migration._may_promote:before:1",
]
"""While the memory is copied; when the guest was stopped; when the last round was confirmed; when all disks were
handed over and no replica knows of it."""


def test_killed_before_the_switch_at_each_step_then_it_moves(begin: Begin) -> None:
    """Each time the guest runs on, and its disks are here, and its QEMU as before; in the end it moves."""
    move = begin(2)
    for place in BEFORE_THE_SWITCH:
        killed = move.start("--throttle-floor=off", "--memory-rate=100M", killed_at=place)
        assert killed.wait(WAIT_S) == -signal.SIGKILL
        _, _, error = move.finish()
        assert "the migration was cancelled; the guest runs on here" in error
        move.is_here()
        move.is_as_before()
        move.wait_there_again()
    killed = move.start(killed_at=BEFORE_THE_SWITCH[2])
    assert killed.stdout is not None and killed.stderr is not None
    killed.stderr.close()  # as when the connection to the operator's terminal was lost
    killed.stdout.close()
    move.goes_on(move.here)
    assert killed.wait(WAIT_S) == -signal.SIGKILL
    move.is_here()
    move.wait_there_again()
    succeed(move)


def test_killed_after_the_replicas_were_told(move: Move) -> None:
    """The guest stands still, here and there. What is said gets it going again."""
    killed = move.start(killed_at="writelog.migrate_run:Migration._continue:before:1")
    assert killed.wait(WAIT_S) == -signal.SIGKILL
    _, _, error = move.finish()
    assert "the disks were handed over" in error and "tap-ctl unpause --force vm0" in error
    with closing(Monitor(move.here.monitor)) as monitor:
        assert not monitor.call("query-status")["running"]
    move.take_back()
    move.end()
    move.check("here")


def test_what_fails_before_the_switch_leaves_the_guest_here(move: Move) -> None:
    """The destination or the replica is killed, or the operator loses patience, while the memory is copied."""
    run = move.start(SLOWLY)
    move.wait_for_event("copying the memory")
    run.send_signal(signal.SIGINT)
    code, events, error = move.finish()
    assert code == 130 and "interrupted; the guest runs on here" in error and events[-1]["state"] == "failed"
    move.is_here()

    move.wait_there_again()
    move.start(SLOWLY)
    move.wait_for_event("copying the memory")
    move.there.end()
    code, _, error = move.finish()
    assert code == 1 and "QEMU's migration failed" in error and "the guest runs on here" in error
    move.is_here()

    move.start()
    code, _, error = move.finish()
    assert code == 1 and "QEMU's migration failed" in error and "the guest runs on here" in error
    move.is_here()

    move.wait_there_again()
    move.start("--memory-rate=32M")
    move.wait_for_event("copying the memory")
    move.replicas[0].kill()
    code, _, error = move.finish()
    assert code == 1 and "disk 'vm0' is stalled" in error and "the guest runs on here" in error
    move.is_here()
    move.is_as_before()
    move.end()
    move.check("here")


def test_the_destination_dies_when_it_has_the_disks(
    move: Move, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guest must not run here, on a disk that is elsewhere; the operator is told how to go on."""
    go_on = Migration._continue

    def kill_and_go_on(migration: Migration) -> None:
        move.there.end()
        go_on(migration)

    monkeypatch.setattr(Migration, "_continue", kill_and_go_on)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert migrate.main(move.arguments()) == 1
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])
    error = capsys.readouterr().err
    assert "the replicas of vm0 have said that they are promoted" in error
    assert "tap-ctl unpause --force vm0" in error
    move.take_back()
    move.end()
    move.check("here")
