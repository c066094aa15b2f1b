"""A served disk with a log, and replicas for it, in one process: the sync under test runs in the main thread.

The disk is real (engine, control socket, log), the sockets are real; a Script is a replica whose answers a test
can change.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from support import LoopThread

from tapcore.control import ControlClient, find_disk
from tapcore.driver import Env
from tapcore.engine import Engine
from tapcore.errors import ControlError, WritelogError
from tapcore.nbd.client import NbdClient
from tapcore.vbd import Vbd
from writelog import sync, wire
from writelog.client import LogClient
from writelog.hashtree import differing
from writelog.replica_copy import Copy
from writelog.replica_server import ReplicaServer
from writelog.replica_state import StateStore
from writelog.sync_command import ask
from writelog.sync_control import find_sync
from writelog.wire import (
    MAX_INT,
    Ack,
    Barrier,
    Base,
    Content,
    ContentDigest,
    Data,
    Digest,
    Epoch,
    Facts,
    Failure,
    Hello,
    Kept,
    Message,
    Packed,
    Probe,
    Probed,
    Promote,
    Promoted,
    Release,
    Released,
    RunningDigest,
    Verify,
    Welcome,
    Zero,
)

SIZE_BYTES = 12 << 20
WAIT_S = 10.0
STEER_S = 30.0


class Script:
    """A replica in a thread that plays by the rules, in memory, but for the messages that `on` has a function for:
    `on[kind](message)` returns what to answer instead (None: nothing), or raises Script.Drop."""

    class Drop(Exception):
        """Drop the connection, and listen again."""

    def __init__(self) -> None:
        self.on: dict[type[Any], Callable[[Any], Message | bytes | None]] = {}
        self.durable = True
        """Whether an ACK says that what is applied is durable."""
        self.memory = bytearray(SIZE_BYTES)
        self.connections = 0
        self.errors: list[BaseException] = []
        self.base = 0
        self._peer = b""
        self._context = zmq.Context()
        self._socket = self._listen("tcp://127.0.0.1:0")
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._stopping = threading.Event()
        self._dropping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def drop(self) -> None:
        """Drop the connection soon, and listen again."""
        self._dropping.set()

    def forget(self) -> None:
        """As if started anew."""
        self.base = 0
        self.memory[:] = bytes(SIZE_BYTES)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(WAIT_S)
        self._context.destroy(linger=0)
        assert not self.errors, self.errors

    def _listen(self, endpoint: str) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.linger = 0
        router.bind(endpoint)
        return router

    def _run(self) -> None:
        try:
            peer, applied = b"", 0
            while not self._stopping.is_set():
                if self._dropping.is_set():
                    self._dropping.clear()
                    peer, applied = b"", 0
                    self._socket.close(linger=0)
                    self._socket = self._listen_again()
                if not self._socket.poll(20):
                    if peer:
                        self._answer(peer, Ack(applied, applied if self.durable else 0, 0, 0))
                    continue
                sender, *frames = self._socket.recv_multipart()
                message, payload = wire.decode(frames)
                if isinstance(message, Hello) and message.is_inquiry:
                    self._answer(sender, Facts(0, "", "", 0, SIZE_BYTES, MAX_INT, 0))
                    continue
                if isinstance(message, Hello):
                    peer, applied = sender, 0
                    self._peer = sender
                elif sender != peer:
                    continue
                applied = getattr(message, "seq", applied)
                try:
                    rule = self.on.get(type(message))
                    answer = rule(message) if rule is not None else self._play(message, payload)
                except Script.Drop:
                    peer, applied = b"", 0
                    self._socket.close(linger=0)
                    self._socket = self._listen_again()
                    continue
                self._answer(peer, answer)
        except BaseException as error:
            self.errors.append(error)

    def _listen_again(self) -> zmq.Socket[bytes]:
        while True:
            try:
                return self._listen(self.endpoint)
            except zmq.ZMQError:
                self._stopping.wait(0.01)

    def _answer(self, peer: bytes, answer: Message | bytes | None) -> None:
        if answer is not None:
            self._socket.send_multipart((peer, answer if isinstance(answer, bytes) else wire.encode(answer)))

    def _play(self, message: Message, payload: Any) -> Message | None:
        memory = self.memory
        if isinstance(message, Hello):
            self.connections += 1
            self._digest = RunningDigest()
            held = self.base if self.base in (message.base, message.former) else 0
            return Welcome(held, 64 << 20, False, 0)
        if isinstance(message, Base):
            self.base = message.base
            return None
        if isinstance(message, Packed):
            payload = wire.unpack(message, payload)
        if isinstance(message, Data | Packed | Zero):
            self._digest.add(message)
            data = bytes(message.length) if isinstance(message, Zero) else bytes(payload)
            memory[message.offset : message.offset + message.length] = data
            return Ack(message.seq, message.seq if self.durable else 0, 0, 0)
        if isinstance(message, Probe):
            self._digest.add(message)
            answer = Probed(message.seq, differing(
                memory[message.offset : message.offset + message.length], message.grain, message.digests))
            self._digest.settle(answer)
            self._answer(self._peer, answer)
            return Ack(message.seq, message.seq if self.durable else 0, 0, 0)
        if isinstance(message, Barrier):
            return Digest(message.seq, self._digest.digest())
        if isinstance(message, Epoch):
            return Kept(1, False)
        if isinstance(message, Verify):
            content = ContentDigest(SIZE_BYTES)
            for chunk in range(content.chunks):
                offset, length = content.range_of(chunk)
                content.set(chunk, memory[offset : offset + length])
            return Content(content.digest())
        if isinstance(message, Promote):
            return Promoted("unix:/script")
        assert isinstance(message, Release), message
        return Released()


class Rig:
    """The disk "vm1", `log:|CHAIN`, served by an engine in a thread, and a real replica on request."""

    def __init__(self, env: Env, image: Path, chain: str = "log:{image}|aio:{path}",
                 **options: Any) -> None:
        """`options` are the engine's."""
        self.env = env
        self.image = image
        if not image.exists():
            image.write_bytes(bytes(SIZE_BYTES))
        self._thread = LoopThread(env)
        self._closers: list[Callable[[], None]] = []
        engine = Engine(env, **options)
        text = chain.format(image="", path=image)
        self._thread.call(lambda: (engine.listen(), engine.open(text, "vm1")))
        self.uri = f"nbd+unix:///vm1?socket={self.info()['nbd'][0].removeprefix('unix:')}"

    def control(self) -> ControlClient:
        return find_disk(self.env.run_dir, "vm1", WAIT_S)

    def info(self) -> dict[str, Any]:
        with self.control() as control:
            return control.call("info", disk="vm1")

    def log(self) -> LogClient:
        return LogClient(self.info()["logs"][0]["socket"], WAIT_S)

    def dirty_bytes(self) -> int:
        with self.log() as log:
            figures = log.stat()
            return (figures.dirty_blocks + figures.leased_blocks) * figures.granularity_bytes

    def guest(self) -> NbdClient:
        return NbdClient(self.uri)

    def guest_goes_on(self) -> bool:
        """Whether a write of the guest ends; False if the disk is paused for good."""
        if self.info()["state"] != "running":
            return False
        with self.guest() as guest:
            guest.write(SIZE_BYTES - 512, b"alive" + bytes(507))
        return True

    def replica(self, chain: str, store: StateStore | None = None, journal: Path | None = None,
                **options: Any) -> str:
        """Start a real replica; its address. With a store, and a journal, it keeps what it knows there."""
        vbd = Vbd(self.env, "replica")

        def start() -> ReplicaServer:
            vbd.open(chain)
            vbd.pause(lambda: None)
            copy = Copy(self.env, vbd.chain.head, store or StateStore(), journal)
            copy.recover(recovered.append)
            return ReplicaServer(self.env, vbd, copy=copy, **options)

        recovered: list[WritelogError | None] = []
        server = self._thread.call(start)
        self._thread.until(lambda: bool(recovered))
        assert recovered == [None]
        endpoint = self._thread.call(lambda: server.listen("tcp://127.0.0.1:0"))
        self._closers.append(lambda: self._close_replica(server, vbd))
        return endpoint

    def _close_replica(self, server: ReplicaServer, vbd: Vbd) -> None:
        ended: list[int] = []
        self._thread.call(lambda: server.close(lambda: vbd.close(lambda: ended.append(1))))
        self._thread.until(lambda: bool(ended))

    def sync(self, *arguments: str) -> int:
        """Run writelog-sync here; its exit code."""
        keys = [] if any(argument.startswith("--key") for argument in arguments) else ["--insecure-loopback-only"]
        return sync.main(["--run-dir", str(self.env.run_dir), "--peer-timeout", "2", *keys, *arguments])

    def verify(self, *arguments: str) -> int:
        """Run writelog-sync verify here; its exit code."""
        return sync.main(["verify", "--run-dir", str(self.env.run_dir), "--peer-timeout", "2",
                          "--insecure-loopback-only", *arguments])

    def close(self) -> None:
        for closer in self._closers:
            closer()
        with self.control() as control:
            control.call("close", disk="vm1", forget=True)
        self._thread.stop()


