"""Curves of hit rate over cache size as one SVG: panels beside each other, a colour a policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_COLOURS = ("#1f6feb", "#d1242f", "#57606a", "#1a7f37")
_PANEL, _GAP, _TOP, _LEFT = 220, 32, 64, 48


class Curve(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]  # (cache size as a share, hit rate), ascending


class Panel(NamedTuple):
    name: str
    curves: Sequence[Curve]


def svg(title: str, panels: Sequence[Panel]) -> str:
    """Cache sizes on a logarithmic axis, hit rates from 0 to 1."""
    shares = [share for panel in panels for curve in panel.curves for share, _ in curve.points]
    smallest, largest = min(shares), max(shares)
    width = _LEFT + len(panels) * (_PANEL + _GAP)
    marks = [_text(width / 2, 20, title)]
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    for number, name in enumerate(names):
        colour = _COLOURS[number % len(_COLOURS)]
        x = width / 2 + 110 * (number - (len(names) - 1) / 2)
        marks.append(f'<circle cx="{x - 40}" cy="36" r="4" fill="{colour}"/>')
        marks.append(_text(x, 40, name))
    for number, panel in enumerate(panels):
        left = _LEFT + number * (_PANEL + _GAP)

        def at(share: float, rate: float, left: float = left) -> tuple[float, float]:
            along = math.log(share / smallest) / (math.log(largest / smallest) or 1)
            return round(left + along * _PANEL, 1), round(_TOP + (1 - rate) * _PANEL, 1)

        marks.append(_text(left + _PANEL / 2, _TOP - 4, panel.name))
        for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
            (x, y), (end, _) = at(smallest, rate), at(largest, rate)
            marks.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#ddd"/>')
            if not number:
                marks.append(_text(x - 6, y + 4, f"{rate:.0%}", anchor="end"))
        for share in sorted({share for curve in panel.curves for share, _ in curve.points}):
            x, y = at(share, 0.0)
            marks.append(_text(x, y + 16, f"{share:.0%}"))
        for curve in panel.curves:
            colour = _COLOURS[names.index(curve.name) % len(_COLOURS)]
            line = " ".join(f"{x},{y}" for x, y in (at(*point) for point in curve.points))
            marks.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
    height = _TOP + _PANEL + 40
    marks.append(_text(width / 2, height - 6, "cache size, of all that was asked for"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" fill="#333">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(marks)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
