"""Commits, one at a time, on a driver that has qcow2 tables to write."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from contract.runner import Runner

from tapcore.driver import Env
from tapcore.formats.commit import Commit
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow2.create import create
from tapcore.formats.tools import find_tools


def test_no_commit_begins_beside_another(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if those who waited for one ask for the next while others still wait."""
    path = tmp_path / "a.qcow2"
    create(str(path), 1 << 20)
    runner = Runner(env, f"qcow2:{path}")
    durable = runner.head.durable  # type: ignore[attr-defined]
    running: list[int] = []
    most: list[int] = []
    lock = threading.Lock()
    real = Commit.run

    def run(commit: Commit, file: ImageFile, data: ImageFile) -> int:
        with lock:
            running.append(1)
            most.append(len(running))
        both.wait(0.05)  # long enough for another one to begin, if it may
        with lock:
            running.pop()
        return real(commit, file, data)

    both = threading.Event()
    monkeypatch.setattr(Commit, "run", run)
    ends: list[int] = []

    def wait_again(code: int) -> None:
        durable.wait(ends.append)

    for _ in range(3):
        durable.wait(wait_again)
        durable.wait(wait_again)
    env.loop.run_until(lambda: len(ends) == 6, 20)
    assert max(most) == 1
    monkeypatch.undo()
    runner.close()


@pytest.mark.parametrize("kind", ["qcow", "qcow2", "vhd", "vmdk"])
def test_close_makes_data_durable_though_no_table_changed(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "image"
    find_tools(kind).create(str(path), 1 << 20)
    runner = Runner(env, f"{kind}:{path}")
    assert runner.write(0, b"a" * 65536) == 0
    runner.close()
    runner = Runner(env, f"{kind}:{path}")
    assert runner.read(0, 512) == b"a" * 512  # its table is cached
    assert runner.write(0, b"b" * 512) == 0
    synced: list[bytes] = []
    real = ImageFile.sync

    def sync(file: ImageFile) -> int:
        synced.append(path.read_bytes())
        return real(file)

    monkeypatch.setattr(ImageFile, "sync", sync)
    runner.close()
    assert any(b"b" * 512 in content for content in synced)
