"""qcow images in which anything may be wrong."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner
from formats_fuzz import Change, Template, bounded_memory, changes, damaged, refuses_or_works, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import need

from tapcore.driver import Env
from tapcore.formats.qcow.create import create
from tapcore.formats.qcow.layout import HEADER
from tapcore.formats.tools import Backing, find_tools
from tapcore.loop import Loop
from tapcore.workers import Workers

SIZE = 96 * 1024
TOOLS = find_tools("qcow")


def plain(env: Env, path: Path) -> None:
    create(str(path), SIZE, backing=None)
    written(env, path)


def overlay(env: Env, path: Path) -> None:
    (path.parent / "base.raw").write_bytes(b"b" * 51200)
    create(str(path), SIZE, backing=Backing("base.raw", "aio"), cluster_bits=9)
    written(env, path)


def compressed(env: Env, path: Path) -> None:
    need("qemu-img")
    raw = path.parent / "a.raw"
    raw.write_bytes(b"".join(bytes([at]) * 3000 + random.Random(at).randbytes(1096) for at in range(SIZE // 4096)))
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow", str(raw), str(path)], timeout=60)  # says 1 always
    raw.unlink()


def written(env: Env, path: Path) -> None:
    runner = Runner(env, f"qcow:{path}")
    rng = random.Random(1)
    for at in range(0, SIZE, 6144):
        assert runner.write(at, rng.randbytes(1500)) == 0
        assert runner.discard(at + 4096, 2048) == 0
    runner.close()


KINDS: dict[str, Callable[[Env, Path], None]] = {make.__name__: make for make in (plain, overlay, compressed)}


@cache
def template(kind: str) -> Template:
    with TemporaryDirectory() as name:
        loop = Loop()
        env = Env(loop, Workers(loop, 2))
        path = Path(name) / "a.qcow"
        KINDS[kind](env, path)
        env.workers.close()
        loop.close()
        others = {other.name: other.read_bytes() for other in Path(name).iterdir() if other != path}
        data = path.read_bytes()
    l1 = HEADER.unpack(data)["l1_table_offset"]
    l2 = int.from_bytes(data[l1 : l1 + 8], "big")
    return Template(kind, data, HEADER, [l1, *range(l2, l2 + 8 * 24, 8)], [l1, l2], others)


ACTIONS: dict[str, Callable[[str], object]] = {
    "repair": lambda path: TOOLS.check(path, repair=True),
    "backing": lambda path: TOOLS.set_backing(path, Backing("base.raw", "aio")),
    "no backing": lambda path: TOOLS.set_backing(path, None),
    "nothing": lambda path: None,
}


def endure(env: Env, template: Template, wrong: list[Change], action: str) -> None:
    with TemporaryDirectory(dir="/dev/shm") as name, bounded_memory():
        path = Path(name) / "a.qcow"
        damaged(template, wrong, path)
        for look in (TOOLS.check, TOOLS.describe):
            refuses_or_works(path, lambda look=look: look(str(path)), reads_only=True)  # type: ignore[misc]
        refuses_or_works(path, lambda: ACTIONS[action](str(path)))
        use(env, "qcow", path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), action=st.sampled_from(sorted(ACTIONS)))
def test_nothing_in_an_image_does_worse_than_an_error(
    env: Env, data: st.DataObject, kind: str, action: str
) -> None:
    endure(env, template(kind), data.draw(changes(template(kind))), action)


@pytest.mark.parametrize("kind", ["plain", "overlay"])
def test_every_byte_of_a_header(env: Env, kind: str) -> None:
    for at in range(48 if kind == "plain" else 80):
        for flip in (0x80, 0xFF, 1):
            endure(env, template(kind), [("byte", at, template(kind).data[at] ^ flip)], "nothing")
