"""The control socket's bytes: in pieces, at once, and wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapcore.errors import ProtocolError
from writelog.control import (
    CLEAR,
    COMMANDS,
    GET,
    KICK,
    KICK_MESSAGE,
    PEEK,
    SHMP,
    ClearOp,
    Decoder,
    Figures,
    Message,
    ReplyDecoder,
    Version,
    decode_shmp_reply,
    encode_shmp_reply,
)

messages = st.builds(Message, st.sampled_from(COMMANDS), st.just(1), st.integers(0, 255), st.integers(0, 0xFFFF),
                     st.integers(0, 0xFFFFFFFF), st.integers(0, (1 << 64) - 1)) | st.builds(
                         Message, st.sampled_from(COMMANDS))


@given(st.lists(messages, max_size=8), st.data())
def test_fault_7_messages_in_any_pieces(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(message.encode() for message in sent)
    decoder = Decoder()
    received: list[Message] = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        received += decoder.feed(stream[:cut])
        stream = stream[cut:]
    assert received == sent


def test_the_bytes_of_a_message() -> None:
    assert Message(SHMP).encode() == b"shmp" + bytes(16)
    message = Message(CLEAR, Version.LEASES, ClearOp.RECLAIM, 0x0302, 0x07060504, 0x0F0E0D0C0B0A0908)
    assert message.encode() == b"clrw\x01\x01" + bytes(range(2, 16))


def test_a_first_parameter_of_zero_is_the_original_whatever_follows() -> None:
    assert Decoder().feed(b"getw\0" + b"\xff" * 15) == [Message(GET)]


@pytest.mark.parametrize("garbage", [b"\0" * 20, b"peeK" + bytes(16), b"kic" + bytes(17), b"\xff" * 100])
def test_an_unknown_command(garbage: bytes) -> None:
    with pytest.raises(ProtocolError, match="unknown command"):
        Decoder().feed(garbage)


@given(st.lists(st.binary(max_size=50), max_size=10))
def test_garbage_never_does_worse(parts: list[bytes]) -> None:
    decoder = Decoder()
    for part in parts:
        try:
            decoder.feed(part)
        except ProtocolError:
            return


@pytest.mark.parametrize(("message", "known"), [
    (Message(PEEK), True),
    (Message(PEEK, 1, 2), True),
    (Message(PEEK, 1, 200), False),
    (Message(PEEK, 2, 0), False),
    (Message(GET, 1, 0), True),
    (Message(GET, 1, 200), False),
    (Message(CLEAR, 1, 2), True),
    (Message(CLEAR, 1, 200), False),
    (Message(SHMP, 1, 0), False),
    (Message(KICK, 1, 0), False),
    (Message(KICK), True),
])
def test_versions_and_ops_that_are_known(message: Message, known: bool) -> None:
    assert message.is_known is known


def test_the_reply_to_shmp() -> None:
    reply = encode_shmp_reply("/log_x.wlog")
    assert reply == b"\0\0\x80\0" + b"/log_x.wlog" + bytes(256 - 4 - 11)
    assert decode_shmp_reply(reply) == "/log_x.wlog"


@pytest.mark.parametrize("reply", [
    encode_shmp_reply(""), b"\0\0\x80\0" + b"x" * 252, b"\0\0\x80\0/../x" + bytes(247), bytes(256),
    b"\0\0\x40\0/log" + bytes(248),
])
def test_replies_to_shmp_that_make_no_sense(reply: bytes) -> None:
    with pytest.raises(ProtocolError, match="no region"):
        decode_shmp_reply(reply)


def test_replies_and_kicks_share_the_stream_a_byte_at_a_time() -> None:
    decoder = ReplyDecoder()
    decoder.expect(4)
    decoder.expect(256)
    named = encode_shmp_reply("/r")
    replies: list[bytes] = []
    for byte in KICK_MESSAGE + b"done" + KICK_MESSAGE + KICK_MESSAGE + named:
        replies += decoder.feed(bytes([byte]))
    assert replies == [b"done", named]
    assert decoder.kicks == 3


def test_a_reply_that_nobody_waits_for() -> None:
    with pytest.raises(ProtocolError, match="unexpected"):
        ReplyDecoder().feed(b"done")


def test_figures_of_a_later_version() -> None:
    figures = Figures(4096, 100, 7, 3, 2, 1, 1, 1, 8, 9, 10)
    assert Figures.decode(figures.encode()) == figures
    with pytest.raises(ProtocolError, match="version 9"):
        Figures.decode(b"\x09" + figures.encode()[1:])
