"""Images that are written compressed read as what was written, and their refcounts are right."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from contract.runner import Runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tapcore.driver import Env, OpenFlag
from tapcore.errors import ImageError, UsageError
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.pack import PackedImage
from tapcore.formats.tools import find_tools

TOOLS = find_tools("qcow2")
KINDS = ("zero", "small", "large", "same", "left out")


def cluster(kind: str, length: int, rng: Random) -> bytes:
    if kind == "small":
        return rng.randbytes(length // 3).ljust(length, b"\7")
    return {"zero": bytes(length), "large": rng.randbytes(length), "same": b"\1" * length}.get(kind, b"")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=80), st.sampled_from([9, 10, 12]), st.integers(0, 1),
       st.sampled_from(["zlib", "zstd"]), st.integers(0, 99))
def test_what_was_written_is_read(
    env: Env, tmp_path: Path, kinds: list[str], bits: int, short: int, compression: str, seed: int
) -> None:
    path = tmp_path / "a.qcow2"
    path.unlink(missing_ok=True)
    rng = Random(seed)
    unit = 1 << bits
    size = len(kinds) * unit - short * (unit // 2 // 512 * 512)
    disk = bytearray(size)
    with PackedImage(str(path), size, cluster_bits=bits, compression=compression) as image:
        for number, kind in enumerate(kinds):
            data = cluster(kind, unit, rng)[: size - number * unit]
            if data:
                image.write(number * unit, data)
                disk[number * unit : number * unit + len(data)] = data
    report = check(str(path))
    assert (report.errors, report.leaks) == (0, 0), report.messages
    runner = Runner(env, f"qcow2:{path}", OpenFlag.RDONLY)
    assert runner.size == size and runner.read(0, size) == disk
    runner.close()


def test_it_can_be_written_afterwards(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    with PackedImage(str(path), 1 << 20) as image:
        image.write(0, b"\1" * (1 << 20))
    runner = Runner(env, f"qcow2:{path}")
    assert runner.write(512, b"\2" * 512) == 0
    assert runner.read(0, 1 << 20) == b"\1" * 512 + b"\2" * 512 + b"\1" * ((1 << 20) - 1024)
    runner.close()
    assert not check(str(path)).errors


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    with pytest.raises(KeyboardInterrupt), PackedImage(str(path), 1 << 20) as image:
        image.write(0, b"\1" * 65536)
        raise KeyboardInterrupt
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(ImageError, match="exists"):
        PackedImage(str(path), 1 << 20)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("options", [{"version": "2", "compression": "zstd"}, {"lazy_refcounts": "on"},
                                     {"cluster_size": "5000"}, {"compression": "lzma"}])
def test_what_no_image_can_be_is_refused(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        TOOLS.packer(str(tmp_path / "a"), 1 << 20, options, compress=True)
    assert list(tmp_path.iterdir()) == []
