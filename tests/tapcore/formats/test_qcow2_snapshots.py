"""Internal snapshots: taken, applied and deleted, here and by qemu-img in turns, and cut off by a crash."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from qcow2_images import assert_clean, content, qemu, scribble, snapshot_contents
from recording import Journal, RecordingFile

from tapcore.driver import Env
from tapcore.errors import ImageError, UsageError
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.snapshots import (
    apply_snapshot,
    create_snapshot,
    delete_snapshot,
    list_snapshots,
)

SIZE = 300 * 1024
OPTIONS = [{}, {"cluster_bits": 9, "refcount_bits": 64}, {"cluster_bits": 12, "version": 2},
           {"cluster_bits": 10, "refcount_bits": 4},
           {"cluster_bits": 14, "extended_l2": True}]


def create_there(path: Path, name: str) -> None:
    qemu("qemu-img", "snapshot", "-c", name, path)


def apply_there(path: Path, name: str) -> None:
    qemu("qemu-img", "snapshot", "-a", name, path)


def delete_there(path: Path, name: str) -> None:
    qemu("qemu-img", "snapshot", "-d", name, path)


@pytest.mark.parametrize("options", OPTIONS)
def test_either_side_takes_applies_and_deletes_what_the_other_made(
    env: Env, tmp_path: Path, options: dict[str, int]
) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, **options)  # type: ignore[arg-type]
    rng = random.Random(str(options))
    disk, taken = bytes(SIZE), dict[str, bytes]()
    for step in range(14):
        here = rng.random() < 0.6
        what = rng.choice(("create", "create", "apply", "delete")) if taken else "create"
        name = rng.choice(sorted(taken)) if taken else ""
        if what == "create":
            disk = scribble(env, path, rng)
            name = f"step {step}"
            taken[name] = disk
            create_snapshot(str(path), name) if here else create_there(path, name)
            if rng.random() < 0.5:
                disk = scribble(env, path, rng)
        elif what == "apply":
            disk = taken[name]
            apply_snapshot(str(path), name) if here else apply_there(path, name)
        else:
            del taken[name]
            delete_snapshot(str(path), name) if here else delete_there(path, name)
        assert_clean(path)
        assert content(env, path) == disk
        assert snapshot_contents(env, path) == taken
    for name, held in taken.items():
        out = tmp_path / "out.raw"
        qemu("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", path, out)
        assert out.read_bytes() == held


def test_the_list_is_the_one_that_qemu_prints(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE)
    assert list_snapshots(str(path)) == []
    made = create_snapshot(str(path), "öne")
    create_there(path, "two")
    info = json.loads(qemu("qemu-img", "info", "--output=json", path))["snapshots"]
    found = list_snapshots(str(path))
    assert [(entry["id"], entry["name"], entry["date-sec"], entry["date-nsec"]) for entry in info] == [
        (snapshot.id, snapshot.name, snapshot.date_s, snapshot.date_ns) for snapshot in found]
    assert found[0] == made and found[1].id == "2" and found[1].disk_bytes == SIZE


def test_a_snapshot_of_another_size_gives_the_disk_its_size_again(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, cluster_bits=9)
    disk = scribble(env, path, random.Random(1), 40)
    create_snapshot(str(path), "small")
    qemu("qemu-img", "resize", path, str(4 * SIZE))
    scribble(env, path, random.Random(2), 40)
    create_snapshot(str(path), "large")
    apply_snapshot(str(path), "small")
    assert content(env, path) == disk
    assert_clean(path)
    apply_there(path, "large")
    assert len(content(env, path)) == 4 * SIZE
    assert_clean(path)


def test_names_that_cannot_be_are_refused_and_nothing_is_changed(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE)
    create_snapshot(str(path), "2")
    create_snapshot(str(path), "two")
    before = path.read_bytes()
    for name in ("", "x" * 256, "two", "2", "1"):
        with pytest.raises(UsageError):
            create_snapshot(str(path), name)
    for action in (apply_snapshot, delete_snapshot):
        with pytest.raises(UsageError, match=r"there are: 1 \(2\), 2 \(two\)"):
            action(str(path), "three")
        with pytest.raises(UsageError, match="2 snapshots"):
            action(str(path), "2")
    assert path.read_bytes() == before


def test_refcounts_of_one_bit_cannot_be_shared(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, refcount_bits=1)
    disk = scribble(env, path, random.Random(3))
    with pytest.raises(ImageError, match="refcount of 1 bits"):
        create_snapshot(str(path), "one")
    assert content(env, path) == disk and list_snapshots(str(path)) == []
    assert_clean(path)


def test_an_image_with_bitmaps_keeps_them_until_the_disk_changes(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE)
    disk = scribble(env, path, random.Random(4))
    create_snapshot(str(path), "one")
    qemu("qemu-img", "bitmap", "--add", path, "b0")
    create_snapshot(str(path), "two")
    delete_snapshot(str(path), "one")
    assert "b0" in qemu("qemu-img", "info", path)
    assert_clean(path)
    apply_snapshot(str(path), "two")
    assert "b0" not in qemu("qemu-img", "info", path)
    assert content(env, path) == disk
    assert_clean(path)


def test_compressed_clusters_are_shared_too(env: Env, tmp_path: Path) -> None:
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(b"".join(random.Random(at).randbytes(100) * 40 for at in range(SIZE // 4000 + 1))[:SIZE])
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
    create_snapshot(str(path), "one")
    assert_clean(path)
    scribble(env, path, random.Random(5), 30)
    assert_clean(path)
    assert snapshot_contents(env, path) == {"one": raw.read_bytes()}
    apply_snapshot(str(path), "one")
    delete_snapshot(str(path), "one")
    assert content(env, path) == raw.read_bytes()
    assert_clean(path)


ACTIONS: dict[str, Callable[[str], object]] = {
    "create": lambda path: create_snapshot(path, "new"), "apply": lambda path: apply_snapshot(path, "one"),
    "delete": lambda path: delete_snapshot(path, "two")}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_crash_leaves_the_image_before_or_the_image_after(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    path, after, crashed = tmp_path / "a.qcow2", tmp_path / "after.qcow2", tmp_path / "crashed.qcow2"
    create(str(path), SIZE, cluster_bits=9)
    rng = random.Random(6)
    for name in ("one", "two"):
        scribble(env, path, rng, 30)
        create_snapshot(str(path), name)
    scribble(env, path, rng, 30)
    shutil.copyfile(path, after)
    before = path.read_bytes()
    RecordingFile.journal = journal = Journal()
    with monkeypatch.context() as patch:
        patch.setattr("tapcore.formats.qcow2.header.ImageFile", RecordingFile)
        ACTIONS[action](str(after))
    allowed = [(content(env, image), snapshot_contents(env, image)) for image in (path, after)]
    assert_clean(after)
    seen = set()
    for cut in range(len(journal.entries) + 1):
        for seed in (None, 1, 2):
            rng_of_crash = None if seed is None else random.Random(cut * 10 + seed)
            crashed.write_bytes(journal.crash(before, cut, rng_of_crash))
            report = check(str(crashed))
            assert (report.errors, report.leaks) == (0, 0), (cut, seed, report.messages)
            seen.add(allowed.index((content(env, crashed), snapshot_contents(env, crashed))))
    assert seen == {0, 1}
