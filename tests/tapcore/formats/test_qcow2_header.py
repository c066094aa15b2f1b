"""The backing file's name and format changed in the header; a crash at every step."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from qcow2_images import assert_clean, content, qemu
from recording import Journal, RecordingFile

from tapcore.driver import Env, OpenFlag
from tapcore.errors import ImageError, UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.header import list_extensions, set_backing
from tapcore.formats.qcow2.layout import (
    EXT_BACKING_FORMAT,
    EXT_FEATURE_NAMES,
    EXTENSION,
    FEATURES,
    HEADER_V2,
    HEADER_V3,
    Header,
)
from tapcore.formats.qcow2.load import load_header
from tapcore.formats.tools import Backing

SIZE = 128 * 1024
UNKNOWN = 0x12345678


def load(path: Path) -> Header:
    file = ImageFile.open(str(path), OpenFlag.RDONLY | OpenFlag.QUERY)
    try:
        return load_header(file)
    finally:
        file.close()


def extensions(data: bytes) -> list[tuple[int, bytes]]:
    start = HEADER_V2.size
    fields = HEADER_V2.unpack(data)
    if fields["version"] == 3:
        start = HEADER_V3.unpack(data, start)["header_length"]
    cluster = data[: 1 << fields["cluster_bits"]]
    return list_extensions(cluster, start, fields["backing_file_offset"])[0]


def make_there(path: Path, options: str) -> None:
    """With a feature name table, and an extension that nobody knows behind it."""
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    data = bytearray(path.read_bytes())
    if HEADER_V2.unpack(data)["version"] == 3:
        end = data.index(EXTENSION.pack(type=0, length=0), HEADER_V3.unpack(data, HEADER_V2.size)["header_length"])
        more = EXTENSION.pack(type=UNKNOWN, length=13) + b"keep me, pray\0\0\0"
        data[end : end + len(more)] = more
        path.write_bytes(data)


@pytest.mark.parametrize("options", [
    "compat=1.1", "compat=0.10", "compat=1.1,cluster_size=4k", "compat=1.1,cluster_size=1k",
    "compat=0.10,cluster_size=512"])
def test_qemu_reads_the_names_that_are_written_and_the_rest_is_kept(
    env: Env, tmp_path: Path, options: str
) -> None:
    path = tmp_path / "a.qcow2"
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    create(str(tmp_path / "a longer name for the same.qcow2"), SIZE)
    make_there(path, options)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4k", path)
    disk = content(env, path)
    kept = [pair for pair in extensions(path.read_bytes()) if pair[0] != EXT_BACKING_FORMAT]
    for name, driver, known in (("base.raw", "aio", "raw"), ("a longer name for the same.qcow2", "qcow2", "qcow2"),
                                ("./base.raw", "aio", "raw")):
        set_backing(str(path), Backing(name, driver))
        info = json.loads(qemu("qemu-img", "info", "--output=json", path))
        assert (info["backing-filename"], info["backing-filename-format"]) == (name, known)
        assert [pair for pair in extensions(path.read_bytes()) if pair[0] != EXT_BACKING_FORMAT] == kept
        assert_clean(path)
        assert (b"b" * 512 in content(env, path)) == (known == "raw")
    qemu("qemu-img", "rebase", "-u", "-b", "a longer name for the same.qcow2", "-F", "qcow2", path)
    set_backing(str(path), None)
    assert "backing-filename" not in json.loads(qemu("qemu-img", "info", "--output=json", path))
    after = {kind for kind, _ in extensions(path.read_bytes())}
    assert EXT_BACKING_FORMAT not in after and {kind for kind, _ in kept} <= after | {EXT_FEATURE_NAMES}
    assert content(env, path) == disk
    assert_clean(path)


def test_the_format_takes_the_place_that_it_had(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, backing="base", backing_format="raw")
    data = bytearray(path.read_bytes())
    at = HEADER_V3.unpack(data, HEADER_V2.size)["header_length"]
    before = EXTENSION.pack(type=UNKNOWN, length=3) + b"abc\0\0\0\0\0"
    data[at + 16 : at + 512] = (data[at : at + 24] + b"base").ljust(496, b"\0")
    data[at : at + 16] = before
    HEADER_V2.pack_into(data, 0, **HEADER_V2.unpack(data) | {"backing_file_offset": at + 40})
    path.write_bytes(data)
    assert load(path).backing_file == "base"
    set_backing(str(path), Backing("other", "qcow2"))
    assert extensions(path.read_bytes()) == [(UNKNOWN, b"abc"), (EXT_BACKING_FORMAT, b"qcow2")]


def test_unknown_autoclear_bits_are_cleared_and_the_bitmaps_bit_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE)
    data = bytearray(path.read_bytes())
    data[88:96] = FEATURES.pack(bits=1 | 1 << 20)
    path.write_bytes(data)
    set_backing(str(path), Backing("other", "qcow2"))
    assert FEATURES.unpack(path.read_bytes(), 88)["bits"] == 1


@pytest.mark.parametrize("cluster_bytes", [4096, 65536])
@pytest.mark.parametrize("former", [None, "old/name.raw", "n" * 900])
@pytest.mark.parametrize("name", [None, "new.qcow2", "m" * 1000])
def test_a_crash_leaves_the_former_backing_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster_bytes: int, former: str | None, name: str | None
) -> None:
    path, crashed = tmp_path / "a.qcow2", tmp_path / "crashed.qcow2"
    make_there(path, f"compat=1.1,cluster_size={cluster_bytes}")
    if former:
        set_backing(str(path), Backing(former, "aio"))
    before = path.read_bytes()
    RecordingFile.journal = journal = Journal()
    with monkeypatch.context() as patch:
        patch.setattr("tapcore.formats.qcow2.header.ImageFile", RecordingFile)
        set_backing(str(path), Backing(name, "qcow2") if name else None)
    allowed = [(former, "raw" if former else None), (name, "qcow2" if name else None)]
    others = [pair for pair in extensions(before) if pair[0] != EXT_BACKING_FORMAT]
    assert load(path).backing_file == name
    seen = set()
    for cut in range(len(journal.entries) + 1):
        for seed in range(4):
            crashed.write_bytes(journal.crash(before, cut, random.Random(seed) if seed else None))
            header = load(crashed)
            seen.add(allowed.index((header.backing_file, header.backing_format)))
            found = extensions(crashed.read_bytes())
            assert [pair for pair in found if pair in others] == others
    assert seen == {0, 1} if former != name else seen <= {0, 1}


def test_what_cannot_be_a_backing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, cluster_bits=9)
    before = path.read_bytes()
    for name in ("", "x" * 1024, "x" * 500):
        with pytest.raises(UsageError):
            set_backing(str(path), Backing(name, "aio"))
    with pytest.raises(UsageError, match="'ram'"):
        set_backing(str(path), Backing("x", "ram"))
    assert path.read_bytes() == before
    data = bytearray(before)
    data[72:80] = FEATURES.pack(bits=2)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="marked corrupt"):
        set_backing(str(path), None)
    assert path.read_bytes() == data
