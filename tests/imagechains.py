"""Chains of images for tests, and QEMU's opinion of them."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

from contract.runner import Runner

from tapcore.driver import Env
from tapcore.formats.tools import Backing, find_tools

QEMU_NAMES = {"aio": "raw", "vhd": "vpc"}


def make_chain(env: Env, folder: Path, kinds: list[str], size: int) -> tuple[list[Path], bytes]:
    """Images of the given drivers (the bottom first), each with a part of the disk of its own; their paths and the
    disk's content."""
    rng = random.Random(repr(kinds))
    content = bytearray(size)
    paths: list[Path] = []
    for number, kind in enumerate(kinds):
        path = folder / f"{number}.{kind}"
        backing = Backing(paths[-1].name, kinds[number - 1]) if paths else None
        find_tools(kind).create(str(path), size, backing=backing)
        runner = Runner(env, f"{kind}:{path}")
        for _ in range(6):
            offset = rng.randrange(size // 4096) * 4096
            data = rng.randbytes(min(rng.choice((4096, 65536, 200 * 1024)), size - offset))
            assert runner.write(offset, data) == 0
            content[offset : offset + len(data)] = data
        runner.close()
        paths.append(path)
    return paths, bytes(content)


def qemu_name(kind: str) -> str:
    return QEMU_NAMES.get(kind, kind)


def qemu(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_chain(path: Path, kind: str) -> list[str]:
    """The names of the files of a chain, the top first, as qemu-img sees it."""
    text = qemu("qemu-img", "info", "--backing-chain", "--output=json", "-f", qemu_name(kind), str(path))
    return [Path(image["filename"]).name for image in json.loads(text)]


def qemu_agrees(path: Path, kind: str, disk: bytes) -> None:
    """QEMU finds the image whole, and the disk as it should be."""
    if kind in ("qcow2", "vmdk"):
        assert "No errors were found" in qemu("qemu-img", "check", "-f", qemu_name(kind), str(path))
    raw = path.parent / "expected.raw"
    raw.write_bytes(disk)
    qemu("qemu-img", "compare", "-f", qemu_name(kind), "-F", "raw", str(path), str(raw))
    raw.unlink()
