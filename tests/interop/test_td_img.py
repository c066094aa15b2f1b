"""td-img as a program, beside qemu-img: what it makes, converts, compares and refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import pytest
from processes import Tapdisk
from support import need

from tapcore.img import vhd_util
from tapcore.img.cli import main

SIZE = 8 << 20
FORMATS = {"raw": "raw", "qcow": "qcow", "qcow2": "qcow2", "vhd": "vpc", "vmdk": "vmdk"}
CHECKED = ("qcow2", "vmdk")
"""Ours, and qemu-img's names of them; and those that qemu-img can check."""


@pytest.fixture(autouse=True)
def programs() -> None:
    need("qemu-img")


def td_img(*arguments: object, status: int = 0) -> str:
    """The command, run here: its output. AssertionError for another exit code, or more than one line of error."""
    said, error = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(error):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    assert code == status, (code, said.getvalue(), error.getvalue())
    assert error.getvalue().count("\n") <= bool(status), error.getvalue()
    return said.getvalue() + error.getvalue()


def as_json(*arguments: object, status: int = 0) -> Any:
    return json.loads(td_img("--json", *arguments, status=status))


def qemu_img(*arguments: object) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sparse(path: Path, seed: int = 1) -> bytes:
    """A raw disk with data, zeroes that are written, and holes; its content."""
    rng = Random(seed)
    content = bytearray(SIZE)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, length in ((0, 512), (100 << 10, 300 << 10), (3 << 20, 1 << 20), (SIZE - 4096, 4096)):
            data = rng.randbytes(length // 2).ljust(length, b"\0")
            os.pwrite(file.fileno(), data, offset)
            content[offset : offset + length] = data
    return bytes(content)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_convert_from_each_to_each(tmp_path: Path, source: str, target: str) -> None:
    """An image that qemu-img made becomes one that qemu-img finds equal and as sparse as its own."""
    sparse(tmp_path / "disk")
    one, other, theirs = (tmp_path / name for name in ("one", "other", "theirs"))
    qemu_img("convert", "-f", "raw", "-O", FORMATS[source], tmp_path / "disk", one)
    td_img("convert", "-f", source, "-O", target, one, other)
    qemu_img("compare", "-f", "raw", "-F", FORMATS[target], tmp_path / "disk", other)
    qemu_img("convert", "-f", "raw", "-O", FORMATS[target], tmp_path / "disk", theirs)
    assert other.stat().st_blocks <= theirs.stat().st_blocks + 256, "zeroes take no space"
    assert as_json("compare", "-f", source, "-F", target, one, other)["equal"]
    assert as_json("check", "-f", target, other)["errors"] == 0
    if target in CHECKED:
        qemu_img("check", "-f", FORMATS[target], other)


@pytest.mark.parametrize(("target", "options", "files"), [
    ("vmdk", ["-o", "subformat=twoGbMaxExtentSparse"], 2), ("vmdk", ["-o", "subformat=monolithicFlat"], 2),
    ("vmdk", ["-c"], 1), ("vmdk", ["-o", "subformat=streamOptimized,adapter_type=lsilogic"], 1),
    ("vhd", ["-o", "variant=fixed"], 1), ("qcow2", ["-o", "version=2,cluster_size=512"], 1),
    ("qcow2", ["-o", "cluster_size=2M"], 1), ("qcow2", ["-c"], 1), ("qcow2", ["-c", "-o", "compression=zstd"], 1),
    ("qcow2", ["-c", "-o", "version=2,cluster_size=512"], 1), ("qcow2", ["-c", "-o", "cluster_size=2M"], 1),
])
def test_convert_to_variants(tmp_path: Path, target: str, options: list[str], files: int) -> None:
    sparse(tmp_path / "disk")
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "a.image"
    td_img("convert", "-O", target, *options, tmp_path / "disk", path)
    assert len(list(folder.iterdir())) == files
    qemu_img("compare", "-f", "raw", "-F", FORMATS[target], tmp_path / "disk", path)
    if target in CHECKED:
        qemu_img("check", "-f", FORMATS[target], path)
    assert "exists" in td_img("convert", "-O", target, *options, tmp_path / "disk", path, status=1)
    td_img("convert", "--force", "-O", target, *options, tmp_path / "disk", path)
    td_img("compare", "-F", target, tmp_path / "disk", path)
    assert len(list(folder.iterdir())) == files


@pytest.mark.parametrize("name", FORMATS)
def test_over_nbd_and_a_log(serve: Callable[..., Tapdisk], tmp_path: Path, name: str) -> None:
    """A served disk is read, and written into."""
    sparse(tmp_path / "disk")
    td_img("convert", "-O", name, tmp_path / "disk", tmp_path / "a")
    driver = {"raw": "aio"}.get(name, name)
    disk = serve(f"log:|{driver}:{tmp_path}/a")
    td_img("convert", disk.uri, tmp_path / "back.img")
    qemu_img("compare", "-f", "raw", "-F", "raw", tmp_path / "disk", tmp_path / "back.img")
    sparse(tmp_path / "disk", seed=2)
    td_img("convert", tmp_path / "disk", f"nbd:{disk.uri}")
    assert as_json("compare", tmp_path / "disk", disk.uri)["equal"]
    refused = td_img("convert", "-n", "-O", name, tmp_path / "disk", tmp_path / "a", status=1)
    assert "in use" in refused and f"process {disk.process.pid} (" in refused


@pytest.mark.parametrize(("source", "options"), [
    ("qcow2", ["-c", "-o", "compression_type=zstd"]), ("qcow2", ["-o", "compat=0.10,cluster_size=512"]),
    ("qcow2", ["-o", "extended_l2=on,cluster_size=128k"]),
    ("vmdk", ["-o", "subformat=streamOptimized"]), ("vmdk", ["-o", "subformat=monolithicFlat"]),
    ("vmdk", ["-o", "subformat=twoGbMaxExtentSparse"]), ("vmdk", ["-o", "subformat=twoGbMaxExtentFlat"]),
    ("vhd", ["-o", "subformat=fixed"]),
])
def test_convert_from_variants_of_qemu(tmp_path: Path, source: str, options: list[str]) -> None:
    content = sparse(tmp_path / "disk")
    path = tmp_path / f"disk.{source}"
    qemu_img("convert", "-f", "raw", "-O", FORMATS[source], *options, tmp_path / "disk", path)
    td_img("convert", "-f", source, path, tmp_path / "back.img")
    back = (tmp_path / "back.img").read_bytes()
    assert back[:SIZE] == content and not any(back[SIZE:])
    assert as_json("info", "-f", source, path)["format"] == source


@pytest.mark.parametrize("options", [[], ["-o", "compression=zstd"]])
def test_what_is_written_compressed_is_as_small_as_theirs(tmp_path: Path, options: list[str]) -> None:
    rng = Random(5)
    words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(300)]
    text = b"".join(rng.choice(words) for _ in range(1 << 20))[: 4 << 20]
    (tmp_path / "disk").write_bytes(text + rng.randbytes(1 << 20) + text[: 1 << 20])
    td_img("convert", "-c", *options, tmp_path / "disk", tmp_path / "ours.qcow2")
    theirs = [option.replace("compression", "compression_type") for option in options]
    qemu_img("convert", "-c", "-O", "qcow2", *theirs, tmp_path / "disk", tmp_path / "theirs.qcow2")
    qemu_img("compare", tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2")
    qemu_img("check", tmp_path / "ours.qcow2")
    sizes = [(tmp_path / name).stat().st_blocks for name in ("ours.qcow2", "theirs.qcow2")]
    assert sizes[0] <= sizes[1] * 1.03


def test_formats_without_compression_say_so(tmp_path: Path) -> None:
    sparse(tmp_path / "disk")
    for target in ("raw", "vhd", "qcow"):
        said = td_img("convert", "-c", "-O", target, tmp_path / "disk", tmp_path / "a", status=1)
        assert "write compressed" in said
        assert not (tmp_path / "a").exists()


def test_an_image_is_not_changed_below_one_that_is_used(serve: Callable[..., Tapdisk], tmp_path: Path) -> None:
    content = sparse(tmp_path / "base.img")
    for name in ("used.qcow2", "top.qcow2"):
        td_img("create", "-b", "base.img", "-F", "raw", tmp_path / name)
    disk = serve(f"qcow2:{tmp_path}/used.qcow2")
    part = tmp_path / "part"
    part.write_bytes(b"\5" * 65536)
    for arguments in (("write", "--file", part, tmp_path / "base.img"), ("commit", tmp_path / "top.qcow2"),
                      ("convert", "-n", part, tmp_path / "base.img"), ("resize", tmp_path / "base.img", "+1M"),
                      ("convert", "--force", part, tmp_path / "base.img")):
        assert f"process {disk.process.pid} (" in td_img(*arguments, status=1), arguments
    assert (tmp_path / "base.img").read_bytes() == content
    td_img("info", tmp_path / "used.qcow2")
    disk.stop()
    td_img("commit", tmp_path / "top.qcow2")


def test_a_parent_that_is_used_is_not_repaired_or_rebased(
    serve: Callable[..., Tapdisk], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, used, other = (tmp_path / f"{name}.vhd" for name in ("base", "used", "other"))
    for path in (base, other):
        td_img("create", path, "4M")
    td_img("create", "-b", base.name, "-F", "vhd", used)
    before = base.read_bytes()
    disk = serve(f"vhd:{used}")
    for arguments in (("check", "--repair", base), ("rebase", "-u", "-b", other.name, "-F", "vhd", base)):
        assert f"process {disk.process.pid} (" in td_img(*arguments, status=1), arguments
    assert vhd_util.main(["resize", "-n", str(base), "-s", "8"]) == 1
    assert f"process {disk.process.pid} (" in capsys.readouterr().err
    td_img("check", base)
    disk.stop()
    assert base.read_bytes() == before
    td_img("check", "--repair", base)


def test_a_source_that_is_gone_does_not_hold_the_program(serve: Callable[..., Tapdisk], tmp_path: Path) -> None:
    """Requests to a server wait for it as long as it takes; whoever asked may give up."""
    sparse(tmp_path / "disk")
    disk = serve(f"delay:read=1000|aio:{tmp_path}/disk")
    command = [sys.executable, "-m", "tapcore.img.cli", "convert", disk.uri, str(tmp_path / "new.img")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob(".new.img.*.partial/new.img")):
            assert process.poll() is None, process.communicate()
        disk.kill()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and b"interrupted" in error
    assert list(tmp_path.glob(".new*")) == [] and not (tmp_path / "new.img").exists()


def test_an_existing_image_is_written_where_it_is(tmp_path: Path) -> None:
    content = sparse(tmp_path / "disk")
    (tmp_path / "b").write_bytes(b"\7" * (SIZE + 65536))
    td_img("convert", "-n", tmp_path / "disk", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content + bytes(65536)
    os.truncate(tmp_path / "b", 4096)
    assert "too few" in td_img("convert", "-n", tmp_path / "disk", tmp_path / "b", status=2)


def test_a_convert_that_fails_leaves_nothing(tmp_path: Path) -> None:
    sparse(tmp_path / "disk")
    before = sorted(tmp_path.iterdir())
    bad = f"error:op=read,offset=3M-4M|aio:{tmp_path}/disk"
    said = td_img("convert", bad, tmp_path / "new.qcow2", status=1)
    assert "read failed: Input/output error (at byte 3145728)" in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_convert_that_is_ended_leaves_nothing_that_looks_whole(tmp_path: Path, how: signal.Signals) -> None:
    sparse(tmp_path / "disk")
    command = [sys.executable, "-m", "tapcore.img.cli", "convert", f"delay:read=1000|aio:{tmp_path}/disk",
               str(tmp_path / "new.qcow2")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob(".new.qcow2.*.partial/new.qcow2")):
            assert process.poll() is None, process.communicate()
        process.send_signal(how)
        _, error = process.communicate(timeout=20)
    assert not (tmp_path / "new.qcow2").exists() and process.returncode != 0
    if how != signal.SIGKILL:
        assert error == b"td-img: interrupted\n"
        assert list(tmp_path.glob(".*")) == []


def test_what_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    content = sparse(tmp_path / "disk")
    (tmp_path / "b.img").write_bytes(b"precious")
    assert "--force" in td_img("convert", tmp_path / "disk", tmp_path / "b.img", status=1)
    assert (tmp_path / "b.img").read_bytes() == b"precious"
    td_img("convert", "--force", tmp_path / "disk", tmp_path / "b.img")
    assert (tmp_path / "b.img").read_bytes() == content


def test_progress_is_told_on_standard_error(tmp_path: Path) -> None:
    sparse(tmp_path / "disk")
    command = [sys.executable, "-m", "tapcore.img.cli", "--json", "convert", "-p", str(tmp_path / "disk"),
               str(tmp_path / "new.qcow2")]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["done_bytes"] == last["total_bytes"] < SIZE
    assert json.loads(done.stdout)["data_bytes"] == last["total_bytes"]


def test_compare_tells_the_first_difference_by_its_exit_code(tmp_path: Path) -> None:
    sparse(tmp_path / "one")
    sparse(tmp_path / "other")
    assert td_img("compare", tmp_path / "one", tmp_path / "other") == "equal\n"
    with (tmp_path / "other").open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 5 << 20)
    assert f"byte {5 << 20}" in td_img("compare", tmp_path / "one", tmp_path / "other", status=1)
    td_img("compare", tmp_path / "one", tmp_path / "missing", status=2)
    os.truncate(tmp_path / "one", SIZE + 4096)
    assert as_json("compare", "-s", tmp_path / "one", tmp_path / "one") == {
        "equal": True, "offset": None, "size_bytes": [SIZE + 4096] * 2}
    td_img("compare", "-s", tmp_path / "one", tmp_path / "other", status=1)


def test_an_overlay_made_described_mapped_and_committed(tmp_path: Path) -> None:
    content = bytearray(sparse(tmp_path / "base.img"))
    td_img("create", "-b", "base.img", "-F", "raw", tmp_path / "top.qcow2")
    (tmp_path / "part").write_bytes(b"\5" * 65536)
    td_img("write", "-f", "qcow2", tmp_path / "top.qcow2", "--offset", "1M", "--file", tmp_path / "part")
    content[1 << 20 : (1 << 20) + 65536] = b"\5" * 65536
    theirs = json.loads(qemu_img("info", "--output=json", tmp_path / "top.qcow2"))
    assert (theirs["backing-filename"], theirs["backing-filename-format"]) == ("base.img", "raw")
    top, base = as_json("info", "--backing-chain", tmp_path / "top.qcow2")
    assert (top["format"], base["format"], top["size_bytes"]) == ("qcow2", "raw", SIZE)
    extents = as_json("map", tmp_path / "top.qcow2")["extents"]
    assert [extent["offset"] for extent in extents if extent["depth"] == 0] == [1 << 20]
    assert sum(extent["length"] for extent in extents) == SIZE
    td_img("commit", "--delete", tmp_path / "top.qcow2")
    assert (tmp_path / "base.img").read_bytes() == content
    assert not (tmp_path / "top.qcow2").exists()


@pytest.mark.parametrize("name", ["qcow", "qcow2", "vhd"])
def test_a_backing_with_a_colon_in_its_name(tmp_path: Path, name: str) -> None:
    base, top = tmp_path / f"a:b.{name}", tmp_path / f"top.{name}"
    td_img("create", base, "1M")
    td_img("create", "-b", base.name, "-F", name, top)
    assert [Path(level["image"]) for level in as_json("info", "--backing-chain", top)] == [top, base]
    td_img("rebase", "-b", base.name, "-F", name, top)
    assert as_json("map", top)


def test_a_chain_that_is_a_loop_is_not_described(tmp_path: Path) -> None:
    one, two = tmp_path / "one.qcow2", tmp_path / "two.qcow2"
    td_img("create", one, "1M")
    td_img("create", "-b", one.name, "-F", "qcow2", two)
    td_img("rebase", "-u", "-b", two.name, "-F", "qcow2", one)
    assert f"two.qcow2 leads back to {one}" in td_img("info", "--backing-chain", one, status=1)
    assert as_json("info", one)["backing"] == str(two)


def test_snapshots_inside_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    (tmp_path / "part").write_bytes(b"\5" * 65536)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    td_img("convert", tmp_path / "disk", path)
    assert as_json("snapshot", "-c", "empty", path)["name"] == "empty"
    td_img("write", "--file", tmp_path / "part", path)
    assert "empty" in qemu_img("snapshot", "-l", path)
    assert [taken["name"] for taken in as_json("snapshot", "-l", path)] == ["empty"]
    td_img("compare", path, tmp_path / "disk", status=1)
    td_img("snapshot", "-a", "empty", path)
    td_img("compare", path, tmp_path / "disk")
    td_img("snapshot", "-d", "empty", path)
    assert as_json("snapshot", path) == []
    td_img("snapshot", "-a", "empty", path, status=2)
    assert "no internal snapshots" in td_img("snapshot", "-l", tmp_path / "disk", status=2)
    qemu_img("check", path)


def test_a_rebase_as_qemu_finds_it(tmp_path: Path) -> None:
    sparse(tmp_path / "old.img")
    sparse(tmp_path / "new.img", seed=2)
    top = tmp_path / "top.qcow2"
    td_img("create", "-b", "old.img", top)
    qemu_img("convert", "-O", "raw", top, tmp_path / "before")
    assert as_json("rebase", "-b", "new.img", "-F", "raw", top)["copied_bytes"] > 0
    (tmp_path / "old.img").unlink()
    qemu_img("compare", top, tmp_path / "before")
    assert json.loads(qemu_img("info", "--output=json", top))["backing-filename"] == "new.img"
    td_img("rebase", "-b", "", top)
    (tmp_path / "new.img").rename(tmp_path / "moved.img")
    qemu_img("compare", top, tmp_path / "before")
    td_img("rebase", "--unsafe", "-b", "gone.img", "-F", "raw", top)
    assert json.loads(qemu_img("info", "--output=json", top))["backing-filename"] == "gone.img"
    td_img("compare", top, tmp_path / "before", status=2)


def test_resize(tmp_path: Path) -> None:
    for path in (tmp_path / "a.qcow2", tmp_path / "a.img"):
        td_img("create", path, "1M")
        td_img("resize", path, "+1M")
        assert json.loads(qemu_img("info", "--output=json", path))["virtual-size"] == 2 << 20
        assert "--shrink" in td_img("resize", path, "512K", status=2)
        td_img("resize", "--shrink", path, "-1536K")
        assert as_json("info", path)["size_bytes"] == 512 << 10


def test_ranges_are_read_and_written(tmp_path: Path) -> None:
    td_img("create", tmp_path / "a.qcow2", "20M")
    data = Random(3).randbytes(9 << 20)
    (tmp_path / "part").write_bytes(data)
    td_img("write", "--offset", "512", "--file", tmp_path / "part", tmp_path / "a.qcow2")
    td_img("read", "--offset", 512, "--length", len(data), "--file", tmp_path / "back", tmp_path / "a.qcow2")
    assert (tmp_path / "back").read_bytes() == data
    qemu_img("convert", "-O", "raw", tmp_path / "a.qcow2", tmp_path / "a.raw")
    assert (tmp_path / "a.raw").read_bytes() == (bytes(512) + data).ljust(20 << 20, b"\0")
    for arguments, words, status in (
            (("read", "--offset", "20M", "--length", "512"), "not inside", 2),
            (("write", "--offset", "19M", "--file", tmp_path / "part"), "longer than", 2),
            (("write", "--length", "10M", "--file", tmp_path / "part"), "ended after", 2),
            (("read", "--file", tmp_path / "no" / "file"), "No such file", 1)):
        assert words in td_img(arguments[0], tmp_path / "a.qcow2", *arguments[1:], status=status)


def test_pipes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tapcore.img.cli"]
    data = Random(4).randbytes(3 << 20)
    td_img("create", tmp_path / "a.qcow2", "4M")
    subprocess.run([*command, "write", str(tmp_path / "a.qcow2")], input=data, timeout=60, check=True)
    with subprocess.Popen([*command, "read", str(tmp_path / "a.qcow2")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1000) == data[:1000]
        process.stdout.close()
        assert process.wait(30) == 1, "nobody reads any more"


def test_check_has_an_exit_code_for_each_end(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    td_img("create", path, "1M")
    td_img("check", path)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"\0\1", 2 * 65536 + 2 * 1)  # another refcount for the refcount table
        os.pwrite(file.fileno(), b"\0\2", 2 * 65536 + 2 * 2)
    td_img("check", path, status=3)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"\0\0", 2 * 65536 + 2 * 1)
    td_img("check", path, status=2)
    td_img("check", tmp_path / "missing", status=1)


@pytest.mark.parametrize(("arguments", "words"), [
    (("create", "a", "1000"), "not a multiple of 512"), (("create", "a"), "size is missing"),
    (("create", "-f", "foo", "a", "1G"), "known formats: "), (("create", "a", "1X"), "not a size"),
    (("create", "-o", "x=1", "a.qcow2", "1G"), "options of qcow2: version"),
    (("create", "-F", "raw", "a.qcow2", "1G"), "name it with -b"),
    (("create", "-b", "no", "a.qcow2"), "there is no backing file"),
    (("resize", "ram:1M", "2M"), "is a chain"), (("info", "qcwo2:/a"), "unknown driver"),
])
def test_bad_usage_is_refused_in_one_line_with_nothing_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in td_img(*arguments, status=2)
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_help_with_examples() -> None:
    for name in ("create", "info", "check", "map", "convert", "compare", "commit", "rebase", "resize",
                 "snapshot", "read", "write"):
        said = td_img(name, "--help")
        assert "examples:" in said and "exit codes:" in said


def test_a_data_file_is_made_and_appears_with_its_image(tmp_path: Path) -> None:
    content = sparse(tmp_path / "a.raw")
    image, elsewhere = tmp_path / "images" / "b.qcow2", tmp_path / "elsewhere"
    elsewhere.mkdir()
    image.parent.mkdir()
    options = f"data_file={elsewhere}/b.data,data_file_raw=on"
    assert "--existing" in td_img("convert", "-o", options, tmp_path / "a.raw", image, status=2)
    assert list(elsewhere.iterdir()) == [] and not image.exists()
    td_img("create", "-o", options, image, SIZE)
    assert "outside the image's folder" in td_img("convert", "--existing", tmp_path / "a.raw", image, status=1)
    chain = f"qcow2:data_file={elsewhere}/b.data,{image}"
    td_img("convert", "--existing", tmp_path / "a.raw", chain)
    assert (elsewhere / "b.data").read_bytes() == content
    qemu_img("compare", tmp_path / "a.raw", image)
    td_img("convert", "-o", "data_file=c.data", chain, tmp_path / "c.qcow2")
    assert (tmp_path / "c.data").exists() and td_img("compare", chain, tmp_path / "c.qcow2")
