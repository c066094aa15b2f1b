"""The engine in this process: its ops over real sockets, clients that misbehave or vanish, held pauses."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import LoopThread, Manual

from tapcore import control_server, map_reader, unixsocket
from tapcore.control import MAX_REQUEST_BYTES, ControlClient
from tapcore.driver import Env, OpenFlag
from tapcore.engine import Engine, default_name
from tapcore.errors import ChainError, ControlError, UsageError, WritelogError
from tapcore.nbd import wire
from tapcore.nbd.client import NbdClient, NbdError
from tapcore.request import STATUS_HOLE, Request
from writelog.logstore import forget

SIZE = 1 << 20
TIMEOUT_S = 20


class SlowToQuiesce(Manual):
    """`slowquiesce:SIZE`: its own I/O ends when the test says so."""

    name = "slowquiesce"

    def open(self) -> None:
        super().open()
        self.quiesced: Callable[[], None] | None = None

    def quiesce(self, done: Callable[[], None]) -> None:
        self.quiesced = done


class Striped(Manual):
    """`striped:SIZE`: every other 4 KiB is a hole; block status tells three extents at a time."""

    name = "striped"

    def queue_status(self, request: Request) -> bool:
        request.extents = []
        at, end = request.offset, request.offset + request.length
        while at < end and len(request.extents) < 3:
            length = min(4096 - at % 4096, end - at)
            request.extents.append((length, STATUS_HOLE if at // 4096 % 2 else 0))
            at += length
        return True


class Rig:
    """An engine whose loop runs in a thread; `disk` is manual, and its requests complete when the test says so."""

    def __init__(self, env: Env) -> None:
        Manual.opened.clear()
        Manual.refusing = False
        self.env = env
        self.engine = Engine(env)
        self.path = self.engine.listen()
        self.engine.open(f"manual:{SIZE}", "disk")
        self.disk = Manual.opened[0]
        self.loop = LoopThread(env)
        self.control = self.client()
        self._raw: list[Raw] = []

    def client(self) -> ControlClient:
        return ControlClient(self.path, TIMEOUT_S)

    def raw(self) -> Raw:
        self._raw.append(Raw(self.path))
        return self._raw[-1]

    def nbd(self, name: str = "disk") -> NbdClient:
        return NbdClient(self.control.call("info", disk=name)["uris"][0], timeout_s=TIMEOUT_S)

    def state(self, name: str = "disk") -> str:
        return str(self.control.call("info", disk=name)["state"])

    def until_state(self, state: str, name: str = "disk") -> None:
        self.loop.until(lambda: self.engine.disks[name].vbd.state == state)

    def until_pending(self, count: int) -> None:
        self.loop.until(lambda: len(self.disk.pending) == count)

    def finish(self) -> None:
        self.loop.call(self.disk.finish)

    def files(self) -> set[str]:
        return {path.name for path in self.env.run_dir.iterdir()}

    def close(self) -> None:
        self.control.close()
        for raw in self._raw:
            raw.close()

        def give_up() -> bool:
            for disk in Manual.opened:
                disk.finish()
                if isinstance(disk, SlowToQuiesce) and disk.quiesced is not None:
                    quiesced, disk.quiesced = disk.quiesced, None
                    quiesced()
            return self.engine.is_down

        self.loop.call(self.engine.shutdown)
        self.loop.until(give_up)
        self.loop.stop()
        assert self.files() == set()


class Raw:
    """A control connection without manners."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(path))
        self._file = self.sock.makefile("rb")

    def send(self, *requests: dict[str, Any] | bytes) -> None:
        self.sock.sendall(b"".join(
            one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in requests))

    def reply(self) -> Any:
        """The next reply's result, or its error's message; None at the end."""
        line = self._file.readline()
        if not line:
            return None
        reply = json.loads(line)
        return reply["result"] if reply["ok"] else reply["error"]["message"]

    def ask(self, op: str, **params: Any) -> Any:
        self.send({"op": op} | params)
        return self.reply()

    def close(self) -> None:
        self._file.close()
        self.sock.close()


@pytest.fixture
def rig(env: Env) -> Iterator[Rig]:
    rig = Rig(env)
    yield rig
    rig.close()


def refused(rig: Rig, op: str, message: str, **params: Any) -> ControlError:
    """`op` fails with an error that matches `message`."""
    with pytest.raises(ControlError, match=message) as caught:
        rig.control.call(op, **params)
    return caught.value


