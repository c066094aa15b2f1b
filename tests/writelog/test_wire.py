"""The replication codec: what is encoded comes back, and nothing else comes through."""

from __future__ import annotations

import errno

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapcore.errors import ProtocolError
from writelog import wire
from writelog.wire import Ack, Barrier, Data, Digest, Failure, Hello, Kind, Promote, Refused, Welcome, Zero

NUMBERS = st.integers(0, wire.MAX_INT)
BASES = st.integers(0, wire.MAX_BASE)
SUMS = st.binary(min_size=16, max_size=16)
TEXTS = st.text(max_size=50)
MESSAGES = st.one_of(
    st.builds(Hello, st.just(wire.VERSION), SUMS, NUMBERS, TEXTS, BASES, BASES, st.booleans(), st.booleans(),
              st.booleans()),
    st.builds(wire.Base, BASES), st.builds(Welcome, BASES, NUMBERS, st.booleans(), NUMBERS),
    st.builds(wire.Epoch, SUMS, NUMBERS), st.builds(wire.Kept, NUMBERS, st.booleans()),
    st.builds(wire.Facts, NUMBERS, TEXTS, TEXTS, BASES, NUMBERS, NUMBERS, NUMBERS),
    st.builds(Refused, NUMBERS, TEXTS, TEXTS), st.builds(Barrier, NUMBERS), st.builds(Digest, NUMBERS, SUMS),
    st.builds(Zero, NUMBERS, NUMBERS, st.integers(1, wire.MAX_ZERO_BYTES)),
    st.builds(Ack, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds(lambda seq, offset, pieces, grain, last: wire.Probe(
        seq, offset, (pieces - 1) * grain + last, grain, bytes(32 * pieces)),
        NUMBERS, NUMBERS, st.integers(1, 128), st.sampled_from([4096, 5000, 8192]), st.integers(1, 4096)),
    st.builds(wire.Probed, NUMBERS, st.binary(max_size=16)),
    st.builds(Promote, SUMS), st.builds(Failure, NUMBERS, TEXTS, TEXTS), st.just(wire.Release()),
)


def sealed(values: object) -> bytes:
    return wire.seal(msgpack.packb(values))


def data(payload: bytes, seq: int = 1, offset: int = 0) -> list[bytes]:
    return [wire.encode(Data(seq, offset, len(payload), wire.checksum(payload))), payload]


@given(MESSAGES)
def test_every_message_comes_back(message: wire.Message) -> None:
    assert wire.decode([wire.encode(message)]) == (message, None)


@given(NUMBERS, NUMBERS, st.binary(min_size=1, max_size=100))
def test_data_comes_back_with_its_payload(seq: int, offset: int, payload: bytes) -> None:
    message = Data(seq, offset, len(payload), wire.checksum(payload))
    assert wire.decode([wire.encode(message), payload]) == (message, payload)


@pytest.mark.parametrize("frames", [
    [], [b""], [b"\xc1"], [wire.seal(b"\xc1")], [wire.seal(b"")], [wire.seal(b"\x91")],
    [sealed(5)], [sealed({})], [sealed([])],
    [sealed([99])], [sealed([True, 1])], [sealed(["HELLO"])],
    [sealed([Kind.BARRIER])], [sealed([Kind.BARRIER, 1, 2])], [sealed([Kind.BARRIER, -1])],
    [sealed([Kind.BARRIER, 1 << 63])], [sealed([Kind.BARRIER, True])],
    [sealed([Kind.BARRIER, 1.0])], [sealed([Kind.BARRIER, "1"])],
    [sealed([Kind.PROMOTE, bytes(15)])], [sealed([Kind.PROMOTE, "x" * 16])],
    [sealed([Kind.HELLO])], [sealed([Kind.HELLO, wire.VERSION, bytes(16), 4096])],
    [sealed([Kind.BASE, "1"])], [sealed([Kind.BASE, -1])],
    [sealed([Kind.ERROR, 5, "x" * 2000, ""])], [bytes(wire.MAX_HEADER_BYTES + 1)],
    [sealed([Kind.ZERO, 1, 0, 0])], [sealed([Kind.ZERO, 1, 0, wire.MAX_ZERO_BYTES + 1])],
    [wire.seal(b"\xdd\xff\xff\xff\xff")], [wire.seal(b"\x91" * 5000)], [msgpack.packb([Kind.BARRIER, 1])],
    [wire.encode(wire.Probe(1, 0, 4096, 4095, bytes(64)))], [wire.encode(wire.Probe(1, 0, 0, 4096, b""))],
    [wire.encode(wire.Probe(1, 0, 8192, 4096, bytes(32)))], [wire.encode(wire.Probe(1, 0, 4096, 4096, bytes(64)))],
    [wire.encode(wire.Probe(1, 0, wire.MAX_DATA_BYTES, 4096, bytes(256 * 32)))],
    [wire.encode(wire.Probed(1, bytes(17)))],
    [wire.encode(Barrier(1)), b"more"], [wire.encode(Barrier(1))[:-1]], [wire.encode(Barrier(1)) + b"\0"],
    data(b"abcd")[:1], [*data(b"abcd"), b""], [data(b"abcd")[0], b"abc"],
    data(bytes(wire.MAX_DATA_BYTES + 1)),
])
def test_bad_frames_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(frames)


@given(st.lists(st.binary(max_size=60) | st.binary(max_size=60).map(wire.seal), max_size=3))
def test_garbage_is_refused_or_is_a_message(frames: list[bytes]) -> None:
    try:
        message, payload = wire.decode(frames)
    except ProtocolError:
        return
    assert wire.decode([wire.encode(message), *([] if payload is None else [payload])]) == (message, payload)


@given(MESSAGES, st.data())
def test_a_cut_header_is_refused(message: wire.Message, draw: st.DataObject) -> None:
    header = wire.encode(message)
    cut = draw.draw(st.integers(0, len(header) - 1))
    with pytest.raises(ProtocolError):
        wire.decode([header[:cut]])


@given(MESSAGES, st.data())
def test_a_header_with_any_bit_flipped_is_damaged(message: wire.Message, draw: st.DataObject) -> None:
    header = bytearray(wire.encode(message))
    bit = draw.draw(st.integers(0, 8 * len(header) - 1))
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError) as caught:
        wire.decode([header])
    assert caught.value.errno == errno.EBADMSG


