"""A real guest moves from one QEMU and tapdisk to another QEMU and a replica, while it writes: whatever it was
told to be durable, on either side, is on the disk where it is then."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from interop.guest import Guest, make_initramfs
from processes import Tapdisk, read_line

SIZE = 8 << 20
BLOCK = 4096
SLOTS = SIZE // BLOCK
WAIT_S = 60
Serve = Callable[..., Tapdisk]

WRITER = """\
n=0
while true; do
  n=$((n + 1))
  {choose}
  printf 'block %08d' $n | dd of=$disk bs=4096 seek=$((n % {slots})) conv=sync,fsync,notrunc 2>/dev/null || exit 1
  echo "wrote $n."
done
"""
CHOOSE = {1: "disk=/dev/vda", 2: "[ $((n % 2)) = 1 ] && disk=/dev/vda || disk=/dev/vdb"}


@pytest.fixture(scope="module", params=[1])
def initramfs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("guest")
    return make_initramfs(folder, WRITER.format(slots=SLOTS, choose=CHOOSE[request.param]))


class Move:
    """A guest with `disks` disks that writes, and all that is there for it to move to."""

    def __init__(self, folder: Path, serve: Serve, initramfs: Path, disks: int = 1) -> None:
        self.folder = folder
        self.incoming = f"unix:{folder}/incoming"
        self.names = [f"vm{number}" for number in range(disks)]
        for name in self.names:
            for place in ("here", "there"):
                with (folder / f"{name}.{place}").open("wb") as file:
                    file.truncate(SIZE)
        self.tapdisks = [serve(f"log:{name}|aio:{folder}/{name}.here", "--name", name) for name in self.names]
        self.here = Guest(folder, initramfs, [tapdisk.uri for tapdisk in self.tapdisks])
        self.replicas = [subprocess.Popen(
            [sys.executable, "-m", "writelog.replica", "--listen", "tcp://127.0.0.1:0", "--name", name, "--nbd",
             f"unix:{folder}/{name}.nbd", f"aio:{folder}/{name}.there"], stdout=subprocess.PIPE)
            for name in self.names]
        self.endpoints = [read_line(replica).split()[-1] for replica in self.replicas]
        self.there = Guest(folder, initramfs, [f"nbd+unix:///{name}?socket={folder}/{name}.nbd"
                                               for name in self.names], self.incoming)
        self.migrate: subprocess.Popen[bytes] | None = None
        self.here.wait_for(lambda text: "wrote 20." in text)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start writelog-migrate."""
        disks = [f"--disk={name}={endpoint}" for name, endpoint in zip(self.names, self.endpoints, strict=True)]
        self.migrate = subprocess.Popen(
            [sys.executable, "-m", "writelog.migrate", "--json", "--run-dir", str(self.tapdisks[0].run_dir),
             "--qmp", self.here.monitor, "--to", self.incoming, *disks, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return self.migrate

    def wait_for_event(self, state: str) -> dict[str, Any]:
        """The next event of that state."""
        assert self.migrate is not None
        while True:
            event: dict[str, Any] = json.loads(read_line(self.migrate, WAIT_S))
            if event["state"] == state:
                return event

    def finish(self) -> tuple[int, list[dict[str, Any]], str]:
        """The exit code of writelog-migrate, its events and what it said."""
        assert self.migrate is not None
        out, err = self.migrate.communicate(timeout=WAIT_S)
        return self.migrate.returncode, [json.loads(line) for line in out.splitlines()], err.decode()

    @property
    def acknowledged(self) -> list[int]:
        """The numbers that the guest has written durably, at either place."""
        return [int(number) for number in re.findall(r"wrote (\d+)\.", self.here.console + self.there.console)]

    def goes_on(self, guest: Guest) -> None:
        """AssertionError unless the guest writes at that place."""
        seen = len(re.findall("wrote", guest.console))
        guest.wait_for(lambda text: len(re.findall("wrote", text)) > seen + 5)

    def check(self, place: str) -> None:
        """Once no QEMU runs: all that was acknowledged is on the disks there."""
        images = [(self.folder / f"{name}.{place}").read_bytes() for name in self.names]
        numbers = self.acknowledged
        for number in numbers:
            image = images[(number + 1) % len(images)]
            at = number % SLOTS * BLOCK
            found = re.match(rb"block (\d{8})", image[at : at + BLOCK])
            assert found, f"{number} was acknowledged and is not there"
            assert int(found[1]) >= number and (int(found[1]) - number) % SLOTS == 0

    def end(self) -> None:
        if self.migrate is not None:
            self.migrate.kill()
            self.migrate.communicate(timeout=WAIT_S)
        self.here.end()
        self.there.end()
        for replica in self.replicas:
            replica.terminate()
            replica.communicate(timeout=WAIT_S)


@pytest.fixture
def move(tmp_path: Path, serve: Serve, initramfs: Path) -> Iterator[Move]:
    move = Move(tmp_path, serve, initramfs)
    yield move
    move.end()


def test_a_guest_moves(move: Move) -> None:
    move.start("--dest-qmp", move.there.monitor)
    code, events, error = move.finish()
    assert code == 0, error
    report = events[-1]
    print(json.dumps(report, indent=1))
    move.goes_on(move.there)
    move.end()
    move.check("there")
