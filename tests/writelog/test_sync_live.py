"""Whole replications in processes of their own: a guest that always writes, and processes that are killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from processes import Tapdisk, forget_logs, read_line

from tapcore.control import find_disk
from tapcore.nbd.client import NbdClient, NbdError
from tapcore.nbd.wire import NBD_CMD_READ
from writelog.client import LogClient
from writelog.sidecar_layout import newest, slots_of

SIZE_BYTES = 48 << 20
WAIT_S = 30
SLOW = "delay:write=500|"
"""Below a replica: the first pass takes 1 s, as 16 MiB are applied at once."""


DISK_LOST_TOO = """
import os, select
from writelog import sync_run
after_loss = sync_run.Sync._after_loss
def disk_lost_too(self, lost):
    fd = os.pidfd_open({0})
    os.kill({0}, 9)
    select.select([fd], [], [])
    sync_run.Sync._after_loss = after_loss
    after_loss(self, lost)
sync_run.Sync._after_loss = disk_lost_too
"""
"""A sync that finds its link lost has its tapdisk killed, too, before it does anything about it."""


class Guest:
    """Writes here and there until the disk does not answer any more."""

    def __init__(self, uri: str) -> None:
        self.writes = 0
        self.unexpected: list[BaseException] = []
        self._uri = uri
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        random = Random(3)
        try:
            with NbdClient(self._uri, timeout_s=WAIT_S) as client:
                while not self._stopping.is_set():
                    hot = random.random() < 0.7
                    offset = random.randrange((1 << 20 if hot else SIZE_BYTES) // 512 - 64) * 512
                    length = random.randrange(1, 64) * 512
                    if random.random() < 0.1:
                        client.zeroes(offset, length)
                    else:
                        client.write(offset, random.randbytes(length))
                    self.writes += 1
                    self._stopping.wait(0.0005)
        except NbdError as error:
            if error.errno not in (errno.ESHUTDOWN, errno.ECONNRESET, errno.EPIPE):
                self.unexpected.append(error)
        except BaseException as error:
            self.unexpected.append(error)

    def wrote_more(self) -> bool:
        """Whether writes still end."""
        before = self.writes
        for _ in range(50):
            if self.writes > before + 5:
                return True
            self._stopping.wait(0.02)
        return False

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        assert not self.unexpected, self.unexpected


class Command:
    """A process of this project."""

    def __init__(self, module: str, *arguments: str, prelude: str = "") -> None:
        """`prelude` is Python that is run in it first."""
        program = ["-m", module]
        if prelude:
            program = ["-c", f"{prelude}\nimport sys\nfrom {module} import main\nsys.exit(main())"]
        self.process = subprocess.Popen([sys.executable, *program, *arguments],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def event(self, match: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next --json event that matches."""
        while True:
            event: dict[str, Any] = json.loads(read_line(self.process))
            if match(event):
                return event

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)

    def end(self) -> tuple[int, str, str]:
        """Wait for it; its exit code, and what it has still said."""
        out, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out.decode(), err.decode()


