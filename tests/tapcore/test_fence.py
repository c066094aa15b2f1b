"""The fence of a handed-over image: heeded by whoever opens it, whatever ended the tapdisk that handed it over."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import Tapdisk, forget_logs
from support import LoopThread
from sync_rig import SIZE_BYTES, Rig

from tapcore import durablefile, fence
from tapcore.control import ControlClient, find_disk
from tapcore.driver import Env
from tapcore.engine import Engine
from tapcore.errors import ControlError, ImageError
from tapcore.nbd import wire
from tapcore.nbd.client import NbdClient
from tapcore.tapctl import main as tap_ctl
from writelog.replica_state import StateStore

SIZE = 1 << 20
TIMEOUT_S = 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


# The file


def test_written_read_and_cleared(image: Path) -> None:
    beside = image.with_name("disk.img.fenced")
    assert fence.read(str(image)) is None
    fence.write(str(image), "handed over\nto tcp://b")
    assert beside.read_text() == "handed over to tcp://b\n"
    assert fence.read(str(image)) == "handed over to tcp://b"
    assert fence.state_of(str(image)) == 0
    fence.clear(str(image))
    fence.clear(str(image))
    assert fence.read(str(image)) is None
    assert list(image.parent.iterdir()) == [image]


def test_a_fence_says_what_its_image_holds(image: Path) -> None:
    fence.write(str(image), "handed over " * 1000, 0x5AB30C4DD1CF8C15)
    assert str(fence.read(str(image))).startswith("handed over handed")
    assert fence.state_of(str(image)) == 0x5AB30C4DD1CF8C15
    other = image.with_name("other")
    other.write_bytes(bytes(SIZE))
    other.rename(image)
    assert fence.read(str(image)) and fence.state_of(str(image)) == 0


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"x" * 100_000])
def test_a_fence_of_any_content_counts(image: Path, content: bytes) -> None:
    image.with_name("disk.img.fenced").write_bytes(content)
    assert fence.read(str(image)) and fence.state_of(str(image)) == 0


def test_a_fence_that_cannot_be_read_counts(image: Path) -> None:
    image.with_name("disk.img.fenced").mkdir()
    assert "cannot read the fence" in str(fence.read(str(image)))


def test_an_image_is_known_through_links(image: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(image)
    fence.write(str(link), "handed over")
    assert fence.read(str(image)) == "handed over"


def test_a_devices_fence_is_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPDISK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("stat.S_ISBLK", lambda _: True)
    fence.write("/dev/null", "handed over")
    assert (tmp_path / "state" / "dev_null.fenced").exists()
    assert fence.read("/dev/null") == "handed over"


@pytest.mark.parametrize("step", ["fsync", "sync_folder"])
def test_a_fence_that_cannot_be_written_is_not_there(
    image: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real = durablefile.sync_folder

    def fail(_: object) -> None:
        monkeypatch.setattr(durablefile, "sync_folder", real)
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(*(("os.fsync", fail) if step == "fsync" else (durablefile, "sync_folder", fail)))
    with pytest.raises(ImageError, match="cannot record the hand-over"):
        fence.write(str(image), "handed over")
    monkeypatch.undo()
    assert list(image.parent.iterdir()) == [image]


def test_a_hand_over_that_cannot_be_recorded_does_not_happen(
    env: Env, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(env)
    path = engine.listen()
    engine.open(f"aio:{image}", "disk")
    thread = LoopThread(env)
    image.with_name("disk.img.fenced.new").mkdir()
    with ControlClient(path, TIMEOUT_S) as control:
        control.call("pause", disk="disk", hold=True)
        with pytest.raises(ControlError, match="cannot record the hand-over"):
            control.call("handover", disk="disk", to="tcp://b")
        assert control.call("info", disk="disk")["fenced"] is None
        assert control.call("unpause", disk="disk") == {"state": "running"}
        control.call("shutdown")
    thread.stop()


def test_no_hand_over_while_the_disk_is_forced_to_go_on(
    env: Env, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be answered, and then the disk would run, here and there."""
    engine = Engine(env)
    path = engine.listen()
    engine.open(f"aio:{image}", "disk")
    thread = LoopThread(env)
    asked, may_end = threading.Event(), threading.Event()
    clear = fence.clear

    def clear_late(image: str) -> None:
        asked.set()
        assert may_end.wait(TIMEOUT_S)
        clear(image)

    monkeypatch.setattr(fence, "clear", clear_late)
    with ControlClient(path, TIMEOUT_S) as holder, ControlClient(path, TIMEOUT_S) as operator:
        holder.call("pause", disk="disk", hold=True)
        forced = threading.Thread(target=lambda: operator.call("unpause", disk="disk", force=True))
        forced.start()
        assert asked.wait(TIMEOUT_S)
        try:
            with pytest.raises(ControlError, match="forced to go on here"):
                holder.call("handover", disk="disk", to="tcp://b")
        finally:
            may_end.set()
            forced.join(TIMEOUT_S)
        info = holder.call("info", disk="disk")
        assert (info["state"], info["fenced"], fence.read(str(image))) == ("running", None, None)
        holder.call("pause", disk="disk", hold=True)
        assert holder.call("handover", disk="disk", to="tcp://b") == {"fenced": "handed over to tcp://b"}
        holder.call("shutdown")
    thread.stop()


