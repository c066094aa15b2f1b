"""Compression: where it pays, and what comes out at the other end."""

from __future__ import annotations

from random import Random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tapcore.errors import ProtocolError
from writelog import wire
from writelog.sync_pack import AUTO, MAX_MISSES, OFF, ON, Packer
from writelog.wire import Packed

TEXT = memoryview(b"what repeats becomes smaller. " * 4000)
NOISE = memoryview(Random(1).randbytes(len(TEXT)))


def unpacked(packed: bytes, length: int) -> bytes:
    return wire.unpack(Packed(1, 0, length, bytes(16)), packed)


@given(st.binary(min_size=1, max_size=5000))
def test_what_is_packed_comes_out_again(data: bytes) -> None:
    packed = Packer(ON).pack(memoryview(data))
    assert packed is None or unpacked(packed, len(data)) == data


def test_what_becomes_no_smaller_passes_and_is_tried_less_and_less() -> None:
    packer = Packer(ON)
    packed = packer.pack(TEXT)
    assert packed is not None and len(packed) < len(TEXT) // 10
    assert packer.pack(NOISE) is None
    tries = [number for number in range(200) if packer.pack(TEXT if number % 100 == 99 else NOISE) is not None]
    assert len(tries) <= 2
    for _ in range(1 << MAX_MISSES):
        packer.pack(TEXT)
    assert packer.pack(TEXT) is not None


@pytest.mark.parametrize(("mode", "link_rate", "is_packed"), [
    (AUTO, 10e6, True), (AUTO, 1e12, False), (ON, 1e12, True), (OFF, 10e6, False),
])
def test_a_link_that_is_faster_than_the_processor_gets_it_as_it_is(
    mode: str, link_rate: float, is_packed: bool
) -> None:
    packer = Packer(mode)
    for look in range(10):
        packer.look(look / 10, int(link_rate * look / 10), 0)
    first, second = packer.pack(TEXT), packer.pack(TEXT)
    assert (second is not None) == is_packed
    assert first is None or is_packed or mode == AUTO, "one try tells how fast the processor is"


def test_nothing_is_packed_before_the_link_is_known() -> None:
    packer = Packer()
    assert packer.pack(TEXT) is None
    for look in range(20):
        packer.look(look / 10, 0, 0)
    assert packer.pack(TEXT) is None
    packer.look(2.0, 1, 0)
    assert packer.pack(TEXT) is None


@pytest.mark.parametrize(("equal_rate", "is_packed"), [(1e12, False), (1e6, True)])
def test_that_little_is_sent_because_most_is_equal_makes_no_slow_link(equal_rate: float, is_packed: bool) -> None:
    packer = Packer()
    for look in range(20):
        packer.look(look / 10, 1 + look * 1000, int(equal_rate * look / 10))
    packer.pack(TEXT)  # tells how fast the processor is
    assert (packer.pack(TEXT) is not None) == is_packed


@pytest.mark.parametrize("payload", [
    b"", b"garbage", zstandard.compress(b"x" * 99), zstandard.compress(b"x" * 101),
    zstandard.compress(b"x" * 100)[:-3],
    zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 100),
])
def test_a_payload_that_does_not_hold_what_it_says_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="PACKED"):
        unpacked(payload, 100)


def test_frames_of_packed() -> None:
    message = Packed(1, 4096, 100, bytes(16))
    header = wire.encode(message)
    assert wire.decode([header, b"zz"]) == (message, b"zz")
    for frames in ([header], [header, b""], [header, b"z", b"z"], [header, bytes(wire.MAX_DATA_BYTES + 1)],
                   [wire.encode(Packed(1, 0, wire.MAX_DATA_BYTES + 1, bytes(16))), b"z"]):
        with pytest.raises(ProtocolError):
            wire.decode(frames)
