"""Figures for people."""

from __future__ import annotations


def size_text(size_bytes: float) -> str:
    """Bytes with a unit that fits: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1023.95:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g} PiB"