def test_hello_of_another_version_tells_its_version_whatever_follows() -> None:
    message, _ = wire.decode([sealed([Kind.HELLO, 7, "something", [], 12])])
    assert isinstance(message, Hello)
    assert message.version == 7


def test_long_texts_are_cut() -> None:
    message, _ = wire.decode([wire.encode(Failure(5, "x" * 5000, "y" * 5000))])
    assert message == Failure(5, "x" * wire.MAX_TEXT_CHARS, "y" * wire.MAX_TEXT_CHARS)


@pytest.mark.parametrize("other", [
    Data(1, 4096, 5, bytes(16)), Data(1, 0, 5, b"\1" * 16), Data(2, 0, 5, bytes(16)), Data(1, 0, 6, bytes(16)),
    Zero(1, 0, 5),
])
def test_digest_depends_on_every_field(other: Data | Zero) -> None:
    digests = []
    for message in (Data(1, 0, 5, bytes(16)), other):
        running = wire.RunningDigest()
        running.add(message)
        digests.append(running.digest())
    assert digests[0] != digests[1]


def test_content_digest_does_not_depend_on_the_order_of_chunks() -> None:
    size_bytes = 2 * wire.VERIFY_CHUNK_BYTES + 5
    disk = bytes(range(256)) * (size_bytes // 256 + 1)
    digests = set()
    for order in ((0, 1, 2), (2, 0, 1)):
        content = wire.ContentDigest(size_bytes)
        assert content.chunks == 3
        for chunk in order:
            offset, length = content.range_of(chunk)
            content.set(chunk, disk[offset : offset + length])
        digests.add(content.digest())
    assert len(digests) == 1
    assert content.range_of(2) == (2 * wire.VERIFY_CHUNK_BYTES, 5)
    content.set(2, b"other")
    assert content.digest() not in digests
