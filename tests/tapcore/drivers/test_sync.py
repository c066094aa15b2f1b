"""sync: everything is complete when the verb returns."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from contract.runner import Runner

from tapcore.driver import Env
from tapcore.errors import ChainError
from tapcore.request import BACKGROUND, DISCARD, FLUSH, FUA, READ, STATUS, WRITE, ZEROES, Request


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(65536))
    return path


def test_everything_is_inline(env: Env, image: Path) -> None:
    disk = Runner(env, f"sync:{image}")
    data = bytearray(b"x" * 512)
    ops = [Request(WRITE, 512, 512, [memoryview(data)], FUA), Request(FLUSH),
           Request(READ, 512, 512, [memoryview(data)]),
           Request(ZEROES, 512, 512), Request(DISCARD, 0, 4096, flags=BACKGROUND), Request(STATUS, 0, 4096)]
    assert disk.run(*ops) == [0] * 6
    assert disk.early == 6 and disk.late == 0
    disk.close()


def test_errors_are_those_of_the_file(env: Env, image: Path) -> None:
    disk = Runner(env, f"sync:{image}")
    os.truncate(image, 512)
    assert disk.run(Request(READ, 0, 1024, [memoryview(bytearray(1024))])) == [errno.EIO]
    disk.close()


def test_the_path_is_all_there_is(env: Env, image: Path) -> None:
    with pytest.raises(ChainError, match="sync: unknown option 'direct'; options of sync: it has none"):
        Runner(env, f"sync:direct,{image}")
