"""The transmission phase without a socket: requests as bytes, replies as bytes, any completion order."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Manual

from tapcore.driver import Env
from tapcore.errors import ProtocolError
from tapcore.loop import Loop
from tapcore.nbd import session as session_module
from tapcore.nbd import wire
from tapcore.nbd.buffers import Buffer
from tapcore.nbd.session import Session
from tapcore.request import BACKGROUND, FUA, WRITE, ZEROES, Extent
from tapcore.vbd import Vbd
from tapcore.workers import Workers

SIZE = 4 << 20
Reply = tuple[int, int, bytes]
"""(cookie, error, data) of a reply."""


class Peer:
    """A session over a manual disk, fed and read as a client would."""

    def __init__(
        self, env: Env, *, structured: bool = True, read_only: bool = False, align_bytes: int = 1,
        size: int = SIZE, contexts: tuple[tuple[int, str], ...] = ((0, wire.BASE_ALLOCATION),),
    ) -> None:
        self.vbd = Vbd(env, "disk")
        self.vbd.open(f"manual:{size}")
        self.disk = Manual.opened[-1]
        self.disk.early = True
        self.structured = structured
        self.woken = 0
        self.session = Session(
            self.vbd, size_bytes=size, read_only=read_only, structured=structured, contexts=contexts,
            dirty_extents=self._dirty, align_bytes=align_bytes, wake=self._wake)
        self.sent = bytearray()

    def _wake(self) -> None:
        self.woken += 1

    def _dirty(self, name: str, offset: int, length: int) -> list[Extent]:
        assert name == "log"
        return [(length // 2, 1), (length - length // 2, 0)]

    def give(self, data: bytes, piece: int | None = None) -> None:
        """Feed `data`, at most `piece` bytes a receive, as the server's shell does."""
        left = memoryview(data)
        while left:
            view = self.session.recv_buffer()
            part = left[: min(len(view), piece or len(left))]
            view[: len(part)] = part
            self.session.received(len(part))
            left = left[len(part) :]
            while self.session.step():
                self.take()
            self.take()

    def take(self, most: int = 1 << 30) -> None:
        """Send: in pieces of at most `most` bytes."""
        replies = self.session.replies
        while replies.unsent_bytes:
            joined = b"".join(replies.output())[:most]
            self.sent += joined
            replies.sent(len(joined))

    def replies(self) -> list[Reply]:
        """Parse all that was sent."""
        self.take()
        return parse(bytes(self.sent))


def parse(data: bytes) -> list[Reply]:
    out: list[Reply] = []
    while data:
        if wire.SIMPLE_REPLY.unpack(data)["magic"] == wire.NBD_SIMPLE_REPLY_MAGIC:
            simple = wire.SIMPLE_REPLY.unpack(data)
            data = data[wire.SIMPLE_REPLY.size :]
            out.append((simple["cookie"], simple["error"], b""))
            continue
        chunk = wire.CHUNK.unpack(data)
        assert chunk["magic"] == wire.NBD_STRUCTURED_REPLY_MAGIC
        body = data[wire.CHUNK.size : wire.CHUNK.size + chunk["length"]]
        data = data[wire.CHUNK.size + chunk["length"] :]
        if chunk["type"] == wire.NBD_REPLY_TYPE_OFFSET_DATA:
            out.append((chunk["cookie"], 0, body[8:]))
        elif chunk["type"] == wire.NBD_REPLY_TYPE_OFFSET_HOLE:
            out.append((chunk["cookie"], 0, bytes(wire.OFFSET_HOLE.unpack(body)["length"])))
        elif chunk["type"] == wire.NBD_REPLY_TYPE_BLOCK_STATUS:
            out.append((chunk["cookie"], 0, body))
        else:
            assert chunk["type"] == wire.NBD_REPLY_TYPE_ERROR
            out.append((chunk["cookie"], wire.ERROR.unpack(body)["error"], b""))
    return out