# Opening and closing


def test_the_control_socket_is_its_owners_alone(rig: Rig) -> None:
    assert stat.S_IMODE(rig.path.stat().st_mode) == 0o600
    assert rig.path.name == f"tapdisk-{os.getpid()}.ctl"
    assert not rig.path.with_suffix(".new").exists()


def test_a_disk_is_opened_listed_served_and_closed(rig: Rig) -> None:
    info = rig.control.call("open", chain="ram:2M", name="two")
    assert info["name"] == "two" and info["size"] == 2 << 20 and info["state"] == "running"
    assert info["pid"] == os.getpid() and info["logs"] == [] and "flush" in info["features"]
    assert info["nbd"] == [f"unix:{rig.env.run_dir}/two.nbd"]
    listed = rig.control.call("list")
    assert listed["pid"] == os.getpid() and [disk["name"] for disk in listed["disks"]] == ["disk", "two"]
    with NbdClient(info["uris"][0]) as client:
        client.write(4096, b"hello")
        assert client.read(4096, 5) == b"hello"
        assert rig.control.call("info", disk="two")["clients"] == 1
        stats = rig.control.call("stats", disk="two")["disks"]["two"]
        assert stats["ops"]["write"]["bytes"] == 5
    assert set(rig.control.call("stats")["disks"]) == {"disk", "two"}
    assert rig.control.call("close", disk="two") == {"disk": "two"}
    assert [disk["name"] for disk in rig.control.call("list")["disks"]] == ["disk"]
    assert "two.nbd" not in rig.files() and "two.lock" not in rig.files()
    refused(rig, "info", "there is no disk 'two'; there are disk", disk="two")
    rig.control.call("open", chain="ram:2M", name="two")


def test_a_disk_of_its_own_address_is_reached_there_alone(rig: Rig, tmp_path: Path) -> None:
    socket_path = tmp_path / "own.nbd"
    info = rig.control.call("open", chain="ram:1M", nbd=[f"unix:{socket_path}", "tcp:127.0.0.1:0"])
    assert info["name"] == "1M" and len(info["uris"]) == 2 and info["uris"][1].startswith("nbd://127.0.0.1:")
    for uri in (*info["uris"], f"nbd+unix:///?socket={socket_path}"):
        NbdClient(uri).disconnect()
    with pytest.raises(NbdError):
        NbdClient(f"nbd+unix:///disk?socket={socket_path}")
    rig.control.call("close", disk="1M")
    assert not socket_path.exists()


def test_shared_addresses_reach_every_disk_by_name(env: Env) -> None:
    engine = Engine(env)
    engine.share(f"unix:{env.run_dir}/all.nbd")
    engine.open("ram:1M", "a")
    engine.open("ram:2M", "b")
    loop = LoopThread(env)
    sizes = []
    for name in ("a", "b"):
        with NbdClient(f"nbd+unix:///{name}?socket={env.run_dir}/all.nbd") as client:
            sizes.append(client.size_bytes)
    assert sizes == [1 << 20, 2 << 20]
    loop.call(engine.shutdown)
    loop.until(lambda: engine.is_down)
    loop.stop()
    assert list(env.run_dir.iterdir()) == []


@pytest.mark.parametrize(("params", "message"), [
    ({"chain": "manual:broken", "name": "new"}, "told not to open"),
    ({"chain": "nix:1", "name": "new"}, "unknown driver 'nix'"),
    ({"chain": ""}, "the chain is empty"),
    ({"chain": "ram:1M", "name": ""}, "cannot be the name"),
    ({"chain": "ram:1M", "name": "a/b"}, "cannot be the name"),
    ({"chain": "ram:1M", "name": ".."}, "cannot be the name"),
    ({"chain": "ram:1M", "name": "x" * 65}, "cannot be the name"),
    ({"chain": "aio:/", "name": None}, "cannot be the name"),
    ({"chain": "ram:1M", "name": "disk"}, "there is a disk 'disk' already"),
    ({"chain": "ram:1M", "name": "new", "nbd": ["unix:/none/x", "tcp:127.0.0.1:0"]}, "cannot listen"),
    ({"chain": "ram:1M", "name": "new", "nbd": ["tcp:127.0.0.1:0", "what"]}, "not an NBD address"),
    ({"chain": "ram:1M", "name": "new", "nbd": ["tcp:192.0.2.1:0"]}, "not a loopback address"),
    ({"chain": "ram:1M", "name": "new", "nbd": ["unix:/\udcff"]}, "cannot be written as a URI"),
    ({"chain": "aio:/none/disk", "name": "new"}, "No such file"),
])
def test_what_cannot_be_opened_leaves_nothing(rig: Rig, params: dict[str, Any], message: str) -> None:
    before = rig.files()
    refused(rig, "open", message, **params)
    assert rig.files() == before
    assert [disk["name"] for disk in rig.control.call("list")["disks"]] == ["disk"]


