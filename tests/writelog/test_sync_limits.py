"""What a sync does about hostile answers, a stuck terminal, a disk that is gone, and arguments without sense."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from sync_rig import SIZE_BYTES, Rig, Script, events

from tapcore.driver import Env
from tapcore.errors import LogError, UsageError
from writelog import sync
from writelog.client import LogClient, Response
from writelog.sync_link import MAX_RECEIVED, Link, Peer
from writelog.sync_report import Reporter
from writelog.sync_transport import check_endpoint
from writelog.wire import Ack, Message, Promote, Release, encode


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def rig(env: Env, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(env, tmp_path / "disk.img")
    yield rig
    rig.close()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


def test_a_disk_that_was_handed_over_is_not_sent_again(
    rig: Rig, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rig.sync("vm1", script.endpoint) == 0
    capsys.readouterr()
    script.forget()
    assert rig.sync("vm1", script.endpoint) == 1
    line = capsys.readouterr().err
    assert f"was handed over to {script.endpoint}" in line
    assert "tap-ctl unpause --force vm1" in line
    assert script.connections == 1


def test_nothing_is_left_in_the_run_directory(rig: Rig, script: Script) -> None:
    before = sorted(rig.env.run_dir.iterdir())
    assert rig.sync("--keep-running", "vm1", script.endpoint) == 0
    assert rig.sync("--log", "nosuch", "vm1", script.endpoint) == 2
    assert sorted(rig.env.run_dir.iterdir()) == before


def test_a_replica_that_never_takes_over_is_given_up(
    rig: Rig, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It acknowledges all the time, so it is not silent."""
    monkeypatch.setattr("writelog.sync_talk.ANSWER_S", 0.3)
    script.on[Promote] = lambda _: None
    assert rig.sync("vm1", script.endpoint) == 1
    assert "handed over, but" in capsys.readouterr().err


def test_a_copy_is_confirmed_whatever_follows(
    rig: Rig, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("writelog.sync_talk.ANSWER_S", 0.3)
    script.on[Release] = lambda _: None
    assert rig.sync("--keep-running", "vm1", script.endpoint) == 0
    assert rig.guest_goes_on()


def test_a_replica_whose_disk_hangs_holds_no_guest(
    rig: Rig, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is there and acknowledges, but applies nothing."""
    monkeypatch.setattr("writelog.sync_run.STALL_TOLD_S", 0.2)
    answer = script._answer

    def apply_nothing(peer: bytes, message: Message | bytes | None) -> None:
        answer(peer, Ack(0, 0, 0, 0) if isinstance(message, Ack) else message)

    monkeypatch.setattr(script, "_answer", apply_nothing)
    assert rig.sync("--json", "--patience", "0.5", "vm1", script.endpoint) == 1
    output = capsys.readouterr()
    assert "applied nothing for" in output.err
    states = {event["state"] for event in events(output.out)}
    assert "stalled" in states
    assert "switching" not in states
    assert rig.dirty_bytes() == SIZE_BYTES
    assert rig.guest_goes_on()


def test_a_tapdisk_that_ends_after_the_hand_over_does_not_stop_it(
    rig: Rig, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[Message] = []
    responses = LogClient.responses

    def responses_until_gone(log: LogClient) -> list[Response]:
        if gone:
            raise LogError("the log server closed the connection")
        return responses(log)

    def promote(message: Promote) -> Message | None:
        gone.append(message)
        return script._play(message, None)

    monkeypatch.setattr(LogClient, "responses", responses_until_gone)
    script.on[Promote] = promote
    assert rig.sync("vm1", script.endpoint) == 0
    assert gone


def test_answers_without_end_are_taken_in_parts() -> None:
    class Flood:
        def recv_multipart(self, flags: int) -> list[bytes]:
            return [encode(Ack(0, 0, 0, 0))]

    context = zmq.Context()
    link = Link(context, Peer("tcp://127.0.0.1:1"))
    real, link.socket = link.socket, Flood()  # type: ignore[assignment]
    for received, _ in enumerate(link.receive()):
        assert received < MAX_RECEIVED
    link.socket = real
    link.close()
    context.destroy(linger=0)


def test_a_report_that_nobody_reads_does_not_stop_the_sync(
    rig: Rig, script: Script, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with os.fdopen(write_fd, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert rig.sync("--json", "vm1", script.endpoint) == 0
    monkeypatch.undo()
    assert rig.info()["fenced"]
    assert capfd.readouterr().err == "writelog-sync: cannot report any more, but goes on: Broken pipe\n"


def test_a_full_disk_ends_the_report_and_not_the_sync(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    reporter = Reporter("plain", Full())
    for state in ("connecting", "syncing"):
        reporter.state(state)
    assert capsys.readouterr().err.count("No space left") == 1


@pytest.mark.parametrize("endpoint", [
    "tcp://127.0.0.1:5/x", "tcp://127.0.0.1;192.0.2.7:5", "tcp://a@127.0.0.1:5", "tcp://two words:5",
])
def test_addresses_that_mean_something_else_to_zmq_are_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        check_endpoint(endpoint, secured=True)


def test_a_name_that_begins_like_loopback_is_another_host() -> None:
    with pytest.raises(UsageError, match="writelog pair"):
        check_endpoint("tcp://127.example.org:5", secured=False)


def test_an_address_that_zmq_refuses_is_told(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    assert rig.sync("vm1", f"ipc://{'x' * 200}") == 2
    assert "cannot connect" in capsys.readouterr().err
    assert rig.dirty_bytes() == 0


@pytest.mark.parametrize("option", ["--peer-timeout", "--max-pause", "--downtime", "--patience", "--max-time"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x"])
def test_times_that_make_no_sense_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        sync.main(["--insecure-loopback-only", option, value, "vm1", "tcp://127.0.0.1:1"])
    assert end.value.code == 2
    assert repr(value) in capsys.readouterr().err


def test_odd_sizes_arrive(env: Env, tmp_path: Path) -> None:
    """The last block is shorter than the log's granularity."""
    image, copy = tmp_path / "odd.img", tmp_path / "copy.img"
    image.write_bytes(os.urandom((SIZE_BYTES // 4) + 512))
    copy.write_bytes(bytes(image.stat().st_size))
    rig = Rig(env, image)
    try:
        assert rig.sync("--verify", "vm1", rig.replica(f"aio:{copy}")) == 0
        assert copy.read_bytes() == image.read_bytes()
    finally:
        rig.close()
