"""The two hosts of a migration: this machine for both, or two network namespaces, whose users have paired them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from interop.wire import Wire
from processes import read_line

WAIT_S = 30
MEMORY_PORT, PAIR_PORT, REPLICA_PORT = 4444, 5598, 5599


@dataclass(frozen=True)
class Hosts:
    """What commands begin with `here` and `there`; their options for keys; where the memory goes, and where the
    first replica listens (the next ones at the ports that follow, unless that is 0)."""

    here: Sequence[str]
    there: Sequence[str]
    keys_here: Sequence[str]
    keys_there: Sequence[str]
    incoming: str
    listen: str
    qemu_here: Sequence[str] = ()
    """Options of its own."""
    qemu_there: Sequence[str] = ()
    waits: str = ""
    """What the QEMU there is told by -incoming, if not `incoming`."""

    def endpoint(self, number: int) -> str:
        host, _, port = self.listen.rpartition(":")
        return f"{host}:{int(port) and int(port) + number}"


def one_machine(folder: Path) -> Hosts:
    insecure = ["--insecure-loopback-only"]
    return Hosts((), (), insecure, insecure, f"unix:{folder}/incoming", "tcp://127.0.0.1:0")


def two_hosts(wire: Wire, folder: Path) -> Hosts:
    """With keys of their own in `folder`, exchanged over the wire."""
    here, there = wire.link.at(wire.link.source), wire.link.at(wire.link.target)
    keys_here, keys_there = (["--keys", str(folder / f"keys.{place}")] for place in ("here", "there"))
    pair = [sys.executable, "-m", "writelog.pair", "pair"]
    with subprocess.Popen([*there, *pair, "listen", *keys_there, "--host", "host-b", "--name", "host-a"],
                          stdout=subprocess.PIPE) as listener:
        code = read_line(listener).split()[-1]
        read_line(listener)
        subprocess.run([*here, *pair, "connect", *keys_here, "--host", "host-a", wire.address, code],
                       check=True, timeout=WAIT_S, stdout=subprocess.DEVNULL)
        listener.communicate(timeout=WAIT_S)
        assert listener.returncode == 0
    return Hosts(here, there, keys_here, keys_there, f"tcp:{wire.address}:{MEMORY_PORT}",
                 f"tcp://{wire.address}:{REPLICA_PORT}")