def ask(kind: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
    return wire.REQUEST.pack(magic=wire.NBD_REQUEST_MAGIC, flags=flags, type=kind, cookie=cookie, offset=offset,
                             length=length) + payload


def write(cookie: int, offset: int, payload: bytes, flags: int = 0) -> bytes:
    return ask(wire.NBD_CMD_WRITE, cookie, offset, len(payload), flags, payload)


def read(cookie: int, offset: int, length: int) -> bytes:
    return ask(wire.NBD_CMD_READ, cookie, offset, length)


@pytest.fixture
def peer(env: Env) -> Iterator[Callable[..., Peer]]:
    yield lambda **options: Peer(env, **options)
    Manual.opened.clear()


def pattern(length: int, seed: int) -> bytes:
    return bytes((seed * 7 + i // 64) & 0xFF for i in range(length))


@pytest.mark.parametrize("piece", [1, 27, 28, 29, 4096, None])
def test_any_cut_of_the_stream_gives_the_same_replies(peer: Callable[..., Peer], piece: int | None) -> None:
    client = peer()
    data = pattern(5000, 1)
    client.give(write(1, 4096, data) + read(2, 4096, 5000) + ask(wire.NBD_CMD_FLUSH, 3)
                + ask(wire.NBD_CMD_TRIM, 4, 4096, 512) + read(5, 4096, 1024)
                + ask(wire.NBD_CMD_BLOCK_STATUS, 6, 0, 65536), piece)
    replies = sorted(client.replies())
    assert [(cookie, error) for cookie, error, _ in replies] == [(i, 0) for i in range(1, 7)]
    by_cookie = {cookie: body for cookie, _, body in replies}
    assert by_cookie[2] == data
    assert by_cookie[5] == bytes(512) + data[512:1024]
    assert by_cookie[6] == wire.STATUS_CONTEXT.pack(context_id=0) + wire.STATUS_EXTENT.pack(length=65536, flags=0)


def test_without_structured_replies_a_read_is_a_simple_reply(peer: Callable[..., Peer]) -> None:
    client = peer(structured=False)
    client.disk.data[:4] = b"abcd"
    client.give(read(9, 0, 4))
    client.take()
    header = wire.SIMPLE_REPLY.pack(magic=wire.NBD_SIMPLE_REPLY_MAGIC, error=0, cookie=9)
    assert bytes(client.sent) == header + b"abcd"


@pytest.mark.parametrize("piece", [1000, 65536, None])
def test_large_writes_are_received_in_pieces(peer: Callable[..., Peer], piece: int | None) -> None:
    client = peer()
    payloads = [pattern(size, size % 251) for size in (40_000, 300_000, 1 << 20, 33_000)]
    offset, stream, wanted = 0, b"", bytearray(SIZE)
    for number, payload in enumerate(payloads):
        stream += write(number, offset, payload)
        wanted[offset : offset + len(payload)] = payload
        offset += len(payload)
    client.give(stream + read(99, 0, 1 << 20), piece)
    replies = client.replies()
    assert [reply[0] for reply in replies] == [0, 1, 2, 3, 99]
    assert replies[-1][2] == bytes(wanted[: 1 << 20])
    assert client.disk.data == wanted


def test_small_requests_are_received_together_again_after_a_large_write(peer: Callable[..., Peer]) -> None:
    client = peer()
    client.give(write(1, 0, bytes(64 << 10)), 4096)
    assert len(client.session.recv_buffer()) == wire.REQUEST.size
    client.give(read(2, 0, 512))
    assert len(client.session.recv_buffer()) > wire.REQUEST.size
    client.give(write(3, 0, bytes(64 << 10)), 4096)
    assert len(client.session.recv_buffer()) == wire.REQUEST.size


@pytest.mark.parametrize("early", [True, False])
def test_a_large_buffer_is_given_back_when_its_request_has_ended(peer: Callable[..., Peer], early: bool) -> None:
    client = peer(size=8 << 20)
    client.disk.early = early
    client.give(write(1, 0, bytes(8 << 20)))
    client.give(read(2, 0, 8 << 20))
    client.disk.finish()
    assert len(client.replies()) == 2
    assert [b.size for b in gc.get_objects() if isinstance(b, Buffer) and b.size >= 8 << 20] == []


def test_late_requests_keep_their_memory_until_they_end(peer: Callable[..., Peer]) -> None:
    """Payloads must not be overwritten by what is received after them."""
    client = peer()
    client.disk.early = False
    payloads = {number: bytes([number + 1]) * 4096 for number in range(200)}
    for number, payload in payloads.items():
        client.give(write(number, number * 8192, payload))
    assert client.session.late == 200
    for count in (3, 150, 47):
        assert client.disk.finish(count) == count
    assert client.session.late == 0 and client.woken == 200
    assert sorted(client.replies()) == [(number, 0, b"") for number in payloads]
    for number, payload in payloads.items():
        assert client.disk.data[number * 8192 : number * 8192 + 4096] == payload


def test_late_reads_answer_in_any_order(peer: Callable[..., Peer]) -> None:
    client = peer()
    client.disk.data[:] = pattern(SIZE, 3)
    client.disk.early = False
    for number in range(50):
        client.give(read(number, number * 70_000 % (SIZE - 70_000), 60_000))
    pending = client.disk.pending
    pending.reverse()
    while client.disk.finish(7):
        client.take(10_000)
    for cookie, error, body in client.replies():
        offset = cookie * 70_000 % (SIZE - 70_000)
        assert error == 0 and body == bytes(client.disk.data[offset : offset + 60_000])
    assert len(client.replies()) == 50


def test_replies_wait_while_the_client_does_not_read(peer: Callable[..., Peer]) -> None:
    """Unsent replies stay intact while more requests come."""
    client = peer()
    client.disk.data[:] = pattern(SIZE, 5)
    for number in range(64):
        view = client.session.recv_buffer()
        data = read(number, number * 4096, 4096)
        view[: len(data)] = data
        client.session.received(len(data))
        while client.session.step():
            pass
    assert client.session.replies.unsent_bytes == 64 * (4096 + 28)
    client.take(777)
    assert [(c, d) for c, _, d in client.replies()] == [
        (number, bytes(client.disk.data[number * 4096 : number * 4096 + 4096])) for number in range(64)]


def test_reads_are_placed_as_the_disk_wants_them(env: Env, peer: Callable[..., Peer]) -> None:
    client = peer(align_bytes=4096)
    client.disk.data[:] = pattern(SIZE, 2)
    client.disk.early = False
    client.give(read(1, 0, 4096) + read(2, 512, 1000) + read(3, 0, 3 << 20))
    assert len(client.disk.pending) == 3
    client.disk.finish()
    bodies = {cookie: body for cookie, _, body in client.replies()}
    assert bodies == {1: bytes(client.disk.data[:4096]), 2: bytes(client.disk.data[512:1512]),
                      3: bytes(client.disk.data[: 3 << 20])}


REFUSED = [
    (read(1, SIZE, 1), errno.EINVAL),
    (read(1, SIZE - 1, 2), errno.EINVAL),
    (read(1, (1 << 64) - 1, 1), errno.EINVAL),
    (read(1, 0, 0), errno.EINVAL),
    (read(1, 0, (32 << 20) + 1), errno.EINVAL),
    (ask(wire.NBD_CMD_READ, 1, 0, 512, flags=1 << 9), errno.EINVAL),
    (write(1, SIZE - 512, bytes(1024)), errno.ENOSPC),
    (write(1, (1 << 64) - 512, bytes(1024)), errno.ENOSPC),
    (write(1, 0, b""), errno.EINVAL),
    (write(1, 0, bytes(100), flags=1 << 7), errno.EINVAL),
    (write(1, 0, bytes((32 << 20) + 512)), errno.ENOSPC),
    (ask(wire.NBD_CMD_TRIM, 1, SIZE, 512), errno.EINVAL),
    (ask(wire.NBD_CMD_TRIM, 1, 0, 512, flags=wire.NBD_CMD_FLAG_NO_HOLE), errno.EINVAL),
    (ask(wire.NBD_CMD_TRIM, 1, 0, 0), errno.EINVAL),
    (ask(wire.NBD_CMD_WRITE_ZEROES, 1, 512, SIZE), errno.ENOSPC),
    (ask(wire.NBD_CMD_BLOCK_STATUS, 1, SIZE - 1, 512), errno.EINVAL),
    (ask(wire.NBD_CMD_RESIZE, 1, 0, 512), errno.EINVAL),
    (ask(77, 1, 0, 512), errno.EINVAL),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
@pytest.mark.parametrize("piece", [4096, None])
def test_a_bad_request_gets_its_error_and_the_connection_lives(
    peer: Callable[..., Peer], number: int, piece: int | None
) -> None:
    data, code = REFUSED[number]
    client = peer()
    client.give(read(5, 0, 512) + data + read(6, 0, 512), piece)
    assert sorted((cookie, error) for cookie, error, _ in client.replies()) == [(1, code), (5, 0), (6, 0)]
    assert client.disk.data == bytes(SIZE)


def test_a_write_longer_than_the_limit_is_refused_even_on_a_larger_disk(peer: Callable[..., Peer]) -> None:
    client = peer(size=40 << 20)
    client.give(write(1, 0, bytes((32 << 20) + 1)) + read(2, 0, 512))
    assert [(cookie, error) for cookie, error, _ in client.replies()] == [(1, errno.EINVAL), (2, 0)]


@pytest.mark.parametrize("data", [
    write(1, 0, bytes(512)), ask(wire.NBD_CMD_TRIM, 1, 0, 512), ask(wire.NBD_CMD_WRITE_ZEROES, 1, 0, 512)])
def test_a_read_only_export_refuses_changes(peer: Callable[..., Peer], data: bytes) -> None:
    client = peer(read_only=True)
    client.give(data + read(2, 0, 512))
    assert [(cookie, error) for cookie, error, _ in client.replies()] == [(1, errno.EPERM), (2, 0)]
    assert all(op != WRITE for op, *_ in client.disk.log)


@pytest.mark.parametrize("structured", [True, False])
def test_failures_of_the_disk_reach_the_client(peer: Callable[..., Peer], structured: bool) -> None:
    client = peer(structured=structured)
    client.disk.errors = [errno.EBADMSG, errno.EROFS, errno.EOPNOTSUPP, errno.EOVERFLOW]
    client.give(read(1, 0, 512) + write(2, 0, bytes(512)) + ask(wire.NBD_CMD_FLUSH, 3)
                + ask(wire.NBD_CMD_BLOCK_STATUS, 4, 0, 512))
    assert sorted(client.replies()) == [
        (1, wire.NBD_EIO, b""), (2, wire.NBD_EPERM, b""), (3, wire.NBD_ENOTSUP, b""), (4, wire.NBD_EOVERFLOW, b"")]
    client.give(write(5, 0, bytes(512)))
    assert client.replies()[-1] == (5, 0, b"")


def test_flags_reach_the_disk_and_do_not_stick(peer: Callable[..., Peer]) -> None:
    client = peer()
    client.give(write(1, 0, bytes(512), flags=wire.NBD_CMD_FLAG_FUA))
    client.give(ask(wire.NBD_CMD_WRITE_ZEROES, 2, 0, 512,
                    flags=wire.NBD_CMD_FLAG_NO_HOLE | wire.NBD_CMD_FLAG_FAST_ZERO))
    client.give(write(3, 0, bytes(512)) + write(4, 1024, bytes(512)))
    assert [(op, flags) for op, _, _, flags in client.disk.log] == [
        (WRITE, FUA), (ZEROES, 2 | 4), (WRITE, 0), (WRITE, 0)]


def test_fua_goes_with_every_command(peer: Callable[..., Peer]) -> None:
    """The protocol: the server must accept it, even if it has no meaning there."""
    client = peer()
    kinds = [wire.NBD_CMD_READ, wire.NBD_CMD_TRIM, wire.NBD_CMD_CACHE, wire.NBD_CMD_WRITE_ZEROES,
             wire.NBD_CMD_BLOCK_STATUS]
    for cookie, kind in enumerate(kinds):
        client.give(ask(kind, cookie, 0, 512, flags=wire.NBD_CMD_FLAG_FUA))
    client.give(ask(wire.NBD_CMD_FLUSH, 9, flags=wire.NBD_CMD_FLAG_FUA))
    assert [error for _, error, _ in client.replies()] == [0] * 6
    assert [flags for op, _, _, flags in client.disk.log] == [0, FUA, BACKGROUND, FUA, 0, 0]


def test_cache_reads_and_says_so_without_data(peer: Callable[..., Peer]) -> None:
    client = peer()
    client.give(ask(wire.NBD_CMD_CACHE, 1, 0, SIZE) + read(2, 0, 4))
    assert client.replies() == [(1, 0, b""), (2, 0, bytes(4))]
    assert client.disk.log[0][2] == SIZE


def test_block_status_answers_for_each_context(peer: Callable[..., Peer]) -> None:
    client = peer(contexts=((7, wire.BASE_ALLOCATION), (9, wire.QEMU_DIRTY_BITMAP + "log")))
    client.give(ask(wire.NBD_CMD_BLOCK_STATUS, 1, 0, 8192))
    first, second = (body for _, _, body in client.replies())
    extent = wire.STATUS_EXTENT.pack
    assert first == wire.STATUS_CONTEXT.pack(context_id=7) + extent(length=8192, flags=0)
    assert second == wire.STATUS_CONTEXT.pack(context_id=9) + extent(length=4096, flags=1) + extent(
        length=4096, flags=0)


def test_block_status_without_a_context_is_refused(peer: Callable[..., Peer]) -> None:
    client = peer(contexts=())
    client.give(ask(wire.NBD_CMD_BLOCK_STATUS, 1, 0, 8192))
    assert client.replies() == [(1, wire.NBD_EINVAL, b"")]


def test_garbage_ends_the_session(peer: Callable[..., Peer]) -> None:
    client = peer()
    with pytest.raises(ProtocolError, match="magic"):
        client.give(b"\0" * 28)


def test_goodbye_stops_the_session(peer: Callable[..., Peer]) -> None:
    client = peer()
    client.give(write(1, 0, b"x" * 512) + ask(wire.NBD_CMD_DISC, 2))
    assert client.session.closing and client.replies() == [(1, 0, b"")]
    assert not client.session.step()


def test_too_much_in_flight_blocks_until_some_is_done(
    peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_LATE_BYTES", 100_000)
    client = peer()
    client.disk.early = False
    client.give(write(1, 0, bytes(60_000)))
    client.give(write(2, 0, bytes(60_000)))
    assert client.session.blocked
    client.disk.finish(1)
    assert not client.session.blocked
    client.disk.finish()
    assert len(client.replies()) == 2


COMMANDS = st.lists(
    st.tuples(st.sampled_from(["read", "write", "fua", "zeroes", "trim", "flush", "status"]),
              st.integers(0, 255), st.integers(1, 40), st.integers(0, 255)),
    min_size=1, max_size=30)


@settings(max_examples=120, deadline=None)
@given(COMMANDS, st.integers(1, 70_000), st.data())
def test_a_session_equals_a_plain_array(
    commands: list[tuple[str, int, int, int]], piece: int, data: st.DataObject
) -> None:
    """Each command waits for the ones before it, which end early or late; replies equal a bytearray's."""
    loop = Loop()
    env = Env(loop, Workers(loop, 1))
    client = Peer(env, size=1 << 18)
    oracle = bytearray(1 << 18)
    for cookie, (what, block, count, letter) in enumerate(commands):
        offset = block * 1024
        length = min(count * 1000, len(oracle) - offset)
        client.disk.early = data.draw(st.booleans())
        wanted = b""
        if what == "read":
            client.give(read(cookie, offset, length), piece)
            wanted = bytes(oracle[offset : offset + length])
        elif what in ("write", "fua"):
            client.give(write(cookie, offset, bytes([letter]) * length, int(what == "fua")), piece)
            oracle[offset : offset + length] = bytes([letter]) * length
        elif what == "flush":
            client.give(ask(wire.NBD_CMD_FLUSH, cookie), piece)
        elif what == "status":
            client.give(ask(wire.NBD_CMD_BLOCK_STATUS, cookie, offset, length), piece)
            wanted = wire.STATUS_CONTEXT.pack(context_id=0) + wire.STATUS_EXTENT.pack(length=length, flags=0)
        else:
            kind = wire.NBD_CMD_TRIM if what == "trim" else wire.NBD_CMD_WRITE_ZEROES
            client.give(ask(kind, cookie, offset, length), piece)
            oracle[offset : offset + length] = bytes(length)
        client.disk.finish()
        assert client.replies()[-1] == (cookie, 0, wanted)
    assert client.disk.data == oracle and client.session.late == 0
    Manual.opened.clear()
    loop.close()


def test_what_is_all_zeroes_is_sent_as_a_hole(peer: Callable[..., Peer]) -> None:
    client = peer()
    client.give(read(1, 0, 4096) + read(2, 8192, 1 << 20) + write(3, 0, b"x") + read(4, 0, 2))
    assert client.replies() == [(1, 0, bytes(4096)), (2, 0, bytes(1 << 20)), (3, 0, b""), (4, 0, b"x\0")]
    assert len(client.sent) < 4096


def test_who_does_not_understand_holes_gets_the_zeroes(peer: Callable[..., Peer]) -> None:
    client = peer(structured=False)
    client.give(read(1, 0, 4096))
    client.take()
    assert client.sent[wire.SIMPLE_REPLY.size :] == bytes(4096)