@pytest.mark.parametrize(("chain", "name"), [
    ("log:|aio:/vm/disk.img", "disk.img"),
    ("aio:direct,/vm/disk.img", "disk.img"),
    ("ram:16M", "16M"),
    ("aio:/vm/a b=c,d", "a_b_c_d"),
    ("aio:/vm/.hidden", "_hidden"),
    ("aio:/" + "x" * 200, "x" * 64),
])
def test_default_names(chain: str, name: str) -> None:
    assert default_name(chain) == name


def test_a_name_is_unique_among_processes(rig: Rig) -> None:
    other = Engine(rig.env)
    with pytest.raises(ControlError, match=f"there is a disk 'disk' already, of tapdisk {os.getpid()}"):
        other.open("ram:1M", "disk")
    rig.control.call("close", disk="disk")
    rig.loop.call(lambda: other.open("ram:1M", "disk"))
    refused(rig, "open", "there is a disk 'disk' already", chain="ram:1M", name="disk")
    rig.loop.call(other.shutdown)
    rig.loop.until(lambda: other.is_down)
    assert rig.control.call("open", chain="ram:1M", name="disk")["name"] == "disk"


def test_read_only_disks(rig: Rig) -> None:
    assert rig.control.call("open", chain="ram:1M", name="ro", read_only=True)["read_only"] is True
    with rig.nbd("ro") as client, pytest.raises(NbdError) as caught:
        client.write(0, b"x")
    assert caught.value.errno == errno.EPERM


def test_logs_are_shown_kept_and_forgotten(rig: Rig) -> None:
    bitmap = Path("/dev/shm")
    before = set(bitmap.iterdir())
    info = rig.control.call("open", chain=f"log:engine-test|ram:{SIZE}", name="logged")
    assert [log["name"] for log in info["logs"]] == ["engine-test"]
    assert Path(info["logs"][0]["socket"]).is_socket()
    rig.control.call("close", disk="logged")
    try:
        assert any("engine-test" in path.name for path in set(bitmap.iterdir()) - before)
        rig.control.call("open", chain=f"log:engine-test|ram:{SIZE}", name="logged")
        rig.control.call("close", disk="logged", forget=True)
        assert not any("engine-test" in path.name for path in set(bitmap.iterdir()) - before)
    finally:
        forget(rig.env.run_dir, "engine-test")


def test_closing_answers_what_is_in_flight_before_it_drops_the_client(rig: Rig) -> None:
    nbd = rig.nbd()
    handle = nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"data")
    rig.until_pending(1)
    raw = rig.raw()
    raw.send({"op": "close", "disk": "disk"})
    rig.until_state("pausing")
    refused(rig, "info", "'disk' is closing", disk="disk")
    refused(rig, "close", "'disk' is closing", disk="disk")
    with pytest.raises(NbdError):
        NbdClient(f"nbd+unix:///disk?socket={rig.env.run_dir}/disk.nbd")
    rig.finish()
    assert nbd.wait()[:2] == (handle, 0)
    assert raw.reply() == {"disk": "disk"}
    assert bytes(rig.disk.data[:4]) == b"data" and rig.disk.closed
    with pytest.raises(NbdError) as caught:
        nbd.read(0, 1)
    assert caught.value.errno in (errno.ECONNRESET, errno.EPIPE)


def test_closing_a_paused_disk_hangs_up_on_its_clients_instead_of_failing_their_requests(rig: Rig) -> None:
    """A client that reconnects sends its requests again; one that gets an error gives it to the guest."""
    rig.control.call("pause", disk="disk")
    nbd = rig.nbd()
    nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"data")
    rig.loop.until(lambda: rig.engine.disks["disk"].vbd.waiting == 1)
    rig.control.call("close", disk="disk")
    with pytest.raises(NbdError) as caught:
        nbd.wait()
    assert caught.value.errno == errno.ECONNRESET
    assert rig.disk.log == []


