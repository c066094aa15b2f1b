"""A disk lives through everything at once, for as long as you like, with a checker beside it.

A guest writes to a disk, reads it back, and knows what must be there. Meanwhile, in an order that the seed
decides: pauses, snapshots, commits, streams, replications, hand-overs to the other side and back, and kill -9 of
tapdisk, sync and replica, in the middle of any of them; sometimes the "host" dies with its tapdisk, then all in
shared memory is gone. No acknowledged write may be lost, and the guest must get on.

When something fails the folder stays, with the images, what every process has said, and the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import IO, Any, Final

from tapcore.control import find_disk
from tapcore.errors import WritelogError
from tapcore.nbd.client import NbdClient, NbdError
from tapcore.nbd.wire import NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES
from writelog.replica_state import SUFFIX
from writelog.shm import SHM_DIR, bitmap_name

BLOCK_BYTES: Final = 4096
SIZE_BYTES: Final = 64 << 20
BLOCKS: Final = 3000
"""That the guest uses, all over the disk."""
DEPTH: Final = 8
LONG_S: Final = 60.0
"""What works at all has worked by then."""
DISK: Final = "vm"

EXAMPLES = """\
examples:
  tools/soak --seconds 3600 --seed 7
  tools/soak --actions 40 --seed 7 --folder /var/tmp/soak       the same beginning, wherever it failed
