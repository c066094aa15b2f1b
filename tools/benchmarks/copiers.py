"""Ways to copy a disk that is in use to another host: ours, QEMU's mirror job, nbdcopy.

Each serves `source` to a guest at a UNIX socket, copies it to `target` over TCP, and tells what that took. The
time begins when its programs are up and ends when the copy is complete, and the guest could run at the target.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

from tools.benchmarks.outcome import OURS
from tools.benchmarks.processes import START_TIMEOUT_S, RunFailed, Watched
from tools.benchmarks.qmp import Qmp
from tools.benchmarks.servers import LOG_NAME
from writelog.logstore import forget

PSK_USER: Final = "bench"


@dataclass(frozen=True)
class Place:
    """Where a copy goes. `at_source` and `at_target` begin the commands that are to run at an end of the link."""

    folder: Path
    source: Path
    target: Path
    deadline_s: float
    host: str = "127.0.0.1"
    source_host: str = "127.0.0.1"
    at_source: Sequence[str] = ()
    at_target: Sequence[str] = ()
    encrypted: bool = False

    @property
    def guest(self) -> Path:
        """The guest's NBD socket."""
        return self.folder / "guest"

    @property
    def guest_there(self) -> Path:
        """The one at the target, after a hand-over."""
        return self.folder / "guest-there"


@dataclass
class Copy:
    """One that succeeded. Times of time.monotonic(); CPU and memory of all its processes."""

    start_s: float
    ready_s: float
    """When all was copied but for what the pause is for."""
    end_s: float
    pause_s: float
    cpu_s: float
    peak_bytes: int


@dataclass
class Meter:
    """CPU seconds of some processes from the start of a copy on."""

    processes: list[Watched] = field(default_factory=list)
    used_s: float = 0.0

    def start(self) -> None:
        self.used_s = -sum(process.usage().cpu_s for process in self.processes)

    def stop(self) -> tuple[float, int]:
        usages = [process.usage() for process in self.processes]
        return self.used_s + sum(usage.cpu_s for usage in usages), sum(usage.peak_bytes for usage in usages)


class Copier(ABC):
    """`quiesce()` stops the guest when it is to be stopped from outside, and returns when it stands still."""

    name: ClassVar[str]

    def __init__(self, place: Place) -> None:
        self.place = place
        self._processes: list[Watched] = []

    @abstractmethod
    def serve(self) -> None:
        """Start both ends, and wait until the guest can connect."""

    @abstractmethod
    def copy(self, quiesce: Callable[[], None]) -> Copy: ...

    def close(self) -> None:
        for process in reversed(self._processes):
            process.end()

    def _start(self, name: str, command: Sequence[str]) -> Watched:
        process = Watched(name, command, self.place.deadline_s)
        self._processes.append(process)
        return process

    def _free_port(self) -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return int(server.getsockname()[1])

    def _psk_file(self) -> Path:
        """For TLS with a key that both ends share."""
        path = self.place.folder / "keys.psk"
        path.write_text(f"{PSK_USER}:{'5a' * 32}\n")
        path.chmod(0o600)
        return path


