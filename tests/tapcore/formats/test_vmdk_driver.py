"""The vmdk driver against plain bytes, and what it refuses."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from contract.runner import Runner
from formats_model import Model, disk_operations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tapcore.driver import Env, OpenFlag
from tapcore.drivers.vmdk import Vmdk
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tools import Backing
from tapcore.formats.vmdk.check import check
from tapcore.formats.vmdk.create import Parent, create
from tapcore.formats.vmdk.layout import GTES_PER_GT
from tapcore.formats.vmdk.load import load_image
from tapcore.formats.vmdk.mapping import Mapping
from tapcore.formats.vmdk.tools import VmdkTools
from tapcore.request import DISCARD, STATUS, STATUS_HOLE, STATUS_ZERO, WRITE, Request

SIZE = 100 * 1024 + 512
FIXTURE = [HealthCheck.function_scoped_fixture]

IMAGES = st.fixed_dictionaries({
    "subformat": st.sampled_from(("monolithicSparse", "monolithicSparse", "twoGbMaxExtentSparse",
                                  "twoGbMaxExtentFlat", "monolithicFlat")),
    "grain_bytes": st.sampled_from((4096, 65536)),
    "zeroed_grain": st.booleans(),
    "split_bytes": st.sampled_from((64 * 1024, 84 * 1024)),
})


def cid_of(path: Path) -> int:
    file = ImageFile.open(str(path), OpenFlag.RDONLY | OpenFlag.QUERY)
    try:
        return load_image(file).descriptor.cid
    finally:
        file.close()


def make_overlay(env: Env, folder: Path, size: int = SIZE, base_bytes: int = SIZE, **options: Any) -> bytes:
    """base.vmdk, written, and a.vmdk over it; what the disk holds."""
    content = random.Random(3).randbytes(base_bytes)
    create(str(folder / "base.vmdk"), base_bytes)
    base = Runner(env, f"vmdk:{folder}/base.vmdk")
    assert base.write(0, content) == 0
    base.close()
    create(str(folder / "a.vmdk"), size, parent=Parent("base.vmdk", cid_of(folder / "base.vmdk")), **options)
    return content[:size].ljust(size, b"\0")


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE)
@given(options=IMAGES, base_sectors=st.sampled_from((0, 0, 33, 150, 300)),
       ops=st.lists(disk_operations(SIZE), min_size=5, max_size=40))
def test_any_sequence_over_any_parent(
    env: Env, options: dict[str, Any], base_sectors: int, ops: list[tuple[int, int, int, int, int]]
) -> None:
    with TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "a.vmdk"
        if base_sectors and options["subformat"] in ("monolithicSparse", "twoGbMaxExtentSparse"):
            disk = make_overlay(env, Path(name), base_bytes=base_sectors * 512, **options)
        else:
            disk = bytes(SIZE)
            create(str(path), SIZE, **options)
        runner = Runner(env, f"vmdk:{path}")
        model = Model(runner, disk)
        model.run(ops)
        runner.status(0, SIZE)
        assert runner.read(0, SIZE) == model.disk
        runner.close()
        report = check(str(path))
        assert (report.errors, report.leaks) == (0, 0), report.messages
        again = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
        assert again.read(0, SIZE) == model.disk
        again.close()


def test_tables_are_dropped_and_read_again(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two tables everything is missing all the time, and changed ones must be written first."""
    monkeypatch.setattr("tapcore.formats.vmdk.mapping.CACHE_BYTES", 0)
    monkeypatch.setattr("tapcore.formats.vmdk.mapping.MIN_CACHED", 2)
    path = tmp_path / "a.vmdk"
    size, step = 16 << 20, 4096
    create(str(path), size, grain_bytes=4096)
    runner = Runner(env, f"vmdk:{path}")
    data = random.Random(1).randbytes(200 * step)
    offsets = random.Random(2).sample(range(0, size, step), 200)
    requests = [Request(WRITE, at, step, [memoryview(data)[n * step :][:step]]) for n, at in enumerate(offsets)]
    assert set(runner.run(*requests)) == {0}
    assert b"".join(runner.read(at, step) for at in offsets) == data
    assert runner.flush() == 0
    assert set(runner.run(*[Request(DISCARD, at, step) for at in offsets[::2]])) == {0}
    runner.close()
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages


