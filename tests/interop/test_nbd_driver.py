"""The nbd driver at the bottom of chains, above real servers: they are killed, stopped and replaced under load."""

from __future__ import annotations

import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contract.runner import Runner
from nbd_servers import Server, nbdkit, qemu_nbd
from processes import Tapdisk
from support import need

from tapcore.driver import Env
from tapcore.request import FLUSH, FUA, READ, WRITE, ZEROES, Request

SIZE = 16 << 20
BLOCK = 64 << 10
TIMEOUT_S = 30
Serve = Callable[..., Tapdisk]


def run(*command: str) -> str:
    need(command[0])
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def server(request: pytest.FixtureRequest, image: Path) -> Iterator[Server]:
    server = nbdkit("file", str(image)) if request.param == "nbdkit" else qemu_nbd(image)
    yield server
    server.stop()


class Load:
    """Random requests, one at a time in each block, 16 in flight, checked against bytes."""

    def __init__(self, runner: Runner, seed: int) -> None:
        self.runner = runner
        self.random = random.Random(seed)
        self.data = bytearray(SIZE)
        self.ended = 0
        self.busy: set[int] = set()
        """The blocks that have a request in flight."""

    def start(self, count: int) -> None:
        batch = [self._make() for _ in range(count)]
        self.runner.start(*batch)
        for request in batch:
            # Behind the runner's own check that each request ends once.
            request.done = self._done

    def _make(self) -> Request:
        block = self.random.choice([block for block in range(SIZE // BLOCK) if block not in self.busy])
        self.busy.add(block)
        start = block * BLOCK + self.random.randrange(BLOCK // 2)
        length = self.random.randrange(1, BLOCK // 2)
        op = self.random.choice((READ, WRITE, WRITE, ZEROES, FLUSH))
        flags = FUA if op == WRITE and self.random.random() < 0.2 else 0
        data = bytearray(self.random.randbytes(length) if op == WRITE else length)
        iov = [memoryview(data)[: length // 3], memoryview(data)[length // 3 :]] if op in (READ, WRITE) else []
        request = Request(op, start, length, iov, flags)
        request.cookie = block
        if op in (WRITE, ZEROES):
            self.data[start : start + length] = data
        return request

    def _done(self, request: Request) -> None:
        assert request.error == 0, request
        self.runner.done(request)
        self.busy.remove(request.cookie)
        self.ended += 1
        if request.op == READ:
            assert b"".join(request.iov) == self.data[request.offset : request.offset + request.length]

    def run(self, until: int) -> None:
        """Keep 16 in flight until so many have ended."""
        deadline = until + 16

        def enough() -> bool:
            room = 16 - len(self.busy)
            if room and self.ended + len(self.busy) < deadline:
                self.start(room)
            return self.ended >= until

        self.runner.env.loop.run_until(enough, TIMEOUT_S)


def test_a_server_killed_and_started_again_loses_nothing(env: Env, server: Server, image: Path) -> None:
    runner = Runner(env, f"nbd:connections=2,unix:{server.path}")
    load = Load(runner, 1)
    for round_number in range(1, 5):
        load.run(200 * round_number)
        load.start(8)
        server.kill()
        load.start(8)
        if round_number % 2:
            env.loop.turn(0)
        server.start()
    load.run(1000)
    runner.wait()
    assert runner.read(0, SIZE) == load.data
    assert runner.flush() == 0
    runner.close()
    assert image.read_bytes() == load.data


def test_a_server_that_was_stopped_for_a_while(env: Env, image: Path) -> None:
    """Given up as silent, then awake again: it may carry out twice what it had received. (Not nbdkit 1.32, which
    aborts when a client hangs up while several of its threads reply.)"""
    server = qemu_nbd(image)
    try:
        runner = Runner(env, f"nbd:timeout=0.2,unix:{server.path}")
        load = Load(runner, 2)
        load.run(100)
        server.signal(signal.SIGSTOP)
        load.start(8)
        with pytest.raises(TimeoutError):
            env.loop.run_until(lambda: False, 0.5)
        assert len(load.busy) >= 8
        server.signal(signal.SIGCONT)
        runner.wait()
        assert runner.read(0, SIZE) == load.data
        runner.close()
    finally:
        server.stop()


def test_a_chain_of_tapdisks(serve: Serve, image: Path, tmp_path: Path) -> None:
    lower = serve(f"bottom=log:|aio:{image}")
    upper = serve(f"top=log:|nbd:connections=2,{lower.uri}")
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(3).randbytes(SIZE // 2))
    noise.open("ab").truncate(SIZE)
    run("nbdcopy", "--connections=4", "--flush", str(noise), upper.uri)
    assert image.read_bytes() == noise.read_bytes()
    commands = ["write -P 0x5a 1048576 3145728", "write -P 0x11 513 1021", "discard 8388608 65536",
                "write -z 2097152 131072", "write -f -P 0x33 40000 512", "flush", "read -P 0x11 513 1021",
                "read -P 0 2097152 131072", "read -P 0x33 40000 512", "read -P 0x5a 1048576 1048576"]
    output = run("qemu-io", "-f", "raw", *[part for command in commands for part in ("-c", command)], upper.uri)
    assert "failed" not in output and "error" not in output
    copy = tmp_path / "copy"
    run("nbdcopy", upper.uri, str(copy))
    assert copy.read_bytes() == image.read_bytes()
    assert re.search(r"^\s*8388608\s+8388608\s+3\b", run("nbdinfo", "--map", upper.uri), re.MULTILINE)


def test_a_guest_waits_while_the_server_is_away(serve: Serve, image: Path) -> None:
    server = nbdkit("file", str(image))
    try:
        disk = serve(f"log:|nbd:unix:{server.path}")
        with disk.client() as client:
            client.write(0, b"before")
            server.kill()
            handle = client.submit(1, 4096, 6, b"during")
            server.start()
            assert client.wait() == (handle, 0, None)
            assert client.read(0, 6) == b"before" and client.read(4096, 6) == b"during"
    finally:
        server.stop()


def test_over_tcp(env: Env, serve: Serve, image: Path) -> None:
    disk = serve(f"aio:{image}", "--nbd", "tcp:127.0.0.1:0")
    assert disk.uri.startswith("nbd://127.0.0.1:")
    runner = Runner(env, f"nbd:connections=3,{disk.uri}")
    load = Load(runner, 4)
    load.run(300)
    runner.wait()
    assert runner.read(0, SIZE) == load.data
    runner.close()


def test_fio_verifies_through_memory(serve: Serve) -> None:
    server = nbdkit("memory", "16M")
    try:
        disk = serve(f"nbd:connections=2,unix:{server.path}")
        output = run("fio", "--name=v", "--ioengine=nbd", f"--uri={disk.uri}", "--rw=randrw", "--bsrange=512-256k",
                     "--iodepth=16", f"--size={SIZE}", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
                     "--verify_state_save=0", "--randrepeat=0")
        assert re.search(r"err= 0", output)
        disk.stop()
    finally:
        server.stop()