class Writelog(Copier):
    """tapdisk, writelog-sync, writelog-replica. Between hosts it is always encrypted."""

    name = OURS

    def serve(self) -> None:
        place = self.place
        self._tapdisk = self._start("tapdisk", [
            sys.executable, "-m", "tapcore.tapdisk", "--run-dir", str(place.folder), "--name", LOG_NAME,
            "--nbd", f"unix:{place.guest}", f"log:{LOG_NAME}|aio:{place.source}"])
        self._guards = self._replica_guards = ["--insecure-loopback-only"]
        if place.encrypted or place.at_source:
            for name in ("sync", "replica"):
                self._start("keygen", [sys.executable, "-m", "writelog.replica", "keygen", str(place.folder),
                                       "--name", name]).run_to_end()
            folder = place.folder
            self._guards = ["--key", f"{folder}/sync.key_secret", "--server-key", f"{folder}/replica.key"]
            self._replica_guards = ["--key", f"{folder}/replica.key_secret", "--authorized", f"{folder}/sync.key"]
        if not self._tapdisk.read_line():
            raise self._tapdisk.failure()
        self._run_dir, self._at = place.folder, place.at_source
        self._receive(place.target, place.at_target, place.host, self._there, place.guest_there)

    @property
    def _there(self) -> Path:
        """The run directory at the target."""
        return self.place.folder / "there"

    def _receive(self, image: Path, at: Sequence[str], host: str, run_dir: Path, guest: Path) -> None:
        """Start a replica of the disk, for the next sync."""
        self._replica = self._start("writelog-replica", [
            *at, sys.executable, "-m", "writelog.replica", *self._replica_guards, "--listen", f"tcp://{host}:0",
            "--run-dir", str(run_dir), "--name", LOG_NAME, "--nbd", f"unix:{guest}", f"aio:{image}"])
        line = self._replica.read_line().decode()
        if not line:
            raise self._replica.failure()
        self._endpoint = line.split()[-1]

    def turn_round(self) -> None:
        """After a hand-over: a guest works at `guest_there`, and the next sync goes back."""
        place = self.place
        self._tapdisk.terminate()
        self._tapdisk.run_to_end()
        self._tapdisk, self._run_dir, self._at = self._replica, self._there, place.at_target
        self._receive(place.source, place.at_source, place.source_host, place.folder, place.guest)

    def copy(self, quiesce: Callable[[], None]) -> Copy:
        return self.sync(quiesce=quiesce)

    def sync(self, *options: str, quiesce: Callable[[], None] = lambda: None) -> Copy:
        sync = self._start("writelog-sync", [
            *self._at, sys.executable, "-m", "writelog.sync", "--run-dir", str(self._run_dir), "--json",
            *self._guards, *options, LOG_NAME, self._endpoint])
        if not sync.read_line():
            raise sync.failure()
        start_s = time.monotonic()
        meter = Meter([self._tapdisk, self._replica, sync])
        meter.start()
        while True:
            line = sync.read_line()
            if not line:
                raise sync.failure()
            event = json.loads(line)
            if event["state"] == "done":
                break
            sync.usage()
        end_s = time.monotonic()
        cpu_s, peak_bytes = meter.stop()
        quiesce()
        sync.run_to_end()
        pause_s = event["pause_s"]
        return Copy(start_s, end_s - pause_s, end_s, pause_s, cpu_s, peak_bytes)

    def close(self) -> None:
        super().close()
        for run_dir in (self.place.folder, self._there):
            forget(run_dir, LOG_NAME)


