"""Whatever bytes come, both sides of the handshake end cleanly and keep little of them."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tapcore.errors import ProtocolError
from tapcore.nbd import wire
from tapcore.nbd.client_codec import MAX_OPTION_REPLY_BYTES, ClientNegotiation, NbdError
from tapcore.nbd.negotiate import MAX_OPTION_BYTES, ExportInfo, ServerNegotiation
from tapcore.nbd.reply_decoder import MAX_STATUS_BYTES, ReplyDecoder

DISK = ExportInfo("disk", 1 << 20, wire.NBD_FLAG_HAS_FLAGS, contexts=("base:allocation", "qemu:dirty-bitmap:b"))


class OneDisk:
    def names(self) -> list[tuple[str, str]]:
        return [(DISK.name, "")]

    def find(self, name: str) -> ExportInfo | None:
        return DISK if name in ("", "disk") else None


def u32(value: int) -> bytes:
    return (value % 2**32).to_bytes(4, "big")


NUMBERS = st.one_of(st.integers(0, 12), st.sampled_from([4096, 65536, 2**32 - 1]))
KNOWN_STRINGS = st.sampled_from([b"", b"disk", b"base:", b"base:allocation", b"qemu:"])
STRINGS = st.one_of(KNOWN_STRINGS, st.binary(max_size=12))
PREFIXED = st.builds(lambda data, lie: u32(len(data) + lie) + data, STRINGS, st.sampled_from([0, 0, 0, 1, -1]))
"""Strings with their length before them, which is now and then wrong."""
COUNTS = st.sampled_from([u32(0), u32(1), u32(2), b"\0\0", b"\0\1\0\3"])
DATA = st.one_of(st.binary(max_size=40), PREFIXED,
                 st.lists(st.one_of(PREFIXED, COUNTS), max_size=5).map(b"".join))


def option(number: int, data: bytes, lie: int) -> bytes:
    return wire.OPTION.pack(magic=wire.IHAVEOPT, option=number, length=max(len(data) + lie, 0)) + data


OPTIONS = st.builds(option, NUMBERS, DATA, st.sampled_from([0, 0, 0, 0, 1, -1, 70_000, 1 << 21]))
CLIENT = st.builds(lambda flags, options, tail: flags + b"".join(options) + tail,
                   st.sampled_from([u32(0), u32(1), u32(3), u32(3), u32(4)]), st.lists(OPTIONS, max_size=12),
                   st.binary(max_size=30))
STREAMS = st.one_of(st.binary(max_size=400), CLIENT, CLIENT.map(lambda data: data + bytes(100_000)))
PIECES = st.sampled_from([1, 3, 16, 4096])


def told(server: ServerNegotiation) -> tuple[bool, str, bool]:
    return server.finished, server.error, server.result is not None


@settings(max_examples=300)
@given(STREAMS, PIECES)
@example(u32(3) + option(wire.NBD_OPT_GO, b"", 70_000) + bytes(100_000), 4096)
def test_server_never_raises_and_keeps_little(stream: bytes, piece_bytes: int) -> None:
    server = ServerNegotiation(OneDisk())
    replies = b""
    for start in range(0, len(stream), piece_bytes):
        server.feed(stream[start : start + piece_bytes])
        replies += server.output()
        if server.result is not None:
            break
        assert len(server._buffer) <= MAX_OPTION_BYTES
        if server.finished:
            assert server.leftover() == b""
    whole = ServerNegotiation(OneDisk())
    whole.feed(stream)
    assert told(server) == told(whole)
    assert replies == whole.output()


SERVER_PARTS = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda option, type, data, lie: wire.OPTION_REPLY.pack(
        magic=wire.NBD_REP_MAGIC, option=option, type=type, length=len(data) + lie) + data,
        st.sampled_from([8, 10, 7, 1]),
        st.sampled_from([1, 2, 3, 4, wire.NBD_REP_ERR_UNSUP, wire.NBD_REP_ERR_POLICY]),
        st.one_of(st.just(b""), st.just(bytes(12)), st.just(b"\0\3" + bytes(12)), st.binary(max_size=20)),
        st.sampled_from([0, 0, 0, 1, 100_000])))
SERVER = st.builds(lambda flags, parts: b"NBDMAGICIHAVEOPT" + flags + b"".join(parts),
                   st.sampled_from([b"\0\0", b"\0\1", b"\0\3"]), st.lists(SERVER_PARTS, max_size=10))


@given(st.one_of(st.binary(max_size=200), SERVER), PIECES)
def test_client_raises_only_what_it_promises(stream: bytes, piece_bytes: int) -> None:
    client = ClientNegotiation("disk", contexts=["base:allocation"])
    try:
        for start in range(0, len(stream), piece_bytes):
            client.feed(stream[start : start + piece_bytes])
            assert client.result is not None or len(client._buffer) <= MAX_OPTION_REPLY_BYTES
    except (NbdError, ProtocolError):
        assert client.result is None


CHUNKS = st.builds(
    lambda flags, type, cookie, payload, lie: wire.CHUNK.pack(
        magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=flags, type=type, cookie=cookie,
        length=(len(payload) + lie) % 2**32) + payload,
    st.integers(0, 1), st.sampled_from([0, 1, 2, 5, 3, 0x8001, 0x8002, 0x8003]), st.integers(1, 4),
    st.one_of(st.binary(max_size=20), st.builds(lambda offset, data: offset.to_bytes(8, "big") + data,
                                                st.integers(0, 16), st.binary(max_size=17))),
    st.sampled_from([0, 0, 0, 0, 1, -1, 2**31]))
REPLIES = st.one_of(CHUNKS, st.binary(max_size=30), st.builds(
    lambda error, cookie: wire.SIMPLE_REPLY.pack(magic=wire.NBD_SIMPLE_REPLY_MAGIC, error=error, cookie=cookie),
    st.integers(0, 5), st.integers(1, 4)))


@given(st.lists(REPLIES, max_size=12).map(b"".join), PIECES, st.booleans())
def test_replies_raise_only_what_they_promise(stream: bytes, piece_bytes: int, structured: bool) -> None:
    decoder = ReplyDecoder(structured)
    for cookie, command in enumerate((wire.NBD_CMD_READ, wire.NBD_CMD_WRITE, wire.NBD_CMD_BLOCK_STATUS), start=1):
        decoder.request(command, cookie, 0, 16)
    try:
        for start in range(0, len(stream), piece_bytes):
            decoder.feed(stream[start : start + piece_bytes])
            assert 0 < len(decoder.room()) <= MAX_STATUS_BYTES
    except ProtocolError:
        return
    assert len(decoder.pending) + len(decoder.finished) == 3
