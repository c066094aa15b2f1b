"""ram: memory that is taken when written, and given back."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import pytest
from contract.runner import Runner

from tapcore.driver import Env, OpenFlag
from tapcore.errors import ChainError
from tapcore.request import READ, Request


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_large_disk_costs_only_what_is_written(env: Env) -> None:
    before = resident_bytes()
    disk = Runner(env, "ram:1T")
    assert disk.size == 1 << 40
    assert disk.write((1 << 40) - 5, b"hello") == 0
    assert disk.read((1 << 40) - 6, 6) == b"\0hello"
    block = bytes(range(256)) * (1 << 16)
    assert disk.write(1 << 39, block) == 0
    assert resident_bytes() - before > 15 << 20
    assert disk.discard(0, 1 << 31) == 0
    assert disk.zeroes((1 << 39) + 100, (16 << 20) - 200) == 0
    assert resident_bytes() - before < 40 << 20
    assert disk.read(1 << 39, 200) == block[:100] + bytes(100)
    assert disk.read((1 << 39) + (16 << 20) - 200, 200) == bytes(100) + block[-100:]
    assert disk.late == 0
    disk.close()


def test_nothing_is_left_after_close(env: Env) -> None:
    for _ in range(2):
        disk = Runner(env, "ram:64K")
        assert disk.read(0, 65536) == bytes(65536)
        disk.write(0, b"x" * 65536)
        disk.close()


def test_read_only(env: Env) -> None:
    disk = Runner(env, "ram:4K", OpenFlag.RDONLY)
    assert disk.chain.info.read_only
    assert disk.write(0, b"x") == disk.zeroes(0, 512) == disk.discard(0, 512) == errno.EROFS
    assert disk.run(Request(READ, 0, 512, [memoryview(bytearray(512))])) == [0]
    disk.close()


@pytest.mark.parametrize("params, message", [
    ("", "size '' is not a size; a number of bytes, or one with K, M, G or T: 10G"),
    ("0", "the size '0' is not a positive multiple of 512 bytes"),
    ("1000", "the size '1000' is not a positive multiple of 512 bytes"),
    ("1M,x", "size '1M,x' is not a size"),
    ("999999999T", "no address space for"),
])
def test_a_bad_size(env: Env, params: str, message: str) -> None:
    with pytest.raises(ChainError) as caught:
        Runner(env, f"ram:{params}")
    assert f"ram: {message}" in str(caught.value)
