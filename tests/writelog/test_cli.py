"""writelog-client as a user runs it."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitarray import bitarray
from logrig import Rig, rig_of

from tapcore.driver import Env
from tapcore.errors import LogError
from writelog.cli import EXIT_CLEAN, EXIT_ERROR, EXIT_OK, main, picture
from writelog.logstream import HEADER, RECORD, StreamInfo, read_info, read_records, write_stream

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def rig(env: Env) -> Iterator[Rig]:
    with rig_of(env) as rig:
        yield rig


def run(rig: Rig, *arguments: str) -> int:
    return main(["--run-dir", str(rig.env.run_dir), "--timeout", "20", *arguments])


def dirty_something(rig: Rig) -> list[tuple[int, bytes]]:
    written = [(BLOCK, os.urandom(2 * BLOCK)), (255 * BLOCK, os.urandom(BLOCK))]
    for offset, data in written:
        rig.write(offset, data)
    return written


def test_peek_as_a_table(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(rig, "peek") == EXIT_CLEAN
    assert capsys.readouterr().out == "0 extents, 0 B of 1 MiB\n"
    dirty_something(rig)
    assert run(rig, "peek", "disk") == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [["offset", "length"], ["4096", "8192"], ["1044480", "4096"]]
    assert lines[3] == "2 extents, 12 KiB of 1 MiB"


def test_peek_as_json_by_socket_path(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    dirty_something(rig)
    assert main(["peek", str(rig.path), "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == {
        "size_bytes": MIB, "granularity_bytes": BLOCK, "dirty_bytes": 3 * BLOCK,
        "extents": [{"offset": BLOCK, "length": 2 * BLOCK}, {"offset": 255 * BLOCK, "length": BLOCK}]}


def test_peek_as_a_picture(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(rig, "peek", "--picture") == EXIT_CLEAN
    dirty_something(rig)
    capsys.readouterr()
    assert run(rig, "peek", "--picture") == EXIT_OK
    out = capsys.readouterr().out
    assert out.count("█") == 3
    assert "12 KiB of 1 MiB dirty" in out


def test_a_picture_shows_any_dirt() -> None:
    bits = bitarray(1000)
    bits[999] = 1
    bits[:500] = 1
    assert picture(bits, 5, 2) == ["█████", "    ░"]
    assert picture(bitarray(), 5, 2) == [" "]
    assert picture(bitarray("01"), 5, 2) == [" █"]


def test_stat(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    dirty_something(rig)
    assert run(rig, "stat") == EXIT_OK
    assert "dirty        12 KiB (3 blocks)" in capsys.readouterr().out
    assert run(rig, "stat", "--json") == EXIT_OK
    figures = json.loads(capsys.readouterr().out)
    assert (figures["dirty_blocks"], figures["size_bytes"], figures["clients"]) == (3, MIB, 1)


def test_clear(rig: Rig) -> None:
    dirty_something(rig)
    assert run(rig, "clear") == EXIT_OK
    assert rig.dirty() == []


def test_get_without_a_file_takes_the_list(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    dirty_something(rig)
    assert run(rig, "get", "--json") == EXIT_OK
    assert len(json.loads(capsys.readouterr().out)["extents"]) == 2
    assert rig.dirty() == rig.leased() == []
    assert run(rig, "get") == EXIT_CLEAN


def test_get_into_a_copy(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rig.leaf.data[:] = random.Random(1).randbytes(MIB)
    copy = tmp_path / "copy.img"
    copy.write_bytes(rig.leaf.data)
    dirty_something(rig)
    assert copy.read_bytes() != rig.leaf.data
    assert run(rig, "get", "--out", str(copy)) == EXIT_OK
    assert capsys.readouterr().out == f"2 extents, 12 KiB, written to {copy}\n"
    assert copy.read_bytes() == rig.leaf.data
    assert rig.dirty() == rig.leased() == []


def test_get_that_fails_forgets_nothing(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dirty_something(rig)
    longer = tmp_path / "longer.img"
    longer.write_bytes(bytes(MIB + 1))
    assert run(rig, "get", "--out", str(longer)) == EXIT_ERROR
    assert "longer than the disk" in capsys.readouterr().err
    assert run(rig, "get", "--out", str(tmp_path / "no" / "where")) == EXIT_ERROR
    rig.leaf.errors = [5]
    assert run(rig, "get", "--out", str(tmp_path / "copy.img")) == EXIT_ERROR
    assert "cannot read" in capsys.readouterr().err
    rig.loop_thread.until(lambda: rig.log.figures().clients == 0)
    assert rig.dirty() == [1, 2, 255]


def test_read_into_a_file(rig: Rig, tmp_path: Path) -> None:
    written = dirty_something(rig)
    out = tmp_path / "changes"
    assert run(rig, "read", "--out", str(out)) == EXIT_OK
    with out.open("rb") as source:
        info = read_info(source)
        assert (info.size_bytes, info.granularity_bytes) == (MIB, BLOCK)
        assert list(read_records(source)) == written
    assert rig.dirty() == [1, 2, 255]
    run(rig, "clear")
    assert run(rig, "read", "--out", str(out)) == EXIT_CLEAN
    with out.open("rb") as source:
        read_info(source)
        assert list(read_records(source)) == []


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "writelog.cli", *arguments]


def test_read_into_a_pipe(rig: Rig) -> None:
    written = dirty_something(rig)
    done = subprocess.run(command("read", str(rig.path), "--out", "-"), stdout=subprocess.PIPE, timeout=30,
                          check=True)
    source = io.BytesIO(done.stdout)
    read_info(source)
    assert list(read_records(source)) == written


def test_a_pipe_whose_reader_is_gone(rig: Rig) -> None:
    dirty_something(rig)
    for arguments in (["read", str(rig.path), "--out", "-"], ["get", str(rig.path)]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command(*arguments), stdout=writer, stderr=subprocess.PIPE, timeout=30)
        os.close(writer)
        assert (done.returncode, done.stderr) == (EXIT_ERROR, b"")
    rig.loop_thread.until(lambda: rig.log.figures().clients == 0)
    assert rig.dirty() == [1, 2, 255]


def test_which_log(rig: Rig, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--run-dir", str(tmp_path), "stat"]) == EXIT_ERROR
    assert "no log is served here" in capsys.readouterr().err
    (rig.env.run_dir / "log__other.ctl").touch()
    assert run(rig, "stat") == EXIT_ERROR
    assert "name one of disk, other" in capsys.readouterr().err
    assert run(rig, "stat", "disk") == EXIT_OK
    assert run(rig, "stat", "other") == EXIT_ERROR
    assert "cannot connect" in capsys.readouterr().err
    assert run(rig, "stat", "a b") == EXIT_ERROR


def test_the_default_run_dir(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPDISK_RUN_DIR", str(rig.env.run_dir))
    assert main(["stat"]) == EXIT_OK


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["peek", "--json", "--picture"], ["read"]])
def test_a_wrong_command_line(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["peek", "--help"])
    assert "writelog-client peek disk.img --picture" in capsys.readouterr().out


# The stream

def stream(pieces: list[tuple[int, bytes]]) -> bytearray:
    out = io.BytesIO()
    write_stream(out, StreamInfo(BLOCK, MIB, 7), [(offset, memoryview(data)) for offset, data in pieces])
    return bytearray(out.getvalue())


def read_back(data: bytes | bytearray) -> list[tuple[int, bytes]]:
    source = io.BytesIO(data)
    read_info(source)
    return list(read_records(source))


def test_a_stream_cut_anywhere_is_noticed() -> None:
    whole = stream([(0, b"abc"), (BLOCK, b"defg")])
    assert read_back(whole) == [(0, b"abc"), (BLOCK, b"defg")]
    for length in range(len(whole)):
        with pytest.raises(LogError, match="cut off"):
            read_back(whole[:length])


@pytest.mark.parametrize(("at", "message"), [
    (0, "no stream"), (8, "version"), (HEADER.size + RECORD.size, "checksum"), (HEADER.size + 14, "damaged"),
    (-RECORD.size, "counts"),
])
def test_a_damaged_stream(at: int, message: str) -> None:
    data = stream([(0, b"abc")])
    data[at] ^= 0xFF
    with pytest.raises(LogError, match=message):
        read_back(data)
