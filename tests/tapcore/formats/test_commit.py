"""Commits: stages with barriers between, and nothing after what failed."""

from __future__ import annotations

import errno
from array import array
from pathlib import Path

import pytest
from recording import Journal, RecordingFile

from tapcore.driver import OpenFlag
from tapcore.formats.commit import Commit, array_writes, runs
from tapcore.formats.extents import to_big_endian
from tapcore.formats.tables import Tables


@pytest.fixture
def file(tmp_path: Path) -> RecordingFile:
    (tmp_path / "a").touch()
    RecordingFile.journal = Journal()
    return RecordingFile.open(str(tmp_path / "a"), OpenFlag.NONE)


def test_a_barrier_stands_between_stages_that_write_something(file: RecordingFile) -> None:
    commit = Commit([[(0, b"a"), (1, b"b")], [], [(2, b"c")], []])
    assert commit.run(file, file) == 0
    assert file.journal.entries == [(0, b"a"), (1, b"b"), [2], (2, b"c"), [4]]
    file.close()


def test_a_first_stage_may_go_with_the_data(file: RecordingFile) -> None:
    assert Commit([[], [(0, b"a")]]).run(file, file) == 0
    assert file.journal.entries == [[0], (0, b"a"), [2]]
    file.close()


def test_a_file_of_data_becomes_durable_first(file: RecordingFile, tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    data = RecordingFile.open(str(tmp_path / "data"), OpenFlag.NONE)
    assert Commit([[(0, b"a")]]).run(file, data) == 0
    assert file.journal.entries == [[0], (0, b"a"), [2]]
    data.close()
    file.close()


def test_what_failed_is_to_be_written_again(file: RecordingFile, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: Tables[str] = Tables(1)
    tables.put(5, "a")
    tables.change(5, 0)
    commit = Commit([[(0, b"a")], [(1, b"b")]], [(tables, tables.take_dirty())])
    monkeypatch.setattr(file, "sync", lambda: errno.EIO)
    assert commit.run(file, file) == errno.EIO
    assert file.journal.entries == [(0, b"a")]
    commit.failed()
    assert tables.dirty == {5: {0}}
    file.close()


def test_neighbours_are_written_at_once() -> None:
    assert list(runs([7, 1, 3, 2])) == [(1, 3), (7, 1)]
    values = array("Q", range(256))
    writes = list(array_writes(values, 4096, {0, 1, 3}, to_big_endian))
    assert [(offset, len(data)) for offset, data in writes] == [(4096, 1024), (5632, 512)]
    assert writes[1][1][:8] == (192).to_bytes(8, "big")
