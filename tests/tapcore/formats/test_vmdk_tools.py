"""The tools of VMDK images: described, checked, mended, given another parent or size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from contract.runner import Runner

from tapcore.driver import Env, OpenFlag
from tapcore.errors import ImageError, UsageError
from tapcore.formats.tools import Backing, Report, find_tools
from tapcore.formats.vmdk.descriptor import NO_PARENT_CID, parse_descriptor, replace_entries
from tapcore.formats.vmdk.tools import VmdkTools

SIZE = 1 << 20
ALL = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"]


def write(env: Env, path: Path, offset: int, data: bytes) -> None:
    runner = Runner(env, f"vmdk:{path}")
    assert runner.write(offset, data) == 0
    runner.close()


def read(env: Env, path: Path, offset: int, length: int) -> bytes:
    runner = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
    data = runner.read(offset, length)
    runner.close()
    return data


class Places:
    """Where directories and tables of a sparse image are, and its bytes, to be damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.rgd, self.gd = (int.from_bytes(self.data[at : at + 8], "little") * 512 for at in (48, 56))

    def table(self, directory: int, index: int = 0) -> int:
        return int.from_bytes(self.data[directory + 4 * index :][:4], "little") * 512

    def put(self, at: int, value: int) -> None:
        self.data[at : at + 4] = value.to_bytes(4, "little")
        self.path.write_bytes(self.data)


@pytest.mark.parametrize("subformat", ALL)
def test_an_image_is_made_described_and_checked(tmp_path: Path, subformat: str) -> None:
    tools = find_tools("vmdk")
    path = str(tmp_path / "a.vmdk")
    tools.create(path, SIZE, options={"subformat": subformat, "adapter_type": "lsilogic"})
    about = tools.describe(path)
    assert about["subformat"] == subformat and about["adapter_type"] == "lsilogic"
    assert all((tmp_path / name).exists() for name in about["extents"])
    assert about["parent_cid"] == "ffffffff" and len(about["cid"]) == 8
    assert tools.check(path) == Report()


