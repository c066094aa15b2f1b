"""The disk made longer and shorter, beside qemu-img, and cut off by a crash."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from qcow2_images import assert_clean, content, qemu, scribble, snapshot_contents
from recording import Journal, RecordingFile

from tapcore.driver import Env
from tapcore.drivers.qcow2 import Qcow2
from tapcore.errors import ImageError, UsageError
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.resize import resize
from tapcore.formats.qcow2.snapshots import apply_snapshot, create_snapshot

SIZE = 100 * 1024 + 512


@pytest.mark.parametrize("options", [
    {}, {"cluster_bits": 9, "refcount_bits": 64}, {"cluster_bits": 12, "version": 2},
    {"cluster_bits": 14, "extended_l2": True}])
@pytest.mark.parametrize("backing_bytes", [0, 3 * SIZE // 512 * 512])
def test_any_sequence_of_sizes(
    env: Env, tmp_path: Path, options: dict[str, int], backing_bytes: int
) -> None:
    path = tmp_path / "a.qcow2"
    base = random.Random(1).randbytes(backing_bytes)
    (tmp_path / "base.raw").write_bytes(base)
    named = {"backing": "base.raw", "backing_format": "raw"} if base else {}
    create(str(path), SIZE, **named, **options)  # type: ignore[arg-type]
    rng = random.Random(str(options))
    for _ in range(8):
        disk = scribble(env, path, rng)
        size = rng.choice((512, len(disk) // 1024 * 512 + 512, len(disk) + 512, SIZE, 2 * SIZE, 7 * SIZE))
        if rng.random() < 0.3:
            qemu("qemu-img", "resize", "-q", "--shrink", path, str(size))
        else:
            resize(str(path), size, shrink=True)
        assert content(env, path) == disk[:size].ljust(size, b"\0")
        assert json.loads(qemu("qemu-img", "info", "--output=json", path))["virtual-size"] == size
        assert_clean(path)


def test_a_smaller_size_must_be_asked_for_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="--shrink"):
        resize(str(path), SIZE - 512)
    for size in (-512, 1000, 1 << 60):
        with pytest.raises(UsageError):
            resize(str(path), size, shrink=True)
    resize(str(path), SIZE)
    assert path.read_bytes() == before


def test_the_space_behind_a_smaller_disk_is_given_back(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), 8 << 20)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 8M", path)
    resize(str(path), 1 << 20, shrink=True)
    assert path.stat().st_blocks * 512 < 2 << 20
    assert content(env, path) == b"\7" * (1 << 20)
    assert_clean(path)


def test_snapshots_keep_what_is_cut_off(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, cluster_bits=9)
    disk = scribble(env, path, random.Random(2), 40)
    create_snapshot(str(path), "one")
    resize(str(path), 20480, shrink=True)
    resize(str(path), 3 * SIZE)
    assert content(env, path) == disk[:20480].ljust(3 * SIZE, b"\0")
    assert snapshot_contents(env, path) == {"one": disk}
    assert_clean(path)
    apply_snapshot(str(path), "one")
    assert content(env, path) == disk


def test_version_2_with_snapshots_is_refused(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), SIZE, version=2)
    create_snapshot(str(path), "one")
    with pytest.raises(ImageError, match="version 2"):
        resize(str(path), 2 * SIZE)


@pytest.mark.parametrize(("size", "backing_bytes"), [(20480, 0), (40 * SIZE, 0), (3 * SIZE, 2 * SIZE)])
def test_a_crash_leaves_the_disk_before_or_the_disk_after(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, backing_bytes: int
) -> None:
    path, crashed = tmp_path / "a.qcow2", tmp_path / "crashed.qcow2"
    (tmp_path / "base.raw").write_bytes(b"b" * backing_bytes)
    named = {"backing": "base.raw", "backing_format": "raw"} if backing_bytes else {}
    create(str(path), SIZE, cluster_bits=10, **named)  # type: ignore[arg-type]
    disk = scribble(env, path, random.Random(3), 20)
    before = path.read_bytes()
    RecordingFile.journal = journal = Journal()
    with monkeypatch.context() as patch:
        patch.setattr("tapcore.formats.qcow2.header.ImageFile", RecordingFile)
        patch.setattr(Qcow2, "file_kind", RecordingFile)
        resize(str(path), size, shrink=True)
    assert_clean(path)
    allowed = [disk, disk[:size].ljust(size, b"\0")]
    assert content(env, path) == allowed[1]
    seen = set()
    for cut in range(len(journal.entries) + 1):
        for seed in (None, cut):
            crashed.write_bytes(journal.crash(before, cut, None if seed is None else random.Random(seed)))
            report = check(str(crashed))
            assert report.errors == 0, report.messages
            seen.add(allowed.index(content(env, crashed)))
    assert seen == {0, 1}
