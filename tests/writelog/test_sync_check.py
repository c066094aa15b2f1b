"""Targets that cannot take the disk, and options that make no sense: a clear error, before anything is copied, and
the source as it was. With processes as users start them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from processes import Tapdisk, read_line
from support import need
from sync_rig import free_port

from tapcore.control import find_disk
from writelog.client import LogClient

SIZE_BYTES = 4 << 20
WAIT_S = 30


class Source:
    """A disk with a guest's data, and processes beside it that are ended after the test."""

    def __init__(self, folder: Path, serve: Callable[..., Tapdisk]) -> None:
        self.folder = folder
        self.image = folder / "disk.img"
        self.image.write_bytes(Random(1).randbytes(SIZE_BYTES // 2))
        os.truncate(self.image, SIZE_BYTES)
        self.content = self.image.read_bytes()
        self._serve = serve
        self.tapdisk = serve(f"log:|aio:{self.image}", "--name", "vm1")
        self.processes: list[subprocess.Popen[bytes]] = []

    def serve_another(self) -> None:
        """A disk of the same size, vm2."""
        other = self.folder / "other.img"
        other.write_bytes(bytes(SIZE_BYTES))
        self._serve(f"log:|aio:{other}", "--name", "vm2")

    def image_of(self, size_bytes: int = SIZE_BYTES) -> Path:
        path = self.folder / "copy.img"
        path.touch()
        os.truncate(path, size_bytes)
        return path

    def replica(self, chain: str, *options: str, prefix: tuple[str, ...] = (), **environment: str) -> str:
        """Its address."""
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "writelog.replica", "--insecure-loopback-only", "--listen",
             "tcp://127.0.0.1:0", *options, chain],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment, start_new_session=True)
        self.processes.append(process)
        return read_line(process).split()[-1]

    def sync(self, *arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> tuple[int, str, str]:
        """Exit code, output, error of a command of writelog-sync; the last arguments are disk and replica."""
        keys = [] if arguments[0] in ("set", "status", "cancel", "wait") else ["--insecure-loopback-only",
                                                                              "--peer-timeout", "5"]
        op = [arguments[0]] if arguments[0] in ("plan", "start", "set", "status", "cancel", "wait") else []
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "writelog.sync", *op, "--run-dir", str(self.tapdisk.run_dir), *keys,
             *arguments[len(op) :]],
            capture_output=True, text=True, timeout=WAIT_S, env=os.environ | environment, check=False)
        return done.returncode, done.stdout, done.stderr

    def is_intact(self) -> bool:
        """The guest writes on, the log knows of no copy, and the image is as it was."""
        with find_disk(self.tapdisk.run_dir, "vm1") as control:
            info = control.call("info", disk="vm1")
        with LogClient(info["logs"][0]["socket"]) as log:
            base = log.stat().base
        with self.tapdisk.client(timeout_s=WAIT_S) as guest:
            guest.write(SIZE_BYTES - 512, bytes(512))
        is_free = info["state"] == "running" and not info["fenced"] and not base
        return is_free and self.image.read_bytes() == self.content

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=WAIT_S)


@pytest.fixture
def source(tmp_path: Path, serve: Callable[..., Tapdisk]) -> Iterator[Source]:
    source = Source(tmp_path, serve)
    yield source
    source.close()


def refused(source: Source, text: str, *arguments: str) -> None:
    """By the sync, in front and in the background, and by plan."""
    for op in ((), ("start",), ("plan", "--rate", "100M", "--for", "0")):
        code, out, error = source.sync(*op, *arguments)
        assert code == 1 and text in out + error, (op, code, out, error)
    assert source.is_intact()


@pytest.mark.parametrize("size_bytes", [SIZE_BYTES // 2, 2 * SIZE_BYTES])
def test_a_target_of_another_size(source: Source, size_bytes: int) -> None:
    endpoint = source.replica(f"aio:{source.image_of(size_bytes)}")
    refused(source, f"the disk has {SIZE_BYTES} bytes, the replica {size_bytes}; make the replica's image the "
            "same", "vm1", endpoint)


def test_a_target_that_cannot_be_written(source: Source) -> None:
    """It does not even begin to listen."""
    need("qemu-nbd")
    path = source.folder / "ro.sock"
    server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "raw", "-k", str(path), "--fork",
                               "--pid-file", str(source.folder / "pid"), str(source.image_of())])
    assert server.wait(WAIT_S) == 0
    try:
        with pytest.raises(AssertionError, match="is read-only"):
            source.replica(f"nbd:nbd+unix:///?socket={path}")
    finally:
        os.kill(int((source.folder / "pid").read_text()), signal.SIGTERM)
    assert source.is_intact()


