"""streamOptimized images, as bytes that follow each other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from contract.runner import Runner
from hypothesis import given, settings
from hypothesis import strategies as st

from tapcore.driver import Env, OpenFlag
from tapcore.errors import ImageError, UsageError
from tapcore.formats.vmdk.check import check
from tapcore.formats.vmdk.layout import HEADER, MARKER
from tapcore.formats.vmdk.stream import StreamDecoder, StreamEncoder, StreamImage, stream_descriptor
from tapcore.formats.vmdk.tools import VmdkTools

GRAIN = 65536
SIZE = 40 * (1 << 20) + 1536


def decode(data: bytes, step: int) -> tuple[StreamDecoder, bytes]:
    decoder = StreamDecoder("stream")
    disk = bytearray()
    for at in range(0, len(data), step):
        for offset, grain in decoder.feed(data[at : at + step]):
            disk += bytes(offset - len(disk)) + grain
    decoder.finish()
    assert decoder.size_bytes is not None
    return decoder, bytes(disk.ljust(decoder.size_bytes, b"\0"))


@settings(max_examples=25)
@given(pieces=st.lists(st.tuples(st.integers(0, 200000), st.integers(1, 150000), st.integers(0, 3)), max_size=8),
       step=st.sampled_from((4095, 100000)), size=st.sampled_from((512, GRAIN, 3 * GRAIN + 512, 34 << 20)))
def test_what_goes_in_comes_out(pieces: list[tuple[int, int, int]], step: int, size: int) -> None:
    """Gaps, pieces that end anywhere, zeroes, several tables."""
    encoder = StreamEncoder(size, stream_descriptor("a.vmdk", size))
    disk, out, at = bytearray(size), [], 0
    for gap, length, kind in pieces:
        at += gap * (200 if kind == 3 else 1)
        data = random.Random(at).randbytes(length) if kind else bytes(length)
        data = data[: max(0, size - at)]
        if data:
            disk[at : at + len(data)] = data
            out.append(encoder.write(at, data))
            at += len(data)
    out.append(encoder.finish())
    decoder, found = decode(b"".join(out), step)
    assert found == disk and decoder.ended
    assert b"streamOptimized" in decoder.descriptor


def test_byte_for_byte(env: Env, tmp_path: Path) -> None:
    """A stream fed a byte at a time; and the file that it makes."""
    encoder = StreamEncoder(3 * GRAIN, stream_descriptor("a.vmdk", 3 * GRAIN))
    data = encoder.write(GRAIN + 5, b"hello") + encoder.finish()
    _, disk = decode(data, 1)
    assert disk == (bytes(GRAIN + 5) + b"hello").ljust(3 * GRAIN, b"\0")
    (tmp_path / "a.vmdk").write_bytes(data)
    runner = Runner(env, f"vmdk:{tmp_path}/a.vmdk", OpenFlag.RDONLY)
    assert runner.read(0, 3 * GRAIN) == disk
    assert runner.status(0, 3 * GRAIN) == [(GRAIN, 3), (GRAIN, 0), (GRAIN, 3)]
    runner.close()


def test_a_stream_is_written_from_front_to_back(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    with pytest.raises(UsageError, match="front to back"), StreamImage(str(path), SIZE) as image:
        image.write(1000, b"x" * 1000)
        image.write(1999, b"y")
    assert not path.exists()
    with pytest.raises(UsageError, match="past the end"), StreamImage(str(path), SIZE) as image:
        image.write(SIZE - 1, b"xy")
    for size in (0, 100, 1 << 60):
        with pytest.raises(UsageError):
            StreamImage(str(path), size)
    with pytest.raises(UsageError, match="descriptor"):
        StreamImage(str(tmp_path / 'a".vmdk'), SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_replaces_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(b"mine")
    with pytest.raises(ImageError, match="exists"):
        StreamImage(str(path), SIZE)
    assert path.read_bytes() == b"mine"


def test_an_empty_stream_is_an_empty_disk(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    VmdkTools.create(str(path), SIZE, options={"subformat": "streamOptimized"})
    runner = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
    assert runner.status(0, SIZE) == [(SIZE, 3)]
    runner.close()
    assert check(str(path)).errors == 0
    assert VmdkTools.describe(str(path))["subformat"] == "streamOptimized"


def stream() -> bytearray:
    encoder = StreamEncoder(SIZE, stream_descriptor("a.vmdk", SIZE))
    data = encoder.write(0, random.Random(1).randbytes(3 * GRAIN)) + encoder.write(SIZE - 512, b"x" * 512)
    return bytearray(data + encoder.finish())


@pytest.mark.parametrize("length", [0, 100, 600, 65536, 65600, 150000, -1, -512, -1024])
def test_a_stream_that_was_cut_short_is_refused(length: int) -> None:
    data = stream()
    with pytest.raises(ImageError, match=r"cut short|end of the file"):
        decode(bytes(data[:length]), 4096)


@pytest.mark.parametrize(("at", "value", "why"), [
    (65536, 5, "which no grain begins at"), (65544, 0xFFFFFF, "more than is possible"), (65548, 0xFFFF, "damaged"),
    (8, 1, "no markers"), (64, 10, "overHead"), (77, 2, "compressAlgorithm")])
def test_what_no_stream_has_is_refused(at: int, value: int, why: str) -> None:
    data = stream()
    length = 2 if at == 77 else 4
    data[at : at + length] = value.to_bytes(length, "little")
    with pytest.raises(ImageError, match=why):
        decode(bytes(data), 4096)


def test_a_marker_of_no_kind_is_refused() -> None:
    data = stream()
    end = len(data) - 1536
    assert MARKER.unpack(data, end)["type"] == 3
    data[end + 12] = 9
    with pytest.raises(ImageError, match="marker of the type 9"):
        decode(bytes(data), 4096)


def test_a_damaged_grain_and_one_in_a_wrong_place_are_found(env: Env, tmp_path: Path) -> None:
    data = stream()
    fields = HEADER.unpack(data, len(data) - 1024)
    assert fields["gdOffset"] * 512 < len(data)
    data[65536:65540] = (128).to_bytes(4, "little")
    data[65536 + 70000] ^= 255
    path = tmp_path / "a.vmdk"
    path.write_bytes(data)
    report = check(str(path))
    assert report.errors == 2
    assert "for sector 128" in report.messages[0] and "damaged" in report.messages[1]