@pytest.mark.parametrize("fails", [False, True])
def test_while_a_hand_over_is_recorded(
    env: Env, image: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """It is told, and whoever pauses the disk meanwhile has it paused, also when the hand-over has failed."""
    engine = Engine(env)
    path = engine.listen()
    engine.open(f"aio:{image}", "disk")
    thread = LoopThread(env)
    asked, may_end = threading.Event(), threading.Event()
    write = fence.write

    def write_late(image: str, why: str, state: int) -> None:
        asked.set()
        assert may_end.wait(TIMEOUT_S)
        if fails:
            raise ImageError("no room", errno=errno.ENOSPC)
        write(image, why, state)

    monkeypatch.setattr(fence, "write", write_late)
    outcome: list[object] = []

    def hand_over() -> None:
        try:
            outcome.append(holder.call("handover", disk="disk", to="tcp://b")["fenced"])
        except ControlError as error:
            outcome.append(error.errno)

    with ControlClient(path, TIMEOUT_S) as holder, ControlClient(path, TIMEOUT_S) as operator:
        holder.call("pause", disk="disk", hold=True)
        assert operator.call("info", disk="disk")["handing_over"] is False
        handing_over = threading.Thread(target=hand_over)
        handing_over.start()
        assert asked.wait(TIMEOUT_S)
        try:
            info = operator.call("info", disk="disk")
            assert (info["handing_over"], info["fenced"], info["image"]) == (True, None, str(image))
            operator.call("pause", disk="disk")
            for op in ("unpause", "close"):
                with pytest.raises(ControlError, match=r"held by|being handed over"):
                    operator.call(op, disk="disk")
        finally:
            may_end.set()
            handing_over.join(TIMEOUT_S)
        assert outcome == [errno.ENOSPC if fails else "handed over to tcp://b"]
        info = operator.call("info", disk="disk")
        assert (info["handing_over"], info["pinned"], info["state"]) == (False, True, "paused")
        if fails:
            holder.call("unpause", disk="disk")
            assert operator.call("info", disk="disk")["state"] == "paused"
            assert operator.call("unpause", disk="disk") == {"state": "running"}
    with ControlClient(path, TIMEOUT_S) as control:
        control.call("shutdown")
    thread.stop()


# Processes


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Tapdisk]]:
    """A tapdisk; with `prelude`, Python that is run in its process first. All are killed after the test."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    started: list[Tapdisk] = []

    def run(chain: str, prelude: str = "") -> Tapdisk:
        common = ("import os, signal\nfrom tapcore import durablefile, fence\n"
                  "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n")
        started.append(Tapdisk(run_dir, chain, "--name", "disk", prelude=common + prelude))
        return started[-1]

    yield run
    for tapdisk in started:
        if tapdisk.process.poll() is None:
            tapdisk.kill()
    forget_logs(run_dir)


during_write = "write = fence.write\ndef spoiled(*a):\n    {}\n    write(*a)\nfence.write = spoiled"


def hand_over(tapdisk: Tapdisk) -> str | None:
    """Write, pause, hand over; the answer, None if the tapdisk died first."""
    with NbdClient(tapdisk.uri, timeout_s=TIMEOUT_S) as guest:
        guest.write(0, b"before")
    with find_disk(tapdisk.run_dir, "disk", TIMEOUT_S) as control:
        control.call("pause", disk="disk", hold=True, hold_s=1000)
        try:
            return str(control.call("handover", disk="disk", to="tcp://b")["fenced"])
        except ControlError as error:
            assert error.errno == errno.ECONNRESET
            return None


@pytest.mark.parametrize(("prelude", "fenced"), [
    (during_write.format("fence.replace_file = die"), False),
    (during_write.format("os.fsync = die"), False),
    (during_write.format("durablefile.sync_folder = die"), True),
    ("write = fence.write\ndef then_die(*a): write(*a); die()\nfence.write = then_die", True),
    ("", True),
])
@pytest.mark.parametrize("chain", ["log:|aio:{}", "aio:{}"])
def test_killed_at_each_step_of_a_hand_over(
    start: Callable[..., Tapdisk], image: Path, capfd: pytest.CaptureFixture[str], chain: str, prelude: str,
    fenced: bool
) -> None:
    """If the hand-over was answered no write gets in; if it was not, either is right."""
    tapdisk = start(chain.format(image), prelude)
    assert hand_over(tapdisk) == (None if prelude else "handed over to tcp://b")
    tapdisk.kill()
    again = start(f"aio:{image}")
    with (NbdClient(again.uri, timeout_s=TIMEOUT_S) as guest,
          find_disk(again.run_dir, "disk", TIMEOUT_S) as control):
        handle = guest.submit(wire.NBD_CMD_WRITE, 0, 5, b"after")
        if not fenced:
            assert guest.wait()[:2] == (handle, 0)
            return
        while not (info := control.call("info", disk="disk"))["waiting"]:
            assert info["in_flight"] == 0
        assert info["state"] == "paused" and info["fenced"] == "handed over to tcp://b"
        assert image.read_bytes()[:6] == b"before"
        with pytest.raises(ControlError, match=r"only by force, with tap-ctl unpause --force disk"):
            control.call("unpause", disk="disk")
        assert tap_ctl(["--run-dir", str(again.run_dir), "unpause", "--force", "disk"]) == 0
        assert guest.wait()[:2] == (handle, 0)
        assert control.call("info", disk="disk")["fenced"] is None
    assert not image.with_name("disk.img.fenced").exists()
    again.process.send_signal(signal.SIGTERM)
    _, error = again.process.communicate(timeout=TIMEOUT_S)
    assert b"handed over to tcp://b; its requests wait" in error and b"unpause --force" in error


def test_a_fenced_image_can_be_read(env: Env, image: Path) -> None:
    fence.write(str(image), "handed over")
    engine = Engine(env)
    disk = engine.open(f"aio:{image}", read_only=True)
    assert disk.vbd.state == "running" and disk.vbd.fenced is None
    engine.shutdown()
    env.loop.run_until(lambda: engine.is_down, TIMEOUT_S)


def test_a_chain_with_a_fenced_image_is_not_gone_on_with(start: Callable[..., Tapdisk], image: Path) -> None:
    other = image.with_name("other.img")
    other.write_bytes(bytes(SIZE))
    fence.write(str(other), "handed over")
    tapdisk = start(f"aio:{image}")
    with find_disk(tapdisk.run_dir, "disk", TIMEOUT_S) as control:
        control.call("pause", disk="disk")
        with pytest.raises(ControlError, match="was handed over"):
            control.call("unpause", disk="disk", chain=f"aio:{other}")
        assert control.call("info", disk="disk")["state"] == "paused"
        control.call("unpause", disk="disk", force=True)
        assert fence.read(str(other)) is None


def test_a_replica_takes_its_fence_away_when_it_is_promoted(env: Env, tmp_path: Path) -> None:
    """And not before: a disk that comes back to where it was is at home there once it is complete."""
    paths = [tmp_path / name for name in ("disk.img", "copy.img")]
    for path in paths:
        path.write_bytes(bytes(SIZE_BYTES))
    fence.write(str(paths[1]), "handed over once")
    rig = Rig(env, paths[0])
    endpoint = rig.replica(f"aio:{paths[1]}", store=StateStore(tmp_path / "replica", paths[1], SIZE_BYTES))
    assert rig.sync("--keep-running", "vm1", endpoint) == 0
    assert fence.read(str(paths[1]))
    assert rig.sync("vm1", endpoint) == 0
    assert fence.read(str(paths[1])) is None
    assert fence.read(str(paths[0])) == f"handed over to {endpoint}"
    rig.close()


def test_ids_say_who_has_what(env: Env, tmp_path: Path) -> None:
    """After a hand-over the former primary is at what the copy has; forced to go on, it parts from it."""
    paths = [tmp_path / name for name in ("disk.img", "copy.img")]
    for path in paths:
        path.write_bytes(bytes(SIZE_BYTES))
    rig = Rig(env, paths[0])

    def ids() -> tuple[str, str, list[str]]:
        [log] = rig.info()["logs"]
        return log["current"], log["base"], log["history"]

    none = "0" * 16
    first, base, _ = ids()
    assert first != none and base == none
    endpoint = rig.replica(f"aio:{paths[1]}")
    assert rig.sync("--keep-running", "vm1", endpoint) == 0
    current, base, _ = ids()
    assert current == first and base != none
    assert rig.sync("vm1", endpoint) == 0
    handed_over = ids()
    assert handed_over[1] == none and handed_over[0] not in (first, none) and handed_over[2][0] == first
    with rig.control() as control:
        control.call("unpause", disk="vm1", force=True)
    current, base, history = ids()
    assert current not in (handed_over[0], first, none) and base == handed_over[0] and first in history
    rig.close()