class Steered:
    """A sync in a process of its own."""

    def __init__(self, rig: Rig, *arguments: str) -> None:
        self.rig = rig
        self.process = subprocess.Popen(
            [sys.executable, "-m", "writelog.sync", "--insecure-loopback-only",
             "--run-dir", str(rig.env.run_dir), "--json", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def ask(self, op: str, **params: Any) -> dict[str, Any]:
        return ask(find_sync(self.rig.env.run_dir, "vm1"), op, STEER_S, **params)

    def until(self, state: str) -> dict[str, Any]:
        """Ask until it is in a state, for a bounded time."""
        for _ in range(int(STEER_S / 0.02)):
            try:
                status = self.ask("status")
            except ControlError:
                assert self.process.poll() is None, self.process.communicate()
            else:
                if status["state"] == state:
                    return status
            threading.Event().wait(0.02)
        raise AssertionError(f"it never was {state}")

    def end(self) -> tuple[int, dict[str, Any], str]:
        out, err = self.process.communicate(timeout=STEER_S)
        return self.process.returncode, json.loads(out.splitlines()[-1]), err.decode()


def events(text: str) -> list[dict[str, Any]]:
    """The events of a --json run."""
    return [json.loads(line) for line in text.splitlines()]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def fail_with(code: int, message: str) -> Callable[[Any], Message]:
    return lambda _: Failure(code, message, "")