# Pausing


def test_a_pause_waits_for_what_is_in_flight_and_blocks_nobody_else(rig: Rig) -> None:
    nbd = rig.nbd()
    first = nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"aaaa")
    rig.until_pending(1)
    raw = rig.raw()
    raw.send({"op": "pause", "disk": "disk"}, {"op": "version"})
    rig.until_state("pausing")
    second = nbd.submit(wire.NBD_CMD_WRITE, 4, 4, b"bbbb")
    rig.loop.until(lambda: rig.engine.disks["disk"].vbd.waiting == 1)
    assert rig.state() == "pausing"
    rig.finish()
    assert raw.reply() == {"state": "paused"}
    assert raw.reply()["protocol"] == 1
    assert nbd.wait()[:2] == (first, 0)
    assert rig.control.call("info", disk="disk")["waiting"] == 1 and rig.disk.pending == []
    assert rig.control.call("unpause", disk="disk") == {"state": "running"}
    rig.until_pending(1)
    rig.finish()
    assert nbd.wait()[:2] == (second, 0)
    nbd.close()


def test_a_pause_outlives_its_connection(rig: Rig) -> None:
    with rig.client() as other:
        other.call("pause", disk="disk")
    rig.loop.until(lambda: len(rig.engine._control._connections) == 1)
    assert rig.state() == "paused"


def test_a_disk_that_is_let_go_before_it_has_paused(rig: Rig) -> None:
    nbd = rig.nbd()
    nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"aaaa")
    rig.until_pending(1)
    raw = rig.raw()
    raw.send({"op": "pause", "disk": "disk"})
    rig.until_state("pausing")
    assert rig.control.call("unpause", disk="disk") == {"state": "running"}
    assert "before it had paused" in raw.reply()
    nbd.close()


@pytest.mark.parametrize("how", ["close", "half", "reset", "garbage"])
def test_a_held_disk_goes_on_when_its_connection_ends(rig: Rig, how: str) -> None:
    raw = rig.raw()
    assert raw.ask("pause", disk="disk", hold=True) == {"state": "paused"}
    assert "process" in rig.control.call("info", disk="disk")["holder"]
    if how == "close":
        raw.close()
    elif how == "half":
        raw.sock.shutdown(socket.SHUT_WR)
    elif how == "reset":
        raw.send({"op": "list"})  # closed with a reply unread
        raw.sock.shutdown(socket.SHUT_RDWR)
    else:
        raw.send(b"x" * (MAX_REQUEST_BYTES + 1))
    rig.until_state("running")
    assert rig.control.call("info", disk="disk")["holder"] is None


@pytest.mark.parametrize("how", ["close", "half"])
def test_a_hold_that_ends_before_the_disk_has_paused(rig: Rig, how: str) -> None:
    nbd = rig.nbd()
    handle = nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"aaaa")
    rig.until_pending(1)
    raw = rig.raw()
    raw.send({"op": "pause", "disk": "disk", "hold": True})
    rig.until_state("pausing")
    if how == "close":
        raw.close()
    else:
        raw.sock.shutdown(socket.SHUT_WR)
        assert "before it had paused" in raw.reply() and raw.reply() is None
    rig.until_state("running")
    rig.finish()
    assert nbd.wait()[:2] == (handle, 0)
    nbd.close()


def test_a_connection_that_has_ended_cannot_hold(rig: Rig) -> None:
    """The request waits behind another one when its connection ends."""
    nbd = rig.nbd()
    nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"aaaa")
    rig.until_pending(1)
    rig.control.call("open", chain="ram:1M", name="other")
    raw = rig.raw()
    raw.send({"op": "pause", "disk": "disk"}, {"op": "pause", "disk": "other", "hold": True})
    raw.sock.shutdown(socket.SHUT_WR)
    rig.until_state("pausing")
    rig.loop.until(lambda: any(connection.ended for connection in rig.engine._control._connections))
    rig.finish()
    assert raw.reply() == {"state": "paused"}
    assert raw.reply() == "the connection that is to hold the disk has ended"
    assert rig.state("other") == "running"
    nbd.close()


