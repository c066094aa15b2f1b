"""The tools of every format, found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapcore.errors import ImageError, UsageError
from tapcore.formats.tools import Backing, ImageTools, Report, find_tools


def test_an_image_is_made_described_and_checked(tmp_path: Path) -> None:
    tools = find_tools("qcow2")
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    path = str(tmp_path / "a.qcow2")
    tools.create(path, 1 << 20, backing=Backing("base.raw", "aio"), options={"cluster_size": "4K"})
    assert tools.describe(path)["cluster_bytes"] == 4096
    assert tools.check(path) == Report()


def test_what_no_image_can_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    for options in ({"cluster_size": "5000"}, {"version": "4"}, {"lazy_refcounts": "perhaps"}):
        with pytest.raises(UsageError):
            find_tools("qcow2").create(str(path), 1 << 20, options=options)
        assert not path.exists()


def test_an_unknown_format_is_told_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"known formats: .*qcow2"):
        find_tools("parallels")


def test_what_a_format_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ImageError, match="resize an image of the format"):
        ImageTools.resize("/a", 512)