@pytest.mark.parametrize("options", [{"subformat": "qcow2"}, {"zeroed_grain": "perhaps"}, {"grain_size": "5000"},
                                     {"grain_size": "512"}, {"adapter_type": "scsi"}])
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        VmdkTools.create(str(tmp_path / "a.vmdk"), SIZE, options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_backing_that_is_no_vmdk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the backing of a vmdk is a vmdk"):
        VmdkTools.create(str(tmp_path / "a.vmdk"), SIZE, backing=Backing("b.raw", "aio"))
    (tmp_path / "b.vmdk").write_bytes(b"no vmdk")
    with pytest.raises(ImageError, match="is not a VMDK"):
        VmdkTools.create(str(tmp_path / "a.vmdk"), SIZE, backing=Backing("b.vmdk", "vmdk"))
    VmdkTools.create(str(tmp_path / "c.vmdk"), SIZE)
    for subformat in ("monolithicFlat", "streamOptimized"):
        with pytest.raises(UsageError, match="has no parent"):
            VmdkTools.create(str(tmp_path / "a.vmdk"), SIZE, backing=Backing("c.vmdk", "vmdk"),
                             options={"subformat": subformat})


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_another_parent(env: Env, tmp_path: Path, subformat: str) -> None:
    for name in ("one", "two"):
        VmdkTools.create(str(tmp_path / f"{name}.vmdk"), SIZE)
        write(env, tmp_path / f"{name}.vmdk", 0, name.encode())
    path = tmp_path / "a.vmdk"
    VmdkTools.create(str(path), SIZE, backing=Backing("one.vmdk", "vmdk"), options={"subformat": subformat})
    write(env, path, SIZE - 5, b"child")
    for name in ("two", "one"):
        VmdkTools.set_backing(str(path), Backing(str(tmp_path / f"{name}.vmdk"), "vmdk"))
        assert read(env, path, 0, 3) == name.encode() and read(env, path, SIZE - 5, 5) == b"child"
    VmdkTools.set_backing(str(path), None)
    assert read(env, path, 0, 3) == bytes(3)
    assert sorted(file.name for file in tmp_path.glob("a*")) == (
        ["a.vmdk"] if subformat == "monolithicSparse" else ["a-s001.vmdk", "a.vmdk"])
    before = path.read_bytes()
    (tmp_path / 'b".vmdk').symlink_to("one.vmdk")
    with pytest.raises(UsageError, match="cannot stand in a descriptor"):
        VmdkTools.set_backing(str(path), Backing('b".vmdk', "vmdk"))
    assert path.read_bytes() == before


def test_entries_are_replaced_where_they_are() -> None:
    text = (b'# Disk DescriptorFile\nCID=00000001\nparentCID=00000002\ncreateType="x"\nparentFileNameHint="p"\n'
            b'RW 8 X "b"\n')
    text = replace_entries(text + bytes(100), {"parentCID": "ffffffff", "parentFileNameHint": None})
    found = parse_descriptor("a", text)
    assert (found.parent_cid, found.parent_hint, found.cid) == (NO_PARENT_CID, None, 1)
    text = replace_entries(text, {"parentCID": "00000003", "parentFileNameHint": '"q"'})
    found = parse_descriptor("a", text)
    assert (found.parent_cid, found.parent_hint, len(found.extents)) == (3, "q", 1)


def damaged(env: Env, path: Path) -> Places:
    VmdkTools.create(str(path), 3 * (32 << 20))
    write(env, path, 0, b"x" * 300000)
    return Places(path)


def test_a_check_mends_the_primary_table_from_its_copy(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    places = damaged(env, path)
    places.put(places.table(places.gd) + 8, 0x7FFFFFFF)
    found = VmdkTools.check(str(path))
    assert found.errors == 1 and "differ" in found.messages[0]
    mended = VmdkTools.check(str(path), repair=True)
    assert (mended.errors, mended.repaired) == (0, 1)
    assert VmdkTools.check(str(path)) == Report()
    assert read(env, path, 131072, 65536) == b"x" * 65536


def test_a_check_mends_the_copy_from_the_primary_table(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    places = damaged(env, path)
    places.put(places.table(places.rgd) + 8, 5000)
    places.put(places.table(places.rgd, 2) + 8, 0x7FFFFFFF)
    assert VmdkTools.check(str(path)).errors == 2
    assert VmdkTools.check(str(path), repair=True).repaired == 2
    assert VmdkTools.check(str(path)) == Report()
    assert read(env, path, 0, 300000) == b"x" * 300000


@pytest.mark.parametrize("which", ["gd", "rgd"])
@pytest.mark.parametrize("entry", [0, 0x7FFFFFFF])
def test_a_check_mends_directories(env: Env, tmp_path: Path, which: str, entry: int) -> None:
    path = tmp_path / "a.vmdk"
    places = damaged(env, path)
    places.put(getattr(places, which), entry)
    with pytest.raises(Exception, match=r"td-img check --repair"):
        Runner(env, f"vmdk:{path}")
    assert VmdkTools.check(str(path)).errors == 1
    assert VmdkTools.check(str(path), repair=True).repaired == 1
    assert VmdkTools.check(str(path)) == Report()
    write(env, path, 400000, b"y")
    assert read(env, path, 0, 300000) == b"x" * 300000


def test_two_entries_for_one_grain_are_found_and_left(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    places = damaged(env, path)
    for directory in (places.gd, places.rgd):
        table = places.table(directory)
        places.put(table + 4, int.from_bytes(places.data[table : table + 4], "little"))
    for repair in (False, True):
        report = VmdkTools.check(str(path), repair=repair)
        assert report.errors == 1 and "something else too" in report.messages[0]


def test_grains_at_any_sector_are_told_apart(env: Env, tmp_path: Path) -> None:
    """Other programs may not align them."""
    path = tmp_path / "a.vmdk"
    places = damaged(env, path)
    places.data += bytes(1 << 20)
    end = len(places.data) // 512 - 1000
    for directory in (places.gd, places.rgd):
        for number in range(3):
            places.put(places.table(directory) + 400 + 4 * number, end + number * 128 + 1)
    assert VmdkTools.check(str(path)).errors == 0
    for directory in (places.gd, places.rgd):
        places.put(places.table(directory) + 404, end + 100)
    assert VmdkTools.check(str(path)).errors > 0


def test_leaked_grains_are_given_back(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    places = damaged(env, path)
    for directory in (places.gd, places.rgd):
        for number in range(3):
            places.put(places.table(directory) + 4 * number, 0)
    blocks = path.stat().st_blocks
    assert VmdkTools.check(str(path)).leaks == 3
    mended = VmdkTools.check(str(path), repair=True)
    assert (mended.leaks, mended.repaired) == (0, 3)
    assert VmdkTools.check(str(path)) == Report()
    assert path.stat().st_blocks <= blocks - 3 * 128


@pytest.mark.parametrize("left", [2 * 65536, 3 * 65536 + 1])
def test_an_extent_that_was_cut_short_is_not_written_before_it_is_mended(
    env: Env, tmp_path: Path, left: int
) -> None:
    """Else a new grain would get the place that a lost one had."""
    path = tmp_path / "a.vmdk"
    places = damaged(env, path)
    end = len(places.data) - 5 * 65536 + left
    path.write_bytes(places.data[:end])
    with pytest.raises(Exception, match=r"cut short.*td-img check --repair"):
        Runner(env, f"vmdk:{path}")
    there = left // 65536 * 65536
    assert read(env, path, 0, there) == b"x" * there
    mended = VmdkTools.check(str(path), repair=True)
    assert mended.errors == 0 and mended.repaired == 5 - -(-left // 65536)
    assert VmdkTools.check(str(path)) == Report()
    write(env, path, 5 << 20, b"y" * 300000)
    assert read(env, path, 0, there) == b"x" * there
    assert read(env, path, 5 * 65536 - 65536, 65536) == bytes(65536)


def test_a_missing_extent_is_an_error_of_the_image(tmp_path: Path) -> None:
    for subformat in ("twoGbMaxExtentFlat", "twoGbMaxExtentSparse"):
        path = tmp_path / f"{subformat}.vmdk"
        VmdkTools.create(str(path), SIZE, options={"subformat": subformat})
        next(tmp_path.glob(f"{subformat}-?001.vmdk")).unlink()
        report = VmdkTools.check(str(path))
        assert report.errors == 1 and "No such file" in report.messages[0]


@pytest.mark.parametrize("subformat", ["monolithicSparse", "monolithicFlat"])
@pytest.mark.parametrize(("size", "larger"), [
    (SIZE, 2 * SIZE), (SIZE + 512, 40 << 20), (SIZE, 5 << 30), (SIZE, SIZE), (33 << 20, 64 << 20)])
def test_a_disk_is_made_larger(env: Env, tmp_path: Path, subformat: str, size: int, larger: int) -> None:
    path = tmp_path / "a.vmdk"
    VmdkTools.create(str(path), size, options={"subformat": subformat})
    data = random.Random(1).randbytes(SIZE)
    write(env, path, size - SIZE, data)
    VmdkTools.resize(str(path), larger)
    runner = Runner(env, f"vmdk:{path}")
    assert runner.size == larger
    assert runner.read(size - SIZE, min(larger - size, SIZE) + SIZE) == data.ljust(
        SIZE + min(larger - size, SIZE), b"\0")
    assert runner.write(larger - 600, b"end" * 200) == 0
    runner.close()
    assert read(env, path, larger - 600, 600) == b"end" * 200
    assert read(env, path, size - SIZE, SIZE - 600) == data[: SIZE - 600]
    report = VmdkTools.check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages
    descriptor = path.read_bytes()
    assert b"RW %d " % (larger // 512) in descriptor


def test_what_the_last_grain_had_behind_the_end_is_not_shown(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    VmdkTools.create(str(path), SIZE + 512)
    write(env, path, SIZE, b"x" * 512)
    data = path.read_bytes()
    path.write_bytes(data[: -65536 + 512] + b"junk" * (127 * 128))
    VmdkTools.resize(str(path), 2 * SIZE)
    assert read(env, path, SIZE, SIZE) == (b"x" * 512).ljust(SIZE, b"\0")


def test_sizes_that_are_not_possible_are_refused(tmp_path: Path) -> None:
    for subformat, size, why in (
        ("monolithicSparse", SIZE - 512, "not made smaller"), ("monolithicSparse", SIZE + 1, "multiple"),
        ("monolithicSparse", 4 << 40, "too large"), ("streamOptimized", 2 * SIZE, "written once"),
        ("twoGbMaxExtentSparse", 2 * SIZE, "several extents"),
    ):
        path = tmp_path / f"{subformat}.vmdk"
        if not path.exists():
            VmdkTools.create(str(path), SIZE, options={"subformat": subformat})
        before = path.read_bytes()
        with pytest.raises((UsageError, ImageError), match=why):
            VmdkTools.resize(str(path), size)
        assert path.read_bytes() == before
    VmdkTools.create(str(tmp_path / "a.vmdk"), SIZE, backing=Backing("monolithicSparse.vmdk", "vmdk"))
    with pytest.raises(ImageError, match="has a parent"):
        VmdkTools.resize(str(tmp_path / "a.vmdk"), 2 * SIZE)
