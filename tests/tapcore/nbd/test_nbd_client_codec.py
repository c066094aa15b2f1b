"""Replies as a client decodes them: in pieces, out of order, and wrong; and handshakes that are wrong.

Handshakes that go well are in test_negotiate.py, where both sides talk to each other."""

from __future__ import annotations

import errno

import pytest

from tapcore.errors import ProtocolError
from tapcore.nbd import wire
from tapcore.nbd.client_codec import ClientNegotiation
from tapcore.nbd.reply_decoder import SCRATCH_BYTES, ReplyDecoder, Transaction
from tapcore.nbd.status import status_chunk


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return wire.SIMPLE_REPLY.pack(magic=wire.NBD_SIMPLE_REPLY_MAGIC, error=error, cookie=cookie) + data


def chunk(cookie: int, type: int, payload: bytes = b"", *, done: bool = True) -> bytes:
    return wire.CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=int(done), type=type, cookie=cookie,
                           length=len(payload)) + payload


def data(cookie: int, offset: int, content: bytes, *, done: bool = True) -> bytes:
    return chunk(cookie, wire.NBD_REPLY_TYPE_OFFSET_DATA, wire.OFFSET_DATA.pack(offset=offset) + content,
                 done=done)


def hole(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    return chunk(cookie, wire.NBD_REPLY_TYPE_OFFSET_HOLE, wire.OFFSET_HOLE.pack(offset=offset, length=length),
                 done=done)


def error(cookie: int, code: int, text: bytes = b"", *, done: bool = True, tail: bytes = b"") -> bytes:
    type = wire.NBD_REPLY_TYPE_ERROR_OFFSET if tail else wire.NBD_REPLY_TYPE_ERROR
    return chunk(cookie, type, wire.ERROR.pack(error=code, message_length=len(text)) + text + tail, done=done)


def none(cookie: int) -> bytes:
    return chunk(cookie, wire.NBD_REPLY_TYPE_NONE)


@pytest.fixture(params=[1, 7, SCRATCH_BYTES], ids=["byte-wise", "by seven", "whole"])
def piece_bytes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def decode(decoder: ReplyDecoder, stream: bytes, piece_bytes: int) -> dict[int, Transaction]:
    for start in range(0, len(stream), piece_bytes):
        decoder.feed(stream[start : start + piece_bytes])
    return {transaction.cookie: transaction for transaction in decoder.finished}


def test_simple_replies_out_of_order(piece_bytes: int) -> None:
    decoder = ReplyDecoder(structured_replies=False)
    decoder.request(wire.NBD_CMD_READ, 1, 512, 5)
    decoder.request(wire.NBD_CMD_WRITE, 2, 512, 9)
    decoder.request(wire.NBD_CMD_READ, 3, 512, 4)
    stream = simple(3, wire.NBD_EIO) + simple(2) + simple(1, 0, b"hello")
    ended = decode(decoder, stream, piece_bytes)
    assert [(cookie, one.error, bytes(one.data)) for cookie, one in ended.items()] == [
        (3, errno.EIO, bytes(4)), (2, 0, b""), (1, 0, b"hello")]
    assert decoder.pending == {}


def test_chunks_of_several_reads_mixed(piece_bytes: int) -> None:
    decoder = ReplyDecoder(structured_replies=True)
    decoder.request(wire.NBD_CMD_READ, 1, 100, 10)
    decoder.request(wire.NBD_CMD_READ, 2, 0, 6)
    stream = (data(1, 107, b"xyz", done=False) + hole(2, 3, 3, done=False) + data(1, 100, b"abc", done=False)
              + data(2, 0, b"123") + hole(1, 103, 4, done=False) + none(1))
    ended = decode(decoder, stream, piece_bytes)
    assert ended[1].data == b"abc\0\0\0\0xyz"
    assert ended[2].data == b"123\0\0\0"


def test_an_error_with_its_text_and_offset(piece_bytes: int) -> None:
    decoder = ReplyDecoder(structured_replies=True)
    decoder.request(wire.NBD_CMD_READ, 1, 0, 8)
    decoder.request(wire.NBD_CMD_WRITE, 2, 0, 8)
    stream = (data(1, 0, b"1234", done=False) + error(1, wire.NBD_EIO, b"bad disk", done=False, tail=bytes(8))
              + error(1, wire.NBD_ENOMEM, b"later")
              + chunk(2, 0x8765, wire.ERROR.pack(error=wire.NBD_EINVAL, message_length=0)))
    ended = decode(decoder, stream, piece_bytes)
    assert (ended[1].error, ended[1].message) == (errno.EIO, "bad disk")
    assert str(ended[1].failed()) == "NBD_CMD_READ of 8 bytes at byte 0 failed: EIO (Input/output error): bad disk"
    assert ended[2].error == errno.EINVAL


def test_block_status_of_two_contexts(piece_bytes: int) -> None:
    decoder = ReplyDecoder(structured_replies=True)
    decoder.request(wire.NBD_CMD_BLOCK_STATUS, 1, 0, 4096)
    decoder.request(wire.NBD_CMD_BLOCK_STATUS, 2, 0, 4096)
    stream = (status_chunk(1, 5, [(512, 0), (512, 3)], 4096, one=False, done=False) + simple(2, wire.NBD_EINVAL)
              + status_chunk(1, 6, [(4096, 1)], 4096, one=False, done=True))
    ended = decode(decoder, stream, piece_bytes)
    assert ended[1].extents == {5: [(512, 0), (512, 3)], 6: [(4096, 1)]}
    assert (ended[2].error, ended[2].extents) == (errno.EINVAL, {})


def test_a_payload_larger_than_the_scratch_goes_past_it() -> None:
    decoder = ReplyDecoder(structured_replies=True)
    content = bytes(range(256)) * 4096
    decoder.request(wire.NBD_CMD_READ, 1, 0, len(content))
    decoder.feed(data(1, 0, content)[:1000])
    assert len(decoder.room()) == len(content) - 1000 + wire.DATA_CHUNK.size
    decoder.feed(data(1, 0, content)[1000:])
    assert decoder.finished[0].data == content
    assert len(decoder.room()) == wire.DATA_CHUNK.size, "the next payload was not received straight either"
    assert len(decoder.room()) == SCRATCH_BYTES


READ = 1
WRITE = 2
STATUS = 3


@pytest.mark.parametrize("structured", [True, False])
def test_what_no_server_says_in_either_form(structured: bool) -> None:
    for stream in (b"x" * 16, simple(99), b"\0" * 16):
        decoder = ReplyDecoder(structured)
        with pytest.raises(ProtocolError):
            decoder.feed(stream)


@pytest.mark.parametrize(("stream", "wrong"), [
    (simple(READ, 0, bytes(512)), "asks for a structured one"),
    (simple(READ, wire.NBD_EIO), "asks for a structured one"),
    (simple(STATUS), "asks for a structured one"),
    (none(99), "cookie 99"),
    (none(READ), "512 bytes missing"),
    (data(READ, 4096, bytes(511)), "1 bytes missing"),
    (data(READ, 4095, b"x"), "no answer"),
    (data(READ, 4096 + 511, b"xx"), "no answer"),
    (data(READ, 4096, b""), "no answer"),
    (chunk(READ, wire.NBD_REPLY_TYPE_OFFSET_DATA, b"1234567") + bytes(8), "no answer"),
    (data(WRITE, 0, b"x"), "no answer"),
    (data(READ, 4096, bytes(512), done=False) + data(READ, 4096, bytes(512)), "missing"),
    (hole(READ, 4096, 0), "no answer"),
    (hole(READ, 4096, 513), "no answer"),
    (chunk(READ, wire.NBD_REPLY_TYPE_OFFSET_HOLE, bytes(11)), "type 2 with 11 bytes"),
    (chunk(READ, wire.NBD_REPLY_TYPE_NONE, b"x"), "type 0 with 1 bytes"),
    (chunk(READ, wire.NBD_REPLY_TYPE_NONE, done=False), "no flag NBD_REPLY_FLAG_DONE"),
    (chunk(READ, 99), "unknown type 99"),
    (chunk(READ, wire.NBD_REPLY_TYPE_ERROR, bytes(5)), "type 32769 with 5 bytes"),
    (error(READ, 0), "error 0"),
    (chunk(READ, wire.NBD_REPLY_TYPE_ERROR, wire.ERROR.pack(error=5, message_length=3) + b"ab"),
     "message of 3 bytes"),
    (wire.CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=1, type=wire.NBD_REPLY_TYPE_ERROR, cookie=READ,
                     length=1 << 31), "with 2147483648 bytes"),
    (wire.CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=1, type=wire.NBD_REPLY_TYPE_BLOCK_STATUS,
                     cookie=STATUS, length=(1 << 31) + 4), "with 2147483652 bytes"),
    (chunk(STATUS, wire.NBD_REPLY_TYPE_BLOCK_STATUS, bytes(4)), "type 5 with 4 bytes"),
    (chunk(STATUS, wire.NBD_REPLY_TYPE_BLOCK_STATUS, bytes(13)), "type 5 with 13 bytes"),
    (chunk(READ, wire.NBD_REPLY_TYPE_BLOCK_STATUS, bytes(12)), "block status chunk in reply to NBD_CMD_READ"),
])
def test_what_no_server_says(stream: bytes, wrong: str) -> None:
    decoder = ReplyDecoder(structured_replies=True)
    decoder.request(wire.NBD_CMD_READ, READ, 4096, 512)
    decoder.request(wire.NBD_CMD_WRITE, WRITE, 4096, 512)
    decoder.request(wire.NBD_CMD_BLOCK_STATUS, STATUS, 4096, 512)
    with pytest.raises(ProtocolError, match=wrong):
        decoder.feed(stream)


