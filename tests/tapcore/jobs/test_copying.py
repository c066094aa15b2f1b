"""Commit and stream of disks that are being written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from imagechains import make_chain, qemu_agrees, qemu_chain
from livewriter import LiveWriter, check_disk
from processes import Tapdisk
from support import need

from tapcore.control import ControlClient, find_disk
from tapcore.driver import Env

SIZE = 4 << 20
Serve = Callable[..., Tapdisk]


@pytest.fixture(autouse=True)
def programs() -> None:
    need("qemu-img", "qemu-io")


def wait_for_job(control: ControlClient, guest: LiveWriter | None = None) -> dict[str, Any]:
    while True:
        (job,) = control.call("jobs", disk="vm")["jobs"]
        if job["state"] != "running":
            return dict(job)
        if guest is not None:
            guest.wait(5)


@pytest.mark.parametrize("kinds", [["aio", "qcow2"], ["qcow2", "qcow2"], ["vhd", "vhd"],
                                   ["aio", "qcow2", "qcow2"], ["vhd", "qcow2"]], ids="-".join)
def test_commit_beside_a_guest(env: Env, serve: Serve, tmp_path: Path, kinds: list[str]) -> None:
    paths, disk = make_chain(env, tmp_path, kinds, SIZE)
    parent, top = paths[-2:]
    tapdisk = serve(f"{kinds[-1]}:{top}", "--name", "vm")
    guest = LiveWriter(tapdisk.uri, disk)
    with find_disk(tapdisk.run_dir, "vm") as control:
        guest.wait(50)
        assert control.call("commit", disk="vm")["job"]["kind"] == "commit"
        job = wait_for_job(control, guest)
        assert job["state"] == "done", job
        assert job["chain"] == f"{kinds[-2]}:{parent}" == control.call("info", disk="vm")["chain"]
        guest.wait(50)
    disk = guest.stop()
    tapdisk.stop()
    qemu_agrees(parent, kinds[-2], disk)
    for level, kind in ((parent, kinds[-2]), (top, kinds[-1])):
        again = serve(f"{kind}:{level}", "--name", f"again-{level.name}")
        check_disk(again.uri, disk)
        again.stop()
    if kinds[-1] == "qcow2":
        qemu_agrees(top, "qcow2", disk)


@pytest.mark.parametrize("kinds", [["aio", "qcow2"], ["qcow2", "qcow2", "qcow2"], ["vhd", "vhd"]], ids="-".join)
def test_stream_beside_a_guest(env: Env, serve: Serve, tmp_path: Path, kinds: list[str]) -> None:
    paths, disk = make_chain(env, tmp_path, kinds, SIZE)
    before = [path.read_bytes() for path in paths[:-1]]
    chain = f"{kinds[-1]}:{paths[-1]}"
    tapdisk = serve(chain, "--name", "vm")
    guest = LiveWriter(tapdisk.uri, disk)
    with find_disk(tapdisk.run_dir, "vm") as control:
        guest.wait(50)
        control.call("stream", disk="vm")
        job = wait_for_job(control, guest)
        assert job["state"] == "done" and job["chain"] == chain, job
        guest.wait(50)
    disk = guest.stop()
    tapdisk.stop()
    assert [path.read_bytes() for path in paths[:-1]] == before
    for path in paths[:-1]:
        path.unlink()
    assert qemu_chain(paths[-1], kinds[-1]) == [paths[-1].name]
    qemu_agrees(paths[-1], kinds[-1], disk)


def test_stream_down_to_a_base(env: Env, serve: Serve, tmp_path: Path) -> None:
    paths, disk = make_chain(env, tmp_path, ["qcow2"] * 4, SIZE)
    tapdisk = serve(f"qcow2:{paths[-1]}", "--name", "vm")
    guest = LiveWriter(tapdisk.uri, disk)
    with find_disk(tapdisk.run_dir, "vm") as control:
        control.call("stream", disk="vm", base=str(paths[1]))
        job = wait_for_job(control, guest)
        assert job["state"] == "done", job
        guest.wait(20)
    disk = guest.stop()
    tapdisk.stop()
    paths[2].unlink()
    assert qemu_chain(paths[-1], "qcow2") == [paths[-1].name, paths[1].name, paths[0].name]
    qemu_agrees(paths[-1], "qcow2", disk)