"""


class Failed(Exception):
    """What must not happen has happened."""


class Guest:
    """Writes and reads in a thread, at whatever address `where()` is; comes back when its disk was gone.
    `possible` has for each block what it may hold: what was acknowledged last, and all that was not, since. Of a
    block in `unflushed` it is anything since the last flush once a tapdisk was killed: an image's tables may be in
    its memory."""

    def __init__(self, where: Callable[[], str], seed: int) -> None:
        self.possible: dict[int, list[bytes]] = {}
        self.unflushed: dict[int, list[bytes]] = {}
        self.acknowledged = self.connections = 0
        self.failure: Exception | None = None
        self.under_way: dict[int, tuple[int, int, bytes]] = {}
        """Kind, block and data of the requests that are not answered yet."""
        self.may_go = threading.Event()
        self.may_go.set()
        self._where = where
        self._random = Random(seed)
        self._blocks = self._random.sample(range(SIZE_BYTES // BLOCK_BYTES), BLOCKS)
        self._stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name="guest", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Begin nothing more; `thread` ends when its disk has."""
        self._stopping.set()

    def get_on(self, requests: int = 50) -> None:
        """Wait for so many more acknowledged requests."""
        deadline_s, wanted = time.monotonic() + LONG_S, self.acknowledged + requests
        while self.acknowledged < wanted:
            if self.failure is not None:
                raise Failed(f"the guest: {self.failure}")
            if time.monotonic() > deadline_s:
                raise Failed("the guest does not get on")
            time.sleep(0.005)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with NbdClient(self._where(), timeout_s=LONG_S) as client:
                    self.connections += 1
                    self._work(client)
            except (NbdError, OSError, WritelogError):
                for block, data in self.unflushed.items():
                    self.possible[block] = [*data, *self.possible[block]]
                self._stopping.wait(0.02)
            except Exception as error:
                self.failure = error
                return

    def _work(self, client: NbdClient) -> None:
        under_way = self.under_way = dict[int, tuple[int, int, bytes]]()
        flushing: dict[int, list[bytes]] = {}
        while not self._stopping.is_set():
            while len(under_way) < DEPTH and self.may_go.is_set():
                kind, block, data = self._next({block for _, block, _ in under_way.values()}, bool(flushing))
                if kind in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES):
                    before = self.possible.setdefault(block, [bytes(BLOCK_BYTES)])
                    self.unflushed.setdefault(block, []).extend(before)
                    before.append(data)
                elif kind == NBD_CMD_FLUSH:
                    busy = {block for _, block, _ in under_way.values()}
                    flushing = {block: list(data) for block, data in self.unflushed.items() if block not in busy}
                length = 0 if kind == NBD_CMD_FLUSH else BLOCK_BYTES
                handle = client.submit(kind, block * BLOCK_BYTES if length else 0, length,
                                       data if kind == NBD_CMD_WRITE else b"")
                under_way[handle] = kind, block, data
            if not under_way:
                self._stopping.wait(0.005)
                continue
            handle, error, found = client.wait()[:3]
            kind, block, data = under_way.pop(handle)
            if error == errno.ESHUTDOWN:
                raise ConnectionResetError
            if error:
                raise Failed(f"a request of block {block} failed with errno {error}")
            if kind == NBD_CMD_READ:
                assert isinstance(found, bytearray)
                self.check(block, bytes(found))
            elif kind == NBD_CMD_FLUSH:
                for flushed, values in flushing.items():
                    if self.unflushed[flushed] == values:
                        del self.unflushed[flushed]
                flushing = {}
            else:
                self.possible[block] = [data]
            self.acknowledged += 1

    def _next(self, busy: set[int], is_flushing: bool) -> tuple[int, int, bytes]:
        random = self._random
        while True:
            block = self._blocks[int(random.random() ** 3 * BLOCKS)]
            if block not in busy:
                kind = random.choices((NBD_CMD_WRITE, NBD_CMD_READ, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLUSH),
                                      (12, 8, 2, 0 if is_flushing else 1))[0]
                data = random.randbytes(8) * (BLOCK_BYTES // 8) if kind == NBD_CMD_WRITE else bytes(BLOCK_BYTES)
                return kind, block, data

    def check(self, block: int, found: bytes) -> None:
        """Failed if the block must not hold that."""
        possible = self.possible.get(block, [bytes(BLOCK_BYTES)])
        if found not in possible:
            raise Failed(f"block {block} holds {found[:8].hex()}…, not {', '.join(x[:8].hex() for x in possible)}")
        if block in self.possible:
            self.possible[block] = [found]

    def check_all(self, uri: str) -> None:
        """All of its disk, while it stands still."""
        with NbdClient(uri, timeout_s=LONG_S) as client:
            for block in list(self.possible):
                self.check(block, bytes(client.read(block * BLOCK_BYTES, BLOCK_BYTES)))


class Side:
    """One of the two hosts: its images, its run directory, and what runs there."""

    def __init__(self, folder: Path, name: str, log: IO[bytes]) -> None:
        self.name = name
        self.folder = folder / name
        self.run_dir = self.folder / "run"
        self.run_dir.mkdir(mode=0o700, parents=True)
        self.log = log
        self.images = 1
        self.top = self.folder / "0.qcow2"
        run("td-img", "create", "-f", "qcow2", str(self.top), str(SIZE_BYTES))
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        self.tapdisk: subprocess.Popen[bytes] | None = None
        self.replica: subprocess.Popen[bytes] | None = None
        self.uri = f"nbd+unix:///{DISK}?socket={self.run_dir / (DISK + '.nbd')}"

    @property
    def sync_command(self) -> list[str]:
        return [sys.executable, "-m", "writelog.sync", "--insecure-loopback-only", "--json", "--run-dir",
                str(self.run_dir), "--peer-timeout", "3", "--downtime", "2", "--max-pause", "30"]

    def start_tapdisk(self) -> None:
        self.tapdisk = self._start("tapcore.tapdisk", "--run-dir", str(self.run_dir), "--nbd",
                                   f"unix:{self.run_dir / (DISK + '.nbd')}", f"{DISK}=log:{DISK}|qcow2:{self.top}")

    def start_replica(self) -> None:
        self.replica = self._start("writelog.replica", "--insecure-loopback-only", "--listen", self.endpoint,
                                   "--peer-timeout", "3", "--name", DISK, "--nbd",
                                   f"unix:{self.run_dir / (DISK + '.nbd')}", f"qcow2:{self.top}")

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE,
                                   stderr=self.log)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise Failed(f"{module} does not start at side {self.name}")
        return process

    def call(self, op: str, **params: Any) -> dict[str, Any]:
        with contextlib.closing(find_disk(self.run_dir, DISK, LONG_S)) as control:
            return control.call(op, disk=DISK, **params)

    def learn_top(self) -> None:
        """Which image the disk stands on: a commit changes it."""
        text = str(self.call("info")["chain"])
        self.top = Path(text.split("|")[-1].split(":", 1)[1])

    def lose_memory(self) -> None:
        """As if the host had died: what its logs have in shared memory is gone."""
        for path in SHM_DIR.glob(bitmap_name(self.run_dir, "ANY").replace("ANY", "*").removeprefix("/")):
            path.unlink(missing_ok=True)

    @property
    def was_promoted(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(json.loads(Path(f"{self.top}{SUFFIX}").read_text())["promoted"])
        return False

    def end(self) -> None:
        for process in (self.tapdisk, self.replica):
            kill(process)
        self.lose_memory()


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def kill(process: subprocess.Popen[bytes] | None, number: int = signal.SIGKILL) -> None:
    if process is not None and process.poll() is None:
        process.send_signal(number)
        process.wait(LONG_S)


class Soak:
    """`tell` is called with a line for each thing that is done."""

    def __init__(self, folder: Path, seed: int, tell: Callable[[str], None]) -> None:
        self.random = Random(seed)
        self.tell = tell
        self.log = (folder / "log.txt").open("ab")
        self.here, self.there = (Side(folder, name, self.log) for name in ("a", "b"))
        self.here.start_tapdisk()
        self.there.start_replica()
        self.guest = Guest(lambda: self.here.uri, seed)
        self.done: dict[str, int] = {}
        self._actions: dict[Callable[[], str], int] = {
            self.pause: 4, self.snapshot: 4, self.job: 5, self.replicate: 6, self.migrate: 4,
            self.kill_tapdisk: 4, self.kill_replica: 2, self.check: 2}

    def run(self, seconds: float, actions: int | None) -> None:
        """Failed if anything went wrong. So much for the actions: their effects depend on the moment, too."""
        start_s = time.monotonic()
        for number in range(actions if actions is not None else sys.maxsize):
            if time.monotonic() - start_s > seconds:
                break
            action = self.random.choices(list(self._actions), list(self._actions.values()))[0]
            name = action.__name__
            outcome = action()
            self.guest.get_on()
            self.done[name] = self.done.get(name, 0) + 1
            self.tell(f"{time.monotonic() - start_s:8.1f} s  {number:5}  {name}: {outcome}")
        self.check()

    def state(self) -> str:
        """What can be seen of the disk, and of what its guest waits for."""
        waits_for = [f"{kind} of block {block}" for kind, block, _ in self.guest.under_way.values()]
        seen: list[object] = [f"the guest waits for {waits_for}"]
        for op in ("info", "jobs", "stats"):
            try:
                seen.append(self.here.call(op))
            except WritelogError as error:
                seen.append(error)
        return "; ".join(map(str, seen))

    def close(self) -> None:
        self.guest.stop()
        for side in (self.here, self.there):
            side.end()
        self.guest.thread.join(LONG_S)
        self.log.close()

    # What is done. Each returns what became of it.

    def pause(self) -> str:
        wait_s = self.random.uniform(0, 0.3)
        self.here.call("pause")
        time.sleep(wait_s)
        deadline_s = time.monotonic() + LONG_S
        while True:
            try:
                self.here.call("unpause")
                return f"{wait_s:.2f} s"
            except WritelogError:  # a sync holds it
                if self.here.call("info")["fenced"] or time.monotonic() > deadline_s:
                    raise
            time.sleep(0.02)

    def snapshot(self) -> str:
        here = self.here
        path = here.folder / f"{here.images}.qcow2"
        here.images += 1
        here.call("snapshot", path=str(path))
        here.top = path
        return path.name

    def job(self) -> str:
        op = self.random.choice(("commit", "commit", "stream"))
        fate, wait_s = self.random.choice(("ends", "ends", "cancelled", "killed")), self.random.uniform(0, 0.3)
        try:
            self.here.call(op)
        except WritelogError as error:
            return f"{op} refused: {error.message}"
        if fate == "killed":
            time.sleep(wait_s)
            return f"{op} killed after {wait_s:.2f} s; {self.kill_tapdisk()}"
        if fate == "cancelled":
            time.sleep(wait_s)
            with contextlib.suppress(WritelogError):  # it has ended
                self.here.call("cancel")
        deadline_s = time.monotonic() + LONG_S
        while (news := self.here.call("jobs")["jobs"][0])["state"] == "running":
            if time.monotonic() > deadline_s:
                raise Failed(f"a {op} does not end: {news}")
            time.sleep(0.02)
        self.here.learn_top()
        if fate == "ends" and news.get("error"):
            raise Failed(f"a {op} failed: {news}")
        return f"{op} {fate}: {news['state']}, now at {self.here.top.name}"

    def kill_tapdisk(self) -> str:
        kill(self.here.tapdisk)
        host_dies = self.random.random() < 0.4
        if host_dies:
            self.here.lose_memory()
        self.here.start_tapdisk()
        return "the host died" if host_dies else "the process died"

    def kill_replica(self) -> str:
        kill(self.there.replica)
        self.there.start_replica()
        return "started again"

    def check(self) -> str:
        """The guest stands still, and its whole disk is looked at."""
        with self.standing_still():
            self.guest.check_all(self.here.uri)
        return f"{len(self.guest.possible)} blocks are right"

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        self.guest.may_go.clear()
        before, since_s = -1, time.monotonic()
        while before != (before := self.guest.acknowledged) or time.monotonic() - since_s < 0.2:
            time.sleep(0.1)
        try:
            yield
        finally:
            self.guest.may_go.set()

    def _sync(self, *options: str) -> tuple[int, str]:
        """Run one, with kills in the middle of it perhaps; its exit code, and what was done to it."""
        command = [*self.here.sync_command, *options, DISK, self.there.endpoint]
        fates = self.random.choices(("", "sync", "replica", "tapdisk", "pause", "snapshot"), (8, 2, 2, 2, 1, 1),
                                    k=self.random.choice((1, 1, 2)))
        waits_s = [self.random.uniform(0, 1.0) for _ in fates]
        out = tempfile.TemporaryFile()  # noqa: SIM115
        sync = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        told = []
        for fate, wait_s in zip(fates, waits_s, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                sync.wait(wait_s)
            if fate and sync.poll() is None:
                told.append(f"{fate} after {wait_s:.2f} s")
                self._meddle(fate, sync)
        try:
            code = sync.wait(LONG_S)
        except subprocess.TimeoutExpired:
            kill(sync)
            raise Failed(f"a sync does not end ({', '.join(told)})") from None
        out.seek(0)
        lines = out.read()
        out.close()
        self.log.write(lines)
        if code > 0:
            told.append(lines.decode(errors="replace").splitlines()[-1])
        if code and not any(fates):
            raise Failed(f"a sync to which nothing was done ended with {code}: {told}")
        return code, "; ".join(told) or "undisturbed"

    def _meddle(self, fate: str, sync: subprocess.Popen[bytes]) -> None:
        if fate == "sync":
            kill(sync)
        elif fate == "replica":
            kill(self.there.replica)
            if not self.there.was_promoted:
                self.there.start_replica()
        elif fate == "tapdisk":
            self.kill_tapdisk()
        else:
            with contextlib.suppress(WritelogError):  # a disk that is handed over takes neither
                self.pause() if fate == "pause" else self.snapshot()

    def replicate(self) -> str:
        """The disk stays here."""
        verify = self.random.random() < 0.7
        code, told = self._sync("--keep-running", *(["--verify"] if verify else []))
        return f"exit code {code}, {told}{', verified' if verify and not code else ''}"

    def migrate(self) -> str:
        """Hand over; then what was the replica is served by a tapdisk, and the former disk is a replica."""
        code, told = self._sync()
        here, there = self.here, self.there
        if code:
            kill(there.replica)  # whatever it was told has come to it by now, or never does
            if not there.was_promoted:
                there.start_replica()
                if here.call("info")["fenced"]:
                    here.call("unpause", force=True)
                    return f"exit code {code}, {told}; it was handed over, and is forced to go on here"
                return f"exit code {code}, {told}; it stays here"
        elif not there.was_promoted or not here.call("info")["fenced"]:
            raise Failed("a sync says that the disk was handed over, but it is not so")
        self.guest.may_go.clear()
        self.here, self.there = there, here
        kill(here.tapdisk, signal.SIGTERM)
        if not code:
            self.guest.check_all(there.uri)
            self.guest.may_go.set()
            self.guest.get_on(20)
            kill(there.replica, signal.SIGTERM)
        Path(f"{there.top}{SUFFIX}").unlink()
        there.start_tapdisk()
        self.guest.may_go.set()
        Path(f"{here.top}{SUFFIX}").unlink(missing_ok=True)
        here.start_replica()
        return f"exit code {code}, {told}; it is at {there.name} now"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/soak", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="S",
                        help="how long (default: %(default)g)")
    parser.add_argument("--actions", type=int, metavar="N", help="no more than that many actions")
    parser.add_argument("--seed", type=int, help="what happens, in which order (default: another one each time)")
    parser.add_argument("--folder", type=Path, metavar="DIR",
                        help="where to work; made, and kept if anything fails (default: a new one in $TMPDIR)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parse_arguments(arguments)
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(3), "big")
    if options.folder is not None:
        options.folder.mkdir(parents=True)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    with (folder / "actions.txt").open("a") as journal:

        def tell(line: str) -> None:
            print(line, flush=True)
            print(line, file=journal, flush=True)

        tell(f"seed {seed}, in {folder}")
        soak = Soak(folder, seed, tell)
        try:
            soak.run(options.seconds, options.actions)
        except BaseException as error:
            tell(f"FAILED: {type(error).__name__}: {error}")
            tell(soak.state())
            tell(f"what is left is in {folder}; seed {seed}")
            if isinstance(error, Failed):
                return 1
            raise
        finally:
            soak.close()
        done = ", ".join(f"{count} {name}" for name, count in sorted(soak.done.items()))
        tell(f"well: {done}; {soak.guest.acknowledged} requests of a guest that connected "
             f"{soak.guest.connections} times; seed {seed}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