def test_a_disk_that_was_paused_before_it_was_held_stays_paused(rig: Rig) -> None:
    rig.control.call("pause", disk="disk")
    raw = rig.raw()
    assert raw.ask("pause", disk="disk", hold=True) == {"state": "paused"}
    assert raw.ask("unpause", disk="disk") == {"state": "paused"}
    assert raw.ask("pause", disk="disk", hold=True) == {"state": "paused"}
    raw.close()
    rig.loop.until(lambda: rig.engine.disks["disk"].holder is None)
    assert rig.state() == "paused"
    assert rig.control.call("unpause", disk="disk") == {"state": "running"}


def test_a_held_disk_is_its_holders(rig: Rig) -> None:
    raw = rig.raw()
    raw.ask("pause", disk="disk", hold=True)
    for op, params in (("pause", {"hold": True}), ("unpause", {}), ("close", {})):
        assert refused(rig, op, f"held by process {os.getpid()}", disk="disk", **params).errno == errno.EBUSY
    assert raw.ask("unpause", disk="disk") == {"state": "running"}
    assert "is not held by this connection" in raw.ask("handover", disk="disk", to="b")


def test_a_disk_is_slowed_down_as_long_as_its_connection_lasts(rig: Rig) -> None:
    raw = rig.raw()
    assert raw.ask("throttle", disk="disk", rate=5000) == {"rate": 5000}
    assert rig.control.call("info", disk="disk")["write_limit"] == 5000
    assert refused(rig, "throttle", "slowed down by process", disk="disk", rate=1).errno == errno.EBUSY
    assert raw.ask("throttle", disk="disk", rate=0) == {"rate": 0}
    assert rig.control.call("throttle", disk="disk", rate=0) == {"rate": 0}
    raw.ask("throttle", disk="disk", rate=5000)
    raw.close()
    rig.loop.until(lambda: rig.engine.disks["disk"].vbd.throttle is None)
    assert rig.control.call("info", disk="disk")["write_limit"] is None


def test_force_takes_a_held_disk_away(rig: Rig) -> None:
    raw = rig.raw()
    raw.ask("pause", disk="disk", hold=True)
    assert rig.control.call("unpause", disk="disk", force=True) == {"state": "running"}
    assert "is not held by this connection" in raw.ask("handover", disk="disk", to="b")
    rig.control.call("pause", disk="disk")
    assert "is not held by this connection" in raw.ask("handover", disk="disk", to="b")
    raw.close()
    rig.loop.until(lambda: len(rig.engine._control._connections) == 1)
    assert rig.state() == "paused"


def test_a_disk_that_was_handed_over_stays_paused_and_fenced(rig: Rig) -> None:
    raw = rig.raw()
    raw.ask("pause", disk="disk", hold=True)
    assert raw.ask("handover", disk="disk", to="tcp://b") == {"fenced": "handed over to tcp://b"}
    raw.close()
    rig.loop.until(lambda: len(rig.engine._control._connections) == 1)
    info = rig.control.call("info", disk="disk")
    assert info["state"] == "paused" and info["fenced"] == "handed over to tcp://b" and info["holder"] is None
    assert refused(rig, "unpause", "handed over to tcp://b; .*only by force", disk="disk").errno == errno.EPERM
    refused(rig, "unpause", "handed over", disk="disk", chain=f"manual:{SIZE}")
    rig.control.call("pause", disk="disk", hold=True)
    refused(rig, "handover", "handed over to tcp://b already", disk="disk", to="tcp://c")
    assert rig.control.call("unpause", disk="disk", force=True) == {"state": "running"}
    assert rig.control.call("info", disk="disk")["fenced"] is None


# Holds that last too long

def test_a_hold_ends_with_its_time(rig: Rig) -> None:
    nbd, raw = rig.nbd(), rig.raw()
    assert raw.ask("pause", disk="disk", hold=True, hold_s=0.01) == {"state": "paused"}
    handle = nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"aaaa")
    rig.until_pending(1)
    rig.finish()
    assert nbd.wait()[:2] == (handle, 0)
    for op, params in (("handover", {"to": "b"}), ("pause", {"hold": True})):
        assert "ran out, and the guest has gone on" in raw.ask(op, disk="disk", **params)
    assert raw.ask("unpause", disk="disk") == {"state": "running"}
    assert raw.ask("pause", disk="disk", hold=True, hold_s=1000) == {"state": "paused"}
    assert "handed over" in raw.ask("handover", disk="disk", to="b")["fenced"]
    assert rig.engine.disks["disk"].hold_timer is None
    nbd.close()


