"""Commit and stream of disks that are being written to."""

from __future__ import annotations

import errno
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contract.runner import Runner
from imagechains import make_chain, qemu_agrees, qemu_chain
from jobrig import Rig
from livewriter import LiveWriter, check_disk
from processes import Tapdisk
from support import need

from tapcore.chain import Level, open_image
from tapcore.control import ControlClient, find_disk
from tapcore.driver import Env, OpenFlag
from tapcore.drivers.qcow2 import Qcow2
from tapcore.errors import ChainError, ControlError
from tapcore.formats.tools import Backing, find_tools
from tapcore.nbd.wire import NBD_CMD_WRITE
from tapcore.request import BACKGROUND, fail

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
                                   ["aio", "qcow2", "qcow2"], ["qcow2", "qcow"], ["vmdk", "qcow2"]], ids="-".join)
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


@pytest.mark.parametrize("kinds", [["aio", "qcow"], ["qcow2", "qcow2", "qcow2"], ["vhd", "vhd"],
                                   ["vmdk", "vmdk", "vmdk"]], ids="-".join)
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


def test_stream_of_a_disk_that_is_longer_than_its_parents(env: Env, tmp_path: Path) -> None:
    """What is behind their end is not looked up there."""
    tools, paths = find_tools("qcow2"), [tmp_path / f"{number}.qcow2" for number in range(3)]
    for number, path in enumerate(paths):
        backing = Backing(paths[number - 1].name, "qcow2") if number else None
        size = (64 << 10, 96 << 10, 1 << 20)[number]
        tools.create(str(path), size, backing=backing, options={"cluster_size": "512"})
        runner = Runner(env, f"qcow2:{path}")
        assert runner.write(number * 4096, bytes([number + 1]) * 4096) == 0
        runner.close()
    rig = Rig(env, f"qcow2:{paths[2]}")
    assert rig.run("stream", base=str(paths[0]))["state"] == "done"
    rig.close()
    paths[1].unlink()
    content = b"".join(bytes([number]) * 4096 for number in (1, 2, 3))
    qemu_agrees(paths[2], "qcow2", content.ljust(1 << 20, b"\0"))


