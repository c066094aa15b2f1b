"""A hand-over whose answer is late, or lost with the tapdisk: what became of it is found out."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from processes import Tapdisk, forget_logs
from sync_rig import SIZE_BYTES, WAIT_S, Script

from tapcore import fence
from tapcore.control import find_disk
from writelog.wire import Promote

PRELUDE = """
import os, signal, threading
from pathlib import Path
from tapcore import fence
from tapcore.errors import ImageError
write = fence.write
def die(): os.kill(os.getpid(), signal.SIGKILL)
def wait():
    folder = Path({folder!r})
    (folder / "asked").touch()
    while not (folder / "go").exists():
        threading.Event().wait(0.01)
def fail(): raise ImageError("no room", errno=28)
def spoiled(image, why, state):
    {spoiled}
fence.write = spoiled
"""


class Primary:
    """A tapdisk that hands its disk over in an odd way, and a sync of it to a Script."""

    def __init__(self, folder: Path, script: Script) -> None:
        self.folder, self.script = folder, script
        self.image = folder / "disk.img"
        self.image.write_bytes(Random(1).randbytes(SIZE_BYTES))
        self.run_dir = folder / "run"
        self.run_dir.mkdir(mode=0o700)
        self.tapdisk: Tapdisk | None = None
        self.sync: subprocess.Popen[str] | None = None
        self.promoted: list[Promote] = []
        play = script._play

        def promote(message: Promote) -> Any:
            self.promoted.append(message)
            return play(message, None)

        script.on[Promote] = promote

    def serve(self, spoiled: str = "") -> None:
        prelude = PRELUDE.format(folder=str(self.folder), spoiled=spoiled) if spoiled else ""
        self.tapdisk = Tapdisk(self.run_dir, f"log:|aio:{self.image}", "--name", "vm1", prelude=prelude)

    def begin(self, *options: str) -> None:
        run = ("import sys; from writelog import sync, sync_source; sync_source.HAND_OVER_S = 0.3; "
               "sys.exit(sync.main())")
        self.sync = subprocess.Popen(
            [sys.executable, "-c", run, "--insecure-loopback-only", "--run-dir", str(self.run_dir), *options,
             "vm1", self.script.endpoint], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def until(self, ready: Callable[[], bool]) -> None:
        for _ in range(3000):
            if ready():
                return
            threading.Event().wait(0.01)
        raise AssertionError("it did not come so far")

    def until_asked(self) -> None:
        """Until the tapdisk records the hand-over, and the sync has ceased to wait for an answer."""
        self.until((self.folder / "asked").exists)
        self.until(lambda: self.info()["holder"] is None)

    def go(self) -> None:
        (self.folder / "go").touch()

    def end(self) -> tuple[int, str]:
        assert self.sync is not None
        _, error = self.sync.communicate(timeout=3 * WAIT_S)
        return self.sync.returncode, error

    def info(self) -> dict[str, Any]:
        with find_disk(self.run_dir, "vm1", WAIT_S) as control:
            return control.call("info", disk="vm1")

    def goes_on(self) -> bool:
        assert self.tapdisk is not None
        if self.info()["state"] != "running":
            return False
        with self.tapdisk.client(timeout_s=WAIT_S) as guest:
            guest.write(0, b"alive")
        return True

    def close(self) -> None:
        self.go()
        if self.sync is not None and self.sync.poll() is None:
            self.sync.kill()
            self.sync.communicate(timeout=WAIT_S)
        if self.tapdisk is not None and self.tapdisk.process.poll() is None:
            self.tapdisk.kill()
        forget_logs(self.run_dir)


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[Primary]:
    script = Script()
    primary = Primary(tmp_path, script)
    yield primary
    primary.close()
    script.close()


def test_one_that_takes_its_time_is_waited_for(primary: Primary) -> None:
    primary.serve("wait(); write(image, why, state)")
    primary.begin()
    primary.until_asked()
    assert not primary.promoted
    primary.go()
    code, error = primary.end()
    assert (code, len(primary.promoted)) == (0, 1), error
    assert primary.script.endpoint in primary.info()["fenced"]
    assert primary.script.memory == primary.image.read_bytes()


def test_one_that_fails_late_did_not_happen(primary: Primary) -> None:
    primary.serve("wait(); fail()")
    primary.begin()
    primary.until_asked()
    primary.go()
    code, error = primary.end()
    assert (code, primary.promoted) == (1, [])
    assert "the primary could not be handed over" in error
    assert primary.goes_on()


@pytest.mark.parametrize("spoiled", ["write(image, why, state); die()", "wait(); write(image, why, state); die()"])
def test_a_tapdisk_that_dies_with_the_fence_on_the_disk_has_handed_over(primary: Primary, spoiled: str) -> None:
    primary.serve(spoiled)
    primary.begin()
    if "wait" in spoiled:
        primary.until_asked()
        primary.go()
    code, error = primary.end()
    assert (code, len(primary.promoted)) == (0, 1), error
    assert primary.script.memory == primary.image.read_bytes()
    assert primary.script.endpoint in str(fence.read(str(primary.image)))
    primary.serve()
    assert not primary.goes_on()


def test_one_that_dies_without_is_waited_for_and_hands_over_then(primary: Primary) -> None:
    primary.serve("die()")
    primary.begin()
    assert primary.tapdisk is not None
    primary.tapdisk.process.wait(WAIT_S)
    primary.tapdisk.process.communicate(timeout=WAIT_S)
    assert not primary.promoted and fence.read(str(primary.image)) is None
    primary.serve()
    code, error = primary.end()
    assert (code, len(primary.promoted)) == (0, 1), error
    assert primary.info()["fenced"] and primary.script.memory == primary.image.read_bytes()


@pytest.mark.parametrize("ending", ["write(image, why, state)", "fail()"])
def test_who_does_not_wait_is_told_what_may_be_the_case(primary: Primary, ending: str) -> None:
    primary.serve(f"wait(); {ending}")
    primary.begin()
    primary.until_asked()
    assert primary.sync is not None
    primary.sync.send_signal(signal.SIGTERM)
    code, error = primary.end()
    assert (code, primary.promoted) == (1, [])
    assert "interrupted; disk 'vm1' may be fenced" in error and "tap-ctl info vm1" in error
    assert f"{primary.image}.fenced" in error and "The replica was not promoted" in error
    primary.go()
    primary.until(lambda: not primary.info()["handing_over"])
    assert primary.goes_on() == (ending == "fail()")
    if not primary.goes_on():
        with find_disk(primary.run_dir, "vm1", WAIT_S) as control:
            control.call("unpause", disk="vm1", force=True)
    assert primary.goes_on()
