"""qcow2 whose data is in a file of its own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from contract.runner import Runner

from tapcore.chain import open_chain
from tapcore.driver import Env, OpenFlag
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.header import set_backing
from tapcore.formats.qcow2.layout import AUTOCLEAR_AT, AUTOCLEAR_DATA_RAW, COPIED, FEATURES, HEADER_V2
from tapcore.formats.qcow2.resize import resize
from tapcore.formats.qcow2.snapshots import create_snapshot
from tapcore.formats.qcow2.tools import Qcow2Tools
from tapcore.formats.tools import Backing
from tapcore.request import NO_HOLE, READ, Request

SIZE = 1 << 20


def test_the_data_is_where_the_guest_has_it(env: Env, tmp_path: Path) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "sub" / "a.data"
    data.parent.mkdir()
    create(str(path), SIZE, data_file="sub/a.data")
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(200000, b"x" * 3000) == 0
    before = runner.late
    assert runner.write(200100, b"y" * 100) == 0 and runner.read(200100, 100) == b"y" * 100
    assert runner.late == before, "in place, at once"
    assert runner.write(0, b"z" * 10) == 0 and runner.read(0, 20) == b"z" * 10 + bytes(10)
    runner.close()
    assert data.read_bytes()[200000:203000] == b"x" * 100 + b"y" * 100 + b"x" * 2800
    assert data.read_bytes()[:10] == b"z" * 10
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0)
    assert Qcow2Tools.describe(str(path))["data_file"] == "sub/a.data"


def test_discards_and_zeroes_give_its_space_back(env: Env, tmp_path: Path) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "a.data"
    create(str(path), SIZE, data_file="a.data", data_file_raw=True)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"x" * SIZE) == 0 and runner.flush() == 0
    full = data.stat().st_blocks
    assert runner.discard(0, SIZE // 2) == 0 and runner.zeroes(SIZE // 2, SIZE // 4) == 0
    assert data.stat().st_blocks <= full // 2
    assert runner.zeroes(SIZE // 4 * 3, SIZE // 4, NO_HOLE) == 0
    assert runner.status(0, SIZE) == [(SIZE, 3)]
    runner.close()
    assert data.read_bytes() == bytes(SIZE)


def test_a_raw_data_file_is_as_long_as_the_disk(env: Env, tmp_path: Path) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "a.data"
    create(str(path), SIZE + 512, data_file=str(data), data_file_raw=True)
    os.truncate(data, 512)
    runner = Runner(env, f"qcow2:{path}")
    assert data.stat().st_size == SIZE + 512
    assert runner.write(SIZE, b"x" * 100) == 0
    runner.close()
    assert data.stat().st_size == SIZE + 512, "not the whole last cluster"


def test_a_data_file_that_is_missing_is_named_and_nothing_is_changed(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, data_file="a.data")
    (tmp_path / "a.data").unlink()
    content = bytearray(path.read_bytes())
    FEATURES.pack_into(content, AUTOCLEAR_AT, bits=1)
    path.write_bytes(content)
    for flags in (OpenFlag.RDONLY, OpenFlag.NONE):
        with pytest.raises(ChainError, match=r"the external data file 'a\.data': cannot open"):
            open_chain(env, f"qcow2:{path}", flags)
    assert path.read_bytes() == content
    assert check(str(path)).messages == ["the external data file 'a.data' does not exist"]


@pytest.mark.parametrize("name", ["../secret", "{folder}/secret", "link", "linked/secret"])
def test_one_outside_the_folder_has_to_be_said(env: Env, tmp_path: Path, name: str) -> None:
    """Or an image from strangers would make others read and write what it likes."""
    path, secret = tmp_path / "sub" / "a.qcow2", tmp_path / "secret"
    path.parent.mkdir()
    create(str(path), SIZE, data_file="a.data")
    (path.parent / "a.data").rename(secret)
    (path.parent / "link").symlink_to("../secret")
    (path.parent / "linked").symlink_to("..")
    rename_data(path, name.format(folder=tmp_path).encode())
    for flags in (OpenFlag.RDONLY, OpenFlag.NONE):
        with pytest.raises(ChainError, match="outside the image's folder"):
            open_chain(env, f"qcow2:{path}", flags)
    with pytest.raises(ImageError, match="outside the image's folder"):
        resize(str(path), 512, shrink=True)
    assert secret.stat().st_size == SIZE
    runner = Runner(env, f"qcow2:data_file={secret},{path}")
    assert runner.write(0, b"s" * 512) == 0
    runner.close()
    assert secret.read_bytes()[:512] == b"s" * 512


def test_the_option_is_for_images_that_have_one(env: Env, tmp_path: Path) -> None:
    create(str(tmp_path / "a.qcow2"), SIZE)
    with pytest.raises(ChainError, match="has no external data file"):
        open_chain(env, f"qcow2:data_file=/x,{tmp_path / 'a.qcow2'}")


def rename_data(path: Path, name: bytes) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(b"a.data")
    content[at - 4 : at] = len(name).to_bytes(4, "big")
    content[at : at + max(len(name), 8)] = name.ljust(8, b"\0")
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "what"), [
    (b"", "does not say which"), (b"a\0b", "NUL byte"), (b"x" * 1024, "1024 bytes"),
    (b"nbd://host/x", "not the path of a local file")])
def test_a_name_that_cannot_be_one_is_refused(env: Env, tmp_path: Path, name: bytes, what: str) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, data_file="a.data")
    rename_data(path, name)
    with pytest.raises(ChainError, match=what):
        open_chain(env, f"qcow2:{path}")


@pytest.mark.parametrize("entry", [
    COPIED | 65536,  # another place than the guest's
    65536 * 3,  # shared
    1 << 62 | 65536 * 3,  # compressed
])
def test_bad_entries_are_errors(env: Env, tmp_path: Path, entry: int) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, data_file="a.data")
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"x" * SIZE) == 0
    runner.close()
    content = bytearray(path.read_bytes())
    l1 = HEADER_V2.unpack(content)["l1_table_offset"]
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & ~COPIED
    content[l2 + 24 : l2 + 32] = entry.to_bytes(8, "big")
    path.write_bytes(content)
    runner = Runner(env, f"qcow2:{path}")
    for length in (512, 100000):
        iov = [memoryview(bytearray(length))]
        assert runner.run(Request(READ, 3 * 65536, length, iov)) == [errno.EIO]
    assert runner.write(3 * 65536, b"y" * 512) == errno.EIO
    assert runner.zeroes(3 * 65536, 65536) == errno.EIO
    assert runner.read(0, 65536) == b"x" * 65536
    runner.close()
    assert check(str(path)).errors > 0


def test_a_raw_bit_beside_a_backing_file_is_cleared(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    create(str(path), SIZE, data_file="a.data", backing="base", backing_format="raw")
    content = bytearray(path.read_bytes())
    FEATURES.pack_into(content, AUTOCLEAR_AT, bits=AUTOCLEAR_DATA_RAW)
    path.write_bytes(content)
    Runner(env, f"qcow2:{path}").close()
    assert FEATURES.unpack(path.read_bytes(), AUTOCLEAR_AT)["bits"] == 0


def test_create_makes_both_files_or_none(tmp_path: Path) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "a.data"
    for options in ({"data_file_raw": True}, {"data_file": "a.data", "version": 2},
                    {"data_file": "a.data", "data_file_raw": True, "backing": "x", "backing_format": "raw"},
                    {"data_file": "x" * 2000}, {"data_file": ""}):
        with pytest.raises(UsageError):
            create(str(path), SIZE, **options)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"here")
    with pytest.raises(ImageError, match="exists"):
        create(str(path), SIZE, data_file="a.data")
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    data.write_bytes(b"precious")
    with pytest.raises(ImageError, match="exists"):
        create(str(path), SIZE, data_file="a.data")
    assert data.read_bytes() == b"precious" and not path.exists()


def written(env: Env, tmp_path: Path, **options: bool) -> Path:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, data_file="a.data", **options)  # type: ignore[arg-type]
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(0, b"x" * SIZE) == 0
    runner.close()
    return path


@pytest.mark.parametrize("extended_l2", [False, True])
def test_repair_leaves_what_is_not_counted_alone(env: Env, tmp_path: Path, extended_l2: bool) -> None:
    path = written(env, tmp_path, extended_l2=extended_l2, data_file_raw=True)
    content = bytearray(path.read_bytes())
    table = HEADER_V2.unpack(content)["refcount_table_offset"]
    block = int.from_bytes(content[table : table + 8], "big")
    content[block : block + 4] = bytes(4)
    path.write_bytes(content)
    assert check(str(path)).errors > 0
    assert check(str(path), repair=True).repaired > 0
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0)
    assert FEATURES.unpack(path.read_bytes(), AUTOCLEAR_AT)["bits"] == AUTOCLEAR_DATA_RAW
    runner = Runner(env, f"qcow2:{path}")
    assert runner.read(0, SIZE) == b"x" * SIZE
    runner.close()


def test_resized_with_its_disk(env: Env, tmp_path: Path) -> None:
    path = written(env, tmp_path, data_file_raw=True)
    resize(str(path), SIZE + 65536)
    data = tmp_path / "a.data"
    assert data.read_bytes() == b"x" * SIZE + bytes(65536)
    resize(str(path), 512, shrink=True)
    assert data.read_bytes() == b"x" * 512
    resize(str(path), SIZE)
    assert data.read_bytes() == b"x" * 512 + bytes(SIZE - 512)
    runner = Runner(env, f"qcow2:{path}")
    assert runner.read(0, SIZE) == b"x" * 512 + bytes(SIZE - 512)
    runner.close()
    assert FEATURES.unpack(path.read_bytes(), AUTOCLEAR_AT)["bits"] == AUTOCLEAR_DATA_RAW
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0)


def test_what_does_not_go_with_it_is_refused(env: Env, tmp_path: Path) -> None:
    path = written(env, tmp_path, data_file_raw=True)
    before = path.read_bytes()
    with pytest.raises(ImageError, match="no internal snapshot"):
        create_snapshot(str(path), "one")
    with pytest.raises(UsageError, match="no backing file"):
        set_backing(str(path), Backing("base", "aio"))
    assert path.read_bytes() == before