def test_a_hold_can_be_made_longer(rig: Rig) -> None:
    raw = rig.raw()
    timers = []
    for limit in ({"hold_s": 1000}, {"hold_s": 1000}, {}):
        raw.ask("pause", disk="disk", hold=True, **limit)
        timers.append(rig.loop.call(lambda: rig.engine.disks["disk"].hold_timer))
    first, second, third = timers
    assert first is not None and second is not None and third is None
    assert first.callback is None and second.callback is None and rig.state() == "paused"


def test_who_held_too_long_does_not_end_the_pause_of_others(rig: Rig) -> None:
    raw = rig.raw()
    raw.ask("pause", disk="disk", hold=True, hold_s=0.01)
    rig.until_state("running")
    rig.control.call("pause", disk="disk")
    assert raw.ask("unpause", disk="disk") == {"state": "paused"}


def test_a_time_that_makes_no_sense(rig: Rig) -> None:
    for hold_s in (0, -1, "1", True, 1e30):
        refused(rig, "pause", "'hold_s' must be seconds", disk="disk", hold=True, hold_s=hold_s)
    refused(rig, "pause", "goes with hold", disk="disk", hold_s=1)


# Another chain


def test_a_paused_disk_goes_on_with_another_chain(rig: Rig) -> None:
    nbd = rig.nbd()
    refused(rig, "unpause", "pause it first", disk="disk", chain=f"manual:{SIZE}")
    rig.control.call("pause", disk="disk")
    handle = nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"data")
    assert rig.control.call("unpause", disk="disk", chain=f"manual:{SIZE}") == {"state": "running"}
    new = Manual.opened[1]
    rig.loop.until(lambda: len(new.pending) == 1)
    rig.loop.call(new.finish)
    assert nbd.wait()[:2] == (handle, 0)
    assert rig.disk.closed and bytes(new.data[:4]) == b"data"
    nbd.close()


@pytest.mark.parametrize("chain", [f"manual:{SIZE * 2}", "manual:broken", "nix"])
def test_a_chain_that_does_not_do_leaves_the_disk_paused_on_the_old_one(rig: Rig, chain: str) -> None:
    rig.control.call("pause", disk="disk")
    with pytest.raises(ControlError):
        rig.control.call("unpause", disk="disk", chain=chain)
    assert rig.state() == "paused" and rig.control.call("info", disk="disk")["chain"] == f"manual:{SIZE}"
    assert rig.control.call("unpause", disk="disk") == {"state": "running"}


def test_a_disk_that_lost_its_chain_can_be_given_another(rig: Rig) -> None:
    rig.control.call("pause", disk="disk")
    Manual.refusing = True
    with pytest.raises(ControlError):
        rig.control.call("unpause", disk="disk", chain=f"manual:{SIZE}")
    refused(rig, "unpause", "has no open chain", disk="disk")
    refused(rig, "unpause", "has no open chain", disk="disk", force=True)
    assert rig.control.call("info", disk="disk")["pinned"] is True
    assert rig.control.call("unpause", disk="disk", chain="ram:1M") == {"state": "running"}


@pytest.mark.parametrize("works", [True, False])
def test_a_holder_that_dies_while_the_chain_is_replaced(rig: Rig, works: bool) -> None:
    rig.control.call("open", chain=f"slowquiesce:{SIZE}", name="slow")
    slow = Manual.opened[1]
    assert isinstance(slow, SlowToQuiesce)
    raw = rig.raw()
    raw.ask("pause", disk="slow", hold=True)
    new = f"ram:{SIZE}" if works else "manual:broken"
    raw.send({"op": "unpause", "disk": "slow", "chain": new})
    rig.until_state("replacing the chain", "slow")
    raw.close()
    rig.loop.until(lambda: rig.engine.disks["slow"].holder is None)
    for op in ("pause", "unpause", "close"):
        refused(rig, op, "replacing the chain", disk="slow")
    quiesced, slow.quiesced = slow.quiesced, None
    assert quiesced is not None
    rig.loop.call(quiesced)
    assert rig.state("slow") == "running"
    assert rig.control.call("info", disk="slow")["chain"] == (new if works else f"slowquiesce:{SIZE}")


# The map


