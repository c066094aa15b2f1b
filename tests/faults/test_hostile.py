"""Hostile clients at every socket and in the shared region, while a guest works beside them.

The guest goes on, its disk is right, the process lives and takes little memory, and afterwards the socket serves
those who behave.

    FAULT_ROUNDS=100 FAULT_SEED=7 pytest tests/faults/test_hostile.py
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
import zmq
from livewriter import LiveWriter
from logrig import RawClient
from processes import Tapdisk, forget_logs, read_line

from tapcore.control import PARAMS, ControlClient, find_disk
from tapcore.control import socket_path as control_socket_path
from tapcore.errors import ControlError, WritelogError
from writelog import wire
from writelog.client import LogClient
from writelog.control import COMMANDS, Message
from writelog.ring import EXTENT, HEADER, REQ_PROD
from writelog.shm import DATA_BYTES
from writelog.sync_command import ask
from writelog.sync_control import find_sync

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "2"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
SIZE_BYTES = 16 << 20
WAIT_S = 60.0
CROWD = 300 * ROUNDS
ENDLESS_MIB = 4096


def peak_mib(process: subprocess.Popen[bytes]) -> int:
    """The most memory that it ever had."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found, "it is dead"
    return int(found[1]) >> 10


class World:
    """A disk and its guest."""

    def __init__(self, folder: Path) -> None:
        self.random = Random(SEED)
        self.folder = folder
        self.image = folder / "disk.img"
        self.image.write_bytes(self.random.randbytes(SIZE_BYTES // 2) + bytes(SIZE_BYTES // 2))
        self.run_dir = folder / "run"
        self.run_dir.mkdir(mode=0o700)
        self.tapdisk = Tapdisk(self.run_dir, f"log:|aio:{self.image}")
        self.log_path = self.run_dir / "log__disk.img.ctl"
        self.guest = LiveWriter(self.tapdisk.uri, self.image.read_bytes(), seed=SEED)
        self.guest.wait(50)

    @contextlib.contextmanager
    def under_attack(self, *processes: subprocess.Popen[bytes], grows_mib: int = 64) -> Iterator[None]:
        """The guest goes on during it and afterwards; the processes live, and have grown by little."""
        watched = [self.tapdisk.process, *processes]
        before = [peak_mib(process) for process in watched]
        yield
        self.guest.wait(50)
        for process, mib in zip(watched, before, strict=True):
            assert process.poll() is None
            assert peak_mib(process) - mib <= grows_mib, process.args

    def connect(self, path: Path | str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(WAIT_S)
        for _ in range(1000):
            with contextlib.suppress(BlockingIOError):  # too many are waiting to be let in
                sock.connect(str(path))
                return sock
            threading.Event().wait(0.01)
        raise AssertionError("nobody is let in any more")

    def crowd(self, open_one: Callable[[], socket.socket]) -> None:
        """Many clients, each of which goes or stays as it likes."""
        staying: list[socket.socket] = []
        for number in range(CROWD):
            sock = open_one()
            if self.random.random() < 0.5:
                with contextlib.suppress(OSError):
                    sock.send(self.random.randbytes(20))
            if self.random.random() < 0.6:
                staying.append(sock)
            else:
                sock.close()
            if number % 50 == 0:
                self.guest.wait(2)
        for sock in staying:
            sock.close()

    def flood(self, sock: socket.socket, piece: bytes, limit_bytes: int) -> int:
        """Send without reading, until nothing more is taken; how much was."""
        sent = 0
        with contextlib.suppress(OSError):
            while sent < limit_bytes and select.select([], [sock], [], 0.3)[1]:
                sent += sock.send(piece)
        return sent

    def close(self) -> None:
        self.tapdisk.kill()
        forget_logs(self.run_dir)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def until(action: Callable[[], object]) -> None:
    """Until it works: a crowd of clients is still being shown out."""
    for _ in range(500):
        with contextlib.suppress(WritelogError, OSError):
            action()
            return
        threading.Event().wait(0.02)
    action()


def nonsense(random: Random) -> object:
    """Any JSON value."""
    return random.choice([None, True, -1, 1 << 70, 1.5, "", "x" * 500, "disk.img", "\ud800", "\0", [], [[[]]], {},
                          {"a": [1]}, random.random(), random.randrange(1 << 40)])


def test_the_control_socket(world: World) -> None:
    random, path = world.random, control_socket_path(world.run_dir, world.tapdisk.process.pid)
    harmless = [op for op in PARAMS if op not in ("shutdown", "close", "pause", "handover", "throttle")]
    with world.under_attack():
        for _ in range(30 * ROUNDS):
            with world.connect(path) as sock:
                request = {"op": random.choice(harmless), "disk": nonsense(random)}
                request |= {name: nonsense(random) for name in random.sample(("offset", "length", "x"), 2)}
                line = random.choice([random.randbytes(200), json.dumps(request).encode(), b"[" * 5000, b""])
                sock.sendall(line + b"\n")
                assert b"error" in sock.recv(1 << 16) or not line
        with world.connect(path) as sock:
            world.flood(sock, b"x" * 65536, 64 << 20)
        with world.connect(path) as sock:
            world.flood(sock, b'{"op": "list"}\n{"op": "stats"}\n' * 1000, 64 << 20)
            world.guest.wait(50)
        world.crowd(lambda: world.connect(path))
        until(lambda: ControlClient(path).close())
        until(lambda: find_disk(world.run_dir, "disk.img", WAIT_S).call("info", disk="disk.img"))
    world.guest.stop()


def test_the_logs_socket(world: World) -> None:
    random = world.random
    with world.under_attack():
        client = RawClient(str(world.log_path))
        client.attach()
        for _ in range(100 * ROUNDS):
            message = Message(random.choice(COMMANDS[1:]), random.randrange(3), random.randrange(5),
                              random.choice((0, 1, 65535)), random.choice((0, 1, 8, 1 << 32 - 1)),
                              random.choice((0, 8, SIZE_BYTES // 512, (1 << 64) - 1)))
            with contextlib.suppress(struct.error, OSError, AssertionError):
                client.send(random.randbytes(20) if random.random() < 0.05 else message.encode())
                if message.command != b"kick":
                    client.receive(4)
                continue
            client.close()
            client = RawClient(str(world.log_path))
            client.attach()
        client.close()
        with world.connect(world.log_path) as sock:
            sent = world.flood(sock, Message(b"peek").encode() * 500, 64 << 20)
            assert sent < 64 << 20
            world.guest.wait(50)
        world.crowd(lambda: world.connect(world.log_path))
        until(lambda: LogClient(world.log_path).close())
    world.guest.stop()


def test_the_shared_region_is_rewritten_while_it_is_read(world: World) -> None:
    """Indices from anywhere, slots that ask for anything, all of it changing all the time."""
    random = world.random
    with world.under_attack():
        for _ in range(10 * ROUNDS):
            client = RawClient(str(world.log_path))
            region = client.attach()
            words = region.page[:16].cast("I")
            stop = threading.Event()

            def scribble(page: memoryview = region.page, stop: threading.Event = stop,
                         random: Random = Random(random.random())) -> None:  # noqa: B008
                while not stop.is_set():
                    slot = HEADER.size + random.randrange(128) * EXTENT.size
                    extent = (random.choice((0, SIZE_BYTES // 512 - 1, 1 << 63, random.randrange(1 << 16))),
                              random.choice((0, 1, 8, 0xFFFFFFFF, 64)),
                              random.choice((0, 4096, DATA_BYTES, 0xFFFFFFFF, DATA_BYTES - 512)))
                    EXTENT.struct.pack_into(page, slot, *extent)

            thread = threading.Thread(target=scribble)
            thread.start()
            produced = 0
            with contextlib.suppress(OSError):
                for step in range(20):
                    produced = (produced + random.randrange(1, 40)) & 0xFFFFFFFF
                    words[REQ_PROD] = produced if step < 18 else random.randrange(1 << 32)
                    client.send(Message(b"kick").encode() * random.choice((1, 1, 100)))
            world.guest.wait(5)
            stop.set()
            thread.join(WAIT_S)
            words.release()
            client.close()
        with LogClient(world.log_path) as log:
            extents = [(0, SIZE_BYTES // 4)]
            assert sum(len(data) for _, data in log.read_extents(extents)) == SIZE_BYTES // 4
    world.guest.stop()


def open_export(world: World) -> socket.socket:
    """A client of the export, as its bytes (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md)."""
    sock = world.connect(world.tapdisk.socket)
    assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
    name = world.tapdisk.name.encode()
    sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
    assert len(sock.recv(10, socket.MSG_WAITALL)) == 10
    return sock


def test_the_nbd_socket(world: World) -> None:
    random = world.random
    with world.under_attack(grows_mib=160):
        for _ in range(20 * ROUNDS):
            with world.connect(world.tapdisk.socket) as sock, contextlib.suppress(OSError):
                sock.sendall(random.randbytes(random.randrange(1, 3000)))
            with open_export(world) as sock, contextlib.suppress(OSError):
                for _ in range(20):  # no writes: they would be good ones
                    sock.sendall(struct.pack(">IHHQQI", 0x25609513, random.randrange(1 << 16),
                                             random.choice((0, 2, 3, 5, 7, 8, 99)), random.getrandbits(64),
                                             random.choice((0, 4096, SIZE_BYTES, random.getrandbits(64))),
                                             random.choice((0, 1, 4096, 1 << 20, 0xFFFFFFFF))))
            world.guest.wait(2)
        deaf = [open_export(world) for _ in range(4)]
        for sock in deaf:
            world.flood(sock, struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 1 << 20) * 100, 32 << 20)
            world.guest.wait(20)
        for sock in deaf:
            sock.close()
        world.crowd(lambda: world.connect(world.tapdisk.socket))
    world.guest.stop()


# Replication


class Pair:
    """A replica, and a sync that is held, of the disk of `world`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.copy = world.folder / "copy.img"
        self.copy.write_bytes(bytes(SIZE_BYTES))
        self.replica = subprocess.Popen(
            [sys.executable, "-m", "writelog.replica", "--insecure-loopback-only", "--listen",
             "tcp://127.0.0.1:0", f"aio:{self.copy}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.endpoint = read_line(self.replica).split()[-1]
        self.sync = subprocess.Popen(
            [sys.executable, "-m", "writelog.sync", "--insecure-loopback-only", "--run-dir", str(world.run_dir),
             "--hold", "--downtime", "5", "--max-pause", "60", world.tapdisk.name, self.endpoint],
            stdout=subprocess.DEVNULL)
        self.wait_in_sync()

    def status(self) -> dict[str, Any]:
        return ask(find_sync(self.world.run_dir, self.world.tapdisk.name), "status", WAIT_S)

    def wait_in_sync(self) -> None:
        def is_in_sync() -> None:
            if self.status()["state"] != "in sync":
                raise ControlError("not yet")

        until(is_in_sync)

    def switch(self) -> None:
        """The sync has lived through it all."""
        self.wait_in_sync()
        disk = self.world.guest.stop()
        ask(find_sync(self.world.run_dir, self.world.tapdisk.name), "switch", WAIT_S)
        assert self.sync.wait(WAIT_S) == 0
        assert self.copy.read_bytes() == disk

    def close(self) -> None:
        for process in (self.sync, self.replica):
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=WAIT_S)


@pytest.fixture
def pair(world: World) -> Iterator[Pair]:
    pair = Pair(world)
    yield pair
    pair.close()


def test_the_syncs_socket(world: World, pair: Pair) -> None:
    random = world.random
    path = find_sync(world.run_dir, world.tapdisk.name)
    with world.under_attack(pair.sync, pair.replica):
        for _ in range(10 * ROUNDS):
            with world.connect(path) as sock, contextlib.suppress(OSError):
                request = {"op": random.choice(("status", "set", "nosuch")), "rate": nonsense(random)}
                line = random.choice([random.randbytes(200), json.dumps(request).encode(), b"[" * 3000])
                sock.sendall(line + b"\n")
                sock.recv(4096)
        with world.connect(path) as sock:
            world.flood(sock, b"x" * 65536, 64 << 20)
        with world.connect(path) as sock:
            world.flood(sock, b'{"op": "status"}\n' * 1000, 1 << 20)
        world.crowd(lambda: world.connect(path))
        until(lambda: ask(path, "set", WAIT_S, rate=0))
    pair.switch()


def test_the_replicas_port(world: World, pair: Pair) -> None:
    """Strangers, and peers that are let in and send what they like: here everybody is."""
    random = world.random
    host, port = pair.endpoint.removeprefix("tcp://").split(":")

    def connect() -> socket.socket:
        return socket.create_connection((host, int(port)), WAIT_S)

    with world.under_attack(pair.sync, pair.replica, grows_mib=320), zmq.Context() as context:
        for _ in range(20 * ROUNDS):
            with connect() as sock, contextlib.suppress(OSError):
                sock.sendall(random.choice([b"", b"\xff" + bytes(8) + b"\x7f"]) + random.randbytes(300))
        world.crowd(connect)
        for _ in range(5 * ROUNDS):
            with context.socket(zmq.DEALER) as peer:
                peer.linger = 200
                peer.connect(pair.endpoint)
                for _ in range(20):
                    headers = [wire.encode(message) for message in (
                        a_hello(random),
                        wire.Data(1, 0, 512, bytes(16)), wire.Barrier(1), wire.Promote(bytes(16)), wire.Release())]
                    frames = [*headers, random.randbytes(50), b"", wire.seal(random.randbytes(30))]
                    peer.send_multipart(random.choices(frames, k=random.randrange(1, 4)))
        with connect() as sock:
            assert send_without_end(sock) > 64
    assert pair.status()["connections"] == 1
    pair.switch()


def a_hello(random: Random) -> wire.Hello:
    """Of a stranger."""
    rest: dict[str, Any] = {field.name: False if field.type == "bool" else 0 for field in fields(wire.Hello)}
    return wire.Hello(**rest | {"version": wire.VERSION, "session": random.randbytes(16), "disk": "x",
                                "size_bytes": SIZE_BYTES, "base": 5})


def send_without_end(sock: socket.socket) -> int:
    """One message of ever more frames, by the bytes of https://rfc.zeromq.org/spec/23, until the replica ends the
    connection; how many MiB that took. zmq itself would send nothing before the last frame."""
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    sock.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
                 + bytes((4, len(ready))) + ready)
    frame = struct.pack(">BQ", 3, 1 << 20) + bytes(1 << 20)
    for count in range(ENDLESS_MIB):
        try:
            sock.sendall(frame)
        except OSError:
            return count
    raise AssertionError("a message without end was taken")
