"""The tools of blktap by their names and option letters, on images that QEMU reads too."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random

import pytest
from support import need

from tapcore.formats.vhd.tools import set_hidden
from tapcore.img import cli, legacy, vhd_util

MIB = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-img")
    monkeypatch.chdir(tmp_path)


def run(main: Callable[[list[str]], int], *arguments: str, status: int = 0) -> str:
    """What the tool prints. AssertionError for another exit code."""
    said, error = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(error):
        code = main(list(arguments))
    assert code == status, (code, said.getvalue(), error.getvalue())
    return said.getvalue() + error.getvalue()


def vhd(*arguments: str, status: int = 0) -> str:
    return run(vhd_util.main, *arguments, status=status)


def write(path: str, offset: int, data: bytes, kind: str = "vhd") -> None:
    Path("data").write_bytes(data)
    run(cli.main, "write", "-f", kind, "--offset", str(offset), "--file", "data", path)


def content(path: str, kind: str) -> bytes:
    Path("content").unlink(missing_ok=True)
    run(cli.main, "convert", "-f", kind, "-O", "raw", path, "content")
    return Path("content").read_bytes()


def qemu_size(path: str, kind: str = "vpc") -> int:
    command = ["qemu-img", "info", "--output=json", "-f", kind, path]
    done = subprocess.run(command, capture_output=True, check=True, timeout=30)
    return int(json.loads(done.stdout)["virtual-size"])


def test_vhd_util_create_query_check_resize() -> None:
    vhd("create", "-n", "a.vhd", "-s", "8")
    assert qemu_size("a.vhd") == 8 * MIB
    size = Path("a.vhd").stat().st_size
    assert vhd("query", "-n", "a.vhd", "-v", "-s", "-p", "-f", "-d") == (
        f"8\n{size}\na.vhd has no parent\nhidden: 0\nchain depth: 1\n")
    assert vhd("check", "-n", "a.vhd") == "a.vhd is valid\n"
    vhd("resize", "-n", "a.vhd", "-s", "16", "-j", "journal")
    assert qemu_size("a.vhd") == 16 * MIB and vhd("query", "-n", "a.vhd", "-v") == "16\n"
    assert "--shrink" in vhd("resize", "-n", "a.vhd", "-s", "8", status=2)
    vhd("create", "-n", "fixed.vhd", "-s", "8", "-r")
    assert Path("fixed.vhd").stat().st_size == 8 * MIB + 512
    assert "exists" in vhd("create", "-n", "a.vhd", "-s", "8", status=1)
    with Path("a.vhd").open("r+b") as file:
        os.pwrite(file.fileno(), b"broken", 16)
    assert "valid" not in vhd("check", "-n", "a.vhd", status=1)


def test_vhd_util_snapshot_and_coalesce() -> None:
    data = Random(1).randbytes(MIB)
    vhd("create", "-n", "base.vhd", "-s", "8")
    write("base.vhd", 0, data)
    Path("sub").mkdir()
    vhd("snapshot", "-n", "sub/one.vhd", "-p", "base.vhd")
    assert vhd("query", "-n", "sub/one.vhd", "-p", "-d") == f"{Path('base.vhd').resolve()}\nchain depth: 2\n"
    vhd("snapshot", "-n", "two.vhd", "-p", "sub/one.vhd")
    assert "base.vhd" in vhd("query", "-n", "two.vhd", "-p"), "an empty image is passed over"
    vhd("snapshot", "-n", "three.vhd", "-p", "sub/one.vhd", "-e")
    assert vhd("query", "-n", "three.vhd", "-d") == "chain depth: 3\n"
    assert "more than 3" in vhd("snapshot", "-n", "four.vhd", "-p", "three.vhd", "-e", "-l", "3", status=2)
    assert not Path("four.vhd").exists()
    write("three.vhd", 4 * MIB, data[:65536])
    want = content("three.vhd", "vhd")
    assert want[4 * MIB :][:65536] == data[:65536] and want[:MIB] == data
    vhd("coalesce", "-n", "three.vhd")
    assert content("sub/one.vhd", "vhd") == want
    assert vhd("check", "-n", "three.vhd", "-p").count("is valid\n") == 3
    Path("raw.img").write_bytes(data)
    vhd("snapshot", "-n", "over-raw.vhd", "-p", "raw.img", "-m")
    assert content("over-raw.vhd", "vhd") == data


def test_vhd_util_scan() -> None:
    vhd("create", "-n", "base.vhd", "-s", "8")
    write("base.vhd", 0, b"\1" * 512)
    vhd("snapshot", "-n", "a.vhd", "-p", "base.vhd")
    vhd("snapshot", "-n", "b.vhd", "-p", "base.vhd", "-e")
    set_hidden("b.vhd", True)
    size = {name: Path(name).stat().st_size for name in ("base.vhd", "a.vhd", "b.vhd")}
    lines = {name: f"vhd={name} capacity={8 * MIB} size={size[name]} hidden={int(name == 'b.vhd')} parent={parent}"
             for name, parent in (("base.vhd", "none"), ("a.vhd", "base.vhd"), ("b.vhd", "base.vhd"))}
    assert vhd("scan", "-m", "*.vhd") == "".join(f"{lines[name]}\n" for name in sorted(lines))
    assert vhd("scan", "-a", "a.vhd") == f"{lines['a.vhd']}\n{lines['base.vhd']}\n"
    assert vhd("scan", "-p", "-a", "a.vhd", "b.vhd") == (
        f"{lines['base.vhd']}\n   {lines['a.vhd']}\n   {lines['b.vhd']}\n")
    assert vhd("scan", "-p", "a.vhd") == f"{lines['a.vhd']} (not found in scan)\n"
    Path("broken.vhd").write_bytes(b"no image" * 100)
    assert "vhd=broken.vhd scan-error=" in vhd("scan", "broken.vhd", "a.vhd", status=1)
    assert lines["a.vhd"] in vhd("scan", "-c", "broken.vhd", "a.vhd")
    vhd("scan", status=2)


def test_vhd_util_tells_its_commands() -> None:
    assert "coalesce" in vhd("-h")
    assert "unknown command 'fill'" in vhd("fill", status=2)
    for command in vhd_util.VHD_COMMANDS:
        with pytest.raises(SystemExit) as end:
            vhd(command, "-h")
        assert end.value.code == 0


def test_tapdisk_stream_and_diff() -> None:
    data = Random(2).randbytes(3 * MIB)
    Path("a.img").write_bytes(data)
    run(cli.main, "convert", "a.img", "a.vhd")
    command = [sys.executable, "-c", "from tapcore.img.legacy import tapdisk_stream as f; raise SystemExit(f())"]
    for options, want in (([], data), (["-c", "3"], data[:1536]), (["-s", "2", "-c", "2"], data[1024:2048])):
        said = subprocess.run([*command, "-n", f"vhd:{Path('a.vhd').resolve()}", *options], capture_output=True,
                              timeout=30, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        assert said.stdout == want
    assert run(legacy.tapdisk_diff, "-n", "a.vhd", "-m", "a.img") == ""
    write("a.img", MIB, b"\0" * 512, "raw")
    assert run(legacy.tapdisk_diff, "-n", "a.vhd", "-m", "a.img", status=1) == "mismatch at sector 2048\n"
    os.truncate("a.img", 2 * MIB)
    assert "sizes differ" in run(legacy.tapdisk_diff, "-n", "a.vhd", "-m", "a.img", status=1)


def test_qcow_tools() -> None:
    data = Random(3).randbytes(MIB)
    Path("a.img").write_bytes(data)
    run(legacy.img2qcow, "a.qcow", "a.img")
    assert qemu_size("a.qcow", "qcow") == MIB
    subprocess.run(["qemu-img", "compare", "a.qcow", "a.img"], timeout=30, check=True, capture_output=True)
    run(legacy.qcow2raw, "back.img", "a.qcow")
    assert Path("back.img").read_bytes() == data
    Path("sub").mkdir()
    run(legacy.qcow_create, "2", "sub/over.qcow", "a.img")
    assert qemu_size("sub/over.qcow", "qcow") == 2 * MIB
    assert content("sub/over.qcow", "qcow") == data + bytes(MIB)
