"""What a migration depends on is lost on the way: connections to monitors, QEMUs, a replica, the guest itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from interop.forward import Forward
from interop.moving import HANDED_OVER, PROMOTED, SLOWLY, STOPPED, WAIT_S, Move

from writelog.migrate_qmp import Monitor

BEGUN = "writelog.migrate_run:Migration._begin_memory:after:1"


@pytest.fixture
def here(move: Move, tmp_path: Path) -> Iterator[Forward]:
    """Where the monitor of the guest's QEMU can be reached."""
    with closing(Forward(tmp_path / "forwarded.here", move.here.monitor)) as forward:
        yield forward


@pytest.fixture
def there(move: Move, tmp_path: Path) -> Iterator[Forward]:
    with closing(Forward(tmp_path / "forwarded.there", move.there.monitor)) as forward:
        yield forward


def hold(move: Move) -> None:
    move.wait_for_event("held")


def test_connections_to_monitors_drop_in_each_phase(move: Move, here: Forward, there: Forward) -> None:
    """They are made anew, and the guest moves."""
    places = [BEGUN, STOPPED, HANDED_OVER, PROMOTED]
    move.start("--dest-qmp", there.address, monitor=here.address, held_at=places)
    for drops in ([here], [here], [here], [here, there]):
        hold(move)
        for forward in drops:
            forward.drop()
        move.let_go_on()
    code, events, error = move.finish()
    assert code == 0, error
    assert not events[-1]["warning"]
    move.goes_on(move.there)
    move.end()
    move.check("there")


def test_gone_for_good_before_the_switch(move: Move, here: Forward, there: Forward) -> None:
    """A monitor; the other QEMU, which is asked before the replicas are promoted; a replica, which comes back:
    the other QEMU finds it again, and the guest moves."""
    move.start(SLOWLY, monitor=here.address)
    move.wait_for_event("copying the memory")
    here.close()
    code, _, error = move.finish()
    assert code == 1 and "the monitor is gone" in error
    assert "the disks go on here" in error and "give it 'migrate_cancel' and 'cont'" in error
    with closing(Monitor(move.here.monitor)) as monitor:
        monitor.call("migrate_cancel")
        for capability in ("pause-before-switchover", "auto-converge"):
            monitor.call("migrate-set-capabilities", capabilities=[{"capability": capability, "state": False}])
        monitor.call("migrate-set-parameters", **{"max-bandwidth": 128 << 20})
    move.is_here()

    move.wait_there_again()
    move.start("--dest-qmp", there.address, held_at=[HANDED_OVER])
    hold(move)
    move.there.process.kill()
    move.let_go_on()
    code, _, error = move.finish()
    assert code == 1 and "the destination QEMU does not answer: it waits for no guest" in error
    assert "the guest runs on here" in error
    move.is_here()
    move.is_as_before()

    move.wait_there_again()
    move.start("--dest-qmp", there.address, held_at=[HANDED_OVER])
    hold(move)
    move.replicas[0].kill()
    move.start_replica_again()
    move.let_go_on()
    code, _, error = move.finish()
    assert code == 0, error
    move.goes_on(move.there)
    move.end()
    move.check("there")


def test_a_replica_dies_before_it_is_promoted(move: Move) -> None:
    """The guest stands still, here and there, until it is taken back."""
    move.start(held_at=[HANDED_OVER], PROMOTE_S=1)
    hold(move)
    move.replicas[0].kill()
    move.let_go_on()
    code, _, error = move.finish()
    assert code == 1 and "a replica could not be promoted for 1 s" in error and "the guest ran nowhere" in error
    move.take_back()
    move.end()
    move.check("here")


@pytest.mark.parametrize(("shuts_down", "held_at", "said"), [
    (True, BEGUN, "the guest has shut down; its disks are here"),
    (False, STOPPED, "the disks go on here"),
])
def test_the_guest_ends(move: Move, shuts_down: bool, held_at: str, said: str) -> None:
    """By itself, or with its QEMU. Its disk is whole, and here."""
    move.start(SLOWLY if shuts_down else "--memory-rate=1G", held_at=[held_at])
    hold(move)
    if shuts_down:
        move.here.shut_down()
    else:
        move.here.process.kill()
    move.here.process.wait(WAIT_S)
    move.let_go_on()
    code, _, error = move.finish()
    assert code == 1 and said in error, error
    info = move.info("vm0")
    assert info["state"] == "running" and info["fenced"] is None
    move.end()
    move.check("here")


def test_the_guest_ends_when_its_replica_is_promoted(move: Move) -> None:
    """Its disk is whole, and there."""
    move.start(held_at=[PROMOTED])
    hold(move)
    move.here.process.kill()
    move.here.process.wait(WAIT_S)
    move.let_go_on()
    code, _, error = move.finish()
    assert code == 1 and "the replicas of vm0 have said that they are promoted" in error
    assert "or start it again, if it has ended" in error and move.info("vm0")["fenced"]
    move.end()
    move.check("there")
