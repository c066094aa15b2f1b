"""The main job on real input: replicate a live disk while a writer uses it, hand it over, and prove the copy.

An ext4 file system is made out of files of this machine and served as log:|aio:. A writer overwrites the blocks
of one file in it, over NBD, all the time, and remembers what was acknowledged. writelog-sync copies the disk to a
writelog-replica and hands it over. Then both images must have the same digest, fsck must find the copy clean,
every acknowledged write must be in it, and the writer goes on at the copy.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from tapcore.errors import WritelogError
from tapcore.nbd import wire
from tapcore.nbd.client import NbdClient, NbdError
from writelog.keyring import fingerprint, load_public_key

BLOCK_BYTES = 4096
SOURCES = ("/usr/lib/python3.11", "/usr/lib/python3", "/usr/include", "/usr/share/perl", "/usr/share/doc", "/etc")
SOURCE_MAX_BYTES = 160 << 20
SCRATCH_BYTES = 64 << 20
DEPTH = 8
STEP_TIMEOUT_S = 120


def fail(message: str) -> NoReturn:
    print(f"\ndemo: FAILED: {message}", file=sys.stderr)
    sys.exit(1)


def say(text: str) -> None:
    print(text, flush=True)


def run(*command: str, accept: tuple[int, ...] = (0,)) -> str:
    """The output of a command that must succeed."""
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=STEP_TIMEOUT_S)
    if outcome.returncode not in accept:
        fail(f"{command[0]} ended with {outcome.returncode}: {outcome.stdout}{outcome.stderr}")
    return outcome.stdout


def read_line(stream: IO[str], what: str) -> str:
    """The next line of a program that has one to say soon."""
    if not select.select([stream], [], [], 30)[0]:
        fail(f"{what} says nothing")
    line = stream.readline()
    if not line:
        fail(f"{what} ended")
    return line.strip()


@contextlib.contextmanager
def program(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of ours: the process and its first line. Ended afterwards."""
    arguments = [sys.executable, "-m", *command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, read_line(process.stdout, command[0])
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                fail(f"{command[0]} does not end")


def tree_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def stage_files(folder: Path) -> Path:
    """A tree with copies of files of this machine, and one file for the writer."""
    tree = folder / "tree"
    tree.mkdir()
    left_bytes = SOURCE_MAX_BYTES
    for name in SOURCES:
        source = Path(name)
        if source.is_dir() and left_bytes > 0:
            size_bytes = tree_bytes(source)
            if size_bytes <= left_bytes:
                run("cp", "-r", "--no-dereference", "--no-preserve=ownership", name, str(tree / source.name),
                    accept=(0, 1))
                left_bytes -= size_bytes
    (tree / "scratch").write_bytes(os.urandom(SCRATCH_BYTES))
    return tree


def make_image(folder: Path, size_bytes: int) -> tuple[Path, list[int]]:
    """An ext4 image, and the offsets (bytes) of the blocks that the writer may overwrite."""
    tree = stage_files(folder)
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK_BYTES), "-d", str(tree), str(image))
    subprocess.run(["rm", "-rf", str(tree)], check=True)
    listed = run("debugfs", "-R", "stat /scratch", str(image))
    blocks: list[int] = []
    for logical, first, last in re.findall(r"\((?:ETB\d+|(\d+)(?:-\d+)?)\):(\d+)(?:-(\d+))?", listed):
        if logical:
            blocks += range(int(first), int(last or first) + 1)
    if len(blocks) != SCRATCH_BYTES // BLOCK_BYTES:
        fail(f"debugfs shows {len(blocks)} blocks of the writer's file")
    return image, [block * BLOCK_BYTES for block in blocks]


