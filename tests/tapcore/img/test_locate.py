"""What an argument names."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tapcore.errors import ImageError, UsageError
from tapcore.formats.qcow2.create import create
from tapcore.img.locate import format_of, locate


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("text", "chain"), [
    ("nbd:unix:/run/x.nbd", "nbd:unix:/run/x.nbd"),
    ("nbd://host/export", "nbd:nbd://host/export"),
    ("nbd+unix:///e?socket=/s", "nbd:nbd+unix:///e?socket=/s"),
    ("log:|qcow2:/vm/a", "log:|qcow2:/vm/a"),
    ("ram:1G", "ram:1G"),
])
def test_chains(text: str, chain: str) -> None:
    image = locate(text)
    assert (image.chain, image.path) == (chain, None)
    with pytest.raises(UsageError, match="is a chain"):
        image.tools  # noqa: B018
    with pytest.raises(UsageError, match="says its formats itself"):
        locate(text, "raw")


def test_one_level_over_a_file_is_that_file() -> None:
    image = locate("qcow2:/vm/disk.qcow2")
    assert image.file == "/vm/disk.qcow2" and image.tools.name == "qcow2"


@pytest.mark.parametrize("name", ["a.img", "log:", "qcow2:x", "a|b", "what:ever", "a\\|b"])
def test_files_whatever_their_names(name: str) -> None:
    Path(name).write_bytes(b"raw" * 512)
    image = locate(f"./{name}")
    assert (image.driver, image.file) == ("aio", f"./{name}")
    if not name.startswith(("log:", "qcow2:")):
        assert locate(name).file == f"./{name}"


def test_the_format_is_as_given_else_as_it_looks(caplog: pytest.LogCaptureFixture) -> None:
    create("a", 1 << 20)
    assert locate("a").driver == "qcow2"
    assert locate("a", "raw").driver == "aio"
    assert not caplog.records


def test_an_overlay_that_was_not_asked_for_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    create("a", 1 << 20, backing="/etc/shadow", backing_format="raw")
    with caplog.at_level(logging.WARNING):
        locate("a", "qcow2", follows=True)
        locate("a")
        assert not caplog.records
        locate("a", follows=True)
    assert "leads to other files" in caplog.text and "say -f raw" in caplog.text


def test_what_cannot_be_meant() -> None:
    for text, chosen, words in (("qcwo2:/a", None, "unknown driver 'qcwo2'"), ("a", "vhdx", "unknown format"),
                                ("", "raw", "not a path"), ("log:", None, "nothing below it")):
        with pytest.raises((UsageError, ImageError, Exception), match=words):
            locate(text, chosen)
    with pytest.raises(ImageError, match="no such file"):
        locate("missing.img")


def test_the_format_of_a_new_image() -> None:
    assert format_of("disk.qcow2", None).name == "qcow2"
    assert format_of("disk.QCOW2", None).name == "qcow2"
    assert format_of("disk.img", None).name == "aio"
    assert format_of("disk.qcow2", "raw").name == "aio"
