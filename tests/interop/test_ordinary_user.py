"""No program of ours needs root: a disk is made, served, replicated and handed over by an ordinary user."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final

import pytest
from processes import forget_logs, read_line

from tapcore.nbd.client import NbdClient

UID: Final = os.geteuid() or 65534
AS_USER: Final = Path(__file__).parents[1] / "as_user.py"
WAIT_S: Final = 60
SIZE_BYTES: Final = 8 << 20


class User:
    """Who has a home, and nothing else. `host` stands for one of two machines: each has keys of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run_dir = home / "run"
        self._running: list[subprocess.Popen[bytes]] = []
        for folder in (home, self.run_dir):
            folder.mkdir(mode=0o700)
            os.chown(folder, UID, UID)

    def start(self, host: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A program, as that user."""
        as_user = [str(AS_USER), str(UID)] if os.geteuid() == 0 else ["-m"]
        process = subprocess.Popen(
            [sys.executable, *as_user, module, *arguments], cwd=self.home, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home), "TAPDISK_RUN_DIR": str(self.run_dir),
                 "XDG_CONFIG_HOME": str(self.home / host), "PYTHONPATH": str(AS_USER.parents[1])})
        self._running.append(process)
        return process

    def run(self, host: str, module: str, *arguments: str) -> str:
        """The output of one that must succeed."""
        out, error = (process := self.start(host, module, *arguments)).communicate(timeout=WAIT_S)
        assert process.returncode == 0, error.decode()
        return out.decode() + error.decode()

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=WAIT_S)
        forget_logs(self.run_dir)


@pytest.fixture
def user() -> Iterator[User]:
    """In a folder that everybody may pass through: pytest keeps its own to itself, whenever it begins anew."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        user = User(Path(folder) / "home")
        yield user
        user.close()


def has_no_power(process: subprocess.Popen[bytes]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    ids = re.search(r"^Uid:\s+(.*)$", status, re.MULTILINE)
    assert ids
    return set(ids[1].split()) == {str(UID)} and bool(re.search(r"^CapEff:\s+0+$", status, re.MULTILINE))


def test_an_ordinary_user_does_it_all(user: User) -> None:
    image, copy = str(user.home / "disk.qcow2"), str(user.home / "copy.raw")
    for path, form in ((image, "qcow2"), (copy, "raw")):
        user.run("a", "tapcore.img.cli", "create", "-f", form, path, str(SIZE_BYTES))
    for giver, taker in (("a", "b"), ("b", "a")):
        file = str(user.home / f"{giver}.key")
        shown = user.run(giver, "writelog.pair", "pair", "export", "--host", giver, file)
        user.run(taker, "writelog.pair", "pair", "import", file, "--fingerprint", shown.split()[-1])

    tapdisk = user.start("a", "tapcore.tapdisk", "--name", "vm1", f"log:|qcow2:{image}")
    uri = read_line(tapdisk, WAIT_S).split()[-1]
    replica = user.start("b", "writelog.replica", "--listen", "tcp://127.0.0.1:0", "--nbd",
                         f"unix:{user.home / 'copy.nbd'}", f"aio:{copy}")
    endpoint = read_line(replica, WAIT_S).split()[-1]
    assert has_no_power(tapdisk)
    assert has_no_power(replica)

    data = Random(5).randbytes(1 << 20)
    with NbdClient(uri) as guest:
        guest.write(4096, data)
    assert "vm1" in user.run("a", "tapcore.tapctl", "list")
    overlay = str(user.home / "overlay.qcow2")
    user.run("a", "tapcore.tapctl", "snapshot", "vm1", overlay)
    report = user.run("a", "writelog.sync", "--json", "--verify", "vm1", endpoint)
    assert json.loads(report.splitlines()[-1])["state"] == "done"
    with NbdClient(f"nbd+unix:///?socket={user.home / 'copy.nbd'}") as guest:
        assert guest.read(4096, len(data)) == data

    for process in (tapdisk, replica):
        process.terminate()
        _, error = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, error.decode()
    user.run("a", "tapcore.img.cli", "compare", "-f", "qcow2", "-F", "raw", overlay, copy)
    assert {path.stat().st_uid for path in user.home.rglob("*")} == {UID}
