"""commit: what the disk shows does not change, also when it is cut off anywhere; and depths."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from contract.runner import Runner
from overlays import SIZE, Cut, CutOff, base, overlay, shows

from tapcore.driver import Env, OpenFlag
from tapcore.errors import UsageError, WritelogError
from tapcore.formats.qcow2.create import create
from tapcore.formats.tools import Backing
from tapcore.img import layers
from tapcore.img.progress import Progress
from tapcore.img.session import Session, Task
from tapcore.request import STATUS, Request


@pytest.mark.parametrize(("top_kind", "kind", "base_bytes"), [
    ("qcow2", "raw", SIZE), ("qcow2", "raw", SIZE // 2 + 512), ("qcow2", "raw", 2 * SIZE),
    ("qcow2", "qcow2", SIZE // 2), ("qcow2", "qcow2", 2 * SIZE), ("qcow2", "vhd", SIZE // 2),
    ("qcow2", "vmdk", SIZE), ("vhd", "vhd", SIZE), ("vhd", "raw", SIZE), ("vmdk", "vmdk", SIZE),
    ("qcow", "raw", SIZE // 2), ("qcow", "qcow", SIZE)])
def test_commit(
    env: Env, tmp_path: Path, caplog: pytest.LogCaptureFixture, top_kind: str, kind: str, base_bytes: int
) -> None:
    rng = Random(f"{kind}{base_bytes}")
    under = base(env, tmp_path, "base", kind, rng, base_bytes)
    top = overlay(env, under, "top", rng, kind=top_kind)
    caplog.clear()
    with Session() as session:
        done = layers.commit(session, top.image, Progress())
    assert done.backing == str(under.path)
    want = top.content + under.content[SIZE:]
    assert shows(env, under) == want and shows(env, top) == top.content
    for disk in (under, top):
        assert not disk.image.tools.check(str(disk.path)).errors
    assert not caplog.records


@pytest.mark.parametrize("at", [0, 1, 4, 8])
def test_a_commit_that_is_cut_off_leaves_a_right_overlay(env: Env, tmp_path: Path, at: int) -> None:
    rng = Random(at)
    under = base(env, tmp_path, "base", "qcow2", rng)
    middle = overlay(env, under, "middle", rng)
    top = overlay(env, middle, "top", rng)
    with pytest.raises(Cut), Session() as session:
        layers.commit(session, top.image, CutOff(at))
    assert shows(env, top) == top.content
    with Session() as session:
        layers.commit(session, top.image, Progress())
    assert shows(env, middle) == shows(env, top) == top.content
    assert shows(env, under) == under.content


def test_what_makes_no_sense_is_refused(env: Env, tmp_path: Path) -> None:
    rng = Random(1)
    under = base(env, tmp_path, "base", "qcow2", rng)
    top = overlay(env, under, "top", rng)
    with Session() as session, pytest.raises(UsageError, match="no backing file"):
        layers.commit(session, under.image, Progress())
    with Session() as session, pytest.raises(WritelogError, match=r"loop|in use"):
        layers.rebase(session, under.image, Backing("top", "qcow2"), top.image, Progress())
    assert shows(env, top) == top.content


def test_the_depth_of_each_part_is_known(env: Env, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"\1" * 65536)
    create(str(tmp_path / "middle"), 131072, backing="base", backing_format="raw")
    create(str(tmp_path / "top"), 196608, backing="middle", backing_format="qcow2")
    runner = Runner(env, f"qcow2:{tmp_path}/middle")
    assert runner.write(65536, b"\2" * 65536) == 0
    runner.close()
    with Session() as session:
        chain = session.open(f"qcow2:{tmp_path}/top", OpenFlag.RDONLY)
        images = layers.mark_depths(chain)
        assert [image.path for image in images] == [f"{tmp_path}/{name}" for name in ("top", "middle", "base")]
        found: list[tuple[int, int]] = []

        def task() -> Task:
            request = Request(STATUS, 0, 196608)
            yield [(chain.head, request)]
            found.extend(request.extents)

        session.run([task()])
    depths = [(length, state >> layers.DEPTH_SHIFT) for length, state in found]
    assert depths == [(65536, 2), (65536, 1), (65536, 0)]
