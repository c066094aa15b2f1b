"""rebase: what the disk shows does not change, whatever it lies on afterwards, also when it is cut off."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from overlays import SIZE, Cut, CutOff, Disk, base, overlay, scribble, shows

from tapcore.driver import Env
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create
from tapcore.formats.tools import Backing
from tapcore.img import layers
from tapcore.img.locate import file_image
from tapcore.img.progress import Progress
from tapcore.img.session import Session


@pytest.mark.parametrize(("old", "new"), [
    (SIZE, SIZE), (SIZE // 2, SIZE), (SIZE, SIZE // 2), (SIZE // 2, 2 * SIZE), (0, SIZE), (SIZE, 0)])
@pytest.mark.parametrize("version", ["2", "3"])
def test_rebase(env: Env, tmp_path: Path, old: int, new: int, version: str) -> None:
    """From a backing to another, shorter and longer than the image; from none, and to none."""
    rng = Random(f"{old}{new}{version}")
    if old:
        top = overlay(env, base(env, tmp_path, "old", "raw", rng, old), "top", rng, version=version)
    else:
        create(str(tmp_path / "top"), SIZE, cluster_bits=12, version=int(version))
        top = scribble(env, Disk(tmp_path / "top", "qcow2", bytes(SIZE)), rng)
    target = base(env, tmp_path, "new", "qcow2", rng, new) if new else None
    with Session() as session:
        done = layers.rebase(session, top.image, Backing("new", "qcow2") if new else None,
                             target and target.image, Progress())
    assert done.backing == ("new" if new else None) and done.copied_bytes > 0
    assert shows(env, top) == top.content
    (tmp_path / "old").unlink(missing_ok=True)
    assert shows(env, top) == top.content
    assert check(str(top.path)).errors == 0
    assert target is None or shows(env, target) == target.content


def test_a_rebase_onto_the_same_content_copies_nothing(env: Env, tmp_path: Path) -> None:
    rng = Random(1)
    under = base(env, tmp_path, "old", "raw", rng)
    top = overlay(env, under, "top", rng)
    (tmp_path / "new").write_bytes(under.content)
    with Session() as session:
        done = layers.rebase(session, top.image, Backing("new", "aio"), file_image(str(tmp_path / "new"), "aio"),
                             Progress())
    assert done.copied_bytes == 0 and shows(env, top) == top.content


@pytest.mark.parametrize(("kind", "base_kind", "target_kind"), [
    ("qcow", "raw", "qcow2"), ("vhd", "vhd", "raw"), ("vhd", "raw", "vhd"), ("vmdk", "vmdk", "vmdk")])
def test_rebase_of_the_other_formats(
    env: Env, tmp_path: Path, kind: str, base_kind: str, target_kind: str
) -> None:
    rng = Random(kind)
    top = overlay(env, base(env, tmp_path, "old", base_kind, rng), "top", rng, kind=kind)
    target = base(env, tmp_path, "new", target_kind, rng)
    with Session() as session:
        layers.rebase(session, top.image, Backing("new", target.driver), target.image, Progress())
    (tmp_path / "old").unlink()
    assert shows(env, top) == top.content
    assert not top.image.tools.check(str(top.path)).errors


@pytest.mark.parametrize("at", [0, 2, 6])
def test_a_rebase_that_is_cut_off_changes_nothing(env: Env, tmp_path: Path, at: int) -> None:
    rng = Random(at)
    top = overlay(env, base(env, tmp_path, "old", "raw", rng), "top", rng)
    target = base(env, tmp_path, "new", "raw", rng)
    with pytest.raises(Cut), Session() as session:
        layers.rebase(session, top.image, Backing("new", "aio"), target.image, CutOff(at))
    target.path.unlink()
    assert shows(env, top) == top.content
