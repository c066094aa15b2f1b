"""Structures: fields at their places, sizes checked when they are declared."""

from __future__ import annotations

import struct

import pytest

from tapcore.layout import Layout

HEADER = Layout("header", ">", "magic:4s version:H :2x size:Q", size=16)


def test_fields_lie_where_the_declaration_says() -> None:
    packed = HEADER.pack(magic=b"disk", version=2, size=1 << 40)
    assert packed == b"disk\x00\x02\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00"
    assert HEADER.unpack(packed) == {"magic": b"disk", "version": 2, "size": 1 << 40}
    assert HEADER.names == ("magic", "version", "size")


def test_in_the_middle_of_a_buffer() -> None:
    buffer = bytearray(40)
    HEADER.pack_into(buffer, 8, magic=b"disk", version=1, size=7)
    assert HEADER.unpack(memoryview(buffer), 8)["size"] == 7
    assert buffer[:8] == bytes(8) and buffer[24:] == bytes(16)


def test_a_wrong_size_is_found_when_it_is_declared() -> None:
    with pytest.raises(AssertionError, match="short: declared 5 bytes, fields take 4"):
        Layout("short", "<", "a:I", size=5)


def test_missing_fields_and_missing_bytes() -> None:
    with pytest.raises(KeyError, match="size"):
        HEADER.pack(magic=b"disk", version=1)
    with pytest.raises(struct.error):
        HEADER.unpack(bytes(20), 8)
