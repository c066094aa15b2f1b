"""qcow2 with extended L2 entries: a write takes only the subclusters that it touches."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from contract.runner import Runner

from tapcore.driver import Env
from tapcore.formats.extents import DATA, HOLE, ZERO
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.layout import HEADER_V2
from tapcore.formats.qcow2.tools import Qcow2Tools
from tapcore.request import NO_HOLE, READ, ZEROES, Request

SIZE = 4 << 20
CLUSTER = 2 << 20
SUB = CLUSTER // 32


def open_overlay(env: Env, tmp_path: Path) -> Runner:
    (tmp_path / "base.raw").write_bytes(random.Random(8).randbytes(SIZE))
    create(str(tmp_path / "a.qcow2"), SIZE, backing="base.raw", backing_format="raw", cluster_bits=21,
           extended_l2=True)
    return Runner(env, f"qcow2:{tmp_path / 'a.qcow2'}")


def kinds(runner: Runner, offset: int, length: int) -> list[tuple[int, int]]:
    found = runner.head.mapping.find(offset, length)  # type: ignore[attr-defined]
    return [(kind, piece) for kind, piece, _ in found]


def test_only_what_is_touched_is_copied(env: Env, tmp_path: Path) -> None:
    runner = open_overlay(env, tmp_path)
    base = (tmp_path / "base.raw").read_bytes()
    assert runner.write(5 * SUB + 100, b"x" * SUB) == 0
    assert kinds(runner, 0, CLUSTER) == [(HOLE, 5 * SUB), (DATA, 2 * SUB), (HOLE, 25 * SUB)]
    runner.flush()
    before = (tmp_path / "a.qcow2").stat().st_blocks
    assert runner.write(20 * SUB, b"y" * 10) == 0
    runner.flush()
    assert (tmp_path / "a.qcow2").stat().st_blocks <= before + SUB // 512 + 128
    expected = bytearray(base)
    expected[5 * SUB + 100 : 6 * SUB + 100] = b"x" * SUB
    expected[20 * SUB : 20 * SUB + 10] = b"y" * 10
    assert runner.read(0, SIZE) == expected
    runner.close()
    assert check(str(tmp_path / "a.qcow2")).leaks == 0


def test_what_is_there_is_written_in_place_and_at_once(env: Env, tmp_path: Path) -> None:
    runner = open_overlay(env, tmp_path)
    assert runner.write(5 * SUB, b"x" * 2 * SUB) == 0
    before = runner.late
    assert runner.write(5 * SUB + 77, b"z" * SUB) == 0
    assert runner.read(5 * SUB + 77, SUB) == b"z" * SUB
    assert runner.late == before and not runner.head.writer._locks  # type: ignore[attr-defined]
    runner.close()


def test_zeroes_and_discards_by_subcluster(env: Env, tmp_path: Path) -> None:
    runner = open_overlay(env, tmp_path)
    assert runner.write(0, b"x" * 8 * SUB) == 0
    assert runner.zeroes(2 * SUB, 4 * SUB) == 0
    assert runner.discard(16 * SUB, SUB) == 0, "the backing's: stays"
    assert kinds(runner, 0, CLUSTER) == [(DATA, 2 * SUB), (ZERO, 4 * SUB), (DATA, 2 * SUB), (HOLE, 24 * SUB)]
    assert runner.zeroes(0, CLUSTER, NO_HOLE) == 0
    assert runner.flush() == 0
    length = (tmp_path / "a.qcow2").stat().st_size
    assert runner.write(3 * SUB, b"y" * 100) == 0
    assert (tmp_path / "a.qcow2").stat().st_size == length, "the place was kept"
    assert runner.read(0, CLUSTER) == bytes(3 * SUB) + b"y" * 100 + bytes(29 * SUB - 100)
    assert runner.discard(0, CLUSTER) == 0
    assert kinds(runner, 0, CLUSTER) == [(ZERO, CLUSTER)]
    runner.close()
    report = check(str(tmp_path / "a.qcow2"))
    assert (report.errors, report.leaks) == (0, 0)


def test_parts_of_a_cluster_change_at_the_same_time(env: Env, tmp_path: Path) -> None:
    runner = open_overlay(env, tmp_path)
    expected = bytearray((tmp_path / "base.raw").read_bytes())
    requests = []
    for number in range(0, 60, 2):
        offset, data = number * SUB + 10, bytes([number]) * 500
        requests.append(Request(1, offset, 500, [memoryview(data)], 8 if number % 3 else 0))
        requests.append(Request(ZEROES, (number + 1) * SUB, SUB))
        expected[offset : offset + 500] = data
        expected[(number + 1) * SUB : (number + 2) * SUB] = bytes(SUB)
    assert set(runner.run(*requests)) == {0}
    assert runner.read(0, SIZE) == expected
    runner.close()
    assert check(str(tmp_path / "a.qcow2")).errors == 0


@pytest.mark.parametrize(("entry", "bits"), [
    (1 << 63 | 5 * 65536, 1 | 1 << 32),  # in the file and zero
    (0, 1),  # in the file, but nowhere
    (1 << 63 | 5 * 65536 | 1, 1),  # the zero flag of other images
    (1 << 62 | 5 * 65536, 1),  # compressed, with a subcluster
])
def test_bad_entries_are_errors(env: Env, tmp_path: Path, entry: int, bits: int) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, extended_l2=True)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"x" * 65536 * 4) == 0
    runner.close()
    data = bytearray(path.read_bytes())
    l1 = HEADER_V2.unpack(data)["l1_table_offset"]
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ~(1 << 63)
    data[l2 : l2 + 16] = entry.to_bytes(8, "big") + bits.to_bytes(8, "big")
    path.write_bytes(data)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.run(Request(READ, 0, 512, [memoryview(bytearray(512))])) == [errno.EIO]
    assert runner.write(0, b"y" * 512) == errno.EIO
    assert runner.zeroes(0, 65536) == errno.EIO
    assert runner.read(65536, 512) == b"x" * 512
    runner.close()
    assert check(str(path)).errors > 0


def test_the_tool_makes_them(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow2")
    Qcow2Tools.create(path, SIZE, options={"extended_l2": "on", "cluster_size": "2M"})
    assert Qcow2Tools.describe(path)["extended_l2"] is True
