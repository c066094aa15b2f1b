"""A guest moves from one host to another, over a link that drops, for a moment or for good, in every phase. Nobody
is told of it: what is sent goes nowhere."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
from interop.credentials import write_credentials
from interop.forward import Forward
from interop.hosts import MEMORY_PORT, two_hosts
from interop.moving import HANDED_OVER, PROMOTED, SLOWLY, STOPPED, WAIT_S, Begin, Move
from interop.wire import Wire

from writelog.migrate_qmp import Monitor
from writelog.migrate_undo import status_of

MONITOR_PORT = 4445
MEMORY = "copying the memory"
OPEN = "--insecure-memory"
CONNECTING = "writelog.migrate_run:Migration._begin_memory:before:1"


@pytest.fixture
def move(begin: Begin, wire: Wire, tmp_path: Path) -> Move:
    return begin(hosts=two_hosts(wire, tmp_path))


def wait_for_progress(move: Move, state: str, disk_state: str = "") -> dict[str, Any]:
    """The next that is told in a state of the migration, and of its disk."""
    while True:
        event = move.wait_for_event(state)
        if "disks" in event and (not disk_state or event["disks"]["vm0"]["state"] == disk_state):
            return event


def wait_for_memory(move: Move) -> None:
    """Until some of it was sent."""
    while wait_for_progress(move, MEMORY)["memory"] is None:
        pass


def test_a_guest_moves_to_another_host(begin: Begin, wire: Wire, tmp_path: Path) -> None:
    """As README says: with the keys of `writelog pair`, the memory over TLS, the other QEMU's monitor through a
    forwarded socket."""
    authority = trustme.CA()
    options = []
    for endpoint, name in (("client", "host-a"), ("server", wire.address)):
        folder = write_credentials(tmp_path / endpoint, endpoint, authority, name)
        options.append(["-object", f"tls-creds-x509,id=tls0,dir={folder},endpoint={endpoint}"])
    hosts = replace(two_hosts(wire, tmp_path), qemu_here=options[0], qemu_there=options[1], waits="defer")
    move = begin(hosts=hosts)
    with closing(Forward(tmp_path / "forwarded.qmp", move.there.monitor)) as forward:
        move.start("--tls-creds=tls0", "--dest-qmp", forward.address)
        code, events, error = move.finish()
    assert code == 0, error
    move.goes_on(move.there)
    with closing(Monitor(move.here.monitor)) as monitor:
        downtime_s = monitor.call("query-migrate")["downtime"] / 1000
    report = events[-1]
    print(f"downtime {report['downtime_s']:.3f} s, as QEMU counts it {downtime_s:.3f} s")
    moved = [event for event in events if event["state"] == MEMORY and event.get("memory")]
    assert all(event["disks"]["vm0"]["sent_bytes"] and event["memory"]["total_bytes"] for event in moved)
    assert 0 < report["downtime_s"] < report["elapsed_s"] and report["memory"]["sent_bytes"] > 0
    move.end()
    move.check("there")


def test_the_link_drops_for_a_moment_in_each_phase(move: Move, wire: Wire) -> None:
    """Then it goes on."""
    move.start(OPEN, SLOWLY, "--peer-timeout=3", held_at=[STOPPED, HANDED_OVER, PROMOTED])
    wait_for_memory(move)
    wire.cut()
    wait_for_progress(move, MEMORY, "stalled")
    wire.mend()
    for state in ("sending the last round", "promoting the replicas", "moving the guest"):
        move.wait_for_event("held")
        wire.cut()
        move.let_go_on()
        for _ in range(2):
            wait_for_progress(move, state)
        wire.mend()
    code, events, error = move.finish()
    assert code == 0, error
    print(events[-1])
    move.goes_on(move.there)
    move.end()
    move.check("there")


def test_the_link_is_gone_before_the_switch(begin: Begin, wire: Wire, tmp_path: Path) -> None:
    """The guest runs on here, each time, and at once: it does not wait for what does not come."""
    there = f"tcp:{wire.address}:{MONITOR_PORT}"
    move = begin(1, "-qmp", f"{there},server=on,wait=off", hosts=two_hosts(wire, tmp_path))

    def fails(said: str, *options: str, held_at: str = "", state: str = "held", ports: Sequence[int] = ()) -> str:
        run = move.start(OPEN, *options, held_at=[held_at] if held_at else [])
        wait_for_memory(move) if state == MEMORY else move.wait_for_event(state)
        wire.cut(*ports)
        if held_at:
            move.let_go_on()
        if said == "interrupted":
            wait_for_progress(move, state, "stalled")
            run.send_signal(signal.SIGINT)
        code, _, error = move.finish()
        assert code == (130 if said == "interrupted" else 1), error
        assert said in error and "the guest runs on here" in error
        wire.mend()
        move.is_here()
        return error

    error = fails("nothing of the memory was sent for", "--patience=1", held_at=CONNECTING, ports=[MEMORY_PORT])
    assert "it still waits for a connection" in error
    with closing(Monitor(move.here.monitor)) as monitor:
        while status_of(monitor) == "cancelling":
            monitor.events(WAIT_S)
    for said, options, held_at, state, ports in [
        ("interrupted", [SLOWLY, "--peer-timeout=1"], "", MEMORY, []),
        ("nothing of the memory was sent for", [SLOWLY, "--patience=1"], "", MEMORY, [MEMORY_PORT]),
        ("the guest has stood still for 1 s, while vm0 was switching", ["--max-pause=1"], STOPPED, "held", []),
        ("the destination QEMU does not answer", ["--dest-qmp", there], HANDED_OVER, "held", [MONITOR_PORT]),
    ]:
        move.wait_there_again()
        fails(said, *options, held_at=held_at, state=state, ports=ports)
    move.end()
    move.check("here")


def test_the_link_is_gone_after_the_switch(move: Move, wire: Wire) -> None:
    """The guest stands still at both ends, until it is taken back. First no replica has heard that it is promoted,
    then the rest of the memory does not arrive."""
    move.start(OPEN, held_at=[HANDED_OVER], PROMOTE_S=1)
    move.wait_for_event("held")
    wire.cut()
    move.let_go_on()
    code, _, error = move.finish()
    assert code == 1 and "a replica could not be promoted for 1 s" in error
    assert "the replicas of none have" in error and "the guest ran nowhere" in error
    wire.mend()
    move.take_back()

    move.start_replica_again()
    move.wait_there_again()
    move.start(OPEN, SLOWLY, "--overwrite", held_at=[PROMOTED], MOVE_S=1)
    move.wait_for_event("held")
    wire.cut()
    move.let_go_on()
    code, _, error = move.finish()
    assert code == 1 and "QEMU has not sent the rest of the memory in 1 s" in error
    assert "the replicas of vm0 have said that they are promoted" in error and "if the guest runs there" in error
    move.take_back()
    move.end()
    move.check("here")
