"""A guest that writes, in a QEMU and on a tapdisk here, and what it can move to: a QEMU and a replica there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from interop.guest import Guest
from processes import Tapdisk, read_line

from tapcore.control import find_disk
from writelog.migrate_qmp import Monitor

SIZE = 8 << 20
BLOCK = 4096
SLOTS = SIZE // BLOCK
WAIT_S = 60
SLOWLY = "--memory-rate=8M"
"""So that there is time for something to happen meanwhile."""
KILLED_AT = """
import sys
import killed_at
from writelog import migrate
killed_at.arm(sys.argv.pop(1))
sys.exit(migrate.main())
"""
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


class Move:
    """A guest with `disks` disks that writes, and all that is there for it to move to."""

    def __init__(self, folder: Path, serve: Serve, initramfs: Path, disks: int, *there: str) -> None:
        """`there`: options of the QEMU at the destination."""
        self.folder = folder
        self._options_there = there
        self.incoming = f"unix:{folder}/incoming"
        self.names = [f"vm{number}" for number in range(disks)]
        for name in self.names:
            for place in ("here", "there"):
                with (folder / f"{name}.{place}").open("wb") as file:
                    file.truncate(SIZE)
        self.tapdisks = [serve(f"log:{name}|aio:{folder}/{name}.here", "--name", name) for name in self.names]
        self.here = Guest(folder, initramfs, [tapdisk.uri for tapdisk in self.tapdisks])
        self.replicas = [subprocess.Popen(
            [sys.executable, "-m", "writelog.replica", "--insecure-loopback-only",
             "--listen", "tcp://127.0.0.1:0", "--name", name, "--nbd",
             f"unix:{folder}/{name}.nbd", f"aio:{folder}/{name}.there"], stdout=subprocess.PIPE)
            for name in self.names]
        self.endpoints = [read_line(replica).split()[-1] for replica in self.replicas]
        self._initramfs = initramfs
        self.there = self._wait_there()
        self.migrate: subprocess.Popen[bytes] | None = None
        self.here.wait_for(lambda text: "wrote 20." in text)

    def _wait_there(self) -> Guest:
        uris = [f"nbd+unix:///{name}?socket={self.folder}/{name}.nbd" for name in self.names]
        return Guest(self.folder, self._initramfs, uris, self.incoming, *self._options_there)

    def wait_there_again(self) -> None:
        """A new QEMU at the destination: one whose guest did not come has ended."""
        self.there.end()
        self.there = self._wait_there()

    def arguments(self, *options: str) -> list[str]:
        """Of writelog-migrate."""
        disks = [f"--disk={name}={endpoint}" for name, endpoint in zip(self.names, self.endpoints, strict=True)]
        return ["--insecure-loopback-only", "--json", "--run-dir", str(self.tapdisks[0].run_dir),
                "--qmp", self.here.monitor,
                "--to", self.incoming, *disks, *options]

    def start(self, *options: str, killed_at: str | None = None) -> subprocess.Popen[bytes]:
        """Start writelog-migrate; with `killed_at` it is killed at a place in the code: see killed_at.py."""
        program = ["-m", "writelog.migrate"] if killed_at is None else ["-c", KILLED_AT, killed_at]
        self.migrate = subprocess.Popen(
            [sys.executable, *program, *self.arguments(*options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])})
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

    def is_here(self) -> None:
        """AssertionError unless the guest runs on here, with disks of which nothing was handed over."""
        self.goes_on(self.here)
        for name in self.names:
            info = self.info(name)
            assert info["state"] == "running" and info["fenced"] is None and info["holder"] is None

    def is_as_before(self) -> None:
        """AssertionError unless nothing of what QEMU was told for its migration is left."""
        with closing(Monitor(self.here.monitor)) as monitor:
            capabilities = {item["capability"]: item["state"]
                            for item in monitor.call("query-migrate-capabilities")}
            assert not capabilities["pause-before-switchover"]
            assert monitor.call("query-migrate-parameters")["max-bandwidth"] == 128 << 20

    def info(self, name: str) -> dict[str, Any]:
        with find_disk(self.tapdisks[0].run_dir, name) as control:
            return control.call("info", disk=name)

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
            if replica.poll() is None:
                replica.terminate()
            replica.communicate(timeout=WAIT_S)


Begin = Callable[..., Move]
