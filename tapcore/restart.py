"""A tapdisk that starts again as another program, under its guests: what it hands on to itself.

`tap-ctl restart` has a tapdisk close its disks and execute the program that is installed now, in the same process.
A writelog-replica whose disk was promoted becomes a tapdisk in the same way. The NBD sockets stay open meanwhile:
a client that connects again waits there until its disk is served. What is to be served is in a file without a
name, whose descriptor the new program gets with `--handed-on`:

    {"shared": [[ADDRESS, FD], …], "named": [PATH, …],
     "disks": [{"name": …, "chain": …, "read_only": …, "paused": …, "nbd": [[ADDRESS, FD], …]}, …]}

`nbd` is empty for a disk that is reached at the shared addresses; `named` are files that the operator has named.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn


@dataclass(frozen=True)
class HandedDisk:
    """A disk; `nbd` are addresses with the descriptors of the sockets that listen there."""

    name: str
    chain: str
    read_only: bool
    paused: bool
    nbd: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class HandedOn:
    """All that a tapdisk serves, and with what."""

    shared: Sequence[tuple[str, int]]
    named: Sequence[str]
    disks: Sequence[HandedDisk] = field(default_factory=list)

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> HandedOn:
        fields = json.loads(data)
        disks = [HandedDisk(**disk) for disk in fields["disks"]]
        return cls(fields["shared"], fields["named"], disks)


def read(fd: int) -> HandedOn:
    """What is in the file `fd`, which is closed."""
    with open(fd, "rb") as file:
        file.seek(0)
        return HandedOn.decode(file.read())


def execute(handed_on: HandedOn, run_dir: Path, *, backing_dirs: Iterable[Path] | None, verbose: bool,
            max_retries: int = 100, retry_interval_s: float = 1.0, tls_creds: Path | None = None,
            insecure: bool = False) -> NoReturn:
    """Become the tapdisk that is installed now, with the options of the whole process."""
    fd = os.memfd_create("tapdisk-handed-on", 0)
    with open(fd, "wb", closefd=False) as file:
        file.write(handed_on.encode())
    arguments = ["--run-dir", str(run_dir), "--max-retries", str(max_retries),
                 "--retry-interval", f"{retry_interval_s:f}", "--handed-on", str(fd)]
    if tls_creds is not None:
        arguments += ["--tls-creds", str(tls_creds)]
    if backing_dirs is not None:
        arguments += ["--backing-dirs", ":".join(map(str, backing_dirs))]
    arguments += ["--insecure"] * insecure + ["--verbose"] * verbose
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "tapcore.tapdisk", *arguments])
