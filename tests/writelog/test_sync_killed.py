"""A sync is killed at each step of the protocol: the guest goes on, what the replica lacks is dirty, and the next
sync sends just that."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sync_rig import SIZE_BYTES, WAIT_S, Rig, Script, events

from tapcore.driver import Env
from tapcore.nbd.wire import NBD_CMD_WRITE
from writelog.wire import Barrier, Base, Data, Hello, Message, Promote, Release, Verify, Zero

BLOCK_BYTES = 4096


@pytest.fixture
def rig(env: Env, tmp_path: Path) -> Iterator[Rig]:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
        file.seek(SIZE_BYTES // 4)
        file.write(Random(1).randbytes(SIZE_BYTES // 2))
    rig = Rig(env, image)
    yield rig
    rig.close()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


def lost_blocks(rig: Rig, memory: bytearray) -> list[int]:
    """The blocks that differ at the replica and are not dirty."""
    image = rig.image.read_bytes()
    with rig.log() as log:
        dirty = [range(start, start + length) for start, length in log.peek()]
    return [start for start in range(0, SIZE_BYTES, BLOCK_BYTES)
            if image[start : start + BLOCK_BYTES] != memory[start : start + BLOCK_BYTES]
            and not any(start in extent for extent in dirty)]


def resumed(rig: Rig, script: Script, capsys: pytest.CaptureFixture[str]) -> bool:
    """Sync, to a copy that is equal then; whether that was one already."""
    capsys.readouterr()
    assert rig.sync("--json", "--verify", "--keep-running", "vm1", script.endpoint) == 0
    assert script.memory == rig.image.read_bytes()
    return bool(events(capsys.readouterr().out)[-1]["resumed"])


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("kind", "options"), [
    (Hello, []), (Base, []),
    (Data, []), (Zero, []), (Barrier, []), (Verify, ["--verify"]), (Release, ["--keep-running"]),
    (Promote, []),
])
def test_killed_at_a_step(
    rig: Rig, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    kind: type[Any], options: list[str], is_first: bool, answered: bool
) -> None:
    """Before the step is answered, or right after, while the guest writes to what was just sent."""
    if not is_first:
        assert not resumed(rig, script, capsys)
        with rig.guest() as guest:
            guest.write(SIZE_BYTES // 2, b"more" * 1024)
            guest.zeroes(0, 4 << 20)
    play, answer = script._play, script._answer
    due: list[Message] = []
    command = [sys.executable, "-m", "writelog.sync", "--insecure-loopback-only",
               "--run-dir", str(rig.env.run_dir), *options, "vm1",
               script.endpoint]
    with rig.guest() as guest, subprocess.Popen(command, stdout=subprocess.DEVNULL) as sync:

        def meddle(message: Message, payload: Any) -> Message | None:
            if isinstance(message, kind):
                due.append(message)
                return play(message, payload) if answered else None
            if isinstance(message, Data | Zero) and guest.in_flight < 200:
                guest.submit(NBD_CMD_WRITE, message.offset, 512, b"\xaa" * 512)
            return play(message, payload)

        def answer_and_kill(peer: bytes, message: Message | bytes | None) -> None:
            answer(peer, message)
            if due:
                sync.kill()

        monkeypatch.setattr(script, "_play", meddle)
        monkeypatch.setattr(script, "_answer", answer_and_kill)
        assert sync.wait(WAIT_S) in (-signal.SIGKILL, 0 if answered else -signal.SIGKILL)
        assert due
        if kind is Promote:
            assert rig.info()["fenced"]
            assert not rig.guest_goes_on()
            assert rig.image.read_bytes() == script.memory
            return
        while guest.in_flight:
            guest.wait()
    for _ in range(500):
        if rig.info()["holder"] is None:
            break
        threading.Event().wait(0.01)
    assert rig.info()["fenced"] is None
    assert rig.guest_goes_on()
    if kind not in (Hello, Base):
        assert lost_blocks(rig, script.memory) == []
    monkeypatch.undo()
    is_copy = not is_first or (kind is not Hello and (kind is not Base or answered))
    assert resumed(rig, script, capsys) == is_copy


def test_stopped_in_the_pause(rig: Rig, script: Script) -> None:
    """The guest goes on without it; the sync that is continued finds that out and switches over later."""
    play = script._play
    barriers: list[Message] = []
    run = ("import sys; from writelog import sync, sync_source; sync_source.HOLD_MARGIN_S = 0.2; "
           "sys.exit(sync.main())")
    command = [sys.executable, "-c", run, "--insecure-loopback-only", "--run-dir", str(rig.env.run_dir),
               "--max-pause", "1", "--peer-timeout", str(WAIT_S), "vm1", script.endpoint]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sync:

        def stop_first(message: Barrier) -> Message | None:
            if not barriers:
                sync.send_signal(signal.SIGSTOP)
            barriers.append(message)
            return play(message, None)

        script.on[Barrier] = stop_first
        while not barriers:
            assert sync.poll() is None
            threading.Event().wait(0.01)
        with rig.guest() as guest:
            guest.write(BLOCK_BYTES, b"alive")
        assert rig.info()["holder"] is None
        sync.send_signal(signal.SIGCONT)
        assert sync.wait(3 * WAIT_S) == 0
    assert len(barriers) > 1
    assert rig.info()["fenced"] and rig.image.read_bytes() == script.memory