def test_a_disk_of_a_tebibyte_needs_little_memory(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    create(str(path), 1 << 40)
    assert path.stat().st_blocks * 512 < 1 << 20
    runner = Runner(env, f"vmdk:{path}")
    offsets = [n * (GTES_PER_GT << 16) * 40 + 512 for n in range(800)]
    for at in offsets[:50]:
        assert runner.write(at, b"%08d" % (at % 99999999)) == 0
    for at in offsets:
        runner.read(at, 8)
    assert runner.read(offsets[49], 8) == b"%08d" % (offsets[49] % 99999999)
    mapping = runner.chain.drivers[0]._extents[0].mapping  # type: ignore[attr-defined]
    assert isinstance(mapping, Mapping)
    assert mapping.tables.capacity * mapping.header.table_bytes <= 8 << 20
    assert len(mapping.directory) * 4 == 128 << 10
    runner.close()


def test_discard_gives_the_space_back_and_uses_it_again(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    create(str(path), 8 << 20)
    runner = Runner(env, f"vmdk:{path}")
    assert runner.write(0, b"x" * (4 << 20)) == 0 and runner.flush() == 0
    full, length = path.stat().st_blocks, path.stat().st_size
    assert runner.discard(0, 4 << 20) == 0 and runner.flush() == 0
    quiet: list[bool] = []
    runner.chain.quiesce(lambda: quiet.append(True))
    env.loop.run_until(lambda: bool(quiet), 10)
    assert path.stat().st_blocks < full / 4
    assert runner.write(4 << 20, b"y" * (4 << 20)) == 0
    runner.close()
    assert path.stat().st_size == length
    assert check(str(path)).leaks == 0


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_both_copies_of_the_tables_are_kept_in_step(env: Env, tmp_path: Path, subformat: str) -> None:
    path = tmp_path / "a.vmdk"
    create(str(path), 8 << 20, subformat=subformat, split_bytes=3 << 20)
    runner = Runner(env, f"vmdk:{path}")
    assert runner.write(123456, b"x" * (4 << 20)) == 0 and runner.flush() == 0
    runner.close()
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages
    for file in tmp_path.glob("*.vmdk"):
        data = bytearray(file.read_bytes())
        if data[:4] == b"KDMV":
            data[48:56], data[56:64] = data[56:64], data[48:56]  # swap the directories
            file.write_bytes(data)
    again = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
    assert again.read(123456, 4 << 20) == b"x" * (4 << 20)
    again.close()


def test_the_content_id_changes_with_the_first_write_alone(env: Env, tmp_path: Path) -> None:
    for subformat in ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse"):
        path = tmp_path / f"{subformat}.vmdk"
        create(str(path), 1 << 20, subformat=subformat)
        first = cid_of(path)
        runner = Runner(env, f"vmdk:{path}")
        runner.read(0, 4096)
        assert runner.flush() == 0 and cid_of(path) == first
        batch = [Request(WRITE, at, 512, [memoryview(bytes(512))]) for at in range(0, 4096, 512)]
        assert set(runner.run(*batch)) == {0}
        second = cid_of(path)
        assert second != first
        assert runner.discard(0, 65536) == 0 and cid_of(path) == second
        runner.close()
        assert cid_of(path) == second


def test_a_parent_that_was_written_since_is_refused_until_it_is_accepted(env: Env, tmp_path: Path) -> None:
    disk = make_overlay(env, tmp_path)
    child = tmp_path / "a.vmdk"
    runner = Runner(env, f"vmdk:{child}")
    assert runner.read(0, SIZE) == disk
    with pytest.raises(ChainError, match="in use"):
        Runner(env, f"vmdk:{child}")
    runner.close()
    base = Runner(env, f"vmdk:{tmp_path}/base.vmdk")
    assert base.write(0, b"z" * 512) == 0
    base.close()
    with pytest.raises(ChainError, match=r"was written after.*parentCID.*td-img rebase -u"):
        Runner(env, f"vmdk:{child}")
    VmdkTools.set_backing(str(child), Backing("base.vmdk", "vmdk"))
    runner = Runner(env, f"vmdk:{child}")
    assert runner.read(0, SIZE) == b"z" * 512 + disk[512:]
    runner.close()
    VmdkTools.set_backing(str(child), None)
    runner = Runner(env, f"vmdk:{child}")
    assert runner.read(0, SIZE) == bytes(SIZE)
    runner.close()


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_own_status_is_without_the_parent(env: Env, tmp_path: Path, subformat: str) -> None:
    make_overlay(env, tmp_path, 1 << 20, 1 << 20, subformat=subformat, split_bytes=3 << 16, zeroed_grain=True)
    runner = Runner(env, f"vmdk:{tmp_path}/a.vmdk")
    assert runner.write(1 << 18, b"x" * (1 << 18)) == 0 and runner.zeroes(1 << 19, 1 << 16) == 0
    assert runner.status(0, 1 << 19) == [(1 << 19, 0)]
    own = Request(STATUS, 0, 1 << 20)
    done: list[Request] = []
    own.done = done.append
    assert isinstance(runner.head, Vmdk)
    if not runner.head.queue_own_status(own):
        env.loop.run_until(lambda: bool(done), 10)
    assert own.extents == [(1 << 18, STATUS_HOLE), (1 << 18, 0), (1 << 16, STATUS_ZERO), (7 << 16, STATUS_HOLE)]
    runner.close()


def test_a_parent_that_is_no_vmdk_is_refused(env: Env, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    create(str(tmp_path / "a.vmdk"), 1 << 20, parent=Parent("base.raw", 1))
    with pytest.raises(ChainError, match="is not a VMDK"):
        Runner(env, f"vmdk:{tmp_path}/a.vmdk")


def test_an_extent_with_tables_missing_gets_them_when_it_is_written(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    create(str(path), 8 << 20, grain_bytes=4096)
    data = bytearray(path.read_bytes())
    for at in (48, 56):
        directory = int.from_bytes(data[at : at + 8], "little") * 512
        data[directory + 4 : directory + 12] = bytes(8)
    path.write_bytes(data)
    runner = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
    assert runner.read(0, 8 << 20) == bytes(8 << 20)
    runner.close()
    runner = Runner(env, f"vmdk:{path}")
    content = random.Random(1).randbytes(8 << 20)
    assert runner.write(0, content) == 0
    runner.close()
    runner = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
    assert runner.read(0, 8 << 20) == content
    runner.close()
    assert check(str(path)).errors == 0


def test_an_extent_that_was_not_closed_gets_its_copies_in_step(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    create(str(path), 1 << 20)
    runner = Runner(env, f"vmdk:{path}")
    assert runner.write(0, b"x" * 65536) == 0 and runner.flush() == 0
    assert path.read_bytes()[72] == 1
    runner.close()
    data = bytearray(path.read_bytes())
    assert data[72] == 0
    data[72] = 1
    rgd = int.from_bytes(data[48:56], "little") * 512
    table = int.from_bytes(data[rgd : rgd + 4], "little") * 512
    data[table : table + 4] = bytes(4)
    path.write_bytes(data)
    assert check(str(path)).leaks == 1
    runner = Runner(env, f"vmdk:{path}")
    runner.close()
    assert path.read_bytes()[72] == 0
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0)


@pytest.mark.parametrize("name", ["/etc/shadow", "../a/secret", "sub/../../secret", "link", "linked/secret", ".."])
def test_an_extent_outside_the_folder_is_refused(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    (folder / "link").symlink_to("../secret")
    (folder / "linked").symlink_to("..")
    path = folder / "a.vmdk"
    path.write_text("# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n"
                    f'createType="monolithicFlat"\nRW 8 FLAT "{name}" 0\n')
    for flags in (OpenFlag.RDONLY, OpenFlag.NONE):
        with pytest.raises(ChainError, match="outside the image's folder"):
            Runner(env, f"vmdk:{path}", flags)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ChainError, match="outside the image's folder"):
        Runner(env, "vmdk:./a/a.vmdk", OpenFlag.RDONLY)


def test_an_extent_in_a_folder_below_is_found(env: Env, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.bin").write_bytes(b"0" * 512 + b"1" * 4096 + b"2" * 512)
    (tmp_path / "a.vmdk").write_text("# Disk DescriptorFile\nCID=00000001\ncreateType=\"monolithicFlat\"\n"
                                     'RW 8 FLAT "data/b.bin" 1\n')
    runner = Runner(env, f"vmdk:{tmp_path}/a.vmdk")
    assert runner.size == 4096 and runner.read(0, 4096) == b"1" * 4096
    assert runner.write(4000, b"x" * 96) == 0 and runner.flush() == 0
    assert runner.discard(0, 512) == 0
    runner.close()
    assert (tmp_path / "data" / "b.bin").read_bytes() == (
        b"0" * 512 + bytes(512) + b"1" * (4000 - 512) + b"x" * 96 + b"2" * 512)


@pytest.mark.parametrize(("line", "why"), [
    ('RW 8 SESPARSE "b"', "SESPARSE"), ('RW 8 VMFSRDM "b"', "VMFSRDM"), ("RW 8 ZERO", "ZERO"),
    ('NOACCESS 8 FLAT "b"', "NOACCESS"), ('RW 0 FLAT "b"', "absurd"), ('RW 99999999999999999 FLAT "b"', "absurd"),
    ("RW 8 FLAT", "no file's name"), ("nonsense", "line 5"), ('RW 8 FLAT "b"\nRW 8 FLAT "b"', "one file for two"),
    ('RW 9 FLAT "b" 0', "has 4096 bytes"), ('RW 8 SPARSE "b"', "magic"), ("", "names no extent"),
    ('RW 8 FLAT "missing"', "No such file"), ('RW 8 SPARSE "b" 4', "no offset"), ('RW 8 FLAT "a.vmdk"', "bytes"),
    ('parentCID=12', "parentFileNameHint"), ('parentCID=x', "hexadecimal"),
    ('encryption.keySafe = "x"\nRW 8 FLAT "b"', "encrypted")])
def test_descriptors_that_cannot_be_served_are_refused(env: Env, tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "b").write_bytes(bytes(4096))
    (tmp_path / "a.vmdk").write_text(f'# Disk DescriptorFile\nversion=1\nCID=1\ncreateType="custom"\n{line}\n')
    with pytest.raises(ChainError, match=why):
        Runner(env, f"vmdk:{tmp_path}/a.vmdk", OpenFlag.RDONLY)


@pytest.mark.parametrize(("text", "why"), [
    ("", "neither"), ("nothing of the kind", "neither"), ("# Disk DescriptorFile\n", "no CID"),
    ("# Disk DescriptorFile\nCID=1\n", "no createType"),
    ('# Disk DescriptorFile\nCID=1\ncreateType="fullDevice"\nRW 8 FLAT "b"', "fullDevice"),
    ('# Disk DescriptorFile\nversion=7\nCID=1\ncreateType="vmfs"\nRW 8 FLAT "b"', "version '7'"),
])
def test_files_that_are_no_vmdk_are_refused(env: Env, tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "a.vmdk").write_text(text)
    with pytest.raises(ChainError, match=why):
        Runner(env, f"vmdk:{tmp_path}/a.vmdk", OpenFlag.RDONLY)


@pytest.mark.parametrize(("before", "after"), [
    (b'createType="monolithicSparse"', b'createType="twoGbMaxExtentS"'),
    (b"# The Disk Data Base\n#DDB\n", b'RW 2048 SPARSE "b.vmdk"\n# \n')])
def test_an_image_of_which_this_file_is_a_part_is_refused(
    env: Env, tmp_path: Path, before: bytes, after: bytes
) -> None:
    path = tmp_path / "a.vmdk"
    create(str(path), 1 << 20)
    data = path.read_bytes()
    assert before in data
    path.write_bytes(data.replace(before, after.ljust(len(before))))
    with pytest.raises(ChainError, match="not supported in a file of this kind"):
        Runner(env, f"vmdk:{path}")


@pytest.mark.parametrize(("entry", "why"), [
    ("CID=12", "too few"), ('CID=00000012\nchangeTrackPath="a-ctk.vmdk"', "changeTrackPath")])
def test_what_must_not_be_written_is_read_all_the_same(env: Env, tmp_path: Path, entry: str, why: str) -> None:
    (tmp_path / "b").write_bytes(bytes(4096))
    (tmp_path / "a.vmdk").write_text(f'# Disk DescriptorFile\n{entry}\ncreateType="vmfs"\nRW 8 VMFS "b"\n')
    with pytest.raises(ChainError, match=why):
        Runner(env, f"vmdk:{tmp_path}/a.vmdk")
    runner = Runner(env, f"vmdk:{tmp_path}/a.vmdk", OpenFlag.RDONLY)
    assert runner.read(0, 4096) == bytes(4096)
    assert runner.write(0, b"x") == errno.EROFS
    runner.close()


def test_an_extent_on_its_own_leads_to_the_descriptor(env: Env, tmp_path: Path) -> None:
    create(str(tmp_path / "a.vmdk"), 1 << 20, subformat="twoGbMaxExtentSparse")
    with pytest.raises(ChainError, match="name the descriptor"):
        Runner(env, f"vmdk:{tmp_path}/a-s001.vmdk")


def test_a_disk_that_is_open_elsewhere_is_refused(env: Env, tmp_path: Path) -> None:
    create(str(tmp_path / "a.vmdk"), 1 << 20, subformat="twoGbMaxExtentFlat", split_bytes=1 << 19)
    lock = ImageFile.open(str(tmp_path / "a-f002.vmdk"), OpenFlag.NONE)
    with pytest.raises(ChainError, match=r"a-f002.vmdk: .*in use"):
        Runner(env, f"vmdk:{tmp_path}/a.vmdk")
    lock.close()
    Runner(env, f"vmdk:{tmp_path}/a.vmdk").close()


@pytest.mark.parametrize("options", [
    {"subformat": "x"}, {"adapter_type": "x"}, {"grain_bytes": 5000}, {"grain_bytes": 4 << 20},
    {"subformat": "monolithicFlat", "parent": Parent("b", 1)}, {"parent": Parent('b"', 1)},
    {"parent": Parent("b\n", 1)}, {"split_bytes": 100}, {"size_bytes": 100}, {"size_bytes": 0},
    {"size_bytes": 3 << 40}])
def test_what_no_image_can_be_is_not_made(tmp_path: Path, options: dict[str, Any]) -> None:
    arguments = {"size_bytes": 1 << 20} | options
    with pytest.raises(UsageError):
        create(str(tmp_path / "a.vmdk"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_image_that_could_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "a-s002.vmdk").write_bytes(b"mine")
    with pytest.raises(ImageError, match="exists"):
        create(str(tmp_path / "a.vmdk"), 1 << 20, subformat="twoGbMaxExtentSparse", split_bytes=1 << 19)
    assert [path.name for path in tmp_path.iterdir()] == ["a-s002.vmdk"]


def test_a_damaged_entry_is_an_error_of_its_range_alone(
    env: Env, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.vmdk"
    create(str(path), 1 << 20)
    runner = Runner(env, f"vmdk:{path}")
    assert runner.write(0, b"x" * (1 << 20)) == 0
    runner.close()
    data = bytearray(path.read_bytes())
    gd = int.from_bytes(data[56:64], "little") * 512
    table = int.from_bytes(data[gd : gd + 4], "little") * 512
    data[table + 4 : table + 8] = b"\x05\0\0\0"  # within the tables
    path.write_bytes(data)
    runner = Runner(env, f"vmdk:{path}")
    assert runner.run(Request(0, 65536, 512, [memoryview(bytearray(512))])) == [errno.EIO]
    assert "guest offset 65536" in caplog.text
    assert runner.write(65536, b"y") == errno.EIO
    assert runner.read(0, 65536) == b"x" * 65536
    assert runner.write(131072, b"z") == 0
    runner.close()
    assert check(str(path)).errors > 0
    report = check(str(path), repair=True)
    assert report.errors == 0 and report.repaired >= 1, report.messages
    again = Runner(env, f"vmdk:{path}", OpenFlag.RDONLY)
    assert again.read(65536, 512) == b"x" * 512
    again.close()