class Pair:
    """A primary with a guest, and what is to be its replica."""

    def __init__(self, folder: Path, serve: Callable[..., Tapdisk]) -> None:
        self.image, self.copy = folder / "a.img", folder / "b.img"
        self.image.write_bytes(Random(4).randbytes(SIZE_BYTES // 2))
        os.truncate(self.image, SIZE_BYTES)
        self.copy.touch()
        os.truncate(self.copy, SIZE_BYTES)
        self._serve = serve
        self.serve()
        self.commands: list[Command] = []
        self.endpoint = ""

    def serve(self) -> None:
        """A tapdisk with the disk, and a guest."""
        self.tapdisk = self._serve(f"log:|delay:write=1|aio:{self.image}", "--name", "vm1")
        self.guest = Guest(self.tapdisk.uri)

    def replica(self, below: str = "", *options: str) -> Command:
        command = Command("writelog.replica", "--insecure-loopback-only",
                          "--listen", self.endpoint or "tcp://127.0.0.1:0", *options,
                          f"{below}aio:{self.copy}")
        self.commands.append(command)
        self.endpoint = read_line(command.process).split()[-1]
        return command

    def sync(self, *options: str, prelude: str = "") -> Command:
        command = Command("writelog.sync", "--insecure-loopback-only",
                          "--run-dir", str(self.tapdisk.run_dir), "--json", *options, "vm1",
                          self.endpoint, prelude=prelude)
        self.commands.append(command)
        return command

    def dirty_bytes(self) -> int:
        with LogClient(next(self.tapdisk.run_dir.glob("log__*.ctl"))) as log:
            figures = log.stat()
            assert figures.leased_blocks == 0
            return figures.dirty_blocks * figures.granularity_bytes

    def epoch(self) -> int:
        """Another one after a full copy has begun anew."""
        record = newest(slots_of(self.image.with_name("a.img.writelog").read_bytes()))
        assert record is not None
        return record.epoch

    def images_are_equal(self) -> bool:
        """End all processes first."""
        self.close()
        return self.image.read_bytes() == self.copy.read_bytes()

    def stop_disk(self) -> None:
        self.guest.stop()
        self.tapdisk.stop()

    def close(self) -> None:
        for command in self.commands:
            if command.process.poll() is None:
                command.process.send_signal(signal.SIGTERM)
                command.end()
        self.tapdisk.stop()
        self.guest.stop()


@pytest.fixture
def pair(tmp_path: Path, serve: Callable[..., Tapdisk]) -> Iterator[Pair]:
    pair = Pair(tmp_path, serve)
    yield pair
    pair.close()


def test_a_busy_disk_moves_and_its_clients_find_it_at_the_replica(pair: Pair, tmp_path: Path) -> None:
    replica = pair.replica("delay:write=100|", "--nbd", f"unix:{tmp_path}/nbd", "--name", "vm1")
    client = NbdClient(f"nbd+unix:///vm1?socket={tmp_path}/nbd", timeout_s=WAIT_S)
    client.submit(NBD_CMD_READ, 0, 1 << 20)
    code, out, err = pair.sync().end()
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    _, error, data = client.wait()
    assert error == 0
    client.close()
    assert report["state"] == "done"
    assert report["extra_bytes"] > 0
    assert report["pause_s"] < 5
    assert replica.process.poll() is None
    assert pair.guest.writes > 50
    assert not pair.guest.wrote_more()
    assert pair.images_are_equal()
    assert isinstance(data, bytearray)
    assert pair.copy.read_bytes().startswith(data)


def test_a_killed_tapdisk_is_waited_for_and_its_log_still_counts(pair: Pair) -> None:
    pair.replica()
    sync = pair.sync("--rate", "12M", "--verify", "--keep-running")
    sync.event(lambda event: event.get("sent_bytes", 0) > SIZE_BYTES // 4)
    epoch = pair.epoch()
    pair.tapdisk.process.kill()
    pair.tapdisk.process.communicate(timeout=WAIT_S)
    event = sync.event(lambda event: event["state"] == "stalled")
    assert "the disk is not served any more" in event["detail"]
    pair.guest.stop()
    pair.serve()
    code, out, err = sync.end()
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["verified"]
    assert report["connections"] == 2
    assert pair.epoch() == epoch
    assert pair.guest.wrote_more()


def test_it_compares_after_a_tapdisk_was_killed_as_before(pair: Pair) -> None:
    """Half of each two MiB is there already: the other half is sent once, but for what was on its way."""
    copy = bytearray(pair.image.read_bytes())
    for place in range(0, SIZE_BYTES // 2, 2 << 20):
        copy[place : place + (1 << 20)] = bytes(1 << 20)
    pair.copy.write_bytes(copy)
    pair.guest.stop()
    pair.replica()
    sync = pair.sync("--rate", "6M", "--compare", "--compress", "off", "--keep-running")
    sync.event(lambda event: event.get("sent_bytes", 0) > 1 << 20)
    pair.tapdisk.process.kill()
    pair.tapdisk.process.communicate(timeout=WAIT_S)
    pair.serve()
    pair.guest.stop()
    code, out, err = sync.end()
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["connections"] == 2
    assert report["sent_bytes"] < SIZE_BYTES // 4 + (8 << 20)


@pytest.mark.parametrize("killed", ["sync", "replica", "both"])
def test_what_was_killed_goes_on_where_it_was(pair: Pair, killed: str) -> None:
    """The log counts for the same copy to the end: nothing was sent anew as a whole."""
    replica = pair.replica()
    sync = pair.sync("--rate", "12M", "--peer-timeout", "1", "--verify", "--keep-running")
    sync.event(lambda event: event.get("sent_bytes", 0) > SIZE_BYTES // 4)
    epoch = pair.epoch()
    if killed in ("replica", "both"):
        replica.kill()
        event = sync.event(lambda event: event["state"] == "stalled")
        assert "next try" in event["detail"]
    if killed in ("sync", "both"):
        sync.kill()
        assert pair.dirty_bytes() < SIZE_BYTES * 7 // 8
    assert pair.guest.wrote_more()
    if killed in ("replica", "both"):
        pair.replica()
    if killed in ("sync", "both"):
        sync = pair.sync("--verify", "--keep-running")
    code, out, err = sync.end()
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["resumed"] == (killed != "replica")
    assert report["connections"] == (2 if killed == "replica" else 1)
    assert pair.epoch() == epoch


@pytest.mark.parametrize("order", ["at once", "one by one", "tapdisk again"])
def test_a_tapdisk_and_the_link_are_lost(pair: Pair, order: str) -> None:
    """The sync waits for the disk, then for the replica, and goes on where it was."""
    replica = pair.replica()
    sync = pair.sync("--rate", "20M", "--peer-timeout", "1", "--verify", "--keep-running",
                     prelude=DISK_LOST_TOO.format(pair.tapdisk.process.pid) if order == "at once" else "")
    sync.event(lambda event: event.get("sent_bytes", 0) > SIZE_BYTES // 4)
    epoch = pair.epoch()
    replica.kill()
    if order != "at once":
        sync.event(lambda event: "next try" in event.get("detail", ""))
        pair.tapdisk.process.kill()
    pair.tapdisk.process.communicate(timeout=WAIT_S)
    pair.guest.stop()
    if order == "tapdisk again":
        sync.event(lambda event: "not served any more" in event.get("detail", ""))
        pair.serve()
        sync.event(lambda event: "nobody answers there" in event.get("detail", ""))
        pair.tapdisk.kill()
        pair.guest.stop()
    pair.replica()
    sync.event(lambda event: "not served any more" in event.get("detail", ""))
    pair.serve()
    code, out, err = sync.end()
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["verified"]
    assert pair.epoch() == epoch
    assert pair.guest.wrote_more()


def test_a_tapdisk_killed_in_the_pause_is_not_waited_for_in_one(pair: Pair) -> None:
    """When it is back, the sync copies while the guest writes, before it pauses again."""
    pair.replica("delay:flush=1000|")
    sync = pair.sync("--downtime", "30", "--keep-running")
    sync.event(lambda event: event["state"] == "switching")
    pair.tapdisk.kill()
    sync.event(lambda event: "not served any more" in event.get("detail", ""))
    pair.guest.stop()
    pair.serve()
    event = sync.event(lambda event: event["state"] != "stalled")
    assert event["state"] == "syncing"
    code, _, err = sync.end()
    assert code == 0, err
    assert pair.guest.wrote_more()


def test_a_copy_that_was_kept_gets_what_has_changed(pair: Pair) -> None:
    replica = pair.replica("", "--once")
    assert pair.sync("--keep-running").end()[0] == 0
    assert replica.end()[0] == 0
    pair.replica()
    code, out, err = pair.sync("--verify", "--downtime", "5").end()
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["resumed"]
    assert report["sent_bytes"] + report["zero_bytes"] < SIZE_BYTES // 2
    assert pair.images_are_equal()


def test_a_copy_that_was_tried_out_by_force_is_not_gone_on_with(pair: Pair) -> None:
    replica = pair.replica("", "--once")
    assert pair.sync("--keep-running").end()[0] == 0
    assert replica.end()[0] == 0
    drill = pair._serve(f"aio:{pair.copy}", "--name", "drill")
    with find_disk(pair.tapdisk.run_dir, "drill") as control:
        assert "a copy of disk 'vm1'" in control.call("info", disk="drill")["fenced"]
        control.call("unpause", disk="drill", force=True)
    with drill.client() as client:
        client.write(0, b"drill" * 100)
    drill.stop()
    pair.replica()
    code, _, err = pair.sync().end()
    assert (code, "holds a copy of disk 'vm1', but none" in err) == (1, True)
    code, _, err = pair.sync("--overwrite", "--verify", "--downtime", "5").end()
    assert code == 0, err
    assert pair.images_are_equal()


def test_when_others_took_from_the_log_only_a_full_copy_will_do(pair: Pair) -> None:
    replica = pair.replica("", "--once")
    assert pair.sync("--keep-running").end()[0] == 0
    assert replica.end()[0] == 0
    pair.replica()
    with LogClient(next(pair.tapdisk.run_dir.glob("log__*.ctl"))) as log:
        log.commit(log.get().lease)
    code, _, err = pair.sync().end()
    assert code == 1
    assert "holds a copy of disk 'vm1', but none that the write log here knows of" in err
    assert pair.guest.wrote_more()
    code, out, err = pair.sync("--overwrite", "--verify", "--downtime", "5").end()
    assert code == 0, err
    assert not json.loads(out.splitlines()[-1])["resumed"]
    assert pair.images_are_equal()


@pytest.mark.parametrize("host_dies", [False, True])
def test_a_disk_restored_with_its_side_car_is_not_taken_for_the_one_that_was_copied(
    pair: Pair, host_dies: bool
) -> None:
    """The copy has what was written since: it would have been left there, mixed with what is older."""
    sidecar = pair.image.with_name("a.img.writelog")
    replica = pair.replica()
    assert pair.sync("--keep-running").end()[0] == 0
    pair.stop_disk()
    backup = {path: path.read_bytes() for path in (pair.image, sidecar)}
    pair.serve()
    assert pair.guest.wrote_more()
    code, out, err = pair.sync("--keep-running").end()
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["resumed"]
    pair.stop_disk()
    for path, content in backup.items():
        path.write_bytes(content)
    if host_dies:
        forget_logs(pair.tapdisk.run_dir)
    pair.serve()
    code, _, err = pair.sync("--keep-running").end()
    assert code == 1
    assert ("is older than the copy here" if host_dies else "none that the write log") in err
    assert "--overwrite" in err
    code, _, err = pair.sync("--overwrite", "--verify", "--downtime", "5").end()
    assert code == 0, err
    assert replica.process.poll() is None
    assert pair.images_are_equal()


def test_a_sync_killed_during_the_pause_lets_the_guest_go_on(pair: Pair) -> None:
    pair.replica("delay:flush=500|")
    sync = pair.sync("--downtime", "30")
    sync.event(lambda event: event["state"] == "switching")
    sync.kill()
    assert pair.guest.wrote_more()
    code, _, err = pair.sync("--keep-running", "--downtime", "30").end()
    assert code == 0, err
    assert pair.guest.wrote_more()


def test_a_rate_holds(pair: Pair) -> None:
    pair.replica()
    code, out, err = pair.sync("--rate", "24M", "--keep-running").end()
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["wire_bytes"] / report["elapsed_s"] <= 1.1 * 24 * (1 << 20)
