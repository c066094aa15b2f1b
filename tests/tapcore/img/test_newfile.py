"""A new file is there when it is whole, and else nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapcore.errors import ImageError
from tapcore.img.newfile import new_file
from tapcore.img.session import Session


def test_it_appears_with_its_companions_when_all_is_done(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    with new_file(str(path)) as place:
        assert Path(place).name == path.name
        Path(place).write_text("descriptor")
        Path(place).with_name("disk-f001.vmdk").write_text("extent")
        assert not path.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["disk-f001.vmdk", "disk.vmdk"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(str(tmp_path / "disk.img")) as place:
        Path(place).write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_exists_stays(tmp_path: Path, when: str) -> None:
    path = tmp_path / "disk.img"
    if when == "before":
        path.write_text("precious")
    with pytest.raises(ImageError, match="exists"), new_file(str(path)) as place:
        Path(place).write_text("new")
        path.write_text("precious")
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_replaced_if_asked_and_unused(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    with Session() as session:
        session.open(f"aio:{path}")
        with pytest.raises(ImageError, match="in use"), new_file(str(path), replace=True):
            pass
    with new_file(str(path), replace=True) as place:
        Path(place).write_bytes(b"new")
        assert path.read_bytes() == bytes(512)
    assert path.read_bytes() == b"new"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="make a file here"), new_file(str(tmp_path / "no" / "disk.img")):
        pass