def test_a_step_that_raises_fails_its_job(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, _ = make_chain(env, tmp_path, ["qcow2", "qcow2"], SIZE)
    rig = Rig(env, f"qcow2:{paths[1]}")

    def bug(driver: Qcow2, request: object) -> bool:
        raise IndexError("a bug")

    monkeypatch.setattr(Qcow2, "queue_own_status", bug)
    for op in ("stream", "commit"):
        job = rig.run(op)
        assert (job["state"], job["error"]) == ("failed", "a bug")
    rig.close()


def test_cancel_leaves_the_chain_as_it_was(env: Env, tmp_path: Path) -> None:
    paths, disk = make_chain(env, tmp_path, ["qcow2", "qcow2"], SIZE)
    rig = Rig(env, f"qcow2:{paths[1]}")
    guest = LiveWriter(rig.uri, disk)
    for op in ("commit", "stream"):
        rig.control.call(op, disk="vm", rate=1)
        with pytest.raises(ControlError, match=f"has a job already: {op}; wait for it"):
            rig.control.call("snapshot", disk="vm", path=str(tmp_path / "no.qcow2"))
        rig.control.call("pause", disk="vm")
        with pytest.raises(ControlError, match="a job works on the images"):
            rig.control.call("unpause", disk="vm", chain="ram:4M")
        rig.control.call("unpause", disk="vm")
        guest.wait(20)
        job = rig.control.call("cancel", disk="vm")["job"]
        assert job["state"] == "cancelled" and "it was cancelled" in job["error"]
        assert rig.chain == f"qcow2:{paths[1]}"
        with pytest.raises(ControlError, match="has no job"):
            rig.control.call("cancel", disk="vm")
        guest.wait(20)
    open_image(env, Level("qcow2", str(paths[0])), OpenFlag.NONE).close()
    assert rig.run("commit")["state"] == "done", "a cancelled one does not stand in the way"
    guest.stop()
    rig.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.qcow2", "1.qcow2", "run"]


def test_who_pauses_the_disk_at_the_same_time_is_told_so(env: Env, tmp_path: Path) -> None:
    paths, _ = make_chain(env, tmp_path, ["qcow2"], SIZE)
    rig = Rig(env, f"delay:write=100|qcow2:{paths[0]}")
    with rig.client() as client, ControlClient(rig.control.path, 60) as second:
        cookie = client.submit(NBD_CMD_WRITE, 0, 512, b"x" * 512)
        rig.loop.until(lambda: rig.engine.disks["vm"].vbd.in_flight == 1)
        taking = threading.Thread(target=second.call, args=("snapshot",),
                                  kwargs={"disk": "vm", "path": str(tmp_path / "top.qcow2")})
        taking.start()
        assert rig.control.call("pause", disk="vm", hold=True) == {"state": "paused"}
        taking.join(60)
        assert rig.chain == f"delay:write=100|qcow2:{tmp_path}/top.qcow2"
        assert rig.control.call("info", disk="vm")["state"] == "paused", "it is held"
        rig.control.call("unpause", disk="vm")
        assert client.wait() == (cookie, 0, None) and client.read(0, 512) == b"x" * 512
    rig.close()


def test_close_ends_a_job_first(env: Env, tmp_path: Path) -> None:
    paths, _ = make_chain(env, tmp_path, ["qcow2", "qcow2"], SIZE)
    rig = Rig(env, f"qcow2:{paths[1]}")
    rig.control.call("commit", disk="vm", rate=1)
    assert rig.control.call("close", disk="vm") == {"disk": "vm"}
    rig.close()
    qemu_chain(paths[1], "qcow2")


def test_a_hand_over_ends_a_job_first(env: Env, tmp_path: Path) -> None:
    paths, _ = make_chain(env, tmp_path, ["qcow2", "qcow2"], SIZE)
    rig = Rig(env, f"qcow2:{paths[1]}")
    rig.control.call("stream", disk="vm", rate=1)
    rig.control.call("pause", disk="vm", hold=True)
    rig.control.call("handover", disk="vm", to="there")
    assert rig.end_of_job()["state"] == "cancelled"
    with pytest.raises(ControlError, match="was handed over to there; its images are not changed"):
        rig.control.call("commit", disk="vm")
    rig.close()


def test_a_parent_that_others_read_is_not_committed_to(env: Env, tmp_path: Path) -> None:
    paths, disk = make_chain(env, tmp_path, ["qcow2", "qcow2"], SIZE)
    find_tools("qcow2").create(str(tmp_path / "other.qcow2"), SIZE, backing=Backing("0.qcow2", "qcow2"))
    other = Runner(env, f"qcow2:{tmp_path}/other.qcow2")
    before = paths[0].read_bytes()
    rig = Rig(env, f"qcow2:{paths[1]}")
    job = rig.run("commit")
    assert job["state"] == "failed" and "0.qcow2: the image is in use: " in job["error"], job
    check_disk(rig.uri, disk)
    assert paths[0].read_bytes() == before and rig.chain == f"qcow2:{paths[1]}"
    rig.close()
    other.close()


def test_nobody_reads_the_parent_during_a_commit(env: Env, tmp_path: Path) -> None:
    paths, _ = make_chain(env, tmp_path, ["qcow2", "qcow2"], SIZE)
    find_tools("qcow2").create(str(tmp_path / "other.qcow2"), SIZE, backing=Backing("0.qcow2", "qcow2"))
    rig = Rig(env, f"qcow2:{paths[1]}")
    rig.control.call("commit", disk="vm", rate=1)
    job = rig.engine.disks["vm"].job
    assert job is not None
    rig.loop.until(lambda: job.phase == "copying")
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", str(tmp_path / "other.qcow2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0 and "lock" in done.stderr, done.stderr
    with pytest.raises(ChainError, match="does not let it be read by others"):
        open_image(env, Level("qcow2", str(tmp_path / "other.qcow2")))
    rig.close()
    open_image(env, Level("qcow2", str(tmp_path / "other.qcow2"))).close()


@pytest.mark.parametrize(("kinds", "op", "params", "message"), [
    (["qcow2"], "commit", {}, "has no parent that it could go into"),
    (["aio"], "stream", {}, "has no parent to be copied from"),
    (["qcow2", "qcow2"], "stream", {"base": "{folder}/1.qcow2"}, "1.qcow2: is no parent of this disk; its "),
    (["qcow2", "qcow2"], "stream", {"base": "{folder}/0.qcow2"}, "0.qcow2: is the parent already"),
    (["qcow2", "qcow2"], "commit", {"rate": 0}, "at a rate of 0"),
])
def test_what_cannot_be_is_told_at_once(
    env: Env, tmp_path: Path, kinds: list[str], op: str, params: dict[str, object], message: str
) -> None:
    paths, disk = make_chain(env, tmp_path, kinds, SIZE)
    rig = Rig(env, f"{kinds[-1]}:{paths[-1]}")
    given = {key: value.format(folder=tmp_path) if isinstance(value, str) else value
             for key, value in params.items()}
    with pytest.raises(ControlError) as caught:
        rig.control.call(op, disk="vm", **given)
    assert message in str(caught.value)
    assert rig.control.call("jobs") == {"jobs": []}
    check_disk(rig.uri, disk)
    rig.close()


@pytest.mark.parametrize("op", ["commit", "stream"])
def test_internal_snapshots_are_not_damaged(env: Env, tmp_path: Path, op: str) -> None:
    paths, disk = make_chain(env, tmp_path, ["qcow2", "qcow2"], SIZE)
    subprocess.run(["qemu-img", "snapshot", "-c", "one", str(paths[1])], check=True, timeout=30)
    rig = Rig(env, f"qcow2:{paths[1]}")
    assert "1.qcow2: has internal snapshots, which would be damaged" in rig.run(op)["error"]
    check_disk(rig.uri, disk)
    rig.close()


def test_sizes_that_differ(env: Env, tmp_path: Path) -> None:
    find_tools("qcow2").create(str(tmp_path / "small.qcow2"), SIZE // 2)
    find_tools("qcow2").create(str(tmp_path / "top.qcow2"), SIZE, backing=Backing("small.qcow2", "qcow2"))
    rig = Rig(env, f"qcow2:{tmp_path}/top.qcow2")
    with pytest.raises(ControlError, match="has 2097152 bytes, the disk 4194304; give them one size"):
        rig.control.call("commit", disk="vm")
    with rig.client() as client:
        client.write(0, b"a" * SIZE)
    assert rig.run("stream")["state"] == "done"
    check_disk(rig.uri, b"a" * SIZE)
    rig.close()


@pytest.mark.parametrize("op", ["commit", "stream"])
def test_an_image_that_cannot_be_written(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    """The target's writes fail: so does the job, and the guest does not notice."""
    paths, disk = make_chain(env, tmp_path, ["qcow2", "qcow2"], SIZE)
    rig = Rig(env, f"qcow2:{paths[1]}")
    verb = Qcow2.queue_write
    monkeypatch.setattr(Qcow2, "queue_write", lambda driver, request: fail(request, errno.ENOSPC)
                        if request.flags & BACKGROUND else verb(driver, request))
    guest = LiveWriter(rig.uri, disk)
    job = rig.run(op)
    assert job["state"] == "failed" and "No space left on device" in job["error"]
    monkeypatch.undo()
    guest.wait(20)
    assert rig.run(op)["state"] == "done"
    guest.stop()
    rig.close()


def test_a_deep_chain(env: Env, serve: Serve, tmp_path: Path) -> None:
    """30 overlays: right, and opened with memory for their tables, not more."""
    paths, disk = make_chain(env, tmp_path, ["aio", *["qcow2"] * 30], SIZE)
    tapdisk = serve(f"qcow2:{paths[-1]}", "--name", "vm")
    check_disk(tapdisk.uri, disk)
    guest = LiveWriter(tapdisk.uri, disk)
    guest.wait(100)
    disk = guest.stop()
    (line,) = [line for line in Path(f"/proc/{tapdisk.process.pid}/status").read_text().splitlines()
               if line.startswith("VmRSS:")]
    assert int(line.split()[1]) < 120 << 10, line
    with find_disk(tapdisk.run_dir, "vm") as control:
        control.call("stream", disk="vm", base=str(paths[0]))
        assert wait_for_job(control)["state"] == "done"
    check_disk(tapdisk.uri, disk)
    tapdisk.stop()
    assert qemu_chain(paths[-1], "qcow2") == [paths[-1].name, paths[0].name]
    qemu_agrees(paths[-1], "qcow2", disk)
