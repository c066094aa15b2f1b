"""nbd: what is sent, what becomes of every kind of reply, and of requests under way when the connection ends."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from contract.runner import Runner
from nbd_servers import FLAGS, Script, nbdkit

from tapcore.chain import open_chain
from tapcore.driver import Env, Feature, OpenFlag
from tapcore.drivers.nbd import Nbd
from tapcore.errors import ChainError
from tapcore.nbd import wire
from tapcore.nbd.remote import Remote
from tapcore.request import DISCARD, FAST, FLUSH, FUA, NO_HOLE, READ, STATUS, WRITE, ZEROES, Request

SIZE = 64 << 20
TIMEOUT_S = 10
LOGGER = "tapcore.nbd.remote"


def write(offset: int = 0, data: bytes = b"w" * 4096, flags: int = 0) -> Request:
    return Request(WRITE, offset, len(data), [memoryview(data)], flags)


def read(offset: int = 0, length: int = 4096) -> Request:
    return Request(READ, offset, length, [memoryview(bytearray(length))])


class Peer:
    """A scripted server, and chains that end in it. What the chain sends is there when `start` returns."""

    def __init__(self, env: Env, path: Path) -> None:
        self.env = env
        self.path = path
        self.pool = ThreadPoolExecutor(1)
        self.script: Script
        self.runners: list[Runner] = []

    def serve(self, **options: object) -> Script:
        self.script = Script(self.path, **{"size_bytes": SIZE} | options)  # type: ignore[arg-type]
        return self.script

    def open(self, options: str = "", flags: OpenFlag = OpenFlag.NONE) -> Runner:
        accepted = self.pool.submit(self.script.accept)
        self.runners.append(Runner(self.env, f"nbd:{options}unix:{self.path}", flags))
        accepted.result(TIMEOUT_S)
        return self.runners[-1]

    def accept(self) -> None:
        """Take the next connection, while the loop runs."""
        accepted: Future[None] = self.pool.submit(self.script.accept)
        self.env.loop.run_until(accepted.done, TIMEOUT_S)
        accepted.result()
        # The worker that dialled has to hand the connection over.
        self.env.loop.run_until(lambda: self.remote._dial is None, TIMEOUT_S)

    @property
    def remote(self) -> Remote:
        driver = self.runners[-1].chain.drivers[-1]
        assert isinstance(driver, Nbd)
        return driver._remote

    def close(self) -> None:
        for runner in self.runners:
            runner.close()
        self.pool.shutdown()
        self.script.close()


@pytest.fixture
def peer(env: Env, tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(env, tmp_path / "nbd")
    yield peer
    peer.close()


def fail_to_open(env: Env, params: str, flags: OpenFlag = OpenFlag.NONE) -> ChainError:
    with pytest.raises(ChainError) as caught:
        open_chain(env, f"nbd:{params}", flags)
    assert "\n" not in str(caught.value)
    return caught.value


# Opening


@pytest.mark.parametrize(("params", "wrong"), [
    ("", "no NBD address in ''"),
    ("/run/nbd", "no NBD address"),
    ("unix:", "names no socket"),
    ("nbd+unix:///x", "names 0 sockets"),
    ("connections=4", "no NBD address"),
    ("connections=0,unix:/x", "0 connections; 1 to 16"),
    ("connections=x,unix:/x", "not a whole number"),
    ("timeout=-1,unix:/x", "timeout '-1' is not a number"),
    ("fua=1,unix:/x", "takes no value"),
    ("speed=9,unix:/x", "options of nbd: connections, timeout, fua"),
])
def test_what_cannot_be_meant(env: Env, params: str, wrong: str) -> None:
    assert wrong in str(fail_to_open(env, params))


def test_nobody_listens(env: Env, tmp_path: Path) -> None:
    error = fail_to_open(env, f"unix:{tmp_path}/none")
    assert error.errno == errno.ENOENT and "is the NBD server running there?" in str(error)
    error = fail_to_open(env, "nbd://127.0.0.1:1/")
    assert error.errno == errno.ECONNREFUSED and "cannot connect to tcp:127.0.0.1:1" in str(error)


def test_an_export_that_is_not_there(env: Env) -> None:
    server = nbdkit("--filter=exportname", "memory", "1M", "exportname-strict=true", "exportname=disk")
    try:
        error = fail_to_open(env, f"nbd+unix:///other?socket={server.path}")
        assert error.errno == errno.ENOENT and "export 'other'" in str(error) and "nbdinfo --list" in str(error)
    finally:
        server.stop()


def test_what_listens_is_no_nbd_server_or_says_nothing(env: Env, peer: Peer) -> None:
    script = peer.serve()

    def say(what: bytes) -> None:
        script.client, _ = script._listener.accept()
        script.send(what)
        if what.startswith(b"HTTP"):
            script.receive(1 << 20)

    said = peer.pool.submit(say, b"HTTP/1.1 400 Bad Request\r\n")
    assert "no NBD server" in str(fail_to_open(env, f"unix:{peer.path}"))
    assert isinstance(said.exception(TIMEOUT_S), ConnectionResetError)
    error = fail_to_open(env, f"timeout=0.3,unix:{peer.path}")
    assert error.errno == errno.ETIMEDOUT and "no answer for 0.3 s" in str(error)


@pytest.mark.parametrize(("options", "wrong"), [
    ({"size_bytes": 1000}, "its size, 1000 bytes"),
    ({"blocks": (4096, 4096, 512)}, "impossible block sizes"),
    ({"blocks": (3, 4096, 65536)}, "impossible block sizes"),
    ({"flags": FLAGS | wire.NBD_FLAG_READ_ONLY}, "is read-only; open the disk read-only"),
])
def test_exports_that_cannot_be_used(env: Env, peer: Peer, options: dict[str, object], wrong: str) -> None:
    script = peer.serve(**options)
    peer.pool.submit(script.accept)
    assert wrong in str(fail_to_open(env, f"unix:{peer.path}"))


@pytest.mark.parametrize("flags", [OpenFlag.RDONLY, OpenFlag.QUERY])
def test_a_read_only_export(peer: Peer, flags: OpenFlag) -> None:
    peer.serve(flags=wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_READ_ONLY)
    runner = peer.open(flags=flags)
    assert runner.chain.info.read_only and runner.chain.info.features == Feature.STATUS
    assert runner.run(write(), Request(DISCARD, 0, 512), Request(ZEROES, 0, 512), Request(FLUSH)) == [
        errno.EROFS, errno.EROFS, errno.EROFS, 0]


def test_a_server_that_can_do_nothing_but_read_and_write(peer: Peer) -> None:
    peer.serve(flags=wire.NBD_FLAG_HAS_FLAGS, structured=False)
    runner = peer.open()
    assert runner.chain.info.features == Feature.NONE
    assert runner.run(Request(DISCARD, 0, 512), Request(ZEROES, 0, 512), Request(FLUSH)) == [errno.EOPNOTSUPP] * 3
    assert runner.status(0, SIZE) == [(SIZE, 0)]
    data = bytearray(4096)
    runner.start(Request(READ, 0, 4096, [memoryview(data)[:100], memoryview(data)[100:]]))
    peer.script.answer(peer.script.request(), data=b"r" * 4096)
    runner.wait()
    assert data == b"r" * 4096


# Commands


def test_flags_reach_the_server(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open()
    runner.start(write(flags=FUA), Request(ZEROES, 0, 512, flags=NO_HOLE | FAST),
                 Request(DISCARD, 512, 512, flags=FUA), Request(FLUSH, 7, 9), read(8192))
    got = [script.request() for _ in range(5)]
    assert [(one["type"], one["flags"], one["offset"], one["length"]) for one in got] == [
        (wire.NBD_CMD_WRITE, wire.NBD_CMD_FLAG_FUA, 0, 4096),
        (wire.NBD_CMD_WRITE_ZEROES, wire.NBD_CMD_FLAG_NO_HOLE | wire.NBD_CMD_FLAG_FAST_ZERO, 0, 512),
        (wire.NBD_CMD_TRIM, wire.NBD_CMD_FLAG_FUA, 512, 512),
        (wire.NBD_CMD_FLUSH, 0, 0, 0),
        (wire.NBD_CMD_READ, 0, 8192, 4096)]
    for one in reversed(got):
        script.answer(one, data=bytes(4096) if one["type"] == wire.NBD_CMD_READ else b"")
    runner.wait()


def test_fua_where_the_server_has_none_is_a_flush_after_the_write(peer: Peer) -> None:
    script = peer.serve(flags=FLAGS & ~(wire.NBD_FLAG_SEND_FUA | wire.NBD_FLAG_SEND_FAST_ZERO))
    runner = peer.open()
    good, bad = write(flags=FUA), Request(DISCARD, 8192, 4096, flags=FUA)
    runner.start(good, bad)
    first, second = script.request(), script.request()
    assert first["flags"] == second["flags"] == 0
    script.answer(first)
    script.answer(second, wire.NBD_EIO)
    peer.env.loop.run_until(lambda: runner.late == 1, TIMEOUT_S)
    assert bad.error == errno.EIO
    flush = script.request()
    assert flush["type"] == wire.NBD_CMD_FLUSH
    script.answer(flush, wire.NBD_ENOSPC)
    runner.wait()
    assert good.error == errno.ENOSPC
    assert runner.run(Request(ZEROES, 0, 512, flags=FAST)) == [errno.ENOTSUP]


def test_the_option_fua_makes_every_change_durable(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open("fua,")
    runner.start(write(), Request(ZEROES, 0, 512), Request(DISCARD, 0, 512))
    for _ in range(3):
        one = script.request()
        assert one["flags"] == wire.NBD_CMD_FLAG_FUA
        script.answer(one)
    runner.wait()


def test_large_requests_are_split_and_end_once(peer: Peer) -> None:
    script = peer.serve(blocks=(1, 4096, 16384))
    runner = peer.open()
    data = bytes(range(256)) * 250
    writing, reading = write(100, data), read(0, 50_000)
    runner.start(writing)
    got = [script.request() for _ in range(4)]
    assert [(one["offset"], one["length"]) for one in got] == [
        (100, 16384), (16484, 16384), (32868, 16384), (49252, 14848)]
    for code, one in zip((0, wire.NBD_ENOSPC, 0, wire.NBD_EIO), got, strict=True):
        script.answer(one, code)
    runner.wait()
    assert writing.error == errno.ENOSPC
    runner.start(reading)
    for _ in range(4):
        one = script.request()
        script.answer(one, data=data[one["offset"] :][: one["length"]])
    runner.wait()
    assert (reading.error, bytes(reading.iov[0])) == (0, data[:50_000])


# Replies


@pytest.mark.parametrize("structured", [False, True])
def test_every_error_of_the_protocol(peer: Peer, structured: bool) -> None:
    script = peer.serve(structured=structured)
    runner = peer.open()
    codes = {code: code for code in wire.NBD_ERRORS.values() if code != wire.NBD_ESHUTDOWN} | {77777: errno.EIO}
    for said, meant in codes.items():
        for request in (write(), read()):
            runner.start(request)
            script.answer(script.request(), said)
            runner.wait()
            assert request.error == meant
        if not structured:
            break


def test_block_status_is_cut_to_the_request_and_checked(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open()

    def ask(*extents: tuple[int, int], context: int = 7) -> Request:
        request = Request(STATUS, 4096, 10000)
        runner.start(request)
        payload = wire.STATUS_CONTEXT.pack(context_id=context)
        payload += b"".join(wire.STATUS_EXTENT.pack(length=length, flags=state) for length, state in extents)
        script.chunk(script.request(), wire.NBD_REPLY_TYPE_BLOCK_STATUS, payload)
        runner.wait()
        return request

    assert ask((4096, 0), (1 << 30, 7)).extents == [(4096, 0), (5904, 3)]
    assert ask((10000, 1), (4096, 0)).extents == [(10000, 1)]
    assert ask((4096, 2)).extents == [(4096, 2)]
    assert ask((4096, 2), (0, 2)).error == errno.EIO
    assert ask((4096, 2), context=8).error == errno.EIO


def test_a_read_with_holes_into_several_buffers(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open()
    data = bytearray(b"\xee" * 100_000)
    views = [memoryview(data)[:10], memoryview(data)[10:60_000], memoryview(data)[60_000:]]
    runner.start(Request(READ, 4096, len(data), views))
    one = script.request()
    found, hole = wire.NBD_REPLY_TYPE_OFFSET_DATA, wire.NBD_REPLY_TYPE_OFFSET_HOLE
    script.chunk(one, found, wire.OFFSET_DATA.pack(offset=54096) + b"b" * 50_000, done=False)
    script.chunk(one, hole, wire.OFFSET_HOLE.pack(offset=4101, length=9995), done=False)
    script.chunk(one, found, wire.OFFSET_DATA.pack(offset=4096) + b"a" * 5, done=False)
    script.chunk(one, found, wire.OFFSET_DATA.pack(offset=14096) + b"c" * 40_000)
    runner.wait()
    assert data == b"a" * 5 + bytes(9995) + b"c" * 40_000 + b"b" * 50_000


# Connections that end


def test_what_was_under_way_is_sent_again_and_ends_once(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    script = peer.serve()
    runner = peer.open()
    batch = [write(0, b"a" * 4096), read(8192), Request(FLUSH), Request(ZEROES, 65536, 4096, flags=NO_HOLE)]
    runner.start(*batch)
    first = [script.request() for _ in batch]
    script.answer(first[0])
    peer.env.loop.run_until(lambda: runner.late == 1, TIMEOUT_S)
    script.hang_up()
    later = write(4096, b"b" * 4096)
    peer.accept()
    runner.start(later)
    again = [script.request() for _ in batch]
    forget = {"cookie": 0}
    assert [one | forget for one in again[:3]] == [one | forget for one in first[1:]]
    assert again[3]["offset"] == 4096 and script.payload == b"b" * 4096
    for one in again:
        script.answer(one, data=b"r" * 4096 if one["type"] == wire.NBD_CMD_READ else b"")
    runner.wait()
    assert [request.error for request in [*batch, later]] == [0] * 5
    assert bytes(batch[1].iov[0]) == b"r" * 4096
    assert [record.getMessage().partition(": ")[2] for record in caplog.records if record.name == LOGGER] == [
        "the connection is lost (the server hung up); 3 requests wait until it is back",
        "the server answers again"]


@pytest.mark.parametrize("garbage", [
    b"\xff" * 32,
    wire.SIMPLE_REPLY.pack(magic=wire.NBD_SIMPLE_REPLY_MAGIC, error=0, cookie=99),
    wire.DATA_CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=1, type=wire.NBD_REPLY_TYPE_OFFSET_DATA,
                         cookie=2, length=4104, offset=4096) + bytes(4096),
    wire.DATA_CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=1, type=wire.NBD_REPLY_TYPE_OFFSET_DATA,
                         cookie=2, length=1 << 31, offset=0) + bytes(4096),
], ids=["noise", "cookie", "another place", "too much"])
def test_garbage_ends_the_connection_and_nothing_else(peer: Peer, garbage: bytes) -> None:
    script = peer.serve()
    runner = peer.open()
    written, wanted = write(), read()
    runner.start(written, wanted)
    one, _ = script.request(), script.request()
    script.send(wire.SIMPLE_REPLY.pack(magic=wire.NBD_SIMPLE_REPLY_MAGIC, error=0, cookie=one["cookie"]) + garbage)
    peer.accept()
    assert runner.late == 1, "what was answered before the garbage is done"
    one = script.request()
    assert one["type"] == wire.NBD_CMD_READ
    script.answer(one, data=b"g" * 4096)
    runner.wait()
    assert bytes(wanted.iov[0]) == b"g" * 4096


def test_a_reply_that_breaks_off(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open()
    wanted = read(0, 1 << 20)
    runner.start(wanted)
    one = script.request()
    script.send(wire.DATA_CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=1, cookie=one["cookie"],
                                     type=wire.NBD_REPLY_TYPE_OFFSET_DATA, length=(1 << 20) + 8, offset=0)
                + b"?" * 100_000)
    script.hang_up()
    peer.accept()
    one = script.request()
    answered = peer.pool.submit(script.answer, one, data=b"!" * (1 << 20))
    runner.wait()
    answered.result(TIMEOUT_S)
    assert bytes(wanted.iov[0]) == b"!" * (1 << 20)


def test_a_server_that_shuts_down_is_waited_for(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open()
    request = write()
    runner.start(request)
    script.answer(script.request(), wire.NBD_ESHUTDOWN)
    peer.accept()
    script.answer(script.request())
    runner.wait()
    assert request.error == 0


def test_a_server_that_stops_answering(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    script = peer.serve()
    runner = peer.open("timeout=0.2,")
    request = write()
    runner.start(request)
    script.request()
    peer.accept()
    script.answer(script.request())
    runner.wait()
    assert request.error == 0 and "no reply for 0.2 s" in caplog.text


def test_an_idle_server_is_not_given_up(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open("timeout=0.05,")
    with pytest.raises(TimeoutError):
        peer.env.loop.run_until(lambda: False, 0.2)
    runner.start(write())
    script.answer(script.request())
    runner.wait()


@pytest.mark.parametrize(("change", "why"), [
    ({"size_bytes": SIZE // 2}, f"it has {SIZE // 2} bytes, not {SIZE}"),
    ({"flags": FLAGS | wire.NBD_FLAG_READ_ONLY}, "it is read-only now"),
    ({"flags": FLAGS & ~wire.NBD_FLAG_SEND_FLUSH}, "it lost features"),
    ({"blocks": (512, 4096, 65536)}, "its block sizes are 512 to 65536"),
])
def test_another_disk_comes_back(
    peer: Peer, caplog: pytest.LogCaptureFixture, change: dict[str, object], why: str
) -> None:
    script = peer.serve()
    runner = peer.open()
    request = write()
    runner.start(request)
    script.request()
    right = {name: getattr(script, name) for name in change}
    vars(script).update(change)
    script.hang_up()
    peer.accept()
    runner.wait()
    assert request.error == errno.ENXIO and why in caplog.text
    assert runner.run(write(), read(), Request(FLUSH)) == [errno.ENXIO] * 3
    vars(script).update(right)
    peer.accept()
    runner.start(request := write())
    script.answer(script.request())
    runner.wait()
    assert request.error == 0 and "the right one again" in caplog.text


def test_close_without_a_connection_fails_what_waits(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open()
    sent, queued = write(), read()
    runner.start(sent)
    script.request()
    script.hang_up()
    peer.env.loop.run_until(lambda: peer.remote.waiting == 1, TIMEOUT_S)
    runner.start(queued)
    runner.chain.close()
    assert (sent.error, queued.error, runner.late) == (errno.ESHUTDOWN, errno.ESHUTDOWN, 2)


def test_close_with_requests_under_way_and_while_it_dials(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open()
    runner.start(sent := write())
    script.request()
    script.hang_up()
    dialled = peer.pool.submit(script._listener.accept)
    peer.env.loop.run_until(dialled.done, TIMEOUT_S)
    runner.chain.close()
    assert sent.error == errno.ESHUTDOWN
    with dialled.result()[0] as client:
        assert client.recv(1) == b"", "the dial was not cancelled"


def test_back_off_and_one_line_in_the_log(env: Env, peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    script = peer.serve()
    peer.open()
    script.close()
    with pytest.raises(TimeoutError):
        env.loop.run_until(lambda: False, 1)
    records = [record for record in caplog.records if record.name == LOGGER]
    assert [record.levelname for record in records if record.levelno > logging.DEBUG] == ["WARNING"]
    assert len(records) == 4, "at 0.1, 0.3 and 0.7 s"


def test_a_server_that_does_not_read_does_not_stop_the_loop(peer: Peer) -> None:
    script = peer.serve()
    runner = peer.open()
    data = [bytes([number]) * (1 << 20) for number in range(32)]
    writes = [write(number << 20, piece) for number, piece in enumerate(data)]
    runner.start(*writes[:16])
    runner.start(*writes[16:])
    turned: list[int] = []
    peer.env.loop.call_soon(lambda: turned.append(1))
    peer.env.loop.run_until(lambda: bool(turned), 2)
    assert runner.late == 0

    def take_all() -> None:
        for _ in writes:
            one = script.request()
            assert script.payload == data[one["offset"] >> 20]
            script.answer(one)

    taken = peer.pool.submit(take_all)
    runner.wait()
    taken.result(TIMEOUT_S)
    assert {request.error for request in writes} == {0}


# Several connections


def test_one_connection_where_the_server_wants_one(peer: Peer) -> None:
    peer.serve()
    runner = peer.open("connections=4,")
    runner.start(write())
    peer.script.answer(peer.script.request())
    runner.wait()
    assert len(peer.remote._links) == 1


def test_several_connections_share_the_work_and_stand_in_for_each_other(peer: Peer) -> None:
    script = peer.serve(flags=FLAGS | wire.NBD_FLAG_CAN_MULTI_CONN)
    runner = peer.open("connections=2,")
    first = script.client
    peer.accept()
    second = script.client
    writes = [write(number << 12) for number in range(6)]
    runner.start(*writes)
    script.client = first
    here = [script.request() for _ in range(3)]
    script.client = second
    there = [script.request() for _ in range(3)]
    assert {one["offset"] >> 12 for one in here + there} == set(range(6))
    first.close()
    (_, kept) = peer.remote._links
    peer.env.loop.run_until(lambda: len(kept.decoder.pending) == 6, TIMEOUT_S)
    moved = [script.request() for _ in range(3)]
    assert {one["offset"] for one in moved} == {one["offset"] for one in here}
    for one in there + moved:
        script.answer(one)
    runner.wait()
    assert {request.error for request in writes} == {0}
    peer.accept()
    assert len(peer.remote._links) == 2
    second.close()