def test_a_chunk_that_was_not_negotiated() -> None:
    decoder = ReplyDecoder(structured_replies=False)
    decoder.request(wire.NBD_CMD_FLUSH, 1, 0, 0)
    with pytest.raises(ProtocolError, match="magic 0x668e33ef"):
        decoder.feed(none(1))


# The handshake


GREETING = b"NBDMAGICIHAVEOPT\0\3"


def option_reply(number: int, type: int, data: bytes = b"", magic: int = wire.NBD_REP_MAGIC) -> bytes:
    return wire.OPTION_REPLY.pack(magic=magic, option=number, type=type, length=len(data)) + data


@pytest.mark.parametrize(("stream", "wrong"), [
    (b"SSH-2.0-OpenSSH_9.2p1", "no NBD server"),
    (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0", "oldstyle"),
    (b"NBDMAGIChowdyhow\0\0", "magic 0x686f77"),
    (GREETING + option_reply(8, wire.NBD_REP_ACK, magic=1), "magic"),
    (GREETING + option_reply(7, wire.NBD_REP_ACK), "option 7 where one to option 8"),
    (GREETING + option_reply(8, 77), "type 77"),
    (GREETING + option_reply(8, wire.NBD_REP_META_CONTEXT, b"\0"), "1 bytes instead of 4"),
    (GREETING + option_reply(8, wire.NBD_REP_META_CONTEXT, b"\0\0\0\1\xff"), "UTF-8"),
    (GREETING + option_reply(8, wire.NBD_REP_INFO, b"\0"), "1 bytes instead of 2"),
    (GREETING + option_reply(8, wire.NBD_REP_ACK, bytes(65537)), "65537 bytes"),
    (GREETING + option_reply(8, wire.NBD_REP_INFO, b"\0\1x") * 5000, "more than 4096 replies"),
    (GREETING + option_reply(8, wire.NBD_REP_ACK) + option_reply(7, wire.NBD_REP_ACK),
     "without NBD_INFO_EXPORT"),
])
def test_client_refuses_what_no_server_says(stream: bytes, wrong: str) -> None:
    client = ClientNegotiation("disk")
    with pytest.raises(ProtocolError, match=wrong):
        client.feed(stream)
