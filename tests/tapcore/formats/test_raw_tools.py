"""raw: made sparse, resized, and nothing lost unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapcore.errors import ImageError, UsageError
from tapcore.formats.tools import Backing, Report, find_tools

TOOLS = find_tools("raw")


def test_a_new_image_is_one_hole(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    TOOLS.create(str(path), 1 << 40)
    assert path.stat().st_size == 1 << 40 and path.stat().st_blocks == 0
    assert TOOLS.check(str(path)) == Report()


def test_what_exists_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"precious")
    with pytest.raises(ImageError, match="exists"):
        TOOLS.create(str(path), 512)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize(("size_bytes", "backing"), [(100, None), (-512, None), (512, Backing("b.img", "aio"))])
def test_what_no_raw_image_can_be(tmp_path: Path, size_bytes: int, backing: Backing | None) -> None:
    path = tmp_path / "a.img"
    with pytest.raises(UsageError):
        TOOLS.create(str(path), size_bytes, backing=backing)
    assert not path.exists()


def test_a_size_that_the_file_system_cannot_have(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    with pytest.raises(ImageError, match="bytes long"):
        TOOLS.create(str(path), (1 << 63) - 512)
    assert not path.exists()


def test_resize(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"\1" * 1024)
    TOOLS.resize(str(path), 2048)
    assert path.read_bytes() == b"\1" * 1024 + bytes(1024)
    with pytest.raises(UsageError, match="--shrink"):
        TOOLS.resize(str(path), 512)
    TOOLS.resize(str(path), 512, shrink=True)
    assert path.read_bytes() == b"\1" * 512
