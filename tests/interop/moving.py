"""A guest that writes, in a QEMU and on a tapdisk here, and what it can move to: a QEMU and a replica there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from interop.guest import Guest
from interop.hosts import Hosts, one_machine
from processes import Tapdisk, read_line

from tapcore import tapctl
from tapcore.control import find_disk
from tapcore.rundir import default_run_dir
from writelog.migrate_qmp import Monitor

SIZE = 8 << 20
BLOCK = 4096
SLOTS = SIZE // BLOCK
WAIT_S = 60
STOPPED = "writelog.migrate_run:Migration._mark:before:1"
"""Where a migration is when the memory is copied and the guest was stopped,"""
HANDED_OVER = "writelog.migrate_run:Migration._may_promote:before:1"
"""when all disks are handed over, and no replica was told,"""
PROMOTED = "writelog.migrate_run:Migration._continue:before:1"
"""and when all replicas are promoted, and QEMU was not told."""
SLOWLY = "--memory-rate=8M"
"""So that there is time for something to happen meanwhile."""
Serve = Callable[..., Tapdisk]

STEERED = Path(__file__).with_name("steered_migrate.py")
WRITER = """\
(read line < /dev/console; poweroff -f) &
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

    def __init__(self, folder: Path, serve: Serve, initramfs: Path, disks: int, *there: str,
                 hosts: Hosts | None = None) -> None:
        """`there`: options of the QEMU at the destination."""
        self.folder = folder
        self.hosts = hosts or one_machine(folder)
        self._options_there = there
        self._initramfs = initramfs
        self.names = [f"vm{number}" for number in range(disks)]
        self.places = ["here", "there"]
        """Where the guest is, and where it is to move to."""
        for name in self.names:
            for place in self.places:
                with (folder / f"{name}.{place}").open("wb") as file:
                    file.truncate(SIZE)
        self.tapdisks = [serve(f"log:{name}|aio:{folder}/{name}.here", "--name", name, at=self.hosts.here)
                         for name in self.names]
        self._run_dirs = {"here": self.tapdisks[0].run_dir, "there": default_run_dir()}
        self.guests: list[Guest] = []
        """All there were, in their order."""
        self.here = self._start_guest("here", [tapdisk.uri for tapdisk in self.tapdisks],
                                      None, *self.hosts.qemu_here, at=self.hosts.here)
        self._former: list[subprocess.Popen[bytes]] = []
        """The replicas of the move before, which serve the guest."""
        self._start_replicas()
        self.there = self._wait_there()
        self.migrate: subprocess.Popen[bytes] | None = None
        self.here.wait_for(lambda text: "wrote 20." in text)

    def _start_guest(self, place: str, uris: Sequence[str], incoming: str | None, *options: str,
                     at: Sequence[str]) -> Guest:
        self.guests.append(Guest(self.folder / f"{place}.qmp", self._initramfs, uris, incoming, *options, at=at))
        return self.guests[-1]

    def _start_replicas(self) -> None:
        self.replicas = [self._start_replica(name, self.hosts.endpoint(number))
                         for number, name in enumerate(self.names)]
        self.endpoints = [read_line(replica).split()[-1] for replica in self.replicas]

    def _start_replica(self, name: str, endpoint: str) -> subprocess.Popen[bytes]:
        there = self.places[1]
        return subprocess.Popen(
            [*self.hosts.there, sys.executable, "-m", "writelog.replica", *self.hosts.keys_there,
             "--run-dir", str(self._run_dirs[there]), "--listen", endpoint, "--name", name,
             "--nbd", f"unix:{self.folder}/{name}.{there}.nbd", f"aio:{self.folder}/{name}.{there}"],
            stdout=subprocess.PIPE)

    def start_replica_again(self) -> None:
        """The first one, which has ended."""
        self.replicas[0].communicate(timeout=WAIT_S)
        self.replicas[0] = self._start_replica(self.names[0], self.endpoints[0])
        read_line(self.replicas[0])

    def _wait_there(self) -> Guest:
        there = self.places[1]
        uris = [f"nbd+unix:///{name}?socket={self.folder}/{name}.{there}.nbd" for name in self.names]
        return self._start_guest(there, uris, self.hosts.waits or self.hosts.incoming,
                                 *self.hosts.qemu_there, *self._options_there, at=self.hosts.there)

    def wait_there_again(self) -> None:
        """A new QEMU at the destination: one whose guest did not come has ended."""
        self.there.end()
        self.there = self._wait_there()

    def turn(self) -> None:
        """The guest has moved; make ready for its move back, on one machine: where it was the images become
        replicas. `here` is where it is from now on."""
        self.here.end()
        for tapdisk in self.tapdisks:
            tapdisk.stop()
        for replica in self._former:
            stop(replica)
        self.places.reverse()
        self.here, self._former = self.there, self.replicas
        self._start_replicas()
        self.there = self._wait_there()

    def arguments(self, *options: str, monitor: str | None = None) -> list[str]:
        """Of writelog-migrate."""
        disks = [f"--disk={name}={endpoint}" for name, endpoint in zip(self.names, self.endpoints, strict=True)]
        return [*self.hosts.keys_here, "--json", "--run-dir", str(self._run_dir),
                "--qmp", monitor or self.here.monitor, "--to", self.hosts.incoming, *disks, *options]

    def start(self, *options: str, killed_at: str | None = None, held_at: Sequence[str] = (),
              monitor: str | None = None, **limits: float) -> subprocess.Popen[bytes]:
        """Start writelog-migrate; what steers it: see steered_migrate.py."""
        steering = {"killed": [killed_at] if killed_at else [], "held": held_at, "limits": limits}
        self.migrate = subprocess.Popen(
            [*self.hosts.here, sys.executable, "-P", str(STEERED), json.dumps(steering),
             *self.arguments(*options, monitor=monitor)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{STEERED.parents[2]}:{STEERED.parents[1]}"})
        return self.migrate

    def let_go_on(self) -> None:
        """One that is held."""
        assert self.migrate is not None and self.migrate.stdin is not None
        self.migrate.stdin.write(b"\n")
        self.migrate.stdin.flush()

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
        consoles = "".join(guest.console for guest in self.guests)
        return [int(number) for number in re.findall(r"wrote (\d+)\.", consoles)]

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

    def take_back(self) -> None:
        """What an operator is told to do when the guest runs nowhere. Until then it writes nothing."""
        written = len(self.acknowledged)
        self.there.end()
        for replica in self.replicas:
            stop(replica)
        for name in self.names:
            assert self.info(name)["fenced"]
        assert len(self.acknowledged) <= written + 1
        for name in self.names:
            assert tapctl.main(["--run-dir", str(self._run_dir), "unpause", "--force", name]) == 0
        with closing(Monitor(self.here.monitor)) as monitor:
            monitor.call("migrate_cancel")
            monitor.call("cont")
        self.is_here()

    def is_as_before(self) -> None:
        """AssertionError unless nothing of what QEMU was told for its migration is left."""
        with closing(Monitor(self.here.monitor)) as monitor:
            capabilities = {item["capability"]: item["state"]
                            for item in monitor.call("query-migrate-capabilities")}
            assert not capabilities["pause-before-switchover"]
            assert monitor.call("query-migrate-parameters")["max-bandwidth"] == 128 << 20

    @property
    def _run_dir(self) -> Path:
        """Where its disks are controlled."""
        return self._run_dirs[self.places[0]]

    def info(self, name: str) -> dict[str, Any]:
        with find_disk(self._run_dir, name) as control:
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
        for replica in self._former + self.replicas:
            stop(replica)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    process.communicate(timeout=WAIT_S)


Begin = Callable[..., Move]