def test_the_map_is_complete_in_pages(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_reader, "MAP_MAX_EXTENTS", 10)
    monkeypatch.setattr(map_reader, "MAP_STEP_BYTES", 24 << 10)
    rig.control.call("open", chain="striped:409600", name="striped")
    extents: list[list[int]] = []
    at: int | None = 1000
    pages = 0
    while at is not None:
        answer = rig.control.call("map", disk="striped", offset=at, length=400_000 - at)
        extents += answer["extents"]
        at = answer["next"]
        pages += 1
    expected = [[1000, 3096, 0], *([start, 4096, start // 4096 % 2] for start in range(4096, 397_312, 4096)),
                [397_312, 2688, 1]]
    assert extents == expected and pages == 9


def test_neighbours_of_one_kind_are_one_extent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_reader, "MAP_STEP_BYTES", 4096)
    rig.control.call("open", chain="ram:1M", name="ram")
    assert rig.control.call("map", disk="ram") == {"extents": [[0, 1 << 20, 0]], "next": None}
    assert rig.control.call("map", disk="ram", offset=1 << 20) == {"extents": [], "next": None}
    assert rig.control.call("map", disk="ram", offset=5, length=0) == {"extents": [], "next": None}


@pytest.mark.parametrize("params", [{"offset": SIZE + 1}, {"offset": 1, "length": SIZE},
                                    {"length": (1 << 63) - 1}])
def test_a_map_beyond_the_end_is_refused(rig: Rig, params: dict[str, int]) -> None:
    assert refused(rig, "map", "not all on the disk", disk="disk", **params).errno == errno.EINVAL


def test_a_map_that_fails_says_so_and_one_of_a_paused_disk_works(rig: Rig) -> None:
    rig.control.call("pause", disk="disk")
    raw = rig.raw()
    raw.send({"op": "map", "disk": "disk"})
    rig.until_pending(1)
    rig.disk.errors = [errno.EIO]
    rig.finish()
    assert raw.reply() == "no block status at 0: Input/output error"
    raw.send({"op": "map", "disk": "disk"})
    rig.until_pending(1)
    rig.finish()
    assert raw.reply() == {"extents": [[0, SIZE, 0]], "next": None}


# Clients


GARBAGE = [b"\n", b"garbage\n", b"\xff\x00\n", b"[]\n", b"[" * 60_000 + b"\n", b'{"op":"nix"}\n', b'{"op":NaN}\n',
           b'{"op":"info"}\n', b'{"op":"info","disk":"nix"}\n', b'{"op":"map","disk":"disk","offset":-1}\n']


def test_garbage_gets_an_error_and_the_connection_lives(rig: Rig) -> None:
    raw = rig.raw()
    for line in GARBAGE:
        raw.send(line)
        assert isinstance(raw.reply(), str)
    raw.send(*GARBAGE, {"op": "version"})
    assert all(isinstance(raw.reply(), str) for _ in GARBAGE)
    assert raw.reply()["protocol"] == 1


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"op":"version"}\n'])
def test_a_line_without_an_end_ends_its_connection_alone(rig: Rig, end: bytes) -> None:
    raw = rig.raw()
    raw.send({"op": "version"}, b"x" * (MAX_REQUEST_BYTES + 1) + end)
    assert raw.reply()["protocol"] == 1
    assert "more than" in raw.reply()
    with contextlib.suppress(ConnectionResetError):
        assert raw.reply() is None
    assert rig.state() == "running"


def test_requests_a_byte_at_a_time(rig: Rig) -> None:
    raw = rig.raw()
    for byte in b'{"op":"version"}\n{"op":"list"}\n':
        raw.send(bytes([byte]))
    assert raw.reply()["protocol"] == 1 and raw.reply()["pid"] == os.getpid()


def test_what_was_asked_before_the_end_of_input_is_answered(rig: Rig) -> None:
    raw = rig.raw()
    raw.send({"op": "version"}, {"op": "list"}, b'{"op":"half')
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.reply()["protocol"] == 1 and raw.reply()["pid"] == os.getpid() and raw.reply() is None


def test_a_client_that_does_not_read_gets_its_replies_in_order_later(rig: Rig) -> None:
    raw = rig.raw()
    count = 10_000
    raw.send(*[{"op": "info", "disk": str(number)} for number in range(count)])
    assert rig.state() == "running"
    for number in range(count):
        assert raw.reply() == f"there is no disk '{number}'"


