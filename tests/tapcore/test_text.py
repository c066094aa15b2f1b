"""Figures for people."""

from __future__ import annotations

import pytest

from tapcore.text import size_text


@pytest.mark.parametrize(("size_bytes", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4096, "4 KiB"), ((1 << 20) - 1, "1 MiB"),
    (626 << 20, "626 MiB"), (1536 << 20, "1.5 GiB"), (6 << 40, "6 TiB"), (3 << 50, "3 PiB"),
])
def test_sizes(size_bytes: int, text: str) -> None:
    assert size_text(size_bytes) == text
