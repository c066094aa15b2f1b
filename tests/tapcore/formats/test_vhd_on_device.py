"""Dynamic VHDs on block devices, as XenServer keeps them: a footer at the end that stays, places full of old data,
discards that leave anything. A file stands for the device."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner
from formats_model import Model, disk_operations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhd_images import BLOCK, make_overlay

from tapcore.driver import Env, OpenFlag
from tapcore.drivers.vhd import Vhd
from tapcore.errors import ImageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.vhd.create import create
from tapcore.formats.vhd.tools import VhdTools, set_hidden
from tapcore.request import WRITE, Request

SIZE = 5 * BLOCK + 512


class DeviceFile(ImageFile):
    """`is_device` whatever it is. Its size does not change."""

    def __init__(self, path: str, fd: int, size_bytes: int, *, is_device: bool, read_only: bool) -> None:
        super().__init__(path, fd, size_bytes, is_device=True, read_only=read_only)

    def discard(self, offset: int, length: int) -> int:
        return self.write([memoryview(b"\xdd" * length)], offset, length)

    def truncate(self, length: int) -> None:
        raise AssertionError("a device cannot be cut")

    def close(self) -> None:
        assert self.length_now() == self.size_bytes
        super().close()


class OnDevice(Vhd):
    name = "vhd-on-device"
    file_kind = DeviceFile


def make_device(folder: Path, over_raw: bool, blocks: int) -> tuple[Path, bytes]:
    """An image in a device with room for so many blocks; what the disk holds."""
    image, device = folder / "a.vhd", folder / "device"
    disk = bytes(SIZE)
    if over_raw:
        data = random.Random(3).randbytes(3 * BLOCK)
        (folder / "base.raw").write_bytes(data)
        make_overlay(image, SIZE, "base.raw", "aio")
        disk = data.ljust(SIZE, b"\0")
    else:
        create(str(image), SIZE, block_bytes=BLOCK)
    content = image.read_bytes()
    old = random.Random(4).randbytes(blocks * (BLOCK + 4096) + 8192)
    device.write_bytes(content[:-512] + old + content[-512:])
    return device, disk


@pytest.fixture
def memory() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(over_raw=st.booleans(), ops=st.lists(disk_operations(SIZE), min_size=5, max_size=40))
def test_any_sequence(env: Env, over_raw: bool, ops: list[tuple[int, int, int, int, int]]) -> None:
    with TemporaryDirectory(dir="/dev/shm") as name:
        device, disk = make_device(Path(name), over_raw, 6)
        footer = device.read_bytes()[-512:]
        runner = Runner(env, f"vhd-on-device:{device}")
        model = Model(runner, disk)
        model.run(ops)
        runner.status(0, SIZE)
        assert runner.read(0, SIZE) == model.disk
        runner.close()
        assert device.read_bytes()[-512:] == footer
        again = Runner(env, f"vhd-on-device:{device}", OpenFlag.RDONLY)
        assert again.read(0, SIZE) == model.disk
        again.close()


def test_a_full_device_takes_no_more_blocks(env: Env, memory: Path) -> None:
    """Nothing is written over the footer; what is there already is still written, in one batch, too."""
    device, _ = make_device(memory, False, 2)
    runner = Runner(env, f"vhd-on-device:{device}")
    assert runner.write(0, b"a" * BLOCK) == 0
    assert runner.write(BLOCK, b"b" * 3 * BLOCK) == errno.ENOSPC
    writes = [Request(WRITE, at, 1000, [memoryview(b"c" * 1000)]) for at in (BLOCK, BLOCK + 5000, 2 * BLOCK, 500)]
    assert runner.run(*writes) == [0, 0, errno.ENOSPC, 0]
    assert runner.zeroes(3 * BLOCK, BLOCK) == 0 and runner.discard(3 * BLOCK, BLOCK) == 0
    assert runner.flush() == 0
    expected = b"a" * 500 + b"c" * 1000 + b"a" * (BLOCK - 1500) + b"c" * 1000 + bytes(4000) + b"c" * 1000
    assert runner.read(0, SIZE) == expected.ljust(SIZE, b"\0")
    runner.close()
    again = Runner(env, f"vhd-on-device:{device}", OpenFlag.RDONLY)
    assert again.read(0, SIZE) == expected.ljust(SIZE, b"\0")
    again.close()


def test_a_footer_that_is_not_at_the_end_comes_there(env: Env, memory: Path) -> None:
    """As after a volume has grown."""
    device, _ = make_device(memory, False, 2)
    footer = device.read_bytes()[-512:]
    device.write_bytes(device.read_bytes() + b"?" * BLOCK)
    runner = Runner(env, f"vhd-on-device:{device}")
    runner.close()
    assert device.read_bytes()[-512:] == footer


def test_marks_are_changed_and_places_are_not(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = make_device(memory, False, 2)
    monkeypatch.setattr("tapcore.formats.vhd.tools.ImageFile", DeviceFile)
    set_hidden(str(device), True)
    assert VhdTools.describe(str(device))["hidden"]
    before = device.read_bytes()
    with pytest.raises(ImageError, match="on a block device are not changed"):
        VhdTools.resize(str(device), 9 * BLOCK)
    with pytest.raises(ImageError, match="on a block device are not changed"):
        VhdTools.set_backing(str(device), None)
    assert device.read_bytes() == before