def test_a_client_that_asks_without_end_is_dropped(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control_server, "MAX_WAITING_BYTES", 100_000)
    nbd = rig.nbd()
    nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"aaaa")
    rig.until_pending(1)
    raw = rig.raw()
    with caplog.at_level(logging.WARNING), contextlib.suppress(BrokenPipeError, ConnectionResetError):
        raw.send({"op": "pause", "disk": "disk", "hold": True})
        for _ in range(1000):
            raw.send(b'{"op":"version"}\n' * 100)
        assert raw.reply() is None
    assert "it was dropped" in caplog.text
    rig.until_state("running")
    nbd.close()


def test_a_client_of_another_user_and_one_too_many_are_turned_away(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control_server, "MAX_CONNECTIONS", 2)
    first = rig.raw()
    assert first.ask("version")["protocol"] == 1
    with caplog.at_level(logging.WARNING):
        assert rig.raw().reply() is None
        first.close()
        rig.loop.until(lambda: len(rig.engine._control._connections) == 1)
        assert rig.raw().ask("version")["protocol"] == 1
        monkeypatch.setattr(unixsocket, "peer_allowed", lambda _: (False, "process 1 of user 1"))
        assert rig.raw().reply() is None
    assert "2 are connected" in caplog.text and "process 1 of user 1 was turned away: it is another" in caplog.text


def test_a_process_without_descriptors_serves_its_clients_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control_server, "RETRY_ACCEPT_S", 0.01)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as sock, caplog.at_level(logging.WARNING):
        sock.settimeout(TIMEOUT_S)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            sock.connect(str(rig.path))
            sock.sendall(b'{"op":"version"}\n')
            rig.loop.until(lambda: "cannot accept a client" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert sock.recv(1000).startswith(b'{"ok":true')


def test_a_fault_in_an_op_is_an_error_of_that_op(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = rig.raw()
    rig.loop.call(lambda: rig.engine._ops.__setitem__("version", lambda call: call.params["x"]))
    assert raw.ask("version") == "version failed: 'x'"
    rig.loop.call(lambda: rig.engine._ops.__setitem__("version", lambda _: {"x": object()}))
    assert "version failed" in raw.ask("version")
    assert raw.ask("list")["pid"] == os.getpid()


# The end


def test_a_shutdown_drains_answers_and_leaves_nothing(rig: Rig) -> None:
    nbd = rig.nbd()
    handle = nbd.submit(wire.NBD_CMD_WRITE, 0, 4, b"data")
    rig.until_pending(1)
    raw, holder = rig.raw(), rig.raw()
    rig.control.call("open", chain="ram:1M", name="held")
    holder.ask("pause", disk="held", hold=True)
    raw.send({"op": "shutdown"})
    rig.until_state("pausing")
    refused(rig, "open", "shutting down", chain="ram:1M", name="new")
    assert not rig.engine.is_down
    rig.finish()
    assert raw.reply() == {"pid": os.getpid()} and raw.reply() is None
    assert nbd.wait()[:2] == (handle, 0)
    assert rig.disk.closed and rig.files() == set() and rig.engine.is_down
    with pytest.raises(ControlError):
        rig.client()


def test_a_shutdown_waits_for_a_chain_that_is_being_replaced(rig: Rig) -> None:
    rig.control.call("open", chain=f"slowquiesce:{SIZE}", name="slow")
    slow = Manual.opened[1]
    assert isinstance(slow, SlowToQuiesce)
    rig.control.call("pause", disk="slow")
    raw = rig.raw()
    raw.send({"op": "unpause", "disk": "slow", "chain": f"ram:{SIZE}"})
    rig.until_state("replacing the chain", "slow")
    rig.loop.call(rig.engine.shutdown)
    rig.loop.until(lambda: "disk" not in rig.engine.disks)
    quiesced, slow.quiesced = slow.quiesced, None
    assert quiesced is not None
    rig.loop.call(quiesced)
    assert raw.reply() == {"state": "running"}
    rig.loop.until(lambda: rig.engine.is_down)
    assert slow.closed


def test_an_engine_takes_the_place_of_a_dead_one_only(rig: Rig) -> None:
    with pytest.raises(ControlError, match="another process listens there"):
        Engine(rig.env).listen()
    assert rig.control.call("version")["pid"] == os.getpid()


def test_errors_of_opening_are_of_the_tree(env: Env) -> None:
    engine = Engine(env)
    for chain, kind in (("nix:", ChainError), ("aio:/", UsageError), ("manual:broken", WritelogError)):
        with pytest.raises(kind):
            engine.open(chain, None if kind is UsageError else "x", read_only=bool(OpenFlag.NONE))
    assert list(env.run_dir.iterdir()) == []
