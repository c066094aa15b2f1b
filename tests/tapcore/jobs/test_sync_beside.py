"""A sync of a disk does not notice that its images are exchanged meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from imagechains import make_chain
from processes import Tapdisk, read_line

from tapcore.control import find_disk
from tapcore.driver import Env

SIZE = 4 << 20


Run = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def run() -> Iterator[Run]:
    """`run(module, *arguments)`: a process, ended after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=20)


def test_a_sync_goes_on_across_snapshots_and_a_commit(
    env: Env, serve: Callable[..., Tapdisk], run: Run, tmp_path: Path
) -> None:
    (bottom,), _ = make_chain(env, tmp_path, ["qcow2"], SIZE)
    copy = tmp_path / "copy.img"
    copy.touch()
    os.truncate(copy, SIZE)
    tapdisk = serve(f"log:|qcow2:{bottom}", "--name", "vm")
    replica = run("writelog.replica", "--insecure-loopback-only", "--listen", "tcp://127.0.0.1:0", f"aio:{copy}")
    endpoint = read_line(replica).split()[-1]
    with tapdisk.client() as client, find_disk(tapdisk.run_dir, "vm") as control:
        client.write(0, os.urandom(SIZE))
        sync = run("writelog.sync", "--insecure-loopback-only",
                   "--run-dir", str(tapdisk.run_dir), "--json", "--keep-running", "--verify",
                   "--rate", "2M", "vm", endpoint)
        while json.loads(read_line(sync)).get("state") != "syncing":
            pass
        for number in range(2):
            control.call("snapshot", disk="vm", path=str(tmp_path / f"top{number}.qcow2"))
            client.write(number << 20, os.urandom(300000))
        control.call("commit", disk="vm")
        job = control.call("jobs", disk="vm")["jobs"][0]
        while job["state"] == "running":
            client.write(3 << 20, os.urandom(4096))
            job = control.call("jobs", disk="vm")["jobs"][0]
        assert job["state"] == "done", job
        out, error = sync.communicate(timeout=60)
        assert sync.returncode == 0, error.decode()
        report = json.loads(out.decode().splitlines()[-1])
        assert report["state"] == "done", report
        expected = client.read(0, SIZE)
    replica.terminate()
    replica.communicate(timeout=20)
    assert copy.read_bytes() == expected
