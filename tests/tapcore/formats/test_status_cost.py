"""A block status over many tables, none of them cached, looks at each entry a few times, however many tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tapcore.driver import OpenFlag
from tapcore.formats.qcow.mapping import Mapping as QcowMapping
from tapcore.formats.qcow2.mapping import Mapping as Qcow2Mapping
from tapcore.formats.vmdk.mapping import Mapping as VmdkMapping
from tapcore.img.cli import main
from tapcore.img.convert import count_data
from tapcore.img.session import Session
from tapcore.img.walk import Walk


@pytest.mark.parametrize(("name", "mapping", "option", "unit_bytes", "size_bytes"), [
    ("qcow2", Qcow2Mapping, "cluster_size=512", 512, 4 << 20),
    ("qcow", QcowMapping, "cluster_size=512", 512, 4 << 20),
    ("vmdk", VmdkMapping, "grain_size=4K", 4096, 32 << 20)])
def test_entries_are_looked_at_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mapping: Any, option: str, unit_bytes: int,
    size_bytes: int,
) -> None:
    (tmp_path / "disk").write_bytes(b"\1" * size_bytes)
    path = str(tmp_path / "image")
    assert main(["convert", "-O", name, "-o", option, str(tmp_path / "disk"), path]) == 0
    looks = 0
    table = mapping.table

    def count(self: Any, index: int) -> Any:
        nonlocal looks
        looks += 1
        return table(self, index)

    monkeypatch.setattr(mapping, "table", count)
    with Session() as session:
        chain = session.open(f"{name}:{path}", OpenFlag.RDONLY)
        assert count_data(session, Walk(session, chain.head, path)) == size_bytes
    assert 0 < looks <= 3 * size_bytes // unit_bytes
