"""Snapshots of disks that are being written to."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from imagechains import make_chain, qemu_agrees, qemu_chain
from jobrig import Rig, failing
from livewriter import LiveWriter, check_disk
from processes import Tapdisk
from support import need

from tapcore.chain import close_image
from tapcore.control import find_disk
from tapcore.driver import Driver, Env
from tapcore.drivers.qcow2 import Qcow2
from tapcore.errors import ControlError, ImageError
from tapcore.formats.tools import find_tools
from tapcore.jobs import snapshot
from tapcore.request import fail
from writelog.client import LogClient
from writelog.logstore import forget

SIZE = 4 << 20
Serve = Callable[..., Tapdisk]


@pytest.fixture(autouse=True)
def programs() -> None:
    need("qemu-img", "qemu-io")


@pytest.mark.parametrize(("base", "overlay"), [
    ("aio", "qcow2"), ("qcow2", "qcow2"), ("aio", "vhd"), ("vhd", "vhd"), ("vhd", "qcow2"), ("qcow2", "qcow")])
def test_a_disk_goes_on_above_a_new_image(env: Env, serve: Serve, tmp_path: Path, base: str, overlay: str) -> None:
    (bottom,), disk = make_chain(env, tmp_path, [base], SIZE)
    tapdisk = serve(f"{base}:{bottom}", "--name", "vm")
    guest = LiveWriter(tapdisk.uri, disk)
    top = tmp_path / "top.img"
    bottom.chmod(0o640)
    with find_disk(tapdisk.run_dir, "vm") as control:
        guest.wait(50)
        result = control.call("snapshot", disk="vm", path=str(top), format=overlay)
        assert result["chain"] == f"{overlay}:{top}" == control.call("info", disk="vm")["chain"]
        assert 0 < result["pause_ms"] < 60_000 and top.stat().st_mode & 0o777 == 0o640
        guest.wait(50)
    disk = guest.stop()
    tapdisk.stop()
    before = bottom.read_bytes()
    if overlay != "vhd":
        assert qemu_chain(top, overlay) == ["top.img", bottom.name]
        qemu_agrees(top, overlay, disk)
    else:
        assert find_tools(overlay).check(str(top)).errors == 0, "QEMU knows no differencing VHD"
    again = serve(f"{overlay}:{top}", "--name", "again")
    check_disk(again.uri, disk)
    assert bottom.read_bytes() == before


def test_the_log_goes_on_with_its_client_and_is_found_again(env: Env, serve: Serve, tmp_path: Path) -> None:
    (bottom,), _ = make_chain(env, tmp_path, ["qcow2"], SIZE)
    tapdisk = serve(f"log:,granularity=65536|qcow2:{bottom}", "--name", "vm")
    top = tmp_path / "a|b.qcow2"
    with find_disk(tapdisk.run_dir, "vm") as control, tapdisk.client() as client:
        (log,) = control.call("info", disk="vm")["logs"]
        watcher = LogClient(log["socket"])
        client.write(0, b"1" * 65536)
        chain = control.call("snapshot", disk="vm", path=str(top))["chain"]
        assert chain == f"log:0.qcow2,granularity=65536|qcow2:{tmp_path}/a\\|b.qcow2"
        client.write(1 << 20, b"2" * 65536)
        dirty = [(0, 65536), (1 << 20, 65536)]
        assert list(watcher.peek()) == dirty
        extents = [(at, bytes(view)) for at, view in watcher.read_extents([(0, 512), (1 << 20, 512)])]
        assert sorted(extents) == [(0, b"1" * 512), (1 << 20, b"2" * 512)]
        second = tmp_path / "c.qcow2"
        chain = control.call("snapshot", disk="vm", path=str(second))["chain"]
        assert list(watcher.peek()) == dirty
        watcher.close()
    tapdisk.stop()
    again = serve(chain, "--name", "vm")
    with find_disk(again.run_dir, "vm") as control:
        (log,) = control.call("info", disk="vm")["logs"]
    found = LogClient(log["socket"])
    assert list(found.peek()) == dirty
    found.close()


@pytest.mark.parametrize(("params", "message"), [
    ({"path": "top.qcow2"}, "the overlay's path 'top.qcow2' is not absolute"),
    ({"path": "{folder}/0.qcow2"}, "{folder}/0.qcow2: cannot create the image: File exists"),
    ({"path": "{folder}/no/top.qcow2"}, "cannot create the image: No such file or directory"),
    ({"path": "{folder}/top", "format": "qcow3"}, "unknown format 'qcow3'; known formats: "),
    ({"path": "{folder}/top", "format": "raw"}, "a raw image has no backing file"),
    ({"path": "{folder}/top", "format": "vhd"}, "the parent of a VHD cannot be of the format qcow2"),
    ({"path": "{folder}/top", "options": ["cluster_size"]}, "option 'cluster_size' has no '='"),
    ({"path": "{folder}/top", "options": ["cluster_size=5"]}, "cluster_size"),
])
def test_what_cannot_be_changes_nothing(
    env: Env, tmp_path: Path, params: dict[str, Any], message: str
) -> None:
    (bottom,), disk = make_chain(env, tmp_path, ["qcow2"], SIZE)
    rig = Rig(env, f"qcow2:{bottom}")
    before = {path.name for path in tmp_path.iterdir()}
    given = {key: value.format(folder=tmp_path) if isinstance(value, str) else value
             for key, value in params.items()}
    with pytest.raises(ControlError) as caught:
        rig.control.call("snapshot", disk="vm", **given)
    assert message.format(folder=tmp_path) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert rig.chain == f"qcow2:{bottom}"
    check_disk(rig.uri, disk)
    rig.close()


def test_when_the_image_does_not_open_again_the_disk_waits_for_another_chain(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bottom,), disk = make_chain(env, tmp_path, ["qcow2"], SIZE)
    rig = Rig(env, f"log:failing|qcow2:{bottom}")
    guest = LiveWriter(rig.uri, disk)
    guest.wait(20)
    monkeypatch.setattr(snapshot, "open_image", failing(tmp_path))
    with pytest.raises(ControlError, match="the former image does not open again: "):
        rig.control.call("snapshot", disk="vm", path=str(tmp_path / "top.qcow2"))
    monkeypatch.undo()
    assert rig.control.call("info", disk="vm")["state"] == "paused"
    with pytest.raises(ControlError, match="has no open chain"):
        rig.control.call("commit", disk="vm")
    rig.control.call("unpause", disk="vm", chain=f"log:failing|qcow2:{bottom}")
    guest.wait(20)
    guest.stop()
    rig.close()
    forget(env.run_dir, "failing")


@pytest.mark.parametrize("step", ["flush", "close", "open"])
def test_a_step_that_fails_leaves_the_disk_on_its_image(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (bottom,), disk = make_chain(env, tmp_path, ["qcow2"], SIZE)
    rig = Rig(env, f"log:failing|qcow2:{bottom}")
    guest = LiveWriter(rig.uri, disk)
    guest.wait(20)
    top = tmp_path / "top.qcow2"

    def close(image: Driver) -> None:
        close_image(image)
        if image.path != str(top):
            raise ImageError("the test says no")

    if step == "open":
        monkeypatch.setattr(snapshot, "open_image", failing(top))
    elif step == "close":
        monkeypatch.setattr(snapshot, "close_image", close)
    else:
        monkeypatch.setattr(Qcow2, "queue_flush", lambda driver, request: fail(request, errno.EIO))
    with pytest.raises(ControlError, match="the test says no" if step != "flush" else "Input/output error"):
        rig.control.call("snapshot", disk="vm", path=str(top))
    monkeypatch.undo()
    assert not top.exists() and rig.chain == f"log:failing|qcow2:{bottom}"
    if step != "flush":
        guest.wait(20)
        assert rig.control.call("snapshot", disk="vm", path=str(top))["chain"] == f"log:failing|qcow2:{top}"
        guest.wait(20)
        guest.stop()
    else:
        guest.client.close()
    rig.close()
    forget(env.run_dir, "failing")