class Writer(threading.Thread):
    """Overwrites blocks at `rate` writes a second, some much more often than others, and remembers which writes
    were acknowledged. `follow` says where to go on when the disk has moved."""

    def __init__(self, uri: str, offsets: list[int], rate: float) -> None:
        super().__init__(name="writer", daemon=True)
        self.acknowledged: dict[int, bytes] = {}
        self.writes = 0
        self.longest_wait_s = 0.0
        self.error = ""
        self._uri = uri
        self._offsets = offsets
        self._rate = rate
        self._next_uri: str | None = None
        self._moved = threading.Event()
        self._stopping = threading.Event()
        self._random = random.Random(1)

    def follow(self, uri: str) -> None:
        """What is not acknowledged when the connection ends is written again at `uri`."""
        self._next_uri = uri
        self._moved.set()

    def stop(self) -> None:
        self._stopping.set()
        self._moved.set()
        self.join(30)
        if self.is_alive():
            fail("the writer hangs")
        if self.error:
            fail(f"the writer met an error: {self.error}")

    def run(self) -> None:
        again: dict[int, bytes] = {}
        while not self._stopping.is_set():
            try:
                with NbdClient(self._uri, timeout_s=STEP_TIMEOUT_S) as client:
                    self._write(client, again)
            except (OSError, WritelogError) as error:
                self._moved.wait(STEP_TIMEOUT_S)
                if self._next_uri is None and not self._stopping.is_set():
                    self.error = str(error)
                    return
                self._uri, self._next_uri = self._next_uri or self._uri, None

    def _write(self, client: NbdClient, again: dict[int, bytes]) -> None:
        """Write until told to stop. `again` holds what was sent and is not acknowledged, by offset."""
        flying: dict[int, tuple[int, bytes]] = {}
        for offset, data in list(again.items()):
            client.write(offset, data)
            self.acknowledged[offset] = again.pop(offset)
        next_s = time.monotonic()
        while flying or not self._stopping.is_set():
            if not self._stopping.is_set() and len(flying) < DEPTH:
                offset = self._offsets[int(len(self._offsets) * self._random.random() ** 4)]
                if offset not in again:
                    data = self._random.randbytes(16) * (BLOCK_BYTES // 16)
                    again[offset] = data
                    flying[client.submit(wire.NBD_CMD_WRITE, offset, BLOCK_BYTES, data)] = (offset, data)
                next_s += 1 / self._rate
                if (ahead_s := next_s - time.monotonic()) > 0:
                    time.sleep(ahead_s)
                if len(flying) < DEPTH:
                    continue
            start_s = time.monotonic()
            handle, code, _ = client.wait()
            self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - start_s)
            offset, data = flying.pop(handle)
            if code:
                raise NbdError(f"a write failed: {os.strerror(code)}", errno=code)
            self.acknowledged[offset] = again.pop(offset)
            self.writes += 1


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def check_writes(path: Path, acknowledged: dict[int, bytes]) -> None:
    with path.open("rb") as file:
        for offset, data in acknowledged.items():
            file.seek(offset)
            if file.read(len(data)) != data:
                fail(f"an acknowledged write at byte {offset} is not in {path.name}")


def pair(one: Path, other: Path) -> None:
    """Make keys for both ends, and have each accept the other's."""
    for giver, taker in ((one, other), (other, one)):
        exported = giver.with_suffix(".key")
        run(sys.executable, "-m", "writelog.pair", "pair", "export", "--keys", str(giver), str(exported))
        shown = fingerprint(load_public_key(exported))
        run(sys.executable, "-m", "writelog.pair", "pair", "import", "--keys", str(taker), str(exported),
            "--name", giver.name, "--fingerprint", shown)


