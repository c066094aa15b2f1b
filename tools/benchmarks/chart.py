"""The ratios of a run as an SVG bar chart: one bar a row, on a logarithmic scale, with a line at 1.

Specification: https://www.w3.org/TR/SVG2/
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from tools.benchmarks.outcome import Outcome

LINE: Final = 22
NAMES: Final = 330
BARS: Final = 440
VALUES: Final = 60
AHEAD, BEHIND = "#2b7a5b", "#b5502f"
MAX_DECADES: Final = 2.0
"""A ratio beyond a hundred is drawn as one of a hundred."""


def write(path: Path, outcomes: list[Outcome]) -> None:
    """Rows without a ratio are left out."""
    rows = [(outcome.row, ratio) for outcome in outcomes if (ratio := outcome.ratio())]
    decades = [max(-MAX_DECADES, min(math.log10(ratio), MAX_DECADES)) for _, ratio in rows]
    low, high = min([*decades, -0.3]), max([*decades, 0.3])
    scale = BARS / (high - low)
    one = NAMES - low * scale
    height = LINE * (len(rows) + 2)
    style = f'viewBox="0 0 {NAMES + BARS + VALUES} {height}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {style}>',
             '<rect width="100%" height="100%" fill="white"/>']
    for number, ((name, ratio), decade) in enumerate(zip(rows, decades, strict=True)):
        top = LINE * number + 6
        left, width = one + min(decade, 0) * scale, abs(decade) * scale
        colour = AHEAD if ratio >= 1 else BEHIND
        parts += [
            f'<text x="{NAMES - 8}" y="{top + 12}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{LINE - 6}" fill="{colour}"/>',
            f'<text x="{max(left + width, one) + 4:.1f}" y="{top + 12}">{ratio:.2f}</text>']
    bottom = LINE * len(rows) + 6
    parts += [f'<line x1="{one:.1f}" x2="{one:.1f}" y1="0" y2="{bottom}" stroke="black"/>',
              f'<text x="{one:.1f}" y="{bottom + 16}" text-anchor="middle">1: level with the best peer</text>',
              "</svg>"]
    path.write_text("\n".join(parts) + "\n")