def test_a_target_without_room(source: Source) -> None:
    need("unshare", "mount")
    folder = source.folder / "small"
    folder.mkdir()
    script = 'mount -t tmpfs -o size=1m none "$0" && truncate -s "$1" "$0/copy.img" && shift && exec "$@"'
    endpoint = source.replica(f"aio:{folder}/copy.img", prefix=(
        "unshare", "--map-root-user", "--mount", "sh", "-c", script, str(folder), str(SIZE_BYTES)))
    refused(source, "the disk holds 2 MiB of data, but the replica's file system has room for", "vm1", endpoint)
    code, out, _ = source.sync("plan", "--rate", "100M", "--for", "0", "--json", "vm1", endpoint)
    target = json.loads(out)["target"]
    assert code == 1 and "of room there" in target["problem"] and 0 < target["free_bytes"] < 1 << 20


def test_a_target_of_another_pair(source: Source) -> None:
    source.serve_another()
    endpoint = source.replica(f"aio:{source.image_of()}")
    assert source.sync("--keep-running", "vm2", endpoint)[0] == 0
    copy = source.image_of().read_bytes()
    refused(source, "the replica holds a copy of disk 'vm2', but none that the write log here knows of",
            "vm1", endpoint)
    assert source.image_of().read_bytes() == copy
    assert source.sync("plan", "--rate", "100M", "--for", "0", "--overwrite", "vm1", endpoint)[0] == 0


def test_a_target_that_was_promoted_or_is_busy(source: Source) -> None:
    source.serve_another()
    endpoint = source.replica(f"aio:{source.image_of()}")
    code, _, error = source.sync("start", "--hold", "vm2", endpoint)
    assert code == 0, error
    for _ in range(1000):
        if json.loads(source.sync("status", "--json", "vm2")[1])["connections"]:
            break
    refused(source, "the replica is busy with another sync", "vm1", endpoint)
    assert source.sync("cancel", "vm2")[0] == 0
    source.sync("wait", "vm2")
    assert source.sync("vm2", endpoint)[0] == 0
    refused(source, "the replica was promoted: it is the primary now", "vm1", endpoint)


def test_nobody_there(source: Source) -> None:
    refused(source, "nobody answers there", "--peer-timeout", "0.5", "vm1", f"tcp://127.0.0.1:{free_port()}")


def test_two_daemons_for_one_disk(source: Source) -> None:
    endpoint = source.replica(f"aio:{source.image_of()}")
    code, _, error = source.sync("start", "--hold", "vm1", endpoint)
    assert code == 0, error
    code, _, error = source.sync("start", "vm1", endpoint)
    assert (code, "a sync of disk 'vm1' is running already" in error) == (1, True), error
    code, _, error = source.sync("vm1", endpoint)
    assert (code, "another sync of disk 'vm1' uses this write log" in error) == (1, True), error
    status = json.loads(source.sync("status", "--json", "vm1")[1])
    assert status["state"] in ("connecting", "syncing", "converging", "in sync")
    assert source.sync("cancel", "vm1")[0] == 0
    source.sync("wait", "vm1")
    with source.tapdisk.client(timeout_s=WAIT_S) as guest:
        guest.write(0, b"alive")


class SlowLink:
    """Forwards connections to `port`, each byte `delay_s` later."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._port, self._delay_s = port, delay_s
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, target), daemon=True).start()
        except OSError:
            return

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                threading.Event().wait(self._delay_s)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        self._listener.close()
        for one in self._sockets:
            one.close()


def test_a_downtime_that_cannot_be(source: Source) -> None:
    endpoint = source.replica(f"aio:{source.image_of()}")
    for value in ("0", "-1", "nan", "soon"):
        code, _, error = source.sync(f"--downtime={value}", "vm1", endpoint)
        assert code == 2 and f"'{value}' is no" in error, error
    link = SlowLink(int(endpoint.split(":")[-1]), 0.1)
    try:
        refused(source, "a downtime of 50 ms is impossible: an answer of the replica alone takes", "--downtime",
                "0.05", "vm1", link.endpoint)
        code, _, error = source.sync("start", "--hold", "--downtime", "5", "vm1", link.endpoint)
        assert code == 0, error
        code, _, error = source.sync("set", "--downtime", "0", "vm1")
        assert code == 2 and "'0' is no downtime" in error
        assert source.sync("cancel", "vm1")[0] == 0
        source.sync("wait", "vm1")
    finally:
        link.close()


@pytest.mark.parametrize(("here_days", "there_days"), [(400, -400), (-400, 400)])
def test_hosts_whose_clocks_differ(source: Source, here_days: int, there_days: int) -> None:
    """By years; `--at` goes by the clock of the sync's host."""
    need("faketime")
    environment = {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}

    def clock(days: int) -> tuple[str, ...]:
        return ("faketime", "-f", f"{days:+d}d")

    endpoint = source.replica(f"aio:{source.image_of()}", prefix=clock(there_days), **environment)
    at = datetime.now() + timedelta(days=here_days, seconds=3)
    code, out, error = source.sync("--json", "--verify", "--at", at.isoformat(timespec="seconds"), "vm1", endpoint,
                                   prefix=clock(here_days), **environment)
    assert code == 0, error
    events: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert events[-1]["handed_over"] and events[-1]["verified"]
    [switching] = [event["time"] for event in events if event["state"] == "switching"][:1]
    assert switching >= at.replace(microsecond=0).timestamp()
    assert source.image_of().read_bytes() == source.content
