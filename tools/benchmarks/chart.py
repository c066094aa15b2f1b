"""The ratios of a run as an SVG bar chart: one bar a row, on a logarithmic scale, with a line at 1; and curves.

Specification: https://www.w3.org/TR/SVG2/
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


WIDTH, HEIGHT, MARGIN = 560, 320, 60
COLOURS: Final = (AHEAD, BEHIND, "#35608f", "#7a5b2b")


def write_curves(path: Path, title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Each with a name and (x, y) points, all above zero; both axes are logarithmic, and marked at the points."""
    points = [point for curve in curves.values() for point in curve]
    across = _axis([x for x, _ in points], MARGIN, WIDTH - 160)
    up = _axis([y for _, y in points] + [min(y for _, y in points) / 2], HEIGHT - MARGIN, MARGIN)
    style = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {style}>',
             '<rect width="100%" height="100%" fill="white"/>',
             f'<text x="{MARGIN}" y="24" font-size="14">{escape(title)}</text>']
    parts += [f'<text x="{across(x):.1f}" y="{HEIGHT - MARGIN + 20}" text-anchor="middle">{x:g}</text>'
              for x in sorted({x for x, _ in points})]
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<text x="{across(x):.1f}" y="{up(y) - 6:.1f}" text-anchor="middle" fill="{colour}">'
                  f'{y:,.4g}</text>' for x, y in curve]
        x, y = curve[-1]
        parts.append(f'<text x="{across(x) + 26:.1f}" y="{up(y) + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _axis(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """From a value to its place between `first` and `last`."""
    low, high = math.log(min(values)), math.log(max(values))
    return lambda value: first + (last - first) * ((math.log(value) - low) / (high - low) if high > low else 0.5)
