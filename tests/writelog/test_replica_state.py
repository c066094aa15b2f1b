"""What a replica knows of its image: kept, and believed only of the image that it was written for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tapcore import fence
from tapcore.errors import ImageError, ReplicationError
from writelog.replica import main
from writelog.replica_state import MAX_BASE, State, StateStore


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "copy.img"
    path.write_bytes(bytes(4096))
    return path


def test_it_is_found_again(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.img.replica"
    store = StateStore(path, image, 4096)
    assert store.state == State()
    for state in (State(MAX_BASE, "vm1"), State(5, "vm\u00e9", True)):
        store.store(state)
        assert StateStore(path, image, 4096).state == store.state == state


def test_an_image_that_was_forced_to_go_on_is_no_copy_any_more(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.img.replica"
    store = StateStore(path, image, 4096)
    store.store(State(5, "vm1"))
    assert "copy of disk 'vm1'" in (fence.read(str(image)) or "")
    fence.clear(str(image))
    found = StateStore(path, image, 4096).state
    assert (found.disk, found.base in (0, 5)) == ("vm1", False)
    store.store(State(6, "vm1"))
    assert StateStore(path, image, 4096).state.base == 6
    store.store(State(6, "vm1", True))
    assert fence.read(str(image)) is None
    assert StateStore(path, image, 4096).state == State(6, "vm1", True)


def test_another_image_of_the_name_is_not_the_copy(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.img.replica"
    StateStore(path, image, 4096).store(State(5, "vm1"))
    assert StateStore(path, image, 8192).state == State()
    image.rename(tmp_path / "old")
    image.write_bytes(bytes(4096))
    assert StateStore(path, image, 4096).state == State()


@pytest.mark.parametrize("text", [b"", b"garbage", b"[]", b"{}", b"\xff", b'{"base": 5}',
                                  b'{"base": "-5", "disk": "", "promoted": false, "image": "", "size_bytes": 0}',
                                  b'{"base": "5", "disk": 5, "promoted": 1, "image": "", "size_bytes": 0}'])
def test_a_damaged_record_is_an_error_and_not_a_blank_one(image: Path, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "copy.img.replica"
    path.write_bytes(text)
    with pytest.raises(ImageError, match="no record of a replica"):
        StateStore(path, image, 4096)
    path.unlink()
    path.mkdir()
    with pytest.raises(ImageError):
        StateStore(path, image, 4096)


def test_what_cannot_be_recorded_does_not_count(image: Path, tmp_path: Path) -> None:
    store = StateStore(tmp_path / "missing" / "state", image, 4096)
    with pytest.raises(ReplicationError, match="cannot record"):
        store.store(State(5, "vm1"))
    assert store.state == State()


def test_a_promoted_image_is_no_replica(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StateStore(Path(f"{os.path.realpath(image)}.replica"), image, 4096).store(State(5, "vm1", True))
    assert main(["--insecure-loopback-only", "--listen", "tcp://127.0.0.1:0", f"aio:{image}"]) == 2
    error = capsys.readouterr().err
    assert "it is the primary, not a replica" in error
    assert "--discard-my-data" in error
