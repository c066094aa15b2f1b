"""Every tool for qcow2 images, here and QEMU's, in any order; after each step QEMU finds nothing wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from qcow2_images import assert_clean, content, qemu, scribble, snapshot_contents

from tapcore.driver import Env
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.layout import FEATURES, INCOMPATIBLE_AT
from tapcore.formats.qcow2.resize import resize
from tapcore.formats.qcow2.snapshots import apply_snapshot, create_snapshot, delete_snapshot

SIZE = 100 * 1024 + 512
STEPS = ("write", "write there", "snapshot", "apply", "delete", "resize", "repair")


class Image:
    """One image, what its disk holds, and what it held at each snapshot."""

    def __init__(self, env: Env, path: Path, disk: bytes, rng: random.Random) -> None:
        self.env = env
        self.path = path
        self.disk = disk
        self.taken: dict[str, bytes] = {}
        self.rng = rng

    def step(self, number: int) -> None:
        rng, path = self.rng, str(self.path)
        here = rng.random() < 0.6
        name = rng.choice(sorted(self.taken)) if self.taken else ""
        what = rng.choice(STEPS)
        if what == "write":
            self.disk = scribble(self.env, self.path, rng)
        elif what == "write there":
            offset = rng.randrange(len(self.disk) // 512) * 512
            length = min(rng.choice((512, 8192, 35840)), len(self.disk) - offset)
            qemu("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {offset} {length}", path)
            self.disk = self.disk[:offset] + b"\7" * length + self.disk[offset + length :]
        elif what == "snapshot":
            name = f"step {number}"
            create_snapshot(path, name) if here else qemu("qemu-img", "snapshot", "-c", name, path)
            self.taken[name] = self.disk
        elif what == "apply" and name:
            apply_snapshot(path, name) if here else qemu("qemu-img", "snapshot", "-a", name, path)
            self.disk = self.taken[name]
        elif what == "delete" and name:
            delete_snapshot(path, name) if here else qemu("qemu-img", "snapshot", "-d", name, path)
            del self.taken[name]
        elif what == "resize":
            size = min(1 << 20, rng.choice((512, len(self.disk) // 1024 * 512 + 512, 3 * len(self.disk))))
            resize(path, size, shrink=True)
            self.disk = self.disk[:size].ljust(size, b"\0")
        elif what == "repair":
            self.mark(rng.choice((1, 2, 3)))
            assert check(path, repair=True).errors == 0

    def mark(self, bits: int) -> None:
        """As dirty, as corrupt, or as both."""
        with self.path.open("r+b") as file:
            file.seek(INCOMPATIBLE_AT)
            former = FEATURES.unpack(file.read(FEATURES.size))["bits"]
            file.seek(INCOMPATIBLE_AT)
            file.write(FEATURES.pack(bits=former | bits))


@pytest.mark.parametrize("options", [
    {"cluster_bits": 9}, {"cluster_bits": 10, "refcount_bits": 64}, {"cluster_bits": 16, "refcount_bits": 8},
    {"cluster_bits": 14, "extended_l2": True}])
@pytest.mark.parametrize("is_overlay", [False, True])
def test_tools_in_any_order(env: Env, tmp_path: Path, options: dict[str, int], is_overlay: bool) -> None:
    rng, path = random.Random(f"{options} {is_overlay}"), tmp_path / "a.qcow2"
    disk = bytes(SIZE)
    if is_overlay:
        (tmp_path / "base.raw").write_bytes(base := rng.randbytes(300 * 512))
        disk = base[:SIZE]
        create(str(path), SIZE, backing="base.raw", backing_format="raw", **options)  # type: ignore[arg-type]
    else:
        create(str(path), SIZE, **options)  # type: ignore[arg-type]
    image = Image(env, path, disk, rng)
    for number in range(10):
        image.step(number)
        assert_clean(path)
        assert content(env, path) == image.disk
        assert snapshot_contents(env, path) == image.taken
