"""What a file looks like; and a guess is never what leads an image to other files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapcore.errors import ImageError
from tapcore.formats.probe import Guess, look, probe

FOOTER = b"conectix" + bytes(52)
DYNAMIC, DIFFERENCING = (FOOTER + kind.to_bytes(4, "big") + bytes(448) for kind in (3, 4))
QCOW2 = b"QFI\xfb\0\0\0\3"

FILES = {
    "raw": (b"\x55\xaa" * 1000, Guess("aio"), "aio"),
    "empty": (b"", Guess("aio"), "aio"),
    "qcow": (b"QFI\xfb\0\0\0\1" + bytes(100), Guess("qcow"), "qcow"),
    "qcow2": (QCOW2 + bytes(100), Guess("qcow2"), "qcow2"),
    "qcow2 with a backing": (QCOW2 + bytes(7) + b"\1" + bytes(100), Guess("qcow2", True), None),
    "qcow2 with a data file": (QCOW2 + bytes(71) + b"\4" + bytes(100), Guess("qcow2", True), None),
    "qcow of no known version": (b"QFI\xfb\0\0\0\x09" + bytes(100), Guess("aio"), "aio"),
    "vhd": (DYNAMIC + bytes(4096) + DYNAMIC, Guess("vhd"), None),
    "vhd, differencing": (DIFFERENCING + bytes(4096) + DIFFERENCING, Guess("vhd", True), None),
    "vhd, its copy says less": (DYNAMIC + bytes(4096) + DIFFERENCING, Guess("vhd", True), None),
    "vmdk": (b"KDMV" + bytes(1000), Guess("vmdk"), None),
    "vmdk with a parent": (b"KDMV" + bytes(1000) + b'parentFileNameHint="a"', Guess("vmdk", True), None),
    "vmdk descriptor": (b"# Disk DescriptorFile\n", Guess("vmdk", True), None),
    "vhdx": (b"vhdxfile" + bytes(1000), Guess("aio"), None),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_looks_like(tmp_path: Path, name: str) -> None:
    content, guess, as_backing = FILES[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    assert look(str(path)) == guess
    if as_backing is not None:
        assert probe(str(path), "child") == as_backing
    else:
        with pytest.raises(ImageError, match="does not say the format"):
            probe(str(path), "child")


def test_a_raw_disk_that_ends_like_a_fixed_vhd_stays_raw(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096) + FOOTER.ljust(512, b"\0"))
    guess = look(str(path))
    assert guess.driver == "aio" and guess.hint is not None and "-f vhd" in guess.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot open"):
        look(str(tmp_path / "no"))