def sync(run_dir: Path, keys: Path, endpoint: str) -> dict[str, Any]:
    """Run writelog-sync, show how it gets on, return its report."""
    command = [sys.executable, "-m", "writelog.sync", "--keys", str(keys),
               "--run-dir", str(run_dir), "--json", "demo", endpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told_s, event = 0.0, {}
        for line in process.stdout:
            event = json.loads(line)
            if "rate" in event and time.monotonic() - told_s > 1:
                told_s = time.monotonic()
                sent, rate, left, dirty = (
                    (event[name] or 0) / 1e6 for name in ("sent_bytes", "rate", "remaining_bytes", "dirty_rate"))
                say(f"   {event['state']}: {sent:,.0f} MB sent at {rate:,.0f} MB/s, {left:,.0f} MB left, "
                    f"the writer dirties {dirty:,.1f} MB/s")
        if process.wait(STEP_TIMEOUT_S) or event.get("state") != "done":
            fail(f"writelog-sync ended with {process.returncode}: {event.get('error', '')}")
    return event


def demonstrate(folder: Path, options: argparse.Namespace) -> None:
    started_s = time.monotonic()
    say("1. an ext4 image out of this machine's files")
    size_bytes = options.size_mib << 20
    image, offsets = make_image(folder, size_bytes)
    used_bytes = image.stat().st_blocks * 512
    say(f"   {size_bytes / 1e6:,.0f} MB, of which {used_bytes / 1e6:,.0f} MB are allocated")
    copy = folder / "copy.img"
    with copy.open("wb") as file:
        file.truncate(size_bytes)
    run_dir = folder / "run"
    run_dir.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        say("2. a tapdisk serves it, a writer uses it, a replica waits; each has a key that the other knows")
        pair(folder / "a", folder / "b")
        primary, ready = stack.enter_context(program(
            "tapcore.tapdisk", "--run-dir", str(run_dir), "--name", "demo", f"log:demo|aio:{image}"))
        _, listening = stack.enter_context(program(
            "writelog.replica", "--keys", str(folder / "b"), "--listen", "tcp://127.0.0.1:0",
            "--run-dir", str(folder / "b-run"), "--nbd", f"unix:{folder / 'copy.nbd'}", "--name", "demo",
            f"aio:{copy}"))
        writer = Writer(ready.split()[-1], offsets, options.rate)
        writer.start()
        time.sleep(1)
        say("3. replicate, live, and hand over")
        report = sync(run_dir, folder / "a", listening.split()[-1])
        before = writer.writes
        say("4. compare")
        if digest(image) != digest(copy):
            fail("the digests differ")
        run("fsck.ext4", "-f", "-n", str(copy))
        check_writes(copy, dict(writer.acknowledged))
        say("5. the writer goes on at the replica")
        writer.follow(f"nbd+unix:///demo?socket={folder / 'copy.nbd'}")
        run(sys.executable, "-m", "tapcore.tapctl", "--run-dir", str(run_dir), "close",
            "--forget", "demo")
        primary.terminate()
        time.sleep(1)
        writer.stop()
        after = writer.writes - before
        if not after:
            fail("the writer did not go on")
        run(sys.executable, "-m", "tapcore.tapctl", "--run-dir", str(folder / "b-run"), "close",
            "--forget", "demo")
    check_writes(copy, writer.acknowledged)
    run("fsck.ext4", "-f", "-n", str(copy))
    show(report, used_bytes, copy, before, after, time.monotonic() - started_s)


def show(report: dict[str, Any], used_bytes: int, copy: Path, before: int, after: int, elapsed_s: float) -> None:
    extra = report["extra_bytes"] / max(1, report["sent_bytes"] - report["extra_bytes"])
    parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in report["pause_parts_s"].items())
    say(f"""
disk        {report['size_bytes'] / 1e6:,.0f} MB, {used_bytes / 1e6:,.0f} MB allocated; the copy takes {
    copy.stat().st_blocks * 512 / 1e6:,.0f} MB
sent        {report['sent_bytes'] / 1e6:,.0f} MB in {report['elapsed_s']:.1f} s: {
    report['sent_bytes'] / 1e6 / report['elapsed_s']:,.0f} MB/s
extra data  {report['extra_bytes'] / 1e6:,.1f} MB sent again because it was written meanwhile: {extra:.1%}
pause       {report['pause_s'] * 1e3:.1f} ms ({parts})
writer      {before:,} writes acknowledged before the hand-over, {after:,} after it, none lost
checked     digests equal, fsck clean, every acknowledged write in the copy; {elapsed_s:.0f} s in all""")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="example:\n  tools/demo --size-mib 4096 --rate 5000")
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the disk (default 1024)")
    parser.add_argument("--rate", type=float, default=2000, help="4 KiB writes a second (default 2000)")
    parser.add_argument("--folder", type=Path, help="where the images are (default: the temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="writelog-demo-", dir=options.folder) as folder:
        demonstrate(Path(folder), options)


if __name__ == "__main__":
    main()
