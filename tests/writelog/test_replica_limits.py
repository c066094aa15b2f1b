"""What a replica holds against peers that send too much, and whom it lets in when its disk is slow."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from processes import forget_logs, read_line
from replica_bench import WAIT_S, Bench

from tapcore.driver import Env
from writelog import replica
from writelog.wire import VERSION, Base, Data, Failure, Hello, Verify, Welcome, checksum, encode


@pytest.fixture
def bench(env: Env) -> Iterator[Bench]:
    bench = Bench(env)
    yield bench
    bench.close()


def test_short_extents_do_not_pile_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("writelog.replica_apply.MAX_QUEUED", 8)
    peer = bench.peer()
    peer.begin()
    bench.driver.early = False
    for _ in range(200):
        peer.zero(0, 1)
    applier = bench.server._applier
    bench.env.loop.run_until(lambda: len(applier._queue) >= 8, WAIT_S)
    for _ in range(20):
        bench.env.loop.turn(0.001)
    assert len(applier._queue) == 8
    bench.go_on()
    peer.barrier()


def test_a_full_replica_neither_spins_nor_forgets_who_waits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one long extent is in flight the first sync goes, and another one says hello."""
    monkeypatch.setattr("writelog.replica_apply.MAX_QUEUED_BYTES", 64 << 10)
    server, loop = bench.server, bench.env.loop
    first = bench.peer()
    first.begin()
    bench.driver.early = False
    first.zero(0, 512 << 10)
    loop.run_until(lambda: server._applier.is_full, WAIT_S)
    second = bench.peer(b"2" * 16)
    second.hello()
    first.close()
    loop.run_until(lambda: server._session is None, WAIT_S)
    loop.run_until(lambda: bool(server._socket.poll(0, zmq.POLLIN)), WAIT_S)
    assert server._socket.fileno() not in loop._handlers
    loop.turn(0)
    assert server._session is None
    bench.go_on()
    second.expect(Welcome)


def test_a_sync_that_came_back_has_its_full_time_again(bench: Bench) -> None:
    first = bench.peer()
    first.begin()
    first.close()
    bench.env.loop.run_until(lambda: bench.server._session is None, WAIT_S)
    timer = bench.server._gone_timer
    assert timer is not None
    assert timer.callback is not None
    assert bench.peer().begin().base
    assert timer.callback is None


def test_one_verification_at_a_time(bench: Bench) -> None:
    peer = bench.peer()
    peer.begin()
    peer.barrier()
    bench.driver.early = False
    peer.send(Verify())
    peer.send(Verify())
    assert "VERIFY" in peer.expect(Failure).message


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e9", "soon"])
def test_times_that_make_no_sense_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        replica.main(["--insecure-loopback-only",
                      "--listen", "tcp://127.0.0.1:0", "--peer-timeout", value, "ram:4096"])
    assert end.value.code == 2
    assert repr(value) in capsys.readouterr().err


def test_an_interrupt_before_the_start_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise KeyboardInterrupt

    assert replica.run_command(command, "writelog-replica") == 130
    assert capsys.readouterr().err == "writelog-replica: interrupted\n"


def test_a_second_signal_ends_a_replica_whose_disk_hangs(tmp_path: Path) -> None:
    image = tmp_path / "copy.img"
    image.write_bytes(bytes(4096))
    command = [sys.executable, "-m", "writelog.replica", "--insecure-loopback-only",
               "--listen", "tcp://127.0.0.1:0",
               f"delay:write=100000|aio:{image}"]
    context = zmq.Context()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            endpoint = read_line(process).split()[-1]
            peer = context.socket(zmq.DEALER)
            peer.connect(endpoint)
            peer.send(encode(Hello(VERSION, bytes(16), 4096, "vm1", 0, 0, False, False)))
            peer.send(encode(Base(7)))
            peer.send_multipart([encode(Data(1, 0, 4096, checksum(bytes(4096)))), bytes(4096)])
            assert peer.poll(int(WAIT_S * 1000))
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionRefusedError):
                for _ in range(500):
                    socket.create_connection(("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))).close()
                    threading.Event().wait(0.01)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT_S) == -signal.SIGINT
        finally:
            process.kill()
            context.destroy(linger=0)


def test_a_log_of_the_replica_is_in_the_run_directory(tmp_path: Path) -> None:
    image, run_dir = tmp_path / "copy.img", tmp_path / "run"
    image.write_bytes(bytes(4096))
    command = [sys.executable, "-m", "writelog.replica", "--insecure-loopback-only",
               "--listen", "tcp://127.0.0.1:0", f"log:|aio:{image}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {"TAPDISK_RUN_DIR": str(run_dir)}) as process:
        try:
            assert read_line(process).startswith("listening on tcp://127.0.0.1:")
            assert (run_dir / "log__copy.img.ctl").is_socket()
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=WAIT_S)
            forget_logs(run_dir)
    assert process.returncode == 0
