"""A guest's disk in each format is served under a log and replicated to each other format, live: both ends hold
what was acknowledged to the guest, and QEMU finds the copy equal and whole."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from random import Random

import pytest
from processes import Tapdisk, read_line
from support import need

from tapcore.formats.tools import find_tools
from tapcore.img.cli import main
from tapcore.nbd.client import NbdClient, NbdError

SIZE = 4 << 20
BLOCK = 4096
FORMATS = {"raw": "raw", "qcow": "qcow", "qcow2": "qcow2", "vhd": "vpc", "vmdk": "vmdk"}
"""Ours, and qemu-img's names of them."""
CHECKED = ("qcow2", "vmdk")


class Guest:
    """Overwrites blocks of a served disk, all the time; `content` is what was acknowledged to it."""

    def __init__(self, uri: str) -> None:
        self.content = bytearray(SIZE)
        self._client = NbdClient(uri)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stopping = threading.Event()
        self.unsure: int | None = None
        """The block of the write that was not acknowledged, if there is one."""

    def fill(self, rng: Random) -> None:
        for offset, length in ((0, 512), (300 << 10, 1 << 20), (3 << 20, 64 << 10), (SIZE - 4096, 4096)):
            data = rng.randbytes(length)
            self._client.write(offset, data)
            self.content[offset : offset + length] = data

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        rng = Random(0)
        try:
            while not self._stopping.is_set():
                block = rng.randrange(SIZE // BLOCK)
                data = rng.randbytes(BLOCK)
                self.unsure = block
                self._client.write(block * BLOCK, data)
                self.content[block * BLOCK : (block + 1) * BLOCK] = data
                self.unsure = None
        except (NbdError, OSError):
            pass  # the disk was handed over, and its server ends

    def end(self) -> None:
        """When the disk is gone, or no later than its next acknowledgement."""
        self._stopping.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._client.close()


@contextmanager
def started_replica(chain: str) -> Iterator[subprocess.Popen[bytes]]:
    """A writelog-replica for one sync, which says its address in a line."""
    command = [sys.executable, "-m", "writelog.replica", "--insecure-loopback-only", "--once",
               "--listen", "tcp://127.0.0.1:0", chain]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
            _, error = process.communicate(timeout=30)
            assert process.returncode == 0, error
        finally:
            process.kill()


def chain_of(path: Path, name: str) -> str:
    return f"{find_tools(name).name}:{path}"


@pytest.mark.parametrize(("source", "target"), list(permutations(FORMATS, 2)))
def test_replicated_from_each_to_each_other(
    serve: Callable[..., Tapdisk], tmp_path: Path, source: str, target: str
) -> None:
    need("qemu-img")
    for name, kind in (("here", source), ("there", target)):
        find_tools(kind).create(str(tmp_path / name), SIZE)
    with started_replica(chain_of(tmp_path / "there", target)) as replica:
        disk = serve(f"log:|{chain_of(tmp_path / 'here', source)}")
        guest = Guest(disk.uri)
        guest.fill(Random(f"{source}{target}"))
        guest.start()
        command = [sys.executable, "-m", "writelog.sync", "--insecure-loopback-only", "--json", "--verify",
                   "--run-dir", str(disk.run_dir), disk.name, read_line(replica).split()[-1]]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    disk.stop()
    guest.end()
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["handed_over"] and report["verified"] and report["digest"]
    here, there, raw = tmp_path / "here", tmp_path / "there", tmp_path / "acknowledged"
    assert main(["compare", "-q", "-f", source, "-F", target, str(here), str(there)]) == 0
    assert main(["convert", "-f", target, "-O", "raw", str(there), str(raw)]) == 0
    copy = bytearray(raw.read_bytes())
    if guest.unsure is not None:
        at = guest.unsure * BLOCK
        guest.content[at : at + BLOCK] = copy[at : at + BLOCK]
    assert copy == guest.content, "what was acknowledged is there"
    equal = ["qemu-img", "compare", "-f", FORMATS[target], "-F", "raw", str(there), str(raw)]
    whole = ["qemu-img", "check", "-f", FORMATS[target], str(there)]
    for command in [equal, whole] if target in CHECKED else [equal]:
        said = subprocess.run(command, capture_output=True, timeout=30, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