class Mirror(Copier):
    """blockdev-mirror between two qemu-storage-daemons. It is ready when it has nothing left; then the guest is
    stopped, as in a migration, and the job ended."""

    name = "QEMU mirror"
    mode: ClassVar[str] = "background"

    def serve(self) -> None:
        place = self.place
        self._port = self._free_port()
        address = f"addr.type=inet,addr.host={place.host},addr.port={self._port}"
        self._secrets: dict[str, str] = {}
        server_secrets: list[str] = []
        client_objects: list[str] = []
        if place.encrypted:
            folder = self._psk_file().parent
            server_secrets = ["--object", f"tls-creds-psk,id=tls,endpoint=server,dir={folder}"]
            client_objects = ["--object", f"tls-creds-psk,id=tls,endpoint=client,dir={folder},username={PSK_USER}"]
            address += ",tls-creds=tls"
            self._secrets = {"tls-creds": "tls"}
        self._target = self._start("qemu-storage-daemon", [
            *place.at_target, *_storage_daemon(place.target, server_secrets), "--nbd-server", address,
            "--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"])
        self._source = self._start("qemu-storage-daemon", [
            *place.at_source, *_storage_daemon(place.source, client_objects),
            "--nbd-server", f"addr.type=unix,addr.path={place.guest}",
            "--export", "type=nbd,id=export,node-name=disk,name=bench,writable=on",
            "--chardev", f"socket,id=monitor,path={place.folder}/qmp,server=on,wait=off",
            "--monitor", "chardev=monitor"])
        _wait_for(self._source, lambda: place.guest.exists() and (place.folder / "qmp").exists())

    def copy(self, quiesce: Callable[[], None]) -> Copy:
        place = self.place
        qmp = Qmp(place.folder / "qmp", place.deadline_s)
        try:
            server = {"type": "inet", "host": place.host, "port": str(self._port)}
            _retry(lambda: qmp.call("blockdev-add", **{
                "driver": "nbd", "node-name": "target", "server": server, "export": "disk", **self._secrets}))
            start_s = time.monotonic()
            meter = Meter([self._source, self._target])
            meter.start()
            qmp.call("blockdev-mirror", **{"job-id": "mirror", "device": "disk", "target": "target",
                                           "sync": "full", "copy-mode": self.mode})
            if qmp.wait("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED")["event"] != "BLOCK_JOB_READY":
                raise RunFailed("the mirror job failed")
            ready_s = time.monotonic()
            quiesce()
            qmp.call("block-job-cancel", device="mirror")
            error = qmp.wait("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")["data"].get("error")
            if error:
                raise RunFailed(f"the mirror job failed: {error}")
            end_s = time.monotonic()
            return Copy(start_s, ready_s, end_s, end_s - ready_s, *meter.stop())
        finally:
            qmp.close()


class BlockingMirror(Mirror):
    """A guest's write is complete when the target has it, too."""

    name = "QEMU write-blocking"
    mode = "write-blocking"


class Nbdcopy(Copier):
    """nbdcopy from one nbdkit to another. It knows no guest: what is written meanwhile is lost."""

    name = "nbdcopy, nbdkit"

    def serve(self) -> None:
        place = self.place
        self._port = self._free_port()
        self._uri = f"nbd://{place.host}:{self._port}/"
        secrets: list[str] = []
        if place.encrypted:
            path = self._psk_file()
            secrets = ["--tls=require", f"--tls-psk={path}"]
            self._uri = f"nbds://{PSK_USER}@{place.host}:{self._port}/?tls-psk-file={path}"
        pid_files = [place.folder / f"{end}.pid" for end in ("source", "target")]
        self._source = self._start("nbdkit", ["nbdkit", "-f", "-P", str(pid_files[0]), "-U", str(place.guest),
                                              "file", str(place.source)])
        self._target = self._start("nbdkit", [
            *place.at_target, "nbdkit", "-f", "-P", str(pid_files[1]), "-i", place.host, "-p", str(self._port),
            *secrets, "file", str(place.target)])
        for process, path in zip((self._source, self._target), pid_files, strict=True):
            _wait_for(process, path.exists)

    def copy(self, quiesce: Callable[[], None]) -> Copy:
        place = self.place
        meter = Meter([self._source, self._target])
        meter.start()
        start_s = time.monotonic()
        copier = self._start("nbdcopy", [*place.at_source, "nbdcopy", "--flush",
                                         f"nbd+unix:///?socket={place.guest}", self._uri])
        usage = copier.run_to_end()
        end_s = time.monotonic()
        cpu_s, peak_bytes = meter.stop()
        return Copy(start_s, end_s, end_s, 0.0, cpu_s + usage.cpu_s, peak_bytes + usage.peak_bytes)


def _storage_daemon(image: Path, objects: Sequence[str]) -> list[str]:
    return ["qemu-storage-daemon", *objects,
            "--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap",
            "--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap,detect-zeroes=unmap"]


def _wait_for(process: Watched, is_up: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not is_up():
        if process.has_ended() or time.monotonic() > deadline_s:
            raise process.failure()
        time.sleep(0.01)


def _retry(action: Callable[[], object]) -> None:
    """Until the server at the other end listens."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            action()
            return
        except RunFailed:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)
