"""The replica, driven over a real zmq socket: what it applies, what it refuses, what it survives."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replica_bench import SIZE_BYTES, UNTOUCHED, WAIT_S, Bench, Peer

from tapcore.driver import Env, OpenFlag
from tapcore.request import FLUSH, WRITE, ZEROES
from writelog import replica, wire
from writelog.hashtree import LEAF_BYTES, piece_digests
from writelog.wire import (
    Ack,
    Barrier,
    Base,
    Content,
    Data,
    Failure,
    Hello,
    Kind,
    Probe,
    Probed,
    Promote,
    Promoted,
    Refusal,
    Refused,
    Release,
    Released,
    Verify,
    Welcome,
    Zero,
)


@pytest.fixture
def bench(env: Env) -> Iterator[Bench]:
    bench = Bench(env)
    yield bench
    bench.close()


def test_applies_acknowledges_and_confirms(bench: Bench) -> None:
    peer = bench.peer()
    welcome = peer.begin()
    assert not welcome.base
    peer.data(4096, b"a" * 8192)
    peer.zero(8192, 4096)
    peer.data(SIZE_BYTES - 512, b"z" * 512)
    ack = peer.expect(Ack, lambda ack: ack.durable == 3)
    assert ack.applied == 3
    peer.barrier()
    expected = bytearray(UNTOUCHED)
    expected[4096:8192] = b"a" * 4096
    expected[8192:12288] = bytes(4096)
    expected[-512:] = b"z" * 512
    assert bench.driver.data == expected
    peer.send(Release())
    peer.expect(Released)
    assert bench.ends == [True]
    assert bench.vbd.state == "paused"


def test_promotes_what_it_confirmed_and_only_that(bench: Bench) -> None:
    peer = bench.peer()
    peer.begin()
    peer.data(0, b"new!")
    digest = peer.barrier()
    peer.send(Promote(digest))
    assert peer.expect(Promoted).export == "unix:/x"
    assert bench.vbd.state == "running"
    peer.send(Promote(digest))
    peer.expect(Promoted)
    assert bench.ends == [True]
    peer.data(0, b"late")
    assert "promoted" in peer.expect(Failure).message
    assert bench.driver.data[:4] == b"new!"
    other = bench.peer(b"2" * 16)
    other.hello()
    assert other.expect(Refused).reason == Refusal.PROMOTED


@pytest.mark.parametrize("spoil", ["nothing confirmed", "more came", "wrong digest"])
def test_does_not_promote_otherwise(bench: Bench, spoil: str) -> None:
    peer = bench.peer()
    peer.begin()
    peer.data(0, b"new!")
    digest = peer.digest.digest()
    if spoil != "nothing confirmed":
        peer.barrier()
    if spoil == "more came":
        peer.data(4096, b"more")
    peer.send(Promote(b"?" * 16 if spoil == "wrong digest" else digest))
    peer.expect(Failure)
    assert bench.vbd.state == "paused"
    assert bench.ends == [False]


def test_promotion_can_be_repeated_on_a_new_connection(bench: Bench) -> None:
    first = bench.peer()
    first.begin()
    first.data(0, b"new!")
    digest = first.barrier()
    first.close()
    second = bench.peer()
    assert second.begin().base
    second.send(Promote(digest))
    second.expect(Promoted)
    third = bench.peer()
    assert third.begin().base
    third.send(Promote(digest))
    third.expect(Promoted)


def test_verify_reads_the_whole_disk(bench: Bench) -> None:
    peer = bench.peer()
    peer.begin()
    peer.data(300_000, b"v" * 100_000)
    peer.barrier()
    peer.send(Verify())
    content = wire.ContentDigest(SIZE_BYTES)
    for chunk in range(content.chunks):
        offset, length = content.range_of(chunk)
        content.set(chunk, bench.driver.data[offset : offset + length])
    assert peer.expect(Content).digest == content.digest()


def probe(peer: Peer, offset: int, content: bytes) -> None:
    """Ask whether the replica holds `content`."""
    peer.seq += 1
    message = Probe(peer.seq, offset, len(content), LEAF_BYTES, piece_digests(content, LEAF_BYTES))
    peer.digest.add(message)
    peer.send(message)


def test_compares_what_is_there_in_order_with_what_comes(bench: Bench) -> None:
    """The write is on its way to the disk when the first PROBE comes, and the second one comes before the next."""
    peer = bench.peer()
    peer.begin()
    bench.driver.early = False
    peer.data(4096, b"a" * 4096)
    probe(peer, 0, bytes(UNTOUCHED[:4096]) + b"a" * 4096 + b"?" * 4096)
    peer.data(4096, b"b" * 4096)
    probe(peer, 4096, b"a" * 4096)
    bench.env.loop.run_until(lambda: bool(bench.driver.pending), WAIT_S)
    bench.go_on()
    answers = [peer.expect(Probed), peer.expect(Probed)]
    assert answers == [Probed(2, b"\4"), Probed(4, b"\1")]
    for answer in answers:
        peer.digest.settle(answer)
    peer.expect(Ack, lambda ack: ack.durable == 4)
    peer.barrier()


def test_a_barrier_before_the_answer_is_refused(bench: Bench) -> None:
    peer = bench.peer()
    peer.begin()
    bench.driver.early = False
    probe(peer, 0, bytes(4096))
    peer.send(Barrier(2))
    assert "1 PROBEs still to be answered" in peer.expect(Failure).message


def test_what_cannot_be_read_cannot_be_compared(bench: Bench) -> None:
    peer = bench.peer()
    peer.begin()
    bench.driver.errors = [errno.EIO]
    probe(peer, 8192, bytes(4096))
    assert "cannot read 4096 bytes" in peer.expect(Failure).message


@pytest.mark.parametrize(("frames", "text"), [
    ([b"garbage"], "checksum"),
    ([wire.seal(b"garbage")], "msgpack"),
    ([wire.encode(Zero(2, 0, 512))], "seq 2 came after 0"),
    ([wire.encode(Barrier(0))], "seq 0 came after 0"),
    ([wire.encode(Zero(1, SIZE_BYTES - 512, 1024))], f"{SIZE_BYTES} (at byte {SIZE_BYTES - 512})"),
    ([wire.encode(Zero(1, wire.MAX_INT, 512))], "beyond the disk"),
    ([wire.encode(Data(1, 4096, 4, wire.checksum(b"good"))), b"evil"], "checksum is wrong (at byte 4096)"),
    ([wire.encode(Data(1, 0, 4, wire.checksum(b"good"))), b"good!"], "payload frames"),
    ([wire.seal(msgpack.packb([Kind.DATA, 1, 0, wire.MAX_DATA_BYTES + 1, bytes(16)])), b"x"], "are allowed"),
    ([wire.encode(Verify())], "without a confirmed barrier"),
    ([wire.encode(Welcome(7, 5, False, 0))], "does not send Welcome"),
    ([wire.encode(Hello(wire.VERSION, bytes(16), SIZE_BYTES, "x", 0, 0, False, False))], "does not send Hello"),
])
def test_a_faulty_message_ends_the_session_and_nothing_is_applied(
    bench: Bench, frames: list[bytes], text: str
) -> None:
    peer = bench.peer()
    peer.begin()
    peer.send_frames(frames)
    assert text in peer.expect(Failure).message
    peer.data(0, b"after")
    other = bench.peer(b"2" * 16)
    other.begin()
    other.barrier()
    assert bench.driver.data == UNTOUCHED
    assert bench.ends == [False]


def test_a_repeated_seq_is_not_applied(bench: Bench) -> None:
    peer = bench.peer()
    peer.begin()
    peer.data(0, b"first")
    peer.expect(Ack, lambda ack: ack.applied == 1)
    peer.seq = 0
    peer.data(0, b"again")
    assert "seq 1 came after 1" in peer.expect(Failure).message
    assert bench.driver.data[:5] == b"first"


@pytest.mark.parametrize("spared", [0, 1, 2])
def test_a_failed_write_flush_or_zero_is_told_with_its_errno(bench: Bench, spared: int) -> None:
    bench.driver.errors = [0] * spared + [errno.ENOSPC]
    peer = bench.peer()
    peer.begin()
    peer.data(8192, b"x" * 512)
    if spared == 2:
        peer.expect(Ack, lambda ack: ack.durable == 1)
    peer.zero(16384, 512)
    failure = peer.expect(Failure)
    assert [op for op, *_ in bench.driver.log][spared] == (WRITE, FLUSH, ZEROES)[spared]
    assert failure.errno == errno.ENOSPC
    assert os.strerror(errno.ENOSPC) in failure.message
    assert bench.ends == [False]


@pytest.mark.parametrize(("size_bytes", "version", "reason", "text"), [
    (SIZE_BYTES + 512, wire.VERSION, Refusal.SIZE, f"has {SIZE_BYTES + 512} bytes, the replica {SIZE_BYTES}"),
    (SIZE_BYTES - 512, wire.VERSION, Refusal.SIZE, f"has {SIZE_BYTES - 512} bytes"),
    (SIZE_BYTES, 7, Refusal.VERSION, "the sync version 7"),
])
def test_refuses_what_does_not_fit(
    bench: Bench, size_bytes: int, version: int, reason: Refusal, text: str
) -> None:
    peer = bench.peer()
    peer.hello(size_bytes, version)
    refused = peer.expect(Refused)
    assert refused.reason == reason
    assert text in refused.message
    assert refused.hint
    assert not bench.peer(b"2" * 16).begin().base


def test_refuses_when_read_only(env: Env) -> None:
    bench = Bench(env, OpenFlag.RDONLY)
    peer = bench.peer()
    peer.hello()
    assert peer.expect(Refused).reason == Refusal.READ_ONLY
    bench.close()


def test_a_second_sync_is_refused_until_the_first_is_gone(bench: Bench) -> None:
    first = bench.peer()
    first.begin()
    second = bench.peer(b"2" * 16)
    second.base = 8
    second.hello()
    assert second.expect(Refused).reason == Refusal.BUSY
    first.data(0, b"goes on")
    first.barrier()
    first.close()
    second.base = 7
    bench.env.loop.run_until(second.is_welcome, WAIT_S)
    assert bench.driver.data[:7] == b"goes on"


def test_a_sync_that_was_started_again_takes_over_at_once(bench: Bench) -> None:
    first = bench.peer()
    first.begin()
    first.data(0, b"one")
    first.expect(Ack, lambda ack: ack.durable == 1)
    second = bench.peer(b"2" * 16)
    assert second.begin().base
    first.data(0, b"two")
    second.data(3, b"two")
    second.barrier()
    assert bench.driver.data[:6] == b"onetwo"


def test_a_stranger_is_refused_unless_it_may_overwrite(bench: Bench) -> None:
    first = bench.peer()
    first.begin()
    first.send(Release())
    first.expect(Released)
    for base in (0, 8):
        stranger = bench.peer(b"2" * 16)
        stranger.base = base
        stranger.hello()
        refused = stranger.expect(Refused)
        assert refused.reason == Refusal.STRANGER
        assert "a copy of disk 'vm1'" in refused.message
        assert "--overwrite" in refused.hint
    stranger.send(Hello(wire.VERSION, stranger.id, SIZE_BYTES, "vm2", 8, 0, True, True))
    assert not stranger.expect(Welcome).base
    assert bench.server._copy.state.base == 7
    stranger.send(Base(9))
    stranger.data(0, b"x")
    stranger.barrier()
    state = bench.server._copy.state
    assert (state.base, state.disk, state.is_consistent) == (9, "vm2", False)


def test_a_copy_goes_by_its_newest_name(bench: Bench) -> None:
    first = bench.peer()
    first.begin()
    first.send(Base(8))
    first.send(Release())
    first.expect(Released)
    older = bench.peer(b"2" * 16)
    older.hello()
    assert "is older than the copy here" in older.expect(Refused).message
    later = bench.peer(b"3" * 16)
    later.send(Hello(wire.VERSION, later.id, SIZE_BYTES, "vm1", 9, 8, False, False))
    assert later.expect(Welcome).base == 8
    later.send(Base(9))
    later.barrier()
    state = bench.server._copy.state
    assert (state.base, state.disk, state.history) == (9, "vm1", (8, 7))
    later.send(Base(8))
    assert "doubled on the way" in later.expect(Failure).message


def test_nothing_is_applied_before_its_base_is_known(bench: Bench) -> None:
    peer = bench.peer()
    peer.hello()
    assert not peer.expect(Welcome).base
    peer.data(0, b"early")
    assert "BASE did not come first" in peer.expect(Failure).message
    assert bench.driver.data == UNTOUCHED
    assert bench.server._copy.state.base == 0


def test_a_base_that_cannot_be_recorded_is_none(bench: Bench, tmp_path: Path) -> None:
    bench.server._copy._store.path = tmp_path / "missing" / "state"
    peer = bench.peer()
    peer.begin()
    peer.data(0, b"early")
    assert "cannot record" in peer.expect(Failure).message
    assert bench.driver.data == UNTOUCHED
    assert bench.server._copy.state.base == 0


def test_a_session_goes_on_after_its_connection_dropped(bench: Bench) -> None:
    first = bench.peer()
    first.begin()
    first.data(0, b"one")
    first.expect(Ack, lambda ack: ack.durable == 1)
    first.close()
    second = bench.peer()
    assert second.begin().base
    second.data(3, b"two")
    second.barrier()
    assert bench.driver.data[:6] == b"onetwo"
    assert bench.ends == []


def test_a_taken_over_connection_is_ignored(bench: Bench) -> None:
    first = bench.peer()
    first.begin()
    second = bench.peer()
    assert second.begin().base
    first.data(0, b"stale")
    first.send_frames([b"garbage"])
    first.expect(Failure)
    second.data(512, b"fresh")
    second.barrier()
    assert bench.driver.data[:5] == UNTOUCHED[:5]


def test_overlapping_extents_are_applied_in_order(bench: Bench) -> None:
    driver, run_until = bench.driver, bench.env.loop.run_until
    peer = bench.peer()
    peer.begin()
    driver.early = False
    peer.data(0, b"1" * 1024)
    peer.data(512, b"2" * 1024)
    peer.data(8192, b"3" * 512)
    run_until(lambda: bench.server._applier.queued_bytes == 2560, WAIT_S)
    assert [(request.offset, request.length) for request in driver.pending] == [(0, 1024)]
    driver.finish()
    run_until(lambda: len(driver.pending) == 3, WAIT_S)
    assert sorted(request.op for request in driver.pending) == [WRITE, WRITE, FLUSH]
    bench.go_on()
    peer.barrier()
    assert driver.data[:1536] == b"1" * 512 + b"2" * 1024
    assert driver.data[8192:8704] == b"3" * 512


def test_a_new_connection_waits_for_what_is_in_flight(bench: Bench) -> None:
    first = bench.peer()
    first.begin()
    bench.driver.early = False
    first.data(0, b"old")
    bench.env.loop.run_until(lambda: len(bench.driver.pending) == 1, WAIT_S)
    first.close()
    second = bench.peer(b"2" * 16)
    bench.env.loop.run_until(lambda: bench.server._session is None, WAIT_S)
    second.hello()
    bench.env.loop.run_until(lambda: bench.server._session is not None, WAIT_S)
    assert isinstance(second.expect_any(Ack, Welcome), Ack), "it shows that it is there, and does not begin"
    bench.go_on()
    second.expect(Welcome)
    second.send(Base(8))
    second.data(0, b"new")
    second.barrier()
    assert bench.driver.data[:3] == b"new"


def test_durable_is_only_what_a_flush_covered(bench: Bench) -> None:
    driver, run_until = bench.driver, bench.env.loop.run_until
    peer = bench.peer()
    peer.begin()
    peer.data(0, b"a")
    peer.expect(Ack, lambda ack: ack.durable == 1)
    driver.early = False
    peer.data(512, b"b")
    run_until(lambda: [request.op for request in driver.pending] == [WRITE], WAIT_S)
    driver.finish()
    run_until(lambda: [request.op for request in driver.pending] == [FLUSH], WAIT_S)
    assert peer.expect(Ack, lambda ack: ack.applied == 2).durable == 1
    driver.finish()
    peer.expect(Ack, lambda ack: ack.durable == 2)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.binary(max_size=40) | st.binary(max_size=40).map(wire.seal), min_size=1, max_size=3),
                min_size=1, max_size=8), st.booleans())
def test_garbage_neither_kills_nor_changes_anything(
    bench: Bench, messages: list[list[bytes]], greeted: bool
) -> None:
    peer = bench.peer(os.urandom(16))
    if greeted:
        peer.begin()
    for frames in messages:
        peer.send_frames(frames)
    peer.close()
    bench.peers.remove(peer)
    other = bench.peer(os.urandom(16))
    bench.env.loop.run_until(other.is_welcome, WAIT_S)
    other.send(Base(other.base))
    other.barrier()
    other.send(Release())
    other.expect(Released)
    other.close()
    bench.peers.remove(other)
    assert bench.driver.data == UNTOUCHED


def test_the_socket_is_left_alone_while_too_much_is_queued(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("writelog.replica_apply.MAX_QUEUED_BYTES", 64 << 10)
    peer = bench.peer()
    peer.begin()
    bench.driver.early = False
    for _ in range(64):
        peer.data(0, b"f" * (16 << 10))
    applier = bench.server._applier
    bench.env.loop.run_until(lambda: applier.queued_bytes > 64 << 10, WAIT_S)
    assert applier.queued_bytes <= (64 << 10) + (16 << 10)
    bench.go_on()
    peer.barrier()


def test_a_taken_address_is_an_error(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert replica.main(["--insecure-loopback-only", "--listen", bench.endpoint, "manual:4096"]) == 2
    assert "in use" in capsys.readouterr().err
